"""From images to labels: load a network with what belongs to it, and classify with it.

`classifier.py` loads and answers, `caffe_network.py` does that for Caffe's networks, `labels.py` reads names of
classes; `prediction.py` is `resnet_fast.predict`, `stream.py` its loop. Nothing here prints.
"""

from __future__ import annotations

from resnet_fast.inference.classifier import Classifier, ClassifierError, Label, from_module, load
from resnet_fast.inference.prediction import Prediction, predict

__all__ = ["Classifier", "ClassifierError", "Label", "Prediction", "from_module", "load", "predict"]
