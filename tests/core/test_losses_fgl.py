"""The fine-grained localization loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin import encode_boxes, fgl_loss

from . import reference
from .drawing import LAW, bins, even_bins, random, random_boxes, scales, seeds, uniform

Arguments = dict[str, Tensor]


def fgl_arguments(seed: int, pairs: int, weights: Tensor | None = None, scale: float = 1.0) -> Arguments:
    """Float64 arguments of fgl_loss, without the normaliser."""
    weights = bins() if weights is None else weights
    return {
        "logits": random(seed, pairs, 4, len(weights), scale=scale),
        "initial_boxes": random_boxes(seed + 1, pairs),
        "target_boxes": random_boxes(seed + 3, pairs),
        "iou": uniform(seed + 5, pairs, low=0.05),
        "weights": weights,
    }


def slow_fgl(arguments: Arguments, num_boxes: float) -> float:
    """The reference on the same arguments."""
    logits, boxes, targets, iou, weights = arguments.values()
    return reference.fgl(logits, boxes, targets, iou, weights, num_boxes)


@LAW
@given(seeds, even_bins, scales, scales, st.integers(1, 6), st.floats(0.0, 40.0), st.floats(0.1, 8.0))
def test_fgl_values(seed: int, num_bins: int, a: float, c: float, pairs: int, num_boxes: float, scale: float) -> None:
    """The slow loop's number for any W, number of pairs and normaliser."""
    arguments = fgl_arguments(seed, pairs, bins(num_bins, a, c), scale)
    actual = fgl_loss(**arguments, num_boxes=num_boxes)
    assert actual.shape == ()
    assert actual.dtype == torch.float64
    assert actual.item() == pytest.approx(slow_fgl(arguments, num_boxes), rel=1e-6, abs=1e-12)


def test_fgl_by_hand() -> None:
    """Flat logits cost IoU times log(N + 1) for each of the four edges."""
    arguments = fgl_arguments(0, 3)
    arguments["logits"] = torch.zeros(3, 4, 9, dtype=torch.float64)
    expected = float(arguments["iou"].sum()) * 4 * float(np.log(9)) / 2
    assert fgl_loss(**arguments, num_boxes=2.0).item() == pytest.approx(expected)


def test_fgl_gradient() -> None:
    """Autograd, the slow loop's differences and the closed form IoU (softmax - target) / num_boxes agree."""
    arguments = fgl_arguments(1, 3)
    logits = arguments["logits"].requires_grad_()
    fgl_loss(**arguments, num_boxes=2.5).backward()
    slow = reference.numeric_gradient(lambda x: slow_fgl({**arguments, "logits": x}, 2.5), logits.detach())
    torch.testing.assert_close(logits.grad, slow, rtol=1e-6, atol=1e-8)
    left_bin, left, right = encode_boxes(arguments["initial_boxes"], arguments["target_boxes"], arguments["weights"])
    target = torch.zeros(3, 4, 9, dtype=torch.float64).scatter_(-1, left_bin[..., None], left[..., None])
    target.scatter_(-1, left_bin[..., None] + 1, right[..., None])
    closed = arguments["iou"][:, None, None] * (logits.detach().softmax(-1) - target) / 2.5
    torch.testing.assert_close(logits.grad, closed, rtol=1e-6, atol=1e-8)
    others = {name: value for name, value in arguments.items() if name != "logits"}
    assert torch.autograd.gradcheck(lambda z: fgl_loss(z, **others, num_boxes=2.5), (logits,))


def test_fgl_reaches_every_logit_of_a_pair_and_no_logit_of_zero_iou() -> None:
    """The gradient is nonzero at all 4 K logits of a pair, and zero where the IoU is."""
    arguments = fgl_arguments(2, 4)
    arguments["iou"][1] = 0.0
    logits = arguments["logits"].requires_grad_()
    fgl_loss(**arguments, num_boxes=4.0).backward()
    assert bool((logits.grad[[0, 2, 3]] != 0).all())
    assert bool((logits.grad[1] == 0).all())


def test_fgl_gives_no_gradient_to_iou_boxes_and_weights() -> None:
    """Only the logits learn."""
    arguments = {name: value.requires_grad_() for name, value in fgl_arguments(3, 3).items()}
    fgl_loss(**arguments, num_boxes=3.0).backward()
    assert arguments.pop("logits").grad.abs().sum() > 0
    assert all(value.grad is None or not value.grad.any() for value in arguments.values())


def test_fgl_without_pairs() -> None:
    """No pairs give a zero that still has a gradient, whatever the normaliser."""
    arguments = fgl_arguments(4, 0)
    logits = arguments["logits"].requires_grad_()
    loss = fgl_loss(**arguments, num_boxes=0.0)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == (0, 4, 9)


@pytest.mark.parametrize("num_boxes", [0.0, 0.3, 1.0, 7.5])
def test_fgl_normaliser_is_at_least_one(num_boxes: float) -> None:
    """A number and a 0-d tensor divide alike; below one counts as one."""
    arguments = fgl_arguments(5, 3)
    once = fgl_loss(**arguments, num_boxes=1.0).item()
    assert fgl_loss(**arguments, num_boxes=num_boxes).item() == pytest.approx(once / max(num_boxes, 1))
    by_tensor = fgl_loss(**arguments, num_boxes=torch.tensor(num_boxes))
    assert by_tensor.shape == ()
    assert by_tensor.item() == pytest.approx(once / max(num_boxes, 1))


@LAW
@given(seeds, st.permutations(range(6)))
def test_fgl_ignores_the_order_of_pairs(seed: int, order: list[int]) -> None:
    """Any permutation of the pairs, and any split of them into two calls, gives the same sum."""
    arguments = fgl_arguments(seed, 6)
    weights = arguments.pop("weights")
    expected = fgl_loss(**arguments, weights=weights, num_boxes=6.0).item()
    moved = {name: value[order] for name, value in arguments.items()}
    assert fgl_loss(**moved, weights=weights, num_boxes=6.0).item() == pytest.approx(expected, rel=1e-9)
    parts = [{name: value[part] for name, value in arguments.items()} for part in (order[:2], order[2:])]
    total = sum(fgl_loss(**part, weights=weights, num_boxes=6.0).item() for part in parts)
    assert total == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fgl_computes_halves_in_float32(dtype: torch.dtype) -> None:
    """Half-precision arguments, under autocast too, give the loss of their float32 copies."""
    halves = {
        name: value if value.dtype == torch.bool else value.to(dtype) for name, value in fgl_arguments(6, 5).items()
    }
    floats = {name: value if value.dtype == torch.bool else value.float() for name, value in halves.items()}
    expected = fgl_loss(**floats, num_boxes=3.0)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = [fgl_loss(**halves, num_boxes=3.0), fgl_loss(**floats, num_boxes=3.0)]
    for actual in (fgl_loss(**halves, num_boxes=3.0), *under_autocast):
        assert actual.dtype == torch.float32
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
