"""Entry points for torch.hub: torch.hub.load("<owner>/<repository>", "resnet50", weights=...)."""

from resnet_fast.models.resnet import BUILDERS

dependencies = ["torch"]
globals().update(BUILDERS)
