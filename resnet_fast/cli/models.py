"""``resnet-fast models``: list the models with what is published of their weights."""

from __future__ import annotations

from dataclasses import asdict

import typer

from resnet_fast.cli.common import JsonTarget, check_results, write_json


def models(json_target: JsonTarget = None) -> None:
    """List the models and their published weights: parameters, operations, accuracy."""
    from resnet_fast import list_models

    check_results(json_target, None)
    found = list_models()
    if json_target is not None:
        write_json([asdict(row) for row in found.table], json_target)
    if json_target != "-":
        typer.echo(str(found))
