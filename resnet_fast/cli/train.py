"""``resnet-fast train``: list the kinds of training; each is a command in its own file."""

from __future__ import annotations

import typer

from resnet_fast.cli import train_imagenet, train_residual

app = typer.Typer(
    help="Train a network: a ResNet on folders of images, or the small residual network on digits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command("imagenet")(train_imagenet.imagenet)
app.command("residual")(train_residual.residual)
