"""The matcher that remembers what it matched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin import GOLSDMatcher

from . import reference
from .drawing import Indices, to_indices, to_pairs


class DiagonalMatcher(nn.Module):
    """A host matcher: the first queries get the truths, shifted by one more at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = []

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Indices:
        """Keeps what it was given."""
        shift = len(self.calls)
        self.calls.append((outputs, targets))
        return [(torch.arange(len(t["boxes"])) + shift, torch.arange(len(t["boxes"]))) for t in targets]


def scene(seed: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two images with two and no truths."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {"pred_logits": torch.rand(2, 6, 3, generator=generator), "pred_boxes": torch.rand(2, 6, 4)}
    return outputs, [{"labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4)}, {"boxes": torch.zeros(0, 4)}]


def test_matcher_answers_as_the_host_does() -> None:
    """The host sees the very outputs and targets, and its answer comes back."""
    host = DiagonalMatcher()
    golsd = GOLSDMatcher(host)
    assert isinstance(golsd, nn.Module)
    outputs, targets = scene()
    assert to_pairs(golsd(outputs, targets)) == [[(0, 0), (1, 1)], []]
    assert host.calls[0][0]["pred_boxes"] is outputs["pred_boxes"]
    assert host.calls[0][0]["pred_logits"] is outputs["pred_logits"]
    assert host.calls[0][1] is targets


def test_matcher_takes_a_plain_function() -> None:
    """A host matcher need not be a module."""
    golsd = GOLSDMatcher(lambda outputs, targets: to_indices([[(3, 0)], []]))
    assert to_pairs(golsd(*scene())) == [[(3, 0)], []]
    assert to_pairs(golsd.union()) == [[(3, 0)], []]


def test_matcher_remembers_by_the_boxes_tensor() -> None:
    """The same tensor in another dict is not matched again; an equal tensor is."""
    host = DiagonalMatcher()
    golsd = GOLSDMatcher(host)
    outputs, targets = scene()
    assert not golsd.knows(outputs["pred_boxes"])
    first = to_pairs(golsd(outputs, targets))
    assert golsd.knows(outputs["pred_boxes"])
    assert to_pairs(golsd(dict(outputs), targets)) == first
    assert len(host.calls) == 1
    twin = {**outputs, "pred_boxes": outputs["pred_boxes"].clone()}
    assert not golsd.knows(twin["pred_boxes"])
    assert to_pairs(golsd(twin, targets)) != first
    assert len(host.calls) == 2


def test_matcher_gives_the_answer_that_it_was_told() -> None:
    """The host is not asked; the answer is part of the union."""
    host = DiagonalMatcher()
    golsd = GOLSDMatcher(host)
    outputs, targets = scene()
    golsd.remember(outputs["pred_boxes"], to_indices([[(4, 0), (5, 1)], []]))
    assert to_pairs(golsd(outputs, targets)) == to_pairs(golsd.union()) == [[(4, 0), (5, 1)], []]
    assert not host.calls


def test_matcher_is_not_fooled_by_a_recycled_address() -> None:
    """A tensor that is gone answers for no later one."""
    calls: list[int] = []

    def host(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Indices:
        calls.append(len(calls))
        return to_indices([[(len(calls), 0)]])

    golsd = GOLSDMatcher(host)
    answers = [to_pairs(golsd({"pred_boxes": torch.zeros(1, 30, 4)}, [{}])) for _ in range(20)]
    assert len(calls) == 20
    assert answers == [[[(call, 0)]] for call in range(1, 21)]


def test_matcher_gives_the_union_of_what_it_remembers() -> None:
    """The union of all answers, each set counted once however often it was asked for."""
    answers = [[[(0, 1)], [(2, 0)]], [[(0, 0), (1, 1)], []], [[(0, 1)], [(2, 1)]]]
    waiting = iter(answers)
    golsd = GOLSDMatcher(lambda outputs, targets: to_indices(next(waiting)))
    boxes = [torch.rand(2, 3, 4) for _ in answers]
    for tensor in (boxes[0], boxes[1], boxes[1], boxes[1], boxes[2]):
        golsd({"pred_boxes": tensor}, [{}, {}])
    assert to_pairs(golsd.union()) == reference.union(answers) == [[(0, 1), (1, 1)], [(2, 0)]]


def test_matcher_forgets_when_cleared() -> None:
    """After clear nothing is known and the union starts anew."""
    host = DiagonalMatcher()
    golsd = GOLSDMatcher(host)
    outputs, targets = scene()
    golsd(outputs, targets)
    golsd.clear()
    assert not golsd.knows(outputs["pred_boxes"])
    golsd(outputs, targets)
    assert len(host.calls) == 2
    assert to_pairs(golsd.union()) == [[(1, 0), (2, 1)], []]


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_carry_no_memory(duplicate) -> None:
    """A copy knows nothing, and what it learns stays its own."""
    golsd = GOLSDMatcher(DiagonalMatcher())
    outputs, targets = scene()
    golsd(outputs, targets)
    twin = duplicate(golsd)
    assert not twin.knows(outputs["pred_boxes"])
    assert golsd.knows(outputs["pred_boxes"])
    other, _ = scene(1)
    twin(other, targets)
    assert twin.knows(other["pred_boxes"])
    assert not golsd.knows(other["pred_boxes"])
    twin.clear()
    assert golsd.knows(outputs["pred_boxes"])


def test_memory_is_no_part_of_the_state_dict() -> None:
    """A checkpoint of a criterion with a filled memory holds no more than that of an empty one."""
    golsd = GOLSDMatcher(DiagonalMatcher())
    golsd(*scene())
    assert golsd.state_dict() == {}
