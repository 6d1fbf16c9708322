"""Serve a classifier over HTTP: requests that wait at the same time become one batch.

starlette and uvicorn speak HTTP, prometheus-client counts, Pillow decodes. What is here joins them: the batches, and
the limits without which one client could take the memory, the time or the connections of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
import torch
import uvicorn
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, exposition
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from resnet_fast.inference.classifier import Classifier
from resnet_fast.models.images import ImageTooLargeError, read_image

__all__ = ["FORMATS", "Batcher", "Limits", "application", "listen", "serve"]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
"""Formats that are decoded, by Pillow's names: those of cameras and browsers. Strangers reach no other decoder."""

_PAGE = Path(__file__).parent / "page"
_HEAD_SECONDS = 10.0
"""Longest time that a connection may be open without a request: idle, or with half of one's head sent."""
_BUSY_SECONDS = 300.0
"""Longest time for one request in all. Only a client that does not read its answer takes as long."""
_LINGER_SECONDS, _LINGER_BYTES = 5.0, 2**26
"""How long, and for how much, the body of a refused request is still read and thrown away, so that the client, which
sends before it reads, sees the answer rather than a broken connection."""
_GRACE_SECONDS = 30
"""How long requests that have begun may take to end after Ctrl-C or SIGTERM."""
_CLIENT_GONE = 499
"""nginx's code for a client that left before its answer, for the metrics."""
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}

