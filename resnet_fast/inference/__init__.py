"""From images to labels: load a network with what belongs to it, and classify with it.

`classifier.py` loads and answers, `caffe_network.py` does that for Caffe's networks, `labels.py` reads names of
classes. Nothing here prints, and nothing knows of options or tables of the command line.
"""

from __future__ import annotations

from resnet_fast.inference.classifier import Classifier, ClassifierError, Label, load

__all__ = ["Classifier", "ClassifierError", "Label", "load"]
