"""What comes from outside, whatever it is: an answer that can be used, or one of the errors that say what is wrong.

Few examples, and always the same ones; ``DFINE_EXAMPLES=10000`` draws so many new ones for each test.
"""

import json
import math
import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfine_plugin import FDRConfig, FDRHead, InvalidTargetError, SettingsMismatchError
from dfine_plugin.validation import check_targets

LAW = settings(max_examples=int(os.environ.get("DFINE_EXAMPLES", "200")))
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-5, 70), st.just(10**400))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(["uniform", "head"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)
NAMES = st.one_of(st.sampled_from([*FDRConfig().to_dict()]), st.text(max_size=5))


@LAW
@given(st.one_of(st.dictionaries(NAMES, VALUES, max_size=6), VALUES))
def test_settings_are_taken_or_refused(content: Any) -> None:
    try:
        config = FDRConfig.from_json(json.dumps(content))
    except ValueError:
        return
    values = config.bin_values()
    assert values.isfinite().all()
    assert (values.diff() > 0).all()
    assert FDRConfig.from_json(config.to_json()) == config
    assert FDRHead(4, 1, config).get_extra_state().isfinite().all()


TENSORS = st.builds(
    lambda shape, dtype, fill, seed: _tensor(shape, dtype, fill, seed),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.bool, torch.uint8]),
    st.sampled_from([None, math.nan, math.inf, -1.0, 0.0, 1e30]),
    st.integers(0, 2**31),
)


def _tensor(shape: list[int], dtype: torch.dtype, fill: float | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    if fill is not None and values.numel():
        values.view(-1)[0] = fill
    return values.to(dtype)


@LAW
@given(st.one_of(TENSORS, VALUES))
def test_settings_of_a_state_dict_are_the_heads_or_refused(state: Any) -> None:
    head = FDRHead(4, 1, FDRConfig())
    with pytest.raises(SettingsMismatchError):
        head.set_extra_state(state)


BOXES = st.lists(st.lists(st.floats(0.0625, 1, width=32), min_size=4, max_size=4), max_size=3).map(
    lambda rows: torch.tensor(rows).reshape(-1, 4)
)
LABELS = st.lists(st.integers(-1, 4), max_size=3).map(lambda values: torch.tensor(values, dtype=torch.int64))
TARGETS = st.dictionaries(
    st.one_of(st.sampled_from(["boxes", "class_labels"]), st.integers(0, 3)),
    st.one_of(BOXES, LABELS, TENSORS, VALUES, TENSORS.map(lambda tensor: tensor.numpy())),
    max_size=3,
)


@LAW
@given(st.one_of(st.lists(st.one_of(TARGETS, VALUES), max_size=3), VALUES))
def test_targets_are_usable_or_refused(targets: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_targets(targets, 3, "class_labels", "boxes")
        except InvalidTargetError:
            return
    for target in targets:
        boxes, labels = target["boxes"], target["class_labels"]
        assert boxes.reshape(-1, 4).isfinite().all()
        assert ((labels >= 0) & (labels < 3)).all()
        assert len(labels) == len(boxes.reshape(-1, 4))


@LAW
@given(st.lists(st.tuples(BOXES, LABELS), min_size=1, max_size=3))
def test_good_targets_pass(pairs: list[tuple[Tensor, Tensor]]) -> None:
    targets = []
    for boxes, labels in pairs:
        count = min(len(boxes), len(labels))
        targets.append({"boxes": boxes[:count], "class_labels": labels[:count].clamp(0, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_targets(targets, 3, "class_labels", "boxes", images=torch.zeros(len(targets), 3, 2, 2))
