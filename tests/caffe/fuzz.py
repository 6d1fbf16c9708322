"""Coverage-guided fuzzing of the readers of Caffe files; no test of the suite, it runs until it is stopped.

    pip install atheris
    python -m tests.caffe.fuzz prototxt -max_total_time=120
    python -m tests.caffe.fuzz caffemodel -max_total_time=120

Arguments after the target are libFuzzer's. Whatever a file holds, the readers may only succeed or raise a CaffeError of
one line. Anything else, more than 2 GB of memory, or more than 10 seconds for one input ends the run; the input is then
in a file ``crash-...``, and the same command with that file's name repeats it.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["resnet_fast.caffe"]):
    from resnet_fast import caffe
    from resnet_fast.caffe import caffemodel, prototxt

DEFINITION = """
name: "n" input: "data" input_shape { dim: 1 dim: 3 dim: 9 dim: 9 }
layer { name: "c" type: "Convolution" bottom: "data" top: "c" convolution_param { num_output: 2 kernel_size: 3 } }
layer { name: "b" type: "BatchNorm" bottom: "c" top: "c" batch_norm_param { eps: 1e-3 } }
layer { name: "s" type: "Scale" bottom: "c" top: "c" scale_param { bias_term: true } }
layer { name: "p" type: "Pooling" bottom: "c" top: "p" pooling_param { kernel_size: 3 stride: 2 pad: 1 pool: AVE } }
layer { name: "e" type: "Eltwise" bottom: "p" bottom: "p" top: "e" eltwise_param { coeff: 1 coeff: -1 } }
layer { name: "f" type: "InnerProduct" bottom: "e" top: "f" inner_product_param { num_output: 2 } }
layer { name: "d" type: "Deconvolution" bottom: "p" top: "d"
        convolution_param { num_output: 2 kernel_size: 4 stride: 2 } }
layer { name: "crop" type: "Crop" bottom: "d" bottom: "data" top: "crop" crop_param { axis: 2 offset: 0 } }
layer { name: "cut" type: "Slice" bottom: "data" top: "x" top: "y" slice_param { axis: 1 slice_point: 1 } }
layer { name: "l" type: "LRN" bottom: "x" top: "l" lrn_param { local_size: 3 norm_region: WITHIN_CHANNEL } }
layer { name: "q" type: "PReLU" bottom: "y" top: "y" prelu_param { channel_shared: true } }
layer { name: "v" type: "Reshape" bottom: "y" top: "v" reshape_param { shape { dim: 0 dim: -1 } axis: 0 num_axes: 3 } }
layer { name: "w" type: "Flatten" bottom: "v" top: "w" flatten_param { axis: 1 end_axis: -1 } }
"""
V1 = """
input: "data" input_dim: 1 input_dim: 3 input_dim: 9 input_dim: 9
layers { name: "c" type: CONVOLUTION bottom: "data" top: "c" convolution_param { num_output: 2 kernel_h: 1 kernel_w: 2 }
         include { phase: TEST } }
layers { name: "r" type: RELU bottom: "c" top: "c" relu_param { negative_slope: 0.1 } }
"""
Case = Callable[[bytes], None]


def of_prototxt(folder: Path) -> tuple[Case, list[bytes]]:
    """The text of a definition, and the network that it defines."""

    def run(data: bytes) -> None:
        definition = prototxt.parse(data.decode("utf-8", "replace"))
        caffe.Net(definition)
        assert prototxt.parse(prototxt.emit(definition)) == definition

    pasted = DEFINITION.replace("\n", "").replace("dim: 9 dim", "dim: 9dim")
    return run, [DEFINITION.encode(), V1.encode(), pasted.encode()]


def of_caffemodel(folder: Path) -> tuple[Case, list[bytes]]:
    """A file of weights, for a network that has such layers; also as a mean image."""
    (folder / "n.prototxt").write_text(DEFINITION)
    caffe.save(caffe.Net(caffe.parse_prototxt(DEFINITION)), folder / "n.prototxt", folder / "n.caffemodel")
    file = folder / "case.caffemodel"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(caffe.CaffeError):
            caffemodel.read_mean(file)
        caffemodel.read(file)  # most end here, before a network is built
        caffe.load(folder / "n.prototxt", file, strict=False)

    return run, [(folder / "n.caffemodel").read_bytes()]


def main() -> None:
    """Run the target that the first argument names."""
    targets = {"prototxt": of_prototxt, "caffemodel": of_caffemodel}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"usage: python -m tests.caffe.fuzz {'|'.join(targets)} [libFuzzer's arguments]")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run, seeds = targets[sys.argv[1]](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(seeds):
        (corpus / str(index)).write_bytes(seed)

    def once(data: bytes) -> None:
        message = ""
        try:
            run(data)
        except caffe.CaffeError as error:
            message = str(error)
        if "\n" in message:
            raise AssertionError(message)

    again = any(Path(argument).is_file() for argument in sys.argv[2:])
    limits = ["-rss_limit_mb=2048", "-timeout=10"] + ([] if again else ["-max_len=4096", str(corpus)])
    atheris.Setup([sys.argv[0], *limits, *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
