"""The configuration: its bounds, its JSON, its bins."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfine_plugin import FDRConfig

from . import reference
from .drawing import LAW, even_bins, scales

configs = st.builds(
    FDRConfig,
    num_bins=even_bins,
    a=scales,
    c=scales,
    temperature=st.floats(0.1, 20.0),
    residual_scale=st.floats(0.1, 20.0),
    fgl_weight=st.floats(0.0, 5.0),
    ddf_weight=st.floats(0.0, 5.0),
    union=st.booleans(),
    ddf=st.booleans(),
    lqe=st.booleans(),
    weighting=st.sampled_from(["nonuniform", "uniform"]),
    class_loss=st.sampled_from(["host", "mal"]),
    trainable=st.sampled_from(["all", "head"]),
    distribution_losses_train=st.sampled_from(["all", "head"]),
    initial_layer=st.none() | st.integers(1, 12),
    box_refinement=st.booleans(),
)

POSITIVE = r"(positive|> ?0|above 0|greater than 0)"
FINITE = rf"(finite|{POSITIVE})"
NOT_NEGATIVE = r"(negative|>= ?0|at least 0)"


def test_the_papers_recipe() -> None:
    """N = 32, a = 1/2, c = 1/4, T = 5, FGL 0.15, DDF 1.5, union, DDF and LQE on, residuals as they are."""
    config = FDRConfig.paper()
    assert (config.num_bins, config.a, config.c) == (32, 0.5, 0.25)
    assert (config.temperature, config.fgl_weight, config.ddf_weight) == (5.0, 0.15, 1.5)
    assert config.residual_scale == 1.0
    assert (config.union, config.ddf, config.weighting, config.box_refinement) == (True, True, "nonuniform", False)
    assert config.lqe
    assert config.initial_layer == 1
    assert FDRConfig.paper(num_bins=16) == dataclasses.replace(config, num_bins=16)


def test_the_default_departs_from_the_paper_where_it_was_measured() -> None:
    """In these settings, and in nothing else."""
    measured = {"residual_scale": 2.0, "lqe": False, "union": False, "ddf": False, "initial_layer": None}
    assert dataclasses.replace(FDRConfig.paper(), **measured) == FDRConfig()


def test_frozen() -> None:
    """A validated config cannot be made invalid afterwards."""
    config = FDRConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_bins = 31
    assert dataclasses.replace(config, a=1.0) != config
    with pytest.raises(ValueError, match="num_bins"):
        dataclasses.replace(config, num_bins=31)


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("num_bins", 31, "even"),
        ("num_bins", 5, "even"),
        *[("num_bins", value, "4") for value in (2, 0, -4)],
        *[(field, value, POSITIVE) for field in ("a", "c", "temperature", "residual_scale") for value in (0.0, -1.0)],
        *[
            (field, float(value), FINITE)
            for field in ("a", "c", "temperature", "residual_scale")
            for value in ("inf", "nan")
        ],
        *[(field, value, NOT_NEGATIVE) for field in ("fgl_weight", "ddf_weight") for value in (-0.1, float("-inf"))],
        ("weighting", "gaussian", "nonuniform"),
        ("weighting", "", "uniform"),
        ("trainable", "backbone", "'all' or 'head'"),
        ("distribution_losses_train", None, "'all' or 'head'"),
        ("class_loss", "focal", "'host' or 'mal'"),
        ("initial_layer", 0, "an integer of at least 1"),
        ("initial_layer", 1.0, "an integer of at least 1"),
        ("initial_layer", True, "an integer of at least 1"),
    ],
)
def test_out_of_bounds(field: str, value: float | str, bound: str) -> None:
    """The error names the field and its bound."""
    with pytest.raises(ValueError, match=bound) as caught:
        FDRConfig(**{field: value})
    assert re.search(rf"\b{field}\b", str(caught.value))


@pytest.mark.parametrize("field", ["fgl_weight", "ddf_weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_finite(field: str, value: float) -> None:
    """A weight that would make every loss non-finite is refused."""
    with pytest.raises(ValueError, match=field):
        FDRConfig(**{field: value})


def test_smallest_config() -> None:
    """The bounds themselves are allowed."""
    assert len(FDRConfig(num_bins=4, fgl_weight=0.0, ddf_weight=0.0).bin_values()) == 5


@LAW
@given(configs)
def test_round_trips(config: FDRConfig) -> None:
    """Dict and JSON give an equal config back, and name a version and every field."""
    assert FDRConfig.from_dict(config.to_dict()) == config
    assert FDRConfig.from_json(config.to_json()) == config
    written = json.loads(config.to_json())
    assert written == config.to_dict()
    assert written.keys() == {"version", *(field.name for field in dataclasses.fields(FDRConfig))}
    for field in dataclasses.fields(FDRConfig):
        assert written[field.name] == getattr(config, field.name)


def test_from_dict_leaves_its_argument_alone() -> None:
    """Reading a dict twice gives the same."""
    written = FDRConfig(a=1.0).to_dict()
    before = dict(written)
    FDRConfig.from_dict(written)
    assert written == before


def test_settings_written_before_initial_layer_have_the_first() -> None:
    """Which they were made with; settings that somebody chooses have the best one known."""
    written = FDRConfig().to_dict()
    assert FDRConfig.from_dict(written) == FDRConfig()
    del written["initial_layer"]
    assert FDRConfig.from_dict(written) == FDRConfig(initial_layer=1)
    assert FDRConfig.from_dict({"a": 1.0}) == FDRConfig(a=1.0)


def test_unknown_keys_are_refused() -> None:
    """A misspelt key is an error that names it."""
    written = {**FDRConfig().to_dict(), "num_bin": 16}
    with pytest.raises(ValueError, match=r"num_bin\b"):
        FDRConfig.from_dict(written)
    with pytest.raises(ValueError, match=r"num_bin\b"):
        FDRConfig.from_json(json.dumps(written))


def test_unsupported_versions_are_refused() -> None:
    """A file of a later version is an error that names the version."""
    written = {**FDRConfig().to_dict(), "version": 999}
    with pytest.raises(ValueError, match=r"version.*999|999.*version"):
        FDRConfig.from_dict(written)
    with pytest.raises(ValueError, match=r"version.*999|999.*version"):
        FDRConfig.from_json(json.dumps(written))


def test_read_values_are_validated() -> None:
    """A file cannot bring in what the constructor refuses."""
    with pytest.raises(ValueError, match="even"):
        FDRConfig.from_dict({**FDRConfig().to_dict(), "num_bins": 31})


@LAW
@given(configs)
def test_bin_values(config: FDRConfig) -> None:
    """W of the paper, or equal steps from -2a to 2a; float32 of length N + 1."""
    if config.weighting == "uniform":
        expected = [2 * config.a * (2 * n / config.num_bins - 1) for n in range(config.num_bins + 1)]
    else:
        expected = reference.weighting(config.num_bins, config.a, config.c)
    actual = config.bin_values()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6 * (config.a + config.c)
    )
    assert actual[config.num_bins // 2] == 0
