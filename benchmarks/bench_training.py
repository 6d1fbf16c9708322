"""A training step of a ResNet, ours against plain torch, in time and memory: ``python -m benchmarks.bench_training``.

With a CUDA GPU on that, else on the CPU, into ``training.json``. A step is forward, loss, backward and SGD. No data is
read and nothing is trained: inputs are random and few.
"""

from __future__ import annotations

import copy
import datetime
import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.book import Book, Options
from benchmarks.summary import rates
from resnet_fast.benchmarking import device as devices
from resnet_fast.benchmarking import machine
from resnet_fast.benchmarking.compare import fresh_model
from resnet_fast.benchmarking.gate import Verdict, judge
from resnet_fast.benchmarking.network import seeded_batches
from resnet_fast.benchmarking.peers import plain
from resnet_fast.benchmarking.results import one_line
from resnet_fast.benchmarking.timing import Deadline, Samples, flatten, paired_ratio, summarize, turns
from resnet_fast.models import get_model, list_models
from resnet_fast.roofline.measure import tf32

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
"""bf16 is autocast; parameters, gradients and the optimizer are float32 in all of them."""

INPUTS = 2


@dataclass(frozen=True)
class Case:
    """One row of the result file. ``judged``: images of the batch that the gate compares gradients for, as float64
    takes long.

    With few and small ones a single ReLU that rounding decides otherwise can put anybody on the wrong side of the rule.
    """

    arch: str
    precision: str
    batch: int
    image_size: int = 224
    judged: int = 32
    seed: int = 0

    @property
    def name(self) -> str:
        return f"training-{self.arch}-{self.precision}-b{self.batch}"


