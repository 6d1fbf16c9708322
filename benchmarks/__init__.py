"""Scripts that measure: whole models into result files, single ops, training steps, and the report made of them.

The harness they use is ``resnet_fast.benchmarking``. This folder is not installed.
"""
