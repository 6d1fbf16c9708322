"""``resnet-fast info``: show what is installed, found and used, and why not something faster."""

from __future__ import annotations

import typer

from resnet_fast.cli.common import JsonTarget, check_results, write_json


def info(json_target: JsonTarget = None) -> None:
    """Show what is installed, found and used on this machine, and why not something faster."""
    check_results(json_target, None)
    import resnet_fast

    found = resnet_fast.info()
    if json_target is not None:
        write_json(found.as_dict(), json_target)
    if json_target != "-":
        typer.echo(str(found))
