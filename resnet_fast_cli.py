"""The console script ``resnet-fast``. If it is imported, resnet_fast imports torch only when needed.

It is outside the package because importing anything in resnet_fast runs ``resnet_fast/__init__.py`` first.
"""


def main() -> None:
    """Run the command line."""
    try:
        from resnet_fast.cli import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()
