"""Fresh weights of full-size hosts, made to see, so that what runs them can be compared."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dfine_plugin import wrap_decoder
from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.registry import find_adapter

HEADS = ("class_embed", "score_head", "bbox")
"""What the hosts' names of their class and box heads contain."""


def settled_pair(name: str, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """A full-size host and its wrapped twin, in evaluation mode, with weights whose outputs can be compared.

    As initialised they cannot: RT-DETR's neck shrinks what it is given by ten orders of magnitude, all places of an
    image look alike, all queries tie, and which of them a backend selects is chance. So batch norms take their
    statistics from images, and the weights of class heads, box heads and the FDR head are spread. The two share all the
    host's weights.

    Args:
        name: of the host.
        images: ``(B, 3, H, W)``.
    """
    torch.manual_seed(0)
    model = HOSTS[name]()
    bare: nn.Module = getattr(model, "detector", model).eval()
    adapter = find_adapter(bare)
    norms = [(module, module.momentum) for module in bare.modules() if isinstance(module, nn.BatchNorm2d)]
    _spread([parameter for name, parameter in bare.named_parameters() if any(head in name for head in HEADS)])
    for norm, _ in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        adapter.detector(bare)(images)
    for norm, momentum in norms:
        norm.eval()
        norm.momentum = momentum
    wrapped = wrap_decoder(copy.deepcopy(bare)).eval()
    _spread(list(wrapped.get_submodule(f"{adapter.decoder}.fdr").parameters()))
    return bare, wrapped


@torch.no_grad()
def _spread(parameters: list[nn.Parameter]) -> None:
    """Add noise to matrices: half of what keeps the variance of what they are given."""
    for matrix in parameters:
        if matrix.ndim > 1:
            matrix.add_(torch.randn_like(matrix), alpha=0.5 * matrix.shape[-1] ** -0.5)
