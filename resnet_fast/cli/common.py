"""Share what several commands need: errors for users, argument checks, consoles, progress bars. Imports no torch."""

from __future__ import annotations

import contextlib
import enum
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


class UserError(Exception):
    """An error the user can correct; the message is one line that says what was given and what would be right."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a command; the message, if any, says what was kept and how to continue."""

    def __init__(self, message: str | None, status: int) -> None:
        super().__init__(message)
        self.message, self.status = message, status


_say_if_stopped: list[Callable[[], str | None]] = []
_outputs: dict[Path, int | None] = {}
"""Output files of the running command, with each one's modification time before; None if it did not exist."""


def if_stopped(say: Callable[[], str | None]) -> None:
    """Register ``say``, which returns the line shown if Ctrl-C or SIGTERM ends this command; None for no line."""
    _say_if_stopped[:] = [say]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn a KeyboardInterrupt inside the block into Stopped, with the line last registered by ``if_stopped``."""
    _outputs.clear()
    if_stopped(_stopped)
    _pending.clear()
    try:
        yield
        check_interrupted()
    except BaseException as error:
        # An interrupted import may end with an error of its own instead of the KeyboardInterrupt.
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
    """Raised by SIGTERM, which ends a command as Ctrl-C does but with another exit status."""


def stopped_status(kind: type[BaseException]) -> int:
    """Return the exit status of a process ended by Ctrl-C or SIGTERM."""
    return 143 if issubclass(kind, Terminated) else 130


_pending: list[type[KeyboardInterrupt]] = []
"""The exception that a signal raised, until it has ended the command."""


def interrupt(number: int, frame: object) -> None:
    """Handle SIGINT and SIGTERM."""
    _pending[:] = [Terminated if number == signal.SIGTERM else KeyboardInterrupt]
    raise _pending[0]


def check_interrupted() -> None:
    """Raise a pending interrupt again if other code swallowed it, as imports of torch and numpy sometimes do."""
    if _pending:
        raise _pending[0]


def training_stopped(checkpoint: Path, resume: bool) -> str:
    """Return the line for a stopped training: where its checkpoint is, if there is one."""
    if not checkpoint.is_file():
        return f"stopped before the first checkpoint, {checkpoint}, was written; the same command starts again"
    return f"stopped; the same command{'' if resume else ' with --resume'} continues from {checkpoint}"


class Device(str, enum.Enum):
    """Where to compute."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"

    @property
    def found(self) -> str:
        """The device's name: auto is a CUDA GPU if there is one.

        Raises:
            UserError: for cuda without a GPU.
        """
        import torch

        if self is Device.cuda and not torch.cuda.is_available():
            raise UserError("--device is cuda, and torch sees no CUDA GPU here; use cpu")
        return "cuda" if self is not Device.cpu and torch.cuda.is_available() else "cpu"


class OnError(str, enum.Enum):
    """What to do about a damaged image."""

    skip = "skip"
    stop = "stop"


class Precision(str, enum.Enum):
    """Number formats to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.value)
        return found


Arch = Annotated[str, typer.Option("--arch", "-a", metavar="NAME", help="Model name, e.g. resnet50.")]
DeviceName = Annotated[Device, typer.Option("--device", help="auto: a CUDA GPU if there is one.")]
Dtype = Annotated[Precision, typer.Option("--dtype", help="Precision of the computation.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Number of CPU threads (default: torch's choice).")
]
AnyArch = Annotated[
    str | None,
    typer.Option(
        "--arch", "-a", metavar="NAME", help="Model name (default: the one that the weights name, or resnet50)."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME|PATH",
        help="Published weights by name, or a .pth or .safetensors file (default: the best published ones).",
    ),
]
Prototxt = Annotated[
    Path | None, typer.Option("--prototxt", metavar="FILE", help="A Caffe network's deploy definition instead.")
]
Caffemodel = Annotated[
    Path | None, typer.Option("--caffemodel", metavar="FILE", help="The weights that belong to --prototxt.")
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="FILE|B,G,R",
        help="Mean of a Caffe network's images: a .binaryproto file, or three numbers for blue, green and red "
        "(default: the published ResNets').",
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--scale",
        metavar="X",
        help="Factor for a Caffe network's images after subtracting the mean (default: its definition's, or 1).",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", metavar="FILE", help="Names of the classes, one per line, as in synset_words.txt."),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, max=4096, help="Height and width to crop to (default: the weights')."),
]
ResizeSize = Annotated[
    int | None,
    typer.Option("--resize-size", min=1, max=4096, help="Shorter side before cropping (default: the weights')."),
]
TopK = Annotated[int, typer.Option("--topk", "-k", min=1, help="Number of classes to show per image.")]
JsonTarget = Annotated[
    str | None, typer.Option("--json", metavar="PATH|-", help="Write the result as JSON; - prints it instead.")
]


def printable(text: str) -> str:
    """Return ``text`` with control characters, and bytes of file names that are not UTF-8, written as escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def one_line(text: object, limit: int = 600) -> str:
    """Return ``text`` without line breaks, printable, and cut to ``limit`` characters."""
    line = printable(" ".join(str(text).split())) or type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def check_arch(arch: str) -> str:
    """Return ``arch`` if it is one of the ten; raise a UserError that lists them otherwise."""
    from resnet_fast.inference import classifier

    with as_user_errors(classifier.ClassifierError):
        classifier.check_choice(arch)
    return arch


