"""What is not finite is named; what is only large is none of it."""

from __future__ import annotations

import pytest
import torch

from dfine_plugin import NonFiniteError
from dfine_plugin.validation import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_culprit_is_named_with_its_count(value: float, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(2, 3, 4, dtype=dtype, requires_grad=True) for name in ("boxes", "logits", "corners")}
    check_finite(tensors)
    with torch.no_grad():
        tensors["boxes"][0, 1, 2] = value
        tensors["corners"][1] = value
    with pytest.raises(NonFiniteError, match=r"^not finite: boxes \(1 of 24 values\), corners \(12 of 24 values\)$"):
        check_finite(tensors)


def test_opposite_infinities_do_not_cancel() -> None:
    with pytest.raises(NonFiniteError, match="2 of 2"):
        check_finite({"logits": torch.tensor([float("inf"), -float("inf")])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_values_may_add_up_beyond_float32(dtype: torch.dtype) -> None:
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"large": largest, "ordinary": torch.ones(2)})
    with pytest.raises(NonFiniteError, match=r"^not finite: other \(1 of 1 values\)$"):
        check_finite({"large": largest, "other": torch.tensor(float("nan"))})
