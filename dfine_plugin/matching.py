"""GO matching: one set of (query, truth) pairs from the matches of all layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]
"""For each image the matched query indices and, alike in order, the truths' indices: int64, ``(n,)`` each."""


def union_matching(sets: Sequence[Pairs]) -> Pairs:
    """The union of several one-to-one matchings (D-FINE, section 4.2).

    Each (query, truth) pair is counted over all sets; each query takes the truth it met most often, so that a truth can
    have several queries. Between truths met equally often the lowest index wins, whatever the order of the sets.

    Args:
        sets: for each prediction set (layers, initial boxes, encoder proposals), for each image, the pair
            ``(query indices (n,), truth indices (n,))``, int64.

    Returns:
        For each image ``(query indices, truth indices)``, by ascending query.

    Raises:
        ValueError: if there is no set, or the sets differ in their number of images.
    """
    if not sets:
        raise ValueError("union_matching needs at least one set of matches")
    num_images = len(sets[0])
    if any(len(images) != num_images for images in sets):
        raise ValueError(f"the sets hold matches for {[len(images) for images in sets]} images; they must agree")
    flat = [(image, queries, truths) for images in sets for image, (queries, truths) in enumerate(images)]
    if not sum(len(queries) for _, queries, _ in flat):
        return list(sets[0])
    queries = torch.cat([q for _, q, _ in flat])
    truths = torch.cat([t for _, _, t in flat])
    image = torch.cat([torch.full_like(q, i) for i, q, _ in flat])

    # One integer a pair counts the pairs by one sort. Then one integer a vote, the higher the more frequent and, among
    # equals, the lower the truth, elects each query's truth by a maximum.
    num_queries, num_truths = queries.max() + 1, truths.max() + 1
    pairs, counts = torch.unique((image * num_queries + queries) * num_truths + truths, return_counts=True)
    voters, voter = torch.unique_consecutive(pairs // num_truths, return_inverse=True)
    votes = counts * num_truths + (num_truths - 1 - pairs % num_truths)
    elected = torch.zeros_like(voters).scatter_reduce_(0, voter, votes, "amax")
    truths = num_truths - 1 - elected % num_truths
    sizes = torch.bincount(voters // num_queries, minlength=num_images).tolist()
    return list(zip((voters % num_queries).split(sizes), truths.split(sizes), strict=True))


class GOLSDMatcher(nn.Module):
    """A host's matcher that remembers what it matched within one training step, and gives the union.

    Drop-in for the host's matcher: called with a set's outputs and the targets it answers as the host's does. The
    answer is kept under the identity of the set's boxes, since hosts rebuild their dicts between matching and loss; a
    set asked for twice is solved once, and not at all if the answer was told. Nothing is kept in copies or pickles.

    Args:
        matcher: ``matcher(outputs, targets) -> Pairs``.
        boxes_key: the key of the boxes tensor in ``outputs``.
    """

    def __init__(self, matcher: Callable[..., Pairs], boxes_key: str = "pred_boxes") -> None:
        super().__init__()
        self.matcher = matcher
        self.boxes_key = boxes_key
        self._memory: dict[int, tuple[Tensor, Pairs]] = {}

    def forward(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *args: Any, **kwargs: Any) -> Pairs:
        """The host's match of one prediction set, solved at most once for each boxes tensor."""
        boxes = outputs[self.boxes_key]
        if not self.knows(boxes):
            self.remember(boxes, self.matcher(outputs, targets, *args, **kwargs))
        return self._memory[id(boxes)][1]

    def remember(self, boxes: Tensor, pairs: Pairs) -> None:
        """What to answer for the set with this boxes tensor."""
        # the tensor is kept beside the answer, so that its identity cannot be taken over by another one
        self._memory[id(boxes)] = (boxes, pairs)

    def knows(self, boxes: Tensor) -> bool:
        """Whether the set with this boxes tensor has been matched since the last :meth:`clear`."""
        return id(boxes) in self._memory

    def union(self) -> Pairs:
        """:func:`union_matching` over every set matched since the last :meth:`clear`."""
        return union_matching([pairs for _, pairs in self._memory.values()])

    def clear(self) -> None:
        """Forget every match."""
        self._memory.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": {}}
