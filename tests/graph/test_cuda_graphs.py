"""Recording runs: when, for which shapes, what callers get. With a recorder of our own if there is no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import resnet_fast as rf
from resnet_fast.graph.cuda_graphs import SHAPES_KEPT, Recorder, RecordingFailed, recording, why_not_recordable
from tests.networks import small
from tests.triton_device import DEVICE


class Replayed:
    """Records as a GPU does: the results keep their memory, and a replay writes new values there."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        result = pytree.tree_map_only(Tensor, lambda t: torch.full_like(t, float("nan")), function())

        def replay() -> None:
            self.replayed += 1
            pytree.tree_map(lambda old, new: old.copy_(new), result, function())

        return result, replay


def test_the_first_image_of_a_shape_runs_and_the_second_is_recorded() -> None:
    runs: list[tuple[int, ...]] = []

    def run(x: Tensor) -> Tensor:
        runs.append(tuple(x.shape))
        return x * 2

    gpu = Replayed()
    recorder = Recorder(run, gpu)
    for count, x in enumerate(torch.randn(4, 2, 3)):
        assert torch.equal(recorder(x), x * 2)
        assert (gpu.recorded, gpu.replayed) == (min(count, 1), count and count + 1)  # one more: it is tried first
    other = torch.randn(3, 2)
    assert torch.equal(recorder(other), other * 2) and gpu.recorded == 1
    assert torch.equal(recorder(other.t()), other.t() * 2) and gpu.recorded == 1  # another layout: another recording
    assert torch.equal(recorder(other), other * 2) and gpu.recorded == 2


def test_results_belong_to_the_caller_and_inputs_stay_his() -> None:
    recorder = Recorder(lambda x: {"double": x * 2, "more": [x + 1]}, Replayed())
    images = list(torch.randn(3, 2, 3))
    kept = [image.clone() for image in images]
    results = [recorder(image) for image in images]
    for image, before, result in zip(images, kept, results, strict=True):
        assert torch.equal(image, before)
        assert torch.equal(result["double"], before * 2) and torch.equal(result["more"][0], before + 1)
    images[2].zero_()
    assert torch.equal(recorder(kept[0])["double"], kept[0] * 2)


def test_the_shape_used_longest_ago_is_forgotten() -> None:
    gpu = Replayed()
    recorder = Recorder(lambda x: x + 1, gpu)
    for size in range(SHAPES_KEPT + 1):
        for _ in range(2):
            recorder(torch.zeros(size + 1))
    assert gpu.recorded == SHAPES_KEPT + 1
    recorder(torch.zeros(SHAPES_KEPT + 1))
    assert gpu.recorded == SHAPES_KEPT + 1
    recorder(torch.zeros(1))
    recorder(torch.zeros(1))
    assert gpu.recorded == SHAPES_KEPT + 2


def test_recorded_in_inference_mode_and_used_outside() -> None:
    gpu = Replayed()
    recorder = Recorder(lambda x: x + 1, gpu)
    with torch.inference_mode():
        for _ in range(3):
            recorder(torch.zeros(2))
    assert torch.equal(recorder(torch.ones(2)), torch.full((2,), 2.0)) and gpu.recorded == 1


def test_another_choice_of_tf32_is_another_recording() -> None:
    gpu = Replayed()
    recorder = Recorder(lambda x: x + 1, gpu)
    for allowed in (True, True, False, False, True):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            recorder(torch.zeros(2))
    assert gpu.recorded == 2


def test_other_constants_make_recordings_void() -> None:
    gpu, constants = Replayed(), [torch.ones(2)]
    recorder = Recorder(lambda x: x + constants[0], gpu, lambda: tuple(constants))
    for _ in range(2):
        recorder(torch.zeros(2))
    constants[0] = torch.full((2,), 5.0)
    for count in (1, 2):
        assert torch.equal(recorder(torch.zeros(2)), constants[0]) and gpu.recorded == count