@dataclass
class Contestant:
    """A network in train mode, what is called to run it, and its optimizer."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.SGD

    def backward(self, x: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean loss, after its gradients have been added to the parameters'."""
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(self.forward(x), targets)
        loss.backward()
        return loss.detach()

    def step(self, x: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        loss = self.backward(x, targets, dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def layers(model: nn.Module, arch: str) -> tuple[nn.Module, str]:
    """Return the network with the parameters of ``model`` as others have it, and where it is from.

    torchvision's if that is installed; otherwise the graph of ours, every module of it from torch.nn and every
    function torch's (``peers.plain`` makes sure), which is what torchvision's forward calls in the same order.
    """
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision

            network: nn.Module = torchvision.models.get_model(arch)
        except (ImportError, RuntimeError):  # it does not import beside torch builds that it was not made for
            pass
        else:
            network.load_state_dict(model.state_dict())
            return network, f"torchvision {torchvision.__version__}"
    return plain(model), "the graph of resnet_fast's model in plain torch layers"


def contestants(
    model: nn.Module, case: Case, place: torch.device
) -> dict[str, tuple[str, bool, Callable[[], Contestant]]]:
    """By name: the label, whether it is ours, and what builds it."""
    reference, origin = layers(model, case.arch)

    def ours(lean: bool) -> nn.Module:
        network = get_model(case.arch, memory_efficient=True) if lean else get_model(case.arch)
        network.load_state_dict(model.state_dict())
        return network

    def build(make: Callable[[], nn.Module], compiled: bool) -> Contestant:
        module = make().train().to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward = torch.compile(module, dynamic=False) if compiled else module
        # A rate so low that the parameters stay sane over hundreds of steps on the same noise.
        return Contestant(module, forward, torch.optim.SGD(module.parameters(), lr=1e-5, momentum=0.9, nesterov=True))

    return {
        "eager": (f"torch eager, {origin}", False, lambda: build(lambda: copy.deepcopy(reference), False)),
        "compile": ("torch.compile of that", False, lambda: build(lambda: copy.deepcopy(reference), True)),
        "ours": ("resnet_fast", True, lambda: build(lambda: ours(False), False)),
        "lean": ("resnet_fast, memory_efficient", True, lambda: build(lambda: ours(True), False)),
        "ours_compile": ("torch.compile of resnet_fast", True, lambda: build(lambda: ours(False), True)),
    }


NAMES = ("eager", "compile", "ours", "lean", "ours_compile")


def gradients(contestant: Contestant, x: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss [1] and all gradients [number of parameters], in the order of their names; float64, on the CPU."""
    contestant.optimizer.zero_grad(set_to_none=True)
    loss = contestant.backward(x, targets, dtype)
    named = sorted(contestant.module.named_parameters())
    flat = torch.cat([p.grad.double().flatten().cpu() for _, p in named if p.grad is not None])
    contestant.optimizer.zero_grad(set_to_none=True)
    return loss.double().cpu()[None], flat


def peak_bytes(step: Callable[[], object], before: int) -> int:
    """CUDA memory in use at most during a step, beyond ``before``: parameters, optimizer, activations, workspace."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept_bytes(contestant: Contestant, x: Tensor, targets: Tensor, dtype: torch.dtype) -> int:
    """Return what a forward keeps for its backward, each piece of memory once, parameters and the input not counted."""
    known = {each.untyped_storage().data_ptr() for each in (x, *contestant.module.parameters())}
    kept: dict[int, Tensor] = {}  # the tensors too, so that no memory is freed and counted under the same address

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contestant.backward(x, targets, dtype)
    contestant.optimizer.zero_grad(set_to_none=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure(case: Case, *, device: str, names: tuple[str, ...] = NAMES, seconds: float = 10.0) -> dict[str, Any]:
    """Judges and times every contestant and returns the result dictionary.

    One that fails to build or whose loss or gradients break the error rule is listed with the reason and not timed.
    """
    place, dtype = torch.device(device), PRECISIONS[case.precision]
    model = fresh_model(case.arch, image_size=case.image_size, seed=case.seed)
    shape = (case.batch, 3, case.image_size, case.image_size)
    batches = [
        batch.to(place).contiguous(memory_format=torch.channels_last)
        for batch in seeded_batches(shape, INPUTS, seed=case.seed + 1)
    ]
    targets = torch.randint(0, 1000, (case.batch,), generator=torch.Generator().manual_seed(case.seed)).to(place)
    few, wanted = batches[0][: case.judged], targets[: case.judged]
    on_gpu = place.type == "cuda"
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contestant] = {}
    known = contestants(model, case, place)
    with tf32(case.precision == "tf32"):
        exact = _alone(plain(model).double(), few.double(), wanted, place, torch.float32)
        same = _alone(plain(model), few, wanted, place, dtype)
        for name in names:
            label, own, build = known[name]
            row = rows[name] = {"label": label, "ours": own}
            before = torch.cuda.memory_allocated() if on_gpu else 0
            try:
                contestant = build()
                verdicts = _judged(gradients(contestant, few, wanted, dtype), same, exact, dtype)
                for _ in range(2):
                    contestant.step(batches[0], targets, dtype)
                if on_gpu:
                    row["peak_bytes"] = peak_bytes(lambda c=contestant: c.step(batches[0], targets, dtype), before)  # type: ignore[misc]
                else:
                    row["kept_bytes"] = kept_bytes(contestant, batches[0], targets, dtype)
            except Exception as error:  # a compiler may fail in any way, and memory may be short; the others still run
                rows[name] |= {"status": "excluded", "reason": one_line(error)}
                continue
            wrong = "; ".join(f"{what}: {verdict.reason}" for what, verdict in verdicts.items() if verdict.reason)
            row |= {"status": "wrong" if wrong else "timed", "reason": wrong}
            row["gate"] = {what: verdict.as_dict() for what, verdict in verdicts.items()}
            if not wrong:
                ready[name] = contestant
        disturbance = machine.Disturbance()
        samples = _time(ready, batches, targets, dtype, on_gpu, seconds)
        disturbed = disturbance.cores()
    for name, rounds in samples.items():
        taken = summarize(flatten(rounds))
        rows[name] |= {"seconds": taken.as_dict(), "images_per_second": case.batch / taken.p50}
    return {
        "setting": asdict(case) | {"name": case.name, "device": place.type, "threads": torch.get_num_threads()},
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "contestants": rows,
        "ratios": ratios(samples),
        "others_busy_cores": disturbed,
    }


def ratios(samples: Samples) -> dict[str, dict[str, Any]]:
    """Return how many times faster each of ours is than each of the others; quantiles over the rounds."""
    others = [name for name in ("eager", "compile") if name in samples]
    return {
        own: {name: paired_ratio(samples[own], samples[name]).as_dict() for name in others}
        for own in ("ours", "lean", "ours_compile")
        if own in samples
    }


def _alone(
    module: nn.Module, x: Tensor, targets: Tensor, place: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    module = module.train().to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return gradients(Contestant(module, module, torch.optim.SGD(module.parameters())), x, targets, dtype)


def _judged(
    answer: tuple[Tensor, Tensor], same: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Verdict]:
    return {
        what: judge(*each, dtype)
        for what, each in zip(("loss", "gradients"), zip(answer, same, exact, strict=True), strict=True)
    }


def _time(
    ready: dict[str, Contestant],
    batches: list[Tensor],
    targets: Tensor,
    dtype: torch.dtype,
    on_gpu: bool,
    seconds: float,
) -> Samples:
    """Interleaved turns of back-to-back steps, each of which ends with the device being done."""
    calls: dict[str, Callable[[int], object]] = {
        name: (lambda number, c=contestant: c.step(batches[number % len(batches)], targets, dtype))  # type: ignore[misc]
        for name, contestant in ready.items()
    }
    return turns(calls, devices.of("cuda" if on_gpu else "cpu").synchronize, seconds=seconds)


def measure_into(folder: Path, case: Case, names: tuple[str, ...], *, device: str, seconds: float = 4.0) -> bool:
    """Measure one case into ``training.json``, print a line, and say whether our own gradients were right.

    What is in the file already about contestants that take no part this time stays, marked by its own time.
    """
    book = Book(folder, "training", ("cases",))
    try:
        row = measure(case, device=device, names=names, seconds=seconds)
    except Exception as error:
        earlier = book.data["cases"].get(case.name, {})
        book.add("cases", case.name, earlier | {"setting": asdict(case), "failed": one_line(error)})
        print(f"  {case.name}: FAILED {one_line(error)}", flush=True)
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"  {case.name}: img/s: {rates(row)}", flush=True)
    right = all(found["status"] == "timed" for found in row["contestants"].values() if found["ours"])
    book.merge(case.name, row)
    return right


def rounds(cases: list[Case], names: tuple[str, ...], device: str) -> list[tuple[Case, tuple[str, ...]]]:
    """Who is measured together, in order. On a GPU what is compiled comes last, for its time: a case that is cut off
    loses what it has measured."""
    if device == "cpu":
        return [(case, names) for case in cases]
    plain_ones = tuple(name for name in names if name not in ("compile", "ours_compile"))
    first = [(case, plain_ones) for case in cases if plain_ones]
    return first + [
        (case, (*(own for own in ("eager", "ours") if own in names), name))
        for name in ("compile", "ours_compile")
        if name in names
        for case in cases
    ]


def main() -> int:
    parser = Options("bench_training", __doc__)
    parser.add_argument("--arch", choices=list_models(), default="resnet50")
    parser.add_argument("--dtype", default="bf16,fp32", help=f"of {','.join(PRECISIONS)} (default: bf16,fp32)")
    parser.add_argument("--batch", type=int, help="default: 128 and 256 on a GPU, 8 on a CPU")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument(
        "--peers", default=",".join(NAMES), help=f"comma-separated contestants (default: {','.join(NAMES)})"
    )
    parser.add_argument(
        "--case-seconds", type=float, default=10.0, help="time for the rounds of one case (default: 10)"
    )
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's choice)")
    given = parser.parse()
    device, folder, wrong = given.device, given.out, 0
    names = parser.names("--peers", given.peers, NAMES)
    precisions = parser.names("--dtype", given.dtype, PRECISIONS)
    if given.batch is not None and given.batch < 1:
        parser.error(f"--batch is {given.batch}, it must be at least 1")
    batches = (given.batch,) if given.batch else ((128, 256) if device == "cuda" else (8,))
    cases = [
        Case(given.arch, precision, batch, given.image_size, judged=min(batch, 32))
        for precision in precisions
        for batch in batches
    ]
    for case, together in Deadline(given.seconds).each(rounds(cases, names, device)):
        wrong += not measure_into(folder, case, together, device=device, seconds=given.case_seconds)
    print(f"written: {folder / 'training.json'}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
