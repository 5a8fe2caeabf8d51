"""Comparing gradients of two scalars that should be one."""

import torch
from torch import Tensor, nn


def assert_same_gradients(model: nn.Module, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    own = torch.autograd.grad(ours, parameters, retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(theirs, parameters, retain_graph=True, allow_unused=True)
    largest = max(float(g.norm()) for g in other if g is not None)
    for name, g, reference in zip(names, own, other, strict=True):
        if g is None and reference is None:
            continue
        g = torch.zeros_like(reference) if g is None else g
        reference = torch.zeros_like(g) if reference is None else reference
        difference = float((g - reference).norm())
        assert difference <= tolerance * max(float(reference.norm()), 1e-4 * largest), (
            f"{name}: {difference} of {float(reference.norm())}"
        )
