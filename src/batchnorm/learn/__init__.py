"""Batch norm told step by step, with real numbers: `walkthrough.walkthrough` and its terminal."""
