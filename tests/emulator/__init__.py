"""Runs the hand-written CUDA kernels on the CPU; docs/testing.md says what that shows and what it does not."""
