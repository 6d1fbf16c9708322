"""The measuring harness behind ``resnet-fast bench``, ``resnet-fast demo`` and the scripts in benchmarks/.

``machine`` says where, ``peers`` who, ``gate`` whether the answer is right, ``timing`` how long, ``contention`` beside
whom, ``compare`` does it all, ``results`` and ``plot`` write it down. It is not part of the inference path: of what
runs there only ``resnet_fast.info()`` imports anything of it, ``machine``.
"""
