"""What several commands need: the error a user sees, argument checks, consoles, progress bars. Imports no torch."""

from __future__ import annotations

import contextlib
import enum
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


def one_line(text: object, limit: int = 600) -> str:
    """``text`` without line breaks, cut where it gets too long to read."""
    line = " ".join(str(text).split()) or type(text).__name__
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
