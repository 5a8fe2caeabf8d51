"""The weighting function W(n)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from dfine_plugin import weighting_function

from . import reference
from .drawing import LAW, even_bins, scales


def test_defaults_are_the_papers() -> None:
    """N = 32, a = 1/2, c = 1/4: float32 values from -1 to 1."""
    values = weighting_function()
    assert values.shape == (33,)
    assert values.dtype == torch.float32
    assert values[0] == -1
    assert values[32] == 1
    assert torch.equal(values, weighting_function(num_bins=32, a=0.5, c=0.25))


def test_four_bins_by_hand() -> None:
    """The smallest N leaves no curve: -2a, -a, 0, a, 2a."""
    torch.testing.assert_close(weighting_function(4, 0.5, 0.25), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))


def test_eight_bins_by_hand() -> None:
    """With r = 8 the cube root is 2: values c (2^i - 1)."""
    expected = [-14.0, -7.0, -3.0, -1.0, 0.0, 1.0, 3.0, 7.0, 14.0]
    torch.testing.assert_close(weighting_function(8, 7.0, 1.0), torch.tensor(expected))


@LAW
@given(even_bins, scales, scales)
def test_formula(num_bins: int, a: float, c: float) -> None:
    """Every value is the formula's."""
    expected = torch.tensor(reference.weighting(num_bins, a, c), dtype=torch.float64)
    actual = weighting_function(num_bins, a, c)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * (a + c))


@LAW
@given(even_bins, scales, scales)
def test_authors_units(num_bins: int, a: float, c: float) -> None:
    """W = c times the authors' values with reg_scale = 1/c and up = a."""
    expected = c * torch.tensor(reference.published_weighting(num_bins, a, 1 / c), dtype=torch.float64)
    actual = weighting_function(num_bins, a, c)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * (a + c))


@LAW
@given(even_bins, scales, scales)
def test_odd_increasing_and_zero_in_the_middle(num_bins: int, a: float, c: float) -> None:
    """W(N-n) = -W(n) to the last bit, W(N/2) = 0, W(n) < W(n+1), ends at 2a, one before the end at a."""
    values = weighting_function(num_bins, a, c)
    assert torch.equal(values.flip(0), -values)
    assert values[num_bins // 2] == 0
    assert bool((values.diff() > 0).all())
    assert values[-1].item() == pytest.approx(2 * a, rel=1e-6)
    assert values[-2].item() == pytest.approx(a, rel=1e-5)


@LAW
@given(even_bins, scales, scales)
def test_steps_grow_outwards(num_bins: int, a: float, c: float) -> None:
    """Fine bins around zero, coarse ones outside: each step is at least the one before it."""
    steps = weighting_function(num_bins, a, c)[num_bins // 2 :].double().diff()
    assert bool((steps.diff() > -1e-6 * (a + c)).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bins": 31}, r"num_bins.*even"),
        ({"num_bins": 2}, r"num_bins.*4"),
        ({"a": 0.0}, r"\ba\b.*(positive|> ?0|above 0)"),
        ({"a": -0.5}, r"\ba\b.*(positive|> ?0|above 0)"),
        ({"c": 0.0}, r"\bc\b.*(positive|> ?0|above 0)"),
        ({"c": float("nan")}, r"\bc\b.*(positive|finite)"),
    ],
)
def test_refuses_what_has_no_weighting(arguments: dict[str, float], message: str) -> None:
    """An odd or tiny N, or an a or c that is not positive, is a ValueError with the bound."""
    with pytest.raises(ValueError, match=message):
        weighting_function(**arguments)