def set_threads(threads: int | None) -> int:
    """Set torch's number of threads if ``threads`` is given, and return the number in use."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def check_output(path: Path | None) -> None:
    """Raise UserError now if a file could not be written to ``path`` later."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    _outputs[path] = _written(path)


def check_results(json_target: str | None, plot_path: Path | None) -> None:
    """Raise UserError now if the JSON, unless it goes to stdout, or the plot could not be written later."""
    check_output(None if json_target in (None, "-") else Path(str(json_target)))
    check_output(plot_path)
    if plot_path is not None:
        from resnet_fast.benchmarking import plot

        with as_user_errors(plot.PlotError):
            plot.check(plot_path)


@contextlib.contextmanager
def as_user_errors(*kinds: type[BaseException]) -> Iterator[None]:
    """Turn errors of ``kinds`` into a UserError with the same message."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def err_console() -> Console:
    """Return the console for stderr: everything but the command's answer."""
    return Console(stderr=True, highlight=False)


def out_console() -> Console:
    """Return the console for stdout, the command's answer; 120 columns wide if that is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """Return an empty table whose first columns are texts, and whose last ones numbers."""
    empty = Table(title=title, title_justify="left", header_style="bold")
    for heading in (*left, *right):
        empty.add_column(heading, justify="left" if heading in left else "right")
    return empty


def warn_if_disturbed(console: Console, busy: float | None) -> None:
    """Print a warning if other processes kept so many cores busy that times mean little; None for not known."""
    from resnet_fast.benchmarking.machine import DISTURBED

    if busy is not None and busy > DISTURBED:
        console.print(
            f"[yellow]Other processes kept {busy:.2f} cores busy meanwhile: do not trust these times.[/]",
            soft_wrap=True,
        )


class _Clock(ProgressColumn):
    """The time since the bar appeared. rich's TimeElapsedColumn stops when a stage reaches 100 %."""

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(task.get_time() - task.fields["began"]))), style="progress.elapsed")


@contextlib.contextmanager
def progress_bar(total: float | None = 1.0, *, lines: Console | None = None) -> Iterator[Callable[[str, float], None]]:
    """Show a bar that disappears when done, and yield a function of the current stage and the part of it done (0 to 1).

    The bar has the time since it appeared and the time left in the stage; a part that falls begins another stage. It
    is on stderr, and only on a terminal.

    Args:
        total: None shows a bar without a percentage, for work of unknown length.
        lines: the console that lines are printed to meanwhile. If it is a terminal the bar is shown there, since only
            rich's own console can print above a bar.
    """
    console = lines if lines is not None and lines.is_terminal else err_console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        _Clock(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("starting", total=total, began=bar.get_time())
        done = 0.0

        def show(stage: str, fraction: float) -> None:
            nonlocal done
            check_interrupted()
            if fraction < done:
                bar.reset(task)  # the speed of the stage before says nothing about this one
            done = fraction
            bar.update(task, description=stage, completed=fraction)

        yield show


def write_json(data: Any, target: str) -> None:
    """Write ``data`` as JSON to stdout if ``target`` is ``-``, otherwise to that file, whole or not at all."""
    from resnet_fast.benchmarking import results

    if target == "-":
        typer.echo(results.dumps(data), nl=False)
        return
    with as_user_errors(OSError):
        results.write(target, data)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a plot and say so on stderr."""
    from resnet_fast.benchmarking import plot

    with as_user_errors(plot.PlotError, OSError):
        plot.save(figure, path)
    err_console().print(f"plot written to {escape(str(path))}")
