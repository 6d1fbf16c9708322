"""Register the ten ResNets with torchvision: `torchvision.models.get_model("resnet50_fast", weights=...)`.

`resnet_fast.register_models("torchvision")` imports this module, which registers them. They take torchvision's own
weights, by its enums or their names.
"""

from __future__ import annotations

from torchvision.models._api import register_model  # which torchvision.models does not export

from resnet_fast.models.resnet import BUILDERS

for _name, _builder in BUILDERS.items():
    register_model(f"{_name}_fast")(_builder)
