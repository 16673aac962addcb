"""Small experiments with batch normalization on real images."""
