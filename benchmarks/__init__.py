"""Scripts that measure: whole models into result files, single ops with pytest-benchmark, and the report made of both.

The harness they use is ``resnet_fast.benchmarking``. This folder is not installed.
"""
