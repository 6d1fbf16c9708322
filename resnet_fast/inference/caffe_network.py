"""A Caffe network as a classifier: the size of its images, its classes, and the preprocessing of its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from resnet_fast.inference.errors import ClassifierError
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.preprocessing import MAX_SIZE

if TYPE_CHECKING:
    from PIL.Image import Image

    from resnet_fast.caffe import Input, Net
    from resnet_fast.caffe.preprocessing import Preprocessing


@dataclass(frozen=True)
class CaffeNetwork:
    """A network with its preprocessing.

    Attributes:
        prepare: turns an image into a tensor [3, size, size].
        outputs: number of classes.
        probabilities: whether the network ends with a Softmax.
        notes: what was assumed, in lines for the user.
    """

    model: nn.Module
    name: str
    prepare: Callable[[Image], Tensor]
    size: int
    outputs: int
    probabilities: bool
    notes: tuple[str, ...]


def load_caffe(prototxt: Path, caffemodel: Path, mean: str | None, scale: float | None) -> CaffeNetwork:
    """Load the network of a Caffe definition and its weights, with Caffe's preprocessing.

    Args:
        mean: a .binaryproto file, or three numbers "B,G,R"; None: that of the definition's data layer, or the
            published ResNets', which a note says.
        scale: factor after subtracting the mean; None: the definition's, or 1.

    Raises:
        ClassifierError: if a file cannot be read, or the network does not classify square images.
    """
    from resnet_fast import caffe

    try:
        net = caffe.load(prototxt, caffemodel)
        size = _input_size(net)
        outputs, probabilities = _classes(net, size)
        prepare, notes = _preprocessing(mean, scale, size, net.definition.inputs[0])
    except ClassifierError:
        raise
    except (ValueError, OSError) as error:
        raise ClassifierError(readable(error, 600)) from error
    name = readable(net.definition.name, 600) if net.definition.name else prototxt.stem
    return CaffeNetwork(net, name, prepare, size, outputs, probabilities, notes)


def _input_size(net: Net) -> int:
    """Return height and width, in pixels, of the images that the network takes."""
    source, inputs = net.definition.source, net.definition.inputs
    shown = " and ".join(f"{entry.name!r} {'x'.join(map(str, entry.shape))}" for entry in inputs)
    if len(inputs) != 1:
        raise ClassifierError(f"{source}: has {len(inputs)} inputs, {shown}; one of images, Nx3xHxH, was expected")
    shape = inputs[0].shape
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ClassifierError(
            f"{source}: its input is {shown}; square images of three channels, Nx3xHxH, were expected"
        )
    if shape[2] > MAX_SIZE:
        raise ClassifierError(f"{source}: its input is {shown}; images of at most {MAX_SIZE}x{MAX_SIZE} are classified")
    return shape[2]


def _classes(net: Net, size: int) -> tuple[int, bool]:
    """Return the number of classes, and whether the network ends with a Softmax and so returns probabilities."""
    from resnet_fast.caffe import definition

    source, outputs = net.definition.source, net.definition.outputs
    if len(outputs) != 1:
        raise ClassifierError(
            f"{source}: has the outputs {', '.join(map(repr, outputs))}; one of scores or probabilities was expected"
        )
    shape = net.shapes((2, 3, size, size))[outputs[0]]  # of two images, to see which axis is theirs
    if len(shape) < 2 or shape[0] != 2 or shape[2:] not in ((), (1, 1)):
        given = "x".join(map(str, ("N" if shape[:1] == (2,) else shape[0], *shape[1:]))) if shape else "of no axes"
        raise ClassifierError(
            f"{source}: its output {outputs[0]!r} is {given}; N x classes, or N x classes x 1 x 1, was expected"
        )
    last = next(layer for layer in reversed(net.definition.layers) if outputs[0] in layer.tops)
    softmax = last.parameters if isinstance(last.parameters, definition.Softmax) else None
    if softmax is not None and softmax.axis % len(shape) != 1:
        raise ClassifierError(f"{source}: {last}: its axis is {softmax.axis}; 1, that of the classes, was expected")
    return shape[1], softmax is not None


def _preprocessing(
    mean: str | None, scale: float | None, size: int, entry: Input
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the published models' preprocessing: the shorter side 256 for a crop of 224, in proportion for others.

    Mean and scale are those given, or those of the definition's data layer.
    """
    from resnet_fast.caffe.preprocessing import CHANNEL_MEANS, Preprocessing

    resize = 256 if 224 <= size <= 256 else round(size * 256 / 224)  # 227 goes with 256 too
    transform = entry.transform
    if scale is None:
        scale = 1.0 if transform is None else transform.scale
    if mean is None and transform is not None:
        if transform.mean_file:
            raise ClassifierError(
                f"the definition's data layer subtracts the mean image {readable(transform.mean_file, 600)}; give it "
                "with --mean FILE"
            )
        mean = ",".join(map(str, (transform.mean_value or (0.0,)) * (1 if len(transform.mean_value) > 1 else 3)))
    if mean is None:
        shown = ", ".join(map(str, CHANNEL_MEANS))
        note = f"no --mean given; the published ResNets' is used, B, G, R {shown}"
        return Preprocessing(resize, size, scale=scale), (note,)
    try:
        values = [float(part) for part in mean.split(",")]
    except ValueError:
        return Preprocessing.with_mean_file(mean, resize_size=resize, crop_size=size, scale=scale), ()
    if len(values) != 3:
        raise ValueError(f"--mean {mean}: a .binaryproto file, or three numbers B,G,R, was expected")
    return Preprocessing(resize, size, (values[0], values[1], values[2]), scale=scale), ()
