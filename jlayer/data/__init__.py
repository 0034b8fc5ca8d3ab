"""What ships with the package: the checkpoint that the demo runs."""
