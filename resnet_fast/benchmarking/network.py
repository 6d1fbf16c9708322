"""Networks for measurements on machines where no pretrained weights can be had: seeded, random, and well behaved.

Fresh BatchNorm statistics (mean 0, variance 1) would hide folding mistakes, and random ones taken from nowhere make a
deep network explode or go flat. Here the statistics are measured on a batch, then disturbed; and the last BatchNorm of
every residual branch is given a small gain, as training does, without which rounding errors double every few blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize(model: nn.Module, batch: Tensor, *, seed: int = 0) -> nn.Module:
    """Gives ``model`` random BatchNorm parameters and statistics, in place, and returns it in eval mode.

    ``batch`` [N, C, H, W] float32 is what the statistics are measured on. The same seed, torch version and number
    format give the same network. Raises ValueError if the answers on ``batch`` are not finite or do not vary.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    last = {id(_last_of_branch(block)) for block in model.modules()}
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                gain = 0.25 if id(norm) in last else 1.0
                norm.weight.copy_(uniform(norm.weight, 0.5 * gain, 1.5 * gain))
                norm.bias.copy_(uniform(norm.bias, -0.3 * gain, 0.3 * gain))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.reset_running_stats()
        model.train()
        try:
            model(batch)
        finally:
            model.eval()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        for norm in norms:
            if norm.running_mean is not None and norm.running_var is not None:
                spread = norm.running_var.sqrt()
                norm.running_mean.add_(spread * uniform(spread, -0.1, 0.1))
                norm.running_var.mul_(uniform(norm.running_var, 0.8, 1.25))
        answer = model(batch)
    if not bool(torch.isfinite(answer).all()) or float(answer.std()) < 1e-6:
        raise ValueError("randomize: the network's answers on this batch are not finite or do not vary")
    return model


def _last_of_branch(block: nn.Module) -> nn.Module | None:
    """Return the BatchNorm before the addition of a residual block that is written as torchvision's are."""
    if not hasattr(block, "downsample"):
        return None
    last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
    return last if isinstance(last, nn.Module) else None


def seeded_batches(shape: tuple[int, ...], count: int, *, seed: int = 0) -> list[Tensor]:
    """``count`` batches of float32 noise with mean 0 and variance 1, as normalised photographs have."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]