def test_loading_constants_anywhere_in_the_module_makes_recordings_void() -> None:
    fused = rf.optimize(small((1, 1, 1, 1)))
    x, gpu = torch.randn(1, 3, 64, 64), Replayed()
    fused._recorded(x)
    assert fused._recorder is not None
    fused._recorder._record = gpu
    fused._recorded(x)
    assert gpu.recorded == 1
    state = {name: 2 * value if "fc" in name or "avgpool" in name else value for name, value in
             fused.graph_module.state_dict().items()}  # fmt: skip
    fused.graph_module.load_state_dict(state)
    assert torch.equal(fused._recorded(x), fused(x)) and gpu.recorded == 1
    assert torch.equal(fused._recorded(x), fused(x)) and gpu.recorded == 2


class Cuda:
    """As much of torch.cuda as recording asks for: two devices, of which a stream captures its own alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = self.streams = 0
        self.captured: list[tuple[int, Any, object]] = []
        for name in ("current_device", "Stream", "graph_pool_handle", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_device(self) -> int:
        return self.device

    def Stream(self, device: int) -> tuple[str, int, int]:
        self.streams += 1
        return "stream", device, self.streams

    def graph_pool_handle(self) -> object:
        return object()

    def CUDAGraph(self) -> Any:
        class Graph:
            replay = staticmethod(lambda: None)  # as of one that captured nothing

        return Graph()

    @contextmanager
    def graph(self, graph: Any, pool: object, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.captured.append((self.device, stream, pool))
        yield


def test_each_device_captures_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, record = Cuda(monkeypatch), recording()
    for gpus.device in (0, 1, 0, 1):
        assert record(lambda: 7)[0] == 7
    (_, first, pool), (_, second, other), *again = gpus.captured
    assert first[:2] == ("stream", 0) and second[:2] == ("stream", 1) and pool is not other
    assert [device for device, *_ in again] == [0, 1]
    assert again[0][1:] == (first, pool) and again[1][1:] == (second, other)  # whose memory belongs to that stream


def test_a_graph_that_captured_nothing_is_never_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    recorder = Recorder(lambda x: {"double": [x * 2]})
    recorder(torch.ones(2))
    for _ in range(2):
        with pytest.raises(RecordingFailed, match="a replay for another image gives other values"):
            recorder(torch.ones(2))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_constant_network_can_be_recorded(value: float) -> None:
    gpu = Replayed()
    recorder = Recorder(lambda x: x * 0 + value, gpu)
    for _ in range(3):
        torch.testing.assert_close(recorder(torch.ones(2)), torch.full((2,), value), equal_nan=True)
    assert gpu.recorded == 1


def test_half_captured_is_seen() -> None:
    """What ran beside the capture keeps the first image's values."""

    def record(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = function()
        return result, lambda: result[1].copy_(function()[1])

    recorder = Recorder(lambda x: (x * 2, x * 3), record)
    recorder(torch.ones(2))
    with pytest.raises(RecordingFailed, match="other values"):
        recorder(torch.ones(2))


class OnGPU(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@dataclass
class Streams:
    """As much of streams as recordings ask for: ``done`` is what happened, in order."""

    done: list[tuple[str, int, object]] = field(default_factory=list)
    current: int = 0

    @classmethod
    def put(cls, monkeypatch: pytest.MonkeyPatch) -> Streams:
        """Return the streams that torch.cuda has from now on."""
        streams = cls()

        class Event:
            def record(self, stream: Streams.Stream) -> None:
                streams.done.append(("record", stream.number, self))

        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cls.Stream(streams, streams.current))
        monkeypatch.setattr(torch.cuda, "Event", Event)

        monkeypatch.setattr(
            Tensor, "record_stream", lambda image, stream: streams.done.append(("keep", stream.number, None))
        )
        return streams

    @dataclass
    class Stream:
        of: Streams
        number: int

        def wait_event(self, event: object) -> None:
            self.of.done.append(("wait", self.number, event))


def test_replays_on_several_streams_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, x = Streams.put(monkeypatch), torch.ones(2).as_subclass(OnGPU)

    def run(x: Tensor) -> Tensor:
        streams.done.append(("run", streams.current, None))
        return x + 1

    recorder = Recorder(run, Replayed())
    for streams.current in range(5):
        assert torch.equal(recorder(x).as_subclass(Tensor), torch.full((2,), 2.0))
    assert [number for what, number, _ in streams.done if what == "keep"] == [1, 2, 3, 4]  # the first call only ran
    for number in (2, 3, 4):  # each waits for the one before, and then touches what they share
        ((before, _),) = [(e, n) for what, n, e in streams.done if what == "record" and n == number - 1]
        mine = [(what, e) for what, n, e in streams.done if n == number]
        assert mine[0] == ("wait", before) and "run" in [what for what, _ in mine[1:]]
    streams.done.clear()
    for size in range(2, SHAPES_KEPT + 2):  # the last of them takes the first shape's place
        recorder(torch.ones(size).as_subclass(OnGPU))
    assert ("wait", 4) in [(what, number) for what, number, _ in streams.done]  # before its memory is given back


def test_a_refused_recording_is_reported_and_the_run_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        raise RuntimeError("CUDA out of memory")

    recorder = Recorder(lambda x: x + 1, refuse)
    recorder(torch.zeros(2))
    with pytest.raises(RecordingFailed, match="out of memory"):
        recorder(torch.zeros(2))

    fused = rf.optimize(small((1, 1, 1, 1)))
    fused.cuda_graphs = True
    x = torch.randn(1, 3, 64, 64)
    want = fused(x)

    monkeypatch.setattr(fused, "_recorded", recorder_that_refuses := Refused())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(rf.backends.FallbackWarning, match="no longer recorded as CUDA graphs: out of memory"):
        got = fused(x.as_subclass(OnGPU))
    assert torch.allclose(got.as_subclass(Tensor), want, rtol=1e-4, atol=1e-5) and recorder_that_refuses.asked == 1
    assert fused.cuda_graphs is False


class Refused:
    asked = 0

    def __call__(self, x: Tensor) -> Any:
        self.asked += 1
        raise RecordingFailed("out of memory")


@pytest.mark.triton
def test_what_can_be_recorded() -> None:
    torch.manual_seed(0)
    net = small((1, 1, 1, 1))
    options: dict[str, Any] = {"dtype": torch.float16, "gpu": "h100", "check": False}
    fused = rf.optimize(net.to(DEVICE), backend="triton", **options)
    assert why_not_recordable(fused.graph_module) == ""
    reference = rf.optimize(net, backend="reference", **options)
    assert "runs on the backend 'reference'" in why_not_recordable(reference.graph_module)

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x + y)

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.drop = nn.AlphaDropout()

        def forward(self, x: Tensor) -> Tensor:
            return torch.bernoulli(self.conv(x).sigmoid())

    two = rf.optimize(Two().eval(), backend="triton", check=False).graph_module
    assert "more than one input" in why_not_recordable(two)
    random = rf.optimize(Random().eval(), backend="triton", check=False).graph_module
    assert "is no fused op" in why_not_recordable(random)


def test_on_a_cpu_nothing_is_recorded() -> None:
    fused = rf.optimize(small((1, 1, 1, 1)))
    assert fused.cuda_graphs is False and not any("cuda_graphs" in note for note in fused.report().notes)
    copy.deepcopy(fused)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_recorded_runs_on_a_gpu(dtype: torch.dtype) -> None:
    net = small((2, 2, 2, 2)).cuda()
    plain = rf.optimize(net, dtype=dtype, cuda_graphs=False)
    recorded = rf.optimize(net, dtype=dtype)
    assert recorded.cuda_graphs, recorded.report().notes
    for n in (2, 3, 2):
        for _ in range(3):
            x = torch.randn(n, 3, 64, 64, device="cuda")
            want = plain(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                assert torch.equal(recorded(x), want)
            torch.cuda.current_stream().wait_stream(side)
            assert torch.equal(recorded(x), want)
    recorded.load_state_dict(recorded.state_dict())
    assert torch.equal(recorded(x), want)
