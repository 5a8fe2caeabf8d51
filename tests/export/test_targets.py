"""GPUs by name."""

import pytest

from dfine_plugin.tools.targets import GPUS, compute_capability


@pytest.mark.parametrize(
    ("target", "capability"),
    [
        ("sm75", "sm75"),
        ("SM_90", "sm90"),
        ("7.5", "sm75"),
        ("12.0", "sm120"),
        ("T4", "sm75"),
        ("Tesla T4", "sm75"),
        ("a100", "sm80"),
        ("NVIDIA L4", "sm89"),
        ("NVIDIA GeForce RTX 4090", "sm89"),
        ("rtx-3090", "sm86"),
    ],
)
def test_a_gpu_and_its_compute_capability_are_the_same_target(target: str, capability: str) -> None:
    assert compute_capability(target) == capability


def test_every_name_that_an_error_lists_is_taken() -> None:
    with pytest.raises(ValueError, match="target 'T1000' is no compute capability such as sm75, and none of the GPUs"):
        compute_capability("T1000")
    for name, capability in GPUS.items():
        assert compute_capability(name) == capability
