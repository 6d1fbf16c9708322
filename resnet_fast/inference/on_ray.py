"""The engine that classifies with Ray Data: one network per worker, on this machine or a cluster; ray is an extra.

A worker that dies is started again and its block of images repeated; an answer that comes twice counts once.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from resnet_fast.inference.bulk import Engine, Lines, answer_line
from resnet_fast.inference.classifier import Classifier, load
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.inference.stream import BATCH_SIZE, read_bounded, stream
from resnet_fast.models.checkpoint import readable

RETRIES = 3
"""How often a block of images is tried again after its worker died: an image may be what kills it."""

_BLOCK = 4
"""Batches in a block, which is what is repeated after a worker died."""

_STORE_BYTES = 256 * 2**20
"""Ray's shared memory on one machine; paths and answers are all that lies there."""


class _Worker:
    """Classifies batches of paths in a process of Ray's."""

    def __init__(self, folder: str, arguments: dict[str, Any], digest: str, topk: int) -> None:
        os.chdir(folder)  # relative paths mean what they mean to the caller
        self.classifier, self.topk = load(**arguments), topk
        if self.classifier.digest != digest:
            raise ClassifierError(
                f"{self.classifier.source}: other parameters on the machine {os.uname().nodename}; all machines must "
                "see the same file"
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [os.fsdecode(path) for path in batch["path"]]
        outcomes = stream(paths, self.classifier, read_bounded, batch_size=len(paths), workers=1)
        return {"line": [answer_line(path, outcome, self.classifier, self.topk) for path, outcome in outcomes]}


def ray_engine(
    classifier: Classifier,
    arguments: dict[str, Any],
    topk: int,
    *,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
) -> Engine:
    """Return the engine. If RAY_ADDRESS is set that cluster is used, otherwise Ray is started on this machine.

    Args:
        classifier: the network, loaded here, to which those of the workers must be equal.
        arguments: of `load`, by which each worker loads it; files must be seen by all machines.
        workers: number of networks; None: one for each CPU, or GPU if they compute there.

    Raises:
        ClassifierError: if ray is not installed.
    """
    try:
        import pyarrow
        import ray
        import ray.data
    except ImportError:
        raise ClassifierError("--engine ray needs Ray Data: pip install 'resnet_fast[ray]'") from None

    on_gpu = torch.device(arguments.get("device", "cpu")).type == "cuda"

    def run(paths: list[str]) -> Lines:
        if not paths:
            return
        started = not ray.is_initialized()
        if started:
            _start(ray, workers)
        try:
            yield from _answers(paths)
        except ray.exceptions.RayError as error:
            raise ClassifierError(f"Ray's workers failed: {_cause(error)}") from error
        finally:
            if started:
                ray.shutdown()

    def _answers(paths: list[str]) -> Lines:
        count = workers or max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))
        block = _BLOCK * batch_size
        tables = [
            pyarrow.table({"path": pyarrow.array([os.fsencode(path) for path in paths[start : start + block]])})
            for start in range(0, len(paths), block)
        ]
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        with warnings.catch_warnings():
            # Ray 2.60 has no other way to say max_task_retries, without which an image that kills its reader would be
            # tried for ever; the extra allows the versions that have this one.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            answers = ray.data.from_arrow(tables).map_batches(
                _Worker,
                fn_constructor_args=(os.getcwd(), arguments, classifier.digest, topk),
                batch_size=batch_size,
                compute=ray.data.ActorPoolStrategy(size=min(count, len(tables))),
                num_cpus=1,
                num_gpus=1 if on_gpu else 0,
                max_restarts=-1,
                max_task_retries=RETRIES,
            )
        for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
            yield [bytes(line) for line in batch["line"]]

    return run


def _start(ray: Any, workers: int | None) -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local", num_cpus=workers, include_dashboard=False, object_store_memory=_STORE_BYTES,
            log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _cause(error: BaseException) -> str:
    """Return the last line of an error of Ray's, which wraps a worker's traceback."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return readable(lines[-1] if lines else type(error).__name__, 400)
