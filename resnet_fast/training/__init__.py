"""Train: checkpoints, metrics, data and loops. Options and printing are in `resnet_fast.cli`."""
