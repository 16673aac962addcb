"""Networks that the experiment and the benchmark train: LeNet and ResNets with any norm."""
