"""``python -m resnet_fast``: the same as the console script ``resnet-fast``."""

from resnet_fast.cli import main

main()
