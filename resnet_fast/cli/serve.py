"""``resnet-fast serve``: answer images over HTTP with their labels, and show a page to drop one on."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from resnet_fast.cli.common import (
    AnyArch,
    Caffemodel,
    Device,
    DeviceName,
    Dtype,
    ImageSize,
    Labels,
    Mean,
    Precision,
    Prototxt,
    ResizeSize,
    Scale,
    Threads,
    UserError,
    Weights,
    as_user_errors,
    err_console,
    if_stopped,
    one_line,
    progress_bar,
)

_PACKAGES = ("starlette", "uvicorn", "h11", "python_multipart", "prometheus_client")


def serve(
    arch: AnyArch = None,
    weights: Weights = None,
    prototxt: Prototxt = None,
    caffemodel: Caffemodel = None,
    mean: Mean = None,
    scale: Scale = None,
    labels: Labels = None,
    image_size: ImageSize = None,
    resize_size: ResizeSize = None,
    dtype: Dtype = Precision.float32,
    device: DeviceName = Device.auto,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for every interface of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 for a free one, which is printed.")
    ] = 8000,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=1024, help="Most images of one forward.")
    ] = 4,
    batch_timeout_ms: Annotated[
        float,
        typer.Option("--batch-timeout-ms", min=0, max=10_000, help="How long an image may wait for others to join it."),
    ] = 2.0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, max=100_000, help="Images in the server; further ones get 429.")
    ] = 64,
    max_bytes: Annotated[
        int, typer.Option("--max-bytes", min=1, max=2**30, help="Largest request; larger ones get 413.")
    ] = 16 * 2**20,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, max=150_000_000, help="Largest image; larger ones get 413.")
    ] = 50_000_000,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=256, help="Forwards at the same time, which share the weights.")
    ] = 1,
    threads: Threads = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Write a line to stderr for each request.")] = False,
) -> None:
    """Classify images over HTTP; images that wait at the same time are computed together.

    The address shows a page to drop an image on. POST /predict answers programs: curl -F image=@cat.jpg URL/predict.

    /health, /metrics (Prometheus) and /info tell the server's state. Ctrl-C and SIGTERM answer what has begun, then
    stop.

    Each of the --workers uses --threads threads; by default they share the cores.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'resnet_fast[serve]'")
    if_stopped(lambda: "stopped")
    from resnet_fast import inference
    from resnet_fast.inference import serve as server

    with as_user_errors(OSError):
        listening = server.listen(host, port)
    with listening:
        limits = server.Limits(
            batch_size=batch_size, batch_timeout=batch_timeout_ms / 1000, queue=queue, max_bytes=max_bytes,
            max_pixels=max_pixels, workers=workers, threads=threads or 0,
        )  # fmt: skip
        with as_user_errors(inference.ClassifierError):
            with progress_bar(None) as progress:
                progress("loading the network", 0)
                classifier = inference.load(
                    arch, weights, prototxt=prototxt, caffemodel=caffemodel, mean=mean, scale=scale, labels=labels,
                    image_size=image_size, resize_size=resize_size, dtype=dtype.dtype, device=device.found,
                )  # fmt: skip
            for note in classifier.notes:
                typer.echo(f"resnet-fast: note: {note}", err=True)

            def ready(url: str) -> None:
                typer.echo(f"serving {one_line(classifier.name)}, {one_line(classifier.source)}, {dtype.value}: {url}")
                if_stopped(lambda: "stopped; what had begun was answered")
                err_console().print("Ctrl-C stops.")

            server.serve(classifier, listening, limits, access_log=access_log, ready=ready)
