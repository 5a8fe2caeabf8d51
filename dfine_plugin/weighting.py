"""The weighting function W(n) of D-FINE: how far each bin of an edge's distribution moves that edge."""

import math

import torch
from torch import Tensor

from .bounds import check_bins


def weighting_function(num_bins: int = 32, a: float = 0.5, c: float = 0.25) -> Tensor:
    """Non-uniform offsets W(0..N) of the bins, in units of the initial box's side (D-FINE, eq. 2).

    With r = a / c + 1::

        W(0) = -2a                                W(N) = 2a
        W(n) =  c - c r^((N - 2n) / (N - 2))      1   <= n <  N/2
        W(n) = -c + c r^((2n - N) / (N - 2))      N/2 <= n <= N-1

    Small steps near zero, where a box needs the fine moves, large ones at the ends. W is odd about N/2, zero there and
    strictly increasing.

    Args:
        num_bins: N, even, at least 4.
        a: the inner range: W(N-1) = a; the two end bins reach 2a.
        c: curvature; the smaller, the finer the steps near zero.

    Returns:
        ``(N + 1,)`` float32.

    Raises:
        ValueError: if N is odd or below 4, or a or c is not a positive number.

    Example:
        >>> weighting_function(8, a=0.5, c=0.25)[4:]
        tensor([0.0000, 0.1106, 0.2700, 0.5000, 1.0000])
    """
    check_bins(num_bins, a, c)
    steps = torch.arange(1, num_bins // 2, dtype=torch.float64)
    inner = c * torch.expm1(2 * steps / (num_bins - 2) * math.log1p(a / c))
    right = torch.cat([inner, inner.new_tensor([2 * a])])
    return torch.cat([-right.flip(0), right.new_zeros(1), right]).float()


def uniform_bins(num_bins: int = 32, a: float = 0.5) -> Tensor:
    """Evenly spaced offsets from -2a to 2a, as GFocal has them: ``(N + 1,)`` float32, in initial-box sides."""
    check_bins(num_bins, a, 1.0)
    half = num_bins // 2
    return (torch.arange(-half, half + 1, dtype=torch.float64) * (2 * a / half)).float()
