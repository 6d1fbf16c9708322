"""The command line ``resnet-fast``.

Each command has its own file. This one has what they share: the application, ``main``, and the display of errors. It
imports typer and rich; each command imports anything heavier that it needs.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from resnet_fast.cli import (  # isort: skip
    bench, classify, convert, demo, info, models, predict, roofline, serve, train, tune, validate,
)  # fmt: skip
from resnet_fast.cli.common import Stopped, UserError, interrupt, one_line, stoppable, stopped_status

_CLICK_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""typer's base class of wrong arguments, which moves between modules from release to release."""


class _OneLineErrors(TyperGroup):
    """Show every error as one line on stderr and exit non-zero; only --debug shows the traceback."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        given = list(sys.argv[1:] if args is None else args)
        debug = os.environ.get("RESNET_FAST_DEBUG", "0") not in ("", "0")
        options = given[: given.index("--")] if "--" in given else given
        if "--debug" in options:  # at any position, so that it can be appended to a failed command
            given.remove("--debug")
            debug = True
        status = 2 if not given else 0
        try:
            returned = super().main(given or ["--help"], standalone_mode=False, **extra)
            status = returned if isinstance(returned, int) and returned else status
        except Stopped as error:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed again it must not show a traceback
            status = error.status if error.message is None else _report(error.message, error.status, debug)
        except UserError as error:
            status = _report(str(error), 1, debug)
        except _CLICK_ERROR as error:
            said = error.format_message().replace(": Value error, ", ": ", 1)  # as some releases of typer begin
            status = _report(said, 2, debug)
        except MemoryError as error:
            status = _report(f"out of memory: {one_line(error)}", 1, debug)
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)"
            status = _report(text, 70, debug)
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        with stoppable():
            return super().invoke(ctx)


def _report(message: str, status: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"resnet-fast: {one_line(message)}", file=sys.stderr)
    return status


app = typer.Typer(
    name="resnet-fast",
    cls=_OneLineErrors,
    help="ResNets as fused kernels: classify images, train, time this machine, show what is used and why.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import resnet_fast

        typer.echo(f"resnet-fast {resnet_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also RESNET_FAST_DEBUG=1).")
    ] = False,
) -> None:
    pass


for command in (
    classify.classify, predict.predict, serve.serve, validate.validate, convert.convert, bench.bench,
    roofline.roofline, tune.tune, models.models, info.info, demo.demo,
):  # fmt: skip
    app.command()(command)
app.add_typer(train.app, name="train")


def main() -> None:
    """Run the console script."""
    warnings.formatwarning = lambda message, *_rest, **_more: f"resnet-fast: note: {one_line(message)}\n"
    handle_signals()
    try:
        app(prog_name="resnet-fast")
    except KeyboardInterrupt as error:  # before the command began
        raise SystemExit(stopped_status(type(error))) from None


def handle_signals() -> None:
    """Let Ctrl-C and SIGTERM end this process as ``stoppable`` describes; children leave them to their parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for background jobs
            signal.signal(number, interrupt)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_signals_to_the_parent)


def _leave_signals_to_the_parent() -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the parent ends processes that read images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _report_unless_cut_off


def _report_unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report as Python does, except connections that the parent closes as it stops (from multiprocessing's thread)."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
