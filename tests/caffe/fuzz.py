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
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["resnet_fast.caffe"]):
    from resnet_fast import caffe
    from resnet_fast.caffe import caffemodel, prototxt
    from tests.caffe import files

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

    texts = [prototxt.emit(definition) for definition in files.GRAPHS.values()]
    pasted = [re.sub(r"\n *", "", text) for text in texts]
    return run, [text.encode() for text in (V1, *texts, *pasted)]


def of_caffemodel(folder: Path) -> tuple[Case, list[bytes]]:
    """A file of weights, for a network that has such layers; also as a mean image."""
    definition, weights = files.write(folder, files.network(files.GRAPHS["squeeze and excitation"]))
    file = folder / "case.caffemodel"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(caffe.CaffeError):
            caffemodel.read_mean(file)
        caffemodel.read(file)  # most end here, before a network is built
        caffe.load(definition, file, strict=False)

    return run, [Path(weights).read_bytes()]


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
