"""What several commands need: the error a user sees, argument checks, consoles, progress bars. Imports no torch."""

from __future__ import annotations

import contextlib
import enum
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """Something the user can put right; the message is one line that says what was given and what would be right."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a command; the message, if there is one, says what is kept and how to go on."""

    def __init__(self, message: str | None, status: int) -> None:
        super().__init__(message)
        self.message, self.status = message, status


_say_if_stopped: list[Callable[[], str | None]] = []
_outputs: dict[Path, int | None] = {}
"""The files that this command is to write, and when each was written before; None: it did not exist."""


def if_stopped(say: Callable[[], str | None]) -> None:
    """From here on ``say`` gives the line that the user reads if Ctrl-C or SIGTERM ends this command; None: no line."""
    _say_if_stopped[:] = [say]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Runs a command: a KeyboardInterrupt becomes a Stopped with the line that the command has last given."""
    _outputs.clear()
    if_stopped(_stopped)
    _pending.clear()
    try:
        yield
        check_interrupted()
    except BaseException as error:
        # An import that is interrupted may also end with an error of its own.
        kind = _pending[0] if _pending else type(error)
        if not issubclass(kind, KeyboardInterrupt):
            raise
        _pending.clear()
        raise Stopped(_say_if_stopped[-1](), stopped_status(kind)) from error


def _stopped() -> str:
    written = {str(path): _written(path) != before for path, before in _outputs.items()}
    kept = [name for name, done in written.items() if done]
    missing = [name for name, done in written.items() if not done]
    were = "were" if len(missing) > 1 else "was"
    first = f"stopped before {' and '.join(missing)} {were} written" if missing else "stopped"
    return "; ".join([first, *(f"{name} was written" for name in kept), "the same command starts again"])


def _written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does, with another exit status."""


def stopped_status(kind: type[BaseException]) -> int:
    """The exit status of a process that Ctrl-C, or SIGTERM, has ended."""
    return 143 if issubclass(kind, Terminated) else 130


_pending: list[type[KeyboardInterrupt]] = []
"""What a signal has raised, until it has ended the command."""


def interrupt(number: int, frame: object) -> None:
    """The handler of SIGINT and SIGTERM."""
    _pending[:] = [Terminated if number == signal.SIGTERM else KeyboardInterrupt]
    raise _pending[0]


def check_interrupted() -> None:
    """Raises once more what was lost in code that drops exceptions, as imports of torch and numpy do in places."""
    if _pending:
        raise _pending[0]


def training_stopped(checkpoint: Path, resume: bool) -> str:
    """The line for a training that was stopped: where its checkpoint is, if it has one."""
    if not checkpoint.is_file():
        return f"stopped before the first checkpoint, {checkpoint}, was written; the same command starts again"
    return f"stopped; the same command{'' if resume else ' with --resume'} goes on from {checkpoint}"


class Precision(str, enum.Enum):
    """Number formats to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.value)
        return found


Arch = Annotated[str, typer.Option("--arch", "-a", metavar="NAME", help="One of the ten ResNets, as resnet50.")]
Dtype = Annotated[Precision, typer.Option("--dtype", help="Number format to compute in.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Threads to compute with; by default torch's choice.")
]


def printable(text: str) -> str:
    """``text`` with escapes for what no terminal should get: control characters, bytes of a name that is no UTF-8."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def one_line(text: object, limit: int = 600) -> str:
    """``text`` without line breaks, printable, cut where it gets too long to read."""
    line = printable(" ".join(str(text).split())) or type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def check_arch(arch: str) -> str:
    """``arch``, if it is one of the ten; otherwise a UserError that lists them."""
    from resnet_fast import models

    known = models.list_models()
    if arch not in known:
        raise UserError(f"unknown arch {arch!r}; there are {', '.join(known)}")
    return arch


def set_threads(threads: int | None) -> int:
    """Makes torch compute with ``threads`` threads, and returns how many it does compute with."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def check_output(path: Path | None) -> None:
    """Fails now if a file could not be written to ``path`` later."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    _outputs[path] = _written(path)


@contextlib.contextmanager
def as_user_errors(*kinds: type[BaseException]) -> Iterator[None]:
    """Turns errors of ``kinds`` into a UserError with the same message."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def err_console() -> Console:
    """Where everything that is not the answer goes."""
    return Console(stderr=True, highlight=False)


def out_console() -> Console:
    """Where the answer goes; wide enough for tables where nobody is watching."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


@contextlib.contextmanager
def progress_bar(total: float | None = 1.0) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, gone when done; the function it gives takes what is being done and how much of it is done."""
    console = err_console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("starting", total=total)

        def show(stage: str, fraction: float) -> None:
            check_interrupted()
            bar.update(task, description=stage, completed=fraction)

        yield show


def write_json(data: Any, target: str) -> None:
    """``data`` as JSON to stdout for ``-``, otherwise to the file ``target``, whole or not at all."""
    from resnet_fast.benchmarking import results

    if target == "-":
        typer.echo(results.dumps(data), nl=False)
        return
    with as_user_errors(OSError):
        results.write(target, data)
