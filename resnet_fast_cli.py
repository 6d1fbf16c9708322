"""The console script ``resnet-fast``. That it is imported tells resnet_fast to import torch only when it is needed.

It lies beside the package because an import of anything in resnet_fast runs ``resnet_fast/__init__.py`` first.
"""


def main() -> None:
    """The entry point."""
    try:
        from resnet_fast.cli import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()
