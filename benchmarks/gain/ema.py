"""Exponential moving average of a model's weights and buffers, with the ramp of the decay that D-FINE uses."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_ema(model: nn.Module, decay: float, ramp_steps: float) -> AveragedModel:
    """A copy of `model` whose `update_parameters(model)` averages with the decay `decay (1 - exp(-n / ramp_steps))`.

    The ramp forgets the random initial weights; without it a short run would be judged by them. Floating-point
    buffers (BatchNorm's statistics) are averaged like the weights.
    """

    def average(ema: Tensors, current: Tensors, updates: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay * (1 - math.exp(-int(updates) / ramp_steps)))(ema, current, updates)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
