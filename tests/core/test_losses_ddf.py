"""The decoupled distillation focal loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import Tensor

from dfine_plugin import ddf_loss

from . import reference
from .drawing import LAW, random, seeds, uniform

Arguments = dict[str, Tensor]


def ddf_arguments(seed: int, images: int, queries: int, values: int = 5, chance: float = 0.4) -> Arguments:
    """Float64 arguments of ddf_loss; each query is matched by the chance."""
    return {
        "student": random(seed, images, queries, 4, values),
        "teacher": random(seed + 1, images, queries, 4, values),
        "matched": uniform(seed + 2, images, queries) < chance,
        "quality": uniform(seed + 3, images, queries, low=0.05),
    }


def slow_ddf(arguments: Arguments, temperature: float = 5.0) -> float:
    """The reference on the same arguments."""
    return reference.ddf(*arguments.values(), temperature)


@LAW
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.floats(0.0, 1.0), st.floats(0.5, 10.0))
def test_ddf_values(seed: int, images: int, queries: int, chance: float, temperature: float) -> None:
    """The slow loop's number for any share of matched queries and any temperature."""
    arguments = ddf_arguments(seed, images, queries, chance=chance)
    actual = ddf_loss(**arguments, temperature=temperature)
    assert actual.shape == ()
    assert actual.dtype == torch.float64
    assert actual.item() == pytest.approx(slow_ddf(arguments, temperature), rel=1e-6, abs=1e-12)


def test_ddf_default_temperature_is_five() -> None:
    """T = 5, the paper's."""
    arguments = ddf_arguments(0, 2, 4)
    assert ddf_loss(**arguments).item() == pytest.approx(slow_ddf(arguments, 5.0))


@pytest.mark.parametrize("matched", [True, False])
def test_ddf_of_one_group_is_its_mean(matched: bool) -> None:
    """All or none matched: the mean over edges of quality times T^2 KL, by scipy."""
    arguments = ddf_arguments(1, 2, 4)
    arguments["matched"] = torch.full((2, 4), matched)
    p, q = (softmax(arguments[name].numpy() / 3.0, axis=-1) for name in ("teacher", "student"))
    expected = (9.0 * rel_entr(p, q).sum(-1) * arguments["quality"].numpy()[..., None]).mean()
    assert ddf_loss(**arguments, temperature=3.0).item() == pytest.approx(expected)


def test_ddf_groups_weigh_by_the_root_of_their_size() -> None:
    """One matched query of loss x and nine others of loss y give (x + 3 y) / 4."""
    arguments = ddf_arguments(2, 2, 5)
    for name in ("student", "teacher"):
        arguments[name] = arguments[name][:1, :1].expand(2, 5, 4, 5)
    arguments["matched"] = torch.zeros(2, 5, dtype=torch.bool)
    arguments["matched"][1, 2] = True
    arguments["quality"] = torch.where(arguments["matched"], 0.9, 0.2).double()
    one = ddf_loss(**{**arguments, "quality": torch.ones(2, 5, dtype=torch.float64)}).item()
    assert ddf_loss(**arguments).item() == pytest.approx(one * (0.9 + 3 * 0.2) / 4)


def test_ddf_gradient() -> None:
    """Autograd agrees with the slow loop's differences and passes gradcheck."""
    arguments = ddf_arguments(3, 2, 3)
    student = arguments["student"].requires_grad_()
    assert arguments["matched"].any()
    assert not arguments["matched"].all()
    ddf_loss(**arguments).backward()
    slow = reference.numeric_gradient(lambda x: slow_ddf({**arguments, "student": x}), student.detach())
    torch.testing.assert_close(student.grad, slow, rtol=1e-6, atol=1e-8)
    others = {name: value for name, value in arguments.items() if name != "student"}
    assert torch.autograd.gradcheck(lambda x: ddf_loss(x, **others, temperature=2.0), (student,))


def test_ddf_gives_no_gradient_to_teacher_and_quality() -> None:
    """Only the student learns."""
    arguments = ddf_arguments(4, 2, 4)
    for name in ("student", "teacher", "quality"):
        arguments[name].requires_grad_()
    ddf_loss(**arguments).backward()
    assert bool((arguments["student"].grad != 0).all())
    assert all(arguments[name].grad is None or not arguments[name].grad.any() for name in ("teacher", "quality"))


@LAW
@given(seeds, st.floats(0.1, 20.0))
def test_ddf_is_zero_for_a_student_like_its_teacher(seed: int, scale: float) -> None:
    """Student = teacher up to a constant per edge: no loss, no gradient; any other student costs more."""
    arguments = ddf_arguments(seed, 2, 3)
    arguments["teacher"] = arguments["teacher"] * scale
    arguments["student"] = (arguments["teacher"] + random(seed + 9, 2, 3, 4, 1)).requires_grad_()
    loss = ddf_loss(**arguments)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(arguments["student"].grad, torch.zeros(2, 3, 4, 5, dtype=torch.float64))
    assert ddf_loss(**{**arguments, "student": -arguments["student"].detach()}).item() > 0


@LAW
@given(seeds, st.permutations(range(3)), st.permutations(range(4)))
def test_ddf_ignores_the_order_of_images_and_queries(seed: int, images: list[int], queries: list[int]) -> None:
    """The same permutation of all arguments gives the same loss."""
    arguments = ddf_arguments(seed, 3, 4)
    moved = {name: value[images][:, queries] for name, value in arguments.items()}
    assert ddf_loss(**moved).item() == pytest.approx(ddf_loss(**arguments).item(), rel=1e-9)


@LAW
@given(seeds, st.integers(2, 4))
def test_ddf_of_a_repeated_batch_is_that_of_the_batch(seed: int, times: int) -> None:
    """The loss does not depend on the batch size, nor on how the queries lie in images."""
    arguments = ddf_arguments(seed, 2, 3)
    once = ddf_loss(**arguments).item()
    repeated = {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in arguments.items()}
    assert ddf_loss(**repeated).item() == pytest.approx(once, rel=1e-9)
    flat = {name: value.flatten(0, 1)[None] for name, value in arguments.items()}
    assert ddf_loss(**flat).item() == pytest.approx(once, rel=1e-9)


def test_ddf_without_queries() -> None:
    """Q = 0 gives a zero that still has a gradient."""
    arguments = ddf_arguments(5, 2, 0)
    arguments["student"].requires_grad_()
    loss = ddf_loss(**arguments)
    assert loss.item() == 0
    loss.backward()
    assert arguments["student"].grad.shape == (2, 0, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ddf_computes_halves_in_float32(dtype: torch.dtype) -> None:
    """Half-precision arguments, under autocast too, give the loss of their float32 copies."""
    halves = {
        name: value if value.dtype == torch.bool else value.to(dtype) for name, value in ddf_arguments(6, 2, 5).items()
    }
    floats = {name: value if value.dtype == torch.bool else value.float() for name, value in halves.items()}
    expected = ddf_loss(**floats)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = [ddf_loss(**halves), ddf_loss(**floats)]
    for actual in (ddf_loss(**halves), *under_autocast):
        assert actual.dtype == torch.float32
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
