"""Training: checkpoints, metrics, data and loops. What the command line asks for and prints is in `resnet_fast.cli`."""
