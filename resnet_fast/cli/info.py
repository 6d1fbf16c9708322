"""``resnet-fast info``: show what is installed, found and used, and why not something faster."""

from __future__ import annotations

from typing import Annotated

import typer

from resnet_fast.cli.common import write_json


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")] = False,
) -> None:
    """Show what is installed, found and used on this machine, and why not something faster."""
    import resnet_fast

    found = resnet_fast.info()
    if as_json:
        write_json(found.as_dict(), "-")
    else:
        typer.echo(str(found))
