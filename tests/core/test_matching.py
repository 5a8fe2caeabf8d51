"""The union of the prediction sets' matchings."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfine_plugin import union_matching

from . import reference
from .drawing import LAW, to_indices, to_pairs
from .reference import Pairs


@st.composite
def one_to_one(draw: st.DrawFn, queries: int, truths: list[int]) -> Pairs:
    """A partial matching: no query twice, no truth twice, in any order."""
    chosen = draw(st.lists(st.sampled_from(truths), unique=True, max_size=queries)) if truths else []
    voters = draw(st.permutations(range(queries)))
    return list(zip(voters, chosen, strict=False))


@st.composite
def prediction_sets(draw: st.DrawFn) -> list[list[Pairs]]:
    """One to six sets over one to three images; few queries, so that votes collide; truths of any index."""
    images = draw(st.integers(1, 3))
    queries = draw(st.integers(1, 5))
    truths = [draw(st.sampled_from([[], [0], [0, 1], [0, 1, 2, 3], [2, 7, 1000003]])) for _ in range(images)]
    count = draw(st.integers(1, 6))
    return [[draw(one_to_one(queries, truths[image])) for image in range(images)] for _ in range(count)]


def union_of(sets: list[list[Pairs]]) -> list[Pairs]:
    """The function under test on plain pairs."""
    return to_pairs(union_matching([to_indices(matching) for matching in sets]))


@LAW
@given(prediction_sets())
def test_union_counts_votes(sets: list[list[Pairs]]) -> None:
    """What a Counter over all pairs finds: queries ascending, each once."""
    actual = union_of(sets)
    assert actual == reference.union(sets)
    for pairs in actual:
        queries = [query for query, _ in pairs]
        assert queries == sorted(set(queries))


@LAW
@given(prediction_sets(), st.randoms(use_true_random=False))
def test_union_ignores_the_order_of_sets_and_pairs(sets: list[list[Pairs]], chance: random.Random) -> None:
    """Shuffled sets, and shuffled pairs within them, give the same union."""
    shuffled = [[chance.sample(pairs, len(pairs)) for pairs in matching] for matching in sets]
    chance.shuffle(shuffled)
    assert union_of(shuffled) == union_of(sets)


@LAW
@given(prediction_sets(), st.randoms(use_true_random=False))
def test_union_permutes_with_the_images(sets: list[list[Pairs]], chance: random.Random) -> None:
    """Images do not see each other."""
    order = chance.sample(range(len(sets[0])), len(sets[0]))
    expected = union_of(sets)
    assert union_of([[matching[image] for image in order] for matching in sets]) == [expected[i] for i in order]


@LAW
@given(prediction_sets())
def test_union_of_equal_sets_is_the_set(sets: list[list[Pairs]]) -> None:
    """A set repeated is itself, queries ascending."""
    assert union_of([sets[0]] * len(sets)) == [sorted(pairs) for pairs in sets[0]]


def test_union_by_hand() -> None:
    """The majority wins, a tie goes to the lowest truth, a truth may have several queries."""
    sets = [[[(4, 1), (0, 2)]], [[(4, 0), (0, 1)]], [[(4, 1), (3, 0)]], [[(3, 1), (5, 1)]]]
    assert union_of(sets) == [[(0, 1), (3, 0), (4, 1), (5, 1)]]


def test_union_of_images_without_pairs() -> None:
    """An image without truths keeps an empty place between its neighbours."""
    sets = [[[(1, 0)], [], [(2, 1)]], [[(1, 0)], [], []]]
    assert union_of(sets) == [[(1, 0)], [], [(2, 1)]]
    assert union_of([[[], []], [[], []]]) == [[], []]


def test_union_of_nothing() -> None:
    """Sets of no images have a union of no images; without a set nobody knows the images, which is an error."""
    assert list(union_matching([[], []])) == []
    with pytest.raises(ValueError, match="at least one set"):
        union_matching([])


def test_union_of_sets_that_disagree_on_the_images() -> None:
    """Sets of different numbers of images are an error that gives the numbers."""
    with pytest.raises(ValueError, match=r"2, 1"):
        union_matching([to_indices([[], []]), to_indices([[]])])


def test_union_is_fast() -> None:
    """14 sets of 32 images with 300 truths each take a fraction of a second, whatever else the machine does."""
    generator = torch.Generator().manual_seed(0)
    sets = [
        [(torch.randperm(900, generator=generator)[:300], torch.randperm(300, generator=generator)) for _ in range(32)]
        for _ in range(14)
    ]
    start = time.process_time()
    actual = union_matching(sets)
    assert time.process_time() - start < 2.0
    assert to_pairs(actual[:1]) == reference.union([to_pairs(matching[:1]) for matching in sets])