_log = logging.getLogger("uvicorn.error")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        batch_size: most images of one forward.
        batch_timeout: seconds that an image may wait for others to share its forward.
        queue: most images that are decoded, wait or are computed; further requests get 429.
        max_bytes: largest body of a request; all bodies in memory together have at most 16 times as many.
        max_pixels: largest image, width times height, which is refused by its header.
        read_timeout: seconds that a client may take to send a body.
        workers: forwards that run at the same time.
        threads: CPU threads of each forward; 0 shares the cores among the workers.
    """

    batch_size: int = 4
    batch_timeout: float = 0.002
    queue: int = 64
    max_bytes: int = 16 * 2**20
    max_pixels: int = 50_000_000
    read_timeout: float = 20.0
    workers: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            may_be_zero = name in ("batch_timeout", "threads")
            if value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"{name} must be {'at least' if may_be_zero else 'above'} 0, got {value}")

    @property
    def max_buffered(self) -> int:
        """Bytes of all bodies in memory together."""
        return 16 * self.max_bytes

    @property
    def max_connections(self) -> int:
        """Connections at the same time; uvicorn answers 503 on further ones."""
        return self.queue + 256


class Batcher:
    """Compute images that arrive one by one in batches: as many as wait when a forward can begin.

    Args:
        compute: takes [N, ...], returns N rows; runs in a thread of its own.
        size: most images of a batch.
        timeout: seconds that an image may wait for others. While the model is busy images wait anyway, so 0 makes
            batches too if there is enough to do.
        workers: batches that are computed at the same time.
        threads: torch's number of CPU threads in each.
        observe: called with the size of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        *,
        size: int,
        timeout: float,
        workers: int = 1,
        threads: int = 1,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._compute, self._size, self._timeout, self._observe = compute, size, timeout, observe
        self._workers = workers
        self.threads = ThreadPoolExecutor(workers, "forward", initializer=torch.set_num_threads, initargs=(threads,))
        self._waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[Tensor]]] = asyncio.Queue()
        self._collecting = asyncio.Lock()

    async def __call__(self, image: Tensor) -> Tensor:
        """Return the row that `compute` gives for this image; raise what it raises for the batch.

        An image of which the caller is cancelled before its batch begins is not computed.
        """
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((image, answer))
        return await answer

    @contextlib.asynccontextmanager
    async def running(self, failed: Callable[[BaseException], object]) -> AsyncIterator[None]:
        """Compute while the context lasts; `failed` is called if a worker ends, which is an error in this class."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                failed(task.exception() or RuntimeError("a worker ended"))

        tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.threads.shutdown(wait=False, cancel_futures=True)

    def _forward(self, images: list[Tensor]) -> Tensor:
        return self._compute(torch.stack(images))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self._collecting:  # so that two workers that are free make one batch, not two halves
                batch = await self._collect()
            batch = [(image, answer) for image, answer in batch if not answer.done()]
            if not batch:
                continue
            self._observe(len(batch))
            try:
                rows = await loop.run_in_executor(self.threads, self._forward, [image for image, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for (_, answer), row in zip(batch, rows, strict=True):
                    if not answer.done():
                        answer.set_result(row)

    async def _collect(self) -> list[tuple[Tensor, asyncio.Future[Tensor]]]:
        batch = [await self._waiting.get()]
        with anyio.move_on_after(self._timeout):
            while len(batch) < self._size:
                batch.append(self._waiting.get_nowait() if self._waiting.qsize() else await self._waiting.get())
        return batch


class _Metrics:
    """What /metrics shows, in Prometheus's text format."""

    def __init__(self, limits: Limits, queue_length: Callable[[], float], buffered: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        sizes = [2**power for power in range(limits.batch_size.bit_length()) if 2**power < limits.batch_size]
        self.requests = Counter(
            "resnet_fast_requests", "Requests by path and status.", ("path", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "resnet_fast_request_seconds", "Time to answer /predict with 200.", registry=self._registry
        )
        self.batch_size = Histogram(
            "resnet_fast_batch_size",
            "Images in a forward.",
            buckets=(*sizes, limits.batch_size),
            registry=self._registry,
        )
        for name, text, value in (
            ("resnet_fast_queue_length", "Images that are decoded, wait or are computed.", queue_length),
            ("resnet_fast_body_bytes", "Bytes of bodies in memory.", buffered),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def response(self) -> Response:
        return Response(exposition.generate_latest(self._registry), media_type=exposition.CONTENT_TYPE_LATEST)


class _Service:
    """A classifier with what its requests share: threads, counts, metrics."""

    def __init__(self, classifier: Classifier, limits: Limits) -> None:
        cores = os.cpu_count() or 1
        self.classifier, self.limits = classifier, limits
        self.metrics = _Metrics(limits, lambda: self.queue, lambda: self.buffered)
        self.batcher = Batcher(
            classifier.predict,
            size=limits.batch_size,
            timeout=limits.batch_timeout,
            workers=limits.workers,
            threads=limits.threads or max(1, cores // limits.workers),
            observe=self.metrics.batch_size.observe,
        )
        # Few, since each may hold an image of max_pixels; one thread each, since the cores belong to the forwards.
        self._decoders = ThreadPoolExecutor(min(4, cores), "decode", initializer=torch.set_num_threads, initargs=(1,))
        self._model = {
            "model": classifier.name,
            "weights": Path(classifier.source).name,  # strangers need not know the folder
            "dtype": str(classifier.dtype).removeprefix("torch."),
        }
        self.queue = self.buffered = 0
        self.status = "loading"
        self.failed: BaseException | None = None

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """Answer while the context lasts."""
        async with self.batcher.running(self._fail):
            if self.status == "loading":
                await asyncio.wrap_future(self.batcher.threads.submit(self.warm_up))
            try:
                yield
            finally:
                self.status = "stopping"
                self._decoders.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Decode an image, run a forward of it, and one of a whole batch to see that there is memory; then be ready."""
        file = io.BytesIO()
        Image.new("RGB", (2, 2)).save(file, "PNG")
        image = self._decode(file.getvalue())
        for images in sorted({1, self.limits.batch_size}):
            self.classifier.predict(image.expand(images, -1, -1, -1))
        self.status = "ready"

    def _fail(self, error: BaseException) -> None:
        self.failed, self.status = error, "failed"
        _log.error("a worker of the batches ended", exc_info=error)

    # ------------------------------------------------------------------------------------------------------ endpoints

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict: an image as the body, or as the file of a form."""
        began = time.perf_counter()
        topk = _topk(request)
        kind = _kind(request.headers)
        self._check_room()
        held = _Held(self)
        try:
            content = await self._read(request, held)
            if kind == "multipart/form-data":
                content = await _file_of_form(request.headers, content)
            if not content:
                raise HTTPException(400, "the request holds no image")
            self._check_room()
            self.queue += 1
            try:
                work = self._classify(content, held)
                del content  # so that it is gone once it is decoded
                row = await _unless_gone(request, work)
            finally:
                self.queue -= 1
        finally:
            held.release()
        [labels] = self.classifier.top(row[None], topk)
        seconds = time.perf_counter() - began
        self.metrics.seconds.observe(seconds)
        return JSONResponse(
            {
                **self._model,
                "predictions": [asdict(label) for label in labels],
                "milliseconds": round(1000 * seconds, 1),
            }
        )

    async def health(self, request: Request) -> Response:
        """Answer GET /health: 200 if images can be classified now."""
        return JSONResponse({"status": self.status}, 200 if self.status == "ready" else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Answer GET /metrics."""
        return self.metrics.response()

    async def info(self, request: Request) -> Response:
        """Answer GET /info: the model, and the limits of requests."""
        from resnet_fast import __version__

        return JSONResponse(
            {
                **self._model,
                "classes": len(self.classifier.labels),
                "image_size": self.classifier.size,
                "formats": list(FORMATS),
                "limits": asdict(self.limits),
                "version": __version__,
            }
        )

    # ---------------------------------------------------------------------------------------------------------- steps

    def _check_room(self) -> None:
        if self.status != "ready":
            raise HTTPException(503, f"the server is {self.status}", {"retry-after": "1"})
        if self.queue >= self.limits.queue:
            raise HTTPException(429, f"{self.queue} images wait already; try again later", {"retry-after": "1"})

    async def _read(self, request: Request, held: _Held) -> bytes:
        """Return the body, of which never more than the limits is in memory."""
        too_large = HTTPException(413, f"the request has more than {self.limits.max_bytes:,} bytes")
        if (_number(request.headers.get("content-length", "0")) or 0) > self.limits.max_bytes:
            raise too_large
        content = bytearray()  # not a list of chunks, which may be of one byte each
        try:
            with anyio.fail_after(self.limits.read_timeout):
                async for chunk in request.stream():
                    held.add(len(chunk))
                    if held.bytes > self.limits.max_bytes:
                        raise too_large
                    if self.buffered > self.limits.max_buffered:
                        raise HTTPException(503, "too many large requests at once", {"retry-after": "1"})
                    content += chunk
        except TimeoutError:
            raise HTTPException(408, f"the body took longer than {self.limits.read_timeout:g} s to arrive") from None
        request.state.body_read = True
        return bytes(content)

    async def _classify(self, content: bytes, held: _Held) -> Tensor:
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self._decoders, self._decode, content)
        except ImageTooLargeError as error:
            raise HTTPException(413, f"the image has more than {self.limits.max_pixels:,} pixels") from error
        except ValueError as error:
            raise HTTPException(400, str(error).removeprefix("image: ")) from error
        except MemoryError:
            raise HTTPException(503, "out of memory", {"retry-after": "1"}) from None
        del content
        held.release()
        return await self.batcher(image)

    def _decode(self, content: bytes) -> Tensor:
        image = read_image(io.BytesIO(content), max_pixels=self.limits.max_pixels, formats=FORMATS)
        return self.classifier.prepare(image)


class _Held:
    """The bytes of one body in memory, as part of the sum over all requests."""

    def __init__(self, service: _Service) -> None:
        self._service = service
        self.bytes = 0

    def add(self, count: int) -> None:
        self.bytes += count
        self._service.buffered += count

    def release(self) -> None:
        self._service.buffered -= self.bytes
        self.bytes = 0


def _topk(request: Request) -> int:
    unknown = [name for name in request.query_params if name != "topk"]
    if unknown:
        raise HTTPException(400, f"unknown parameter {unknown[0][:40]!r}; there is topk")
    given = request.query_params.getlist("topk") or ["5"]
    topk = _number(given[0]) if len(given) == 1 else None
    if not topk:
        raise HTTPException(400, f"topk is {', '.join(given)[:40]!r}; a number of classes, at least 1, was expected")
    return topk


def _number(text: str) -> int | None:
    """Return the number that the decimal digits mean; None for any other text, and for more than 18 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _kind(headers: Headers) -> str:
    """Return the body's media type, in lower case; "" if the request names none."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Content-Encoding is not supported; send the image as it is")
    if kind not in ("", "application/octet-stream", "multipart/form-data") and not kind.startswith("image/"):
        raise HTTPException(
            415,
            f"Content-Type {kind[:60]!r} is not supported; send an image as image/*, application/octet-stream or "
            "the file of a multipart/form-data form (curl -F image=@FILE)",
        )
    return kind


async def _file_of_form(headers: Headers, body: bytes) -> bytes:
    """Return the content of a form's only file."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(headers, chunks(), max_files=1, max_fields=16)
    parser.spool_max_size = len(body)  # in memory, where the body is anyway
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise HTTPException(400, "the form has no file; one image was expected")
    content = await files[0].read()
    await form.close()
    return content


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of `work`; cancel it and raise ClientDisconnect if the client closes the connection first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


# ----------------------------------------------------------------------------------------------------------------- ASGI


class _Observed:
    """Middleware that counts requests by status, and adds the headers of every answer."""

    def __init__(self, app: ASGIApp, service: _Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_GONE

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except ClientDisconnect:  # nobody is there to be answered
            pass
        except Exception:
            status = 500
            raise
        finally:
            # Other paths share one label, or strangers could make as many as they like.
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, status).inc()


class _Refusal(JSONResponse):
    """An error as one line of JSON, after which the rest of a body that nobody wants is read and thrown away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        left = _LINGER_BYTES
        with anyio.move_on_after(_LINGER_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(request: Request, error: Exception) -> Response:
    """Turn an HTTPException into one line of JSON; anything else into 500, of which the traceback is logged."""
    if not isinstance(error, HTTPException):
        error = HTTPException(500, "internal error")
    body = {"error": " ".join(error.detail.split())}
    headers = dict(error.headers or {})
    if request.method in ("GET", "HEAD") or getattr(request.state, "body_read", False):
        return JSONResponse(body, error.status_code, headers)
    headers["connection"] = "close"
    return (JSONResponse if error.status_code == 408 else _Refusal)(body, error.status_code, headers)


def application(classifier: Classifier, limits: Limits | None = None) -> Starlette:
    """Return the ASGI application, for `serve` or any other server.

    Limits on connections and on the time for a request's head are the server's; all others are kept here.

    Args:
        classifier: as from `resnet_fast.inference.load`; several threads call it at the same time.
        limits: None for the defaults.
    """
    return _application(_Service(classifier, limits or Limits()))


def _application(service: _Service) -> Starlette:
    async def page(request: Request) -> Response:
        return FileResponse(_PAGE / "index.html")

    routes = [
        Route("/", page),
        Route("/predict", service.predict, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.show_metrics),
        Route("/info", service.info),
    ]
    paths = frozenset(route.path for route in routes)
    return Starlette(
        routes=[*routes, Mount("/static", StaticFiles(directory=_PAGE))],
        middleware=[Middleware(_Observed, service=service, paths=paths)],
        exception_handlers={HTTPException: _refuse, Exception: _refuse},
        lifespan=service.running,
    )


# --------------------------------------------------------------------------------------------------------------- server


class _Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit on the time between a connection, or its last answer, and the next request.

    uvicorn limits only the time without a single byte, and only after the first answer.
    """

    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self.loop.call_later(_HEAD_SECONDS, self._check)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _check(self) -> None:
        if self.transport.is_closing():
            return
        busy = self.cycle is not None and not self.cycle.response_complete
        left = self._since + (_BUSY_SECONDS if busy else _HEAD_SECONDS) - self.loop.time()
        if left <= 0:
            self.transport.abort()
            return
        self.loop.call_later(min(left, _HEAD_SECONDS), self._check)


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Return a listening socket; port 0 is a free one.

    Raises:
        OSError: in one line, if the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error


def serve(
    classifier: Classifier,
    sock: socket.socket,
    limits: Limits | None = None,
    *,
    access_log: bool = False,
    ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; requests that have begun by then are answered, for at most 30 seconds.

    The signal is raised again at the end, so that the process ends as signals end it.

    Args:
        classifier: as from `resnet_fast.inference.load`.
        sock: as from `listen`.
        access_log: write one line to stderr for each request.
        ready: called with the server's URL once it answers.

    Raises:
        RuntimeError: if the part that computes failed; the reason has been logged.
    """
    service = _Service(classifier, limits or Limits())
    service.batcher.threads.submit(service.warm_up).result()  # before uvicorn, which would hide an error
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _server(service, access_log=access_log, ready=lambda: ready(url)).run([sock])
    if service.failed is not None:
        raise RuntimeError("the part of the server that computes failed") from service.failed


def _server(service: _Service, *, access_log: bool, ready: Callable[[], object]) -> uvicorn.Server:
    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    async def stop_if_failed() -> None:
        server.should_exit = service.failed is not None or server.should_exit

    config = uvicorn.Config(
        _application(service),
        http=_Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",  # not a line for each malformed request
        access_log=access_log,
        server_header=False,
        limit_concurrency=service.limits.max_connections,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        callback_notify=stop_if_failed,
        timeout_notify=1,
    )
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # nor for each malformed form
    if access_log:
        access = logging.getLogger("uvicorn.access")
        access.setLevel(logging.INFO)
        access.propagate = False
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        access.handlers = [handler]
    server = Server(config)
    return server
