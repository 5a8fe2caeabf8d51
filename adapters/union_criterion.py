"""A host's criterion over the union of all layers' matches, with the plugin's terms beside its own, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfine_plugin.assignment import MatchingCost, SetToMatch, match_sets
from dfine_plugin.config import FDRConfig
from dfine_plugin.criterion import (
    FlatPairs,
    box_losses,
    copy_pairs,
    distribution_losses,
    flatten_pairs,
    mean_over_processes,
)
from dfine_plugin.matching import GOLSDMatcher, Pairs, union_matching
from dfine_plugin.record import FDRRecord
from dfine_plugin.validation import FiniteCheck, check_finite

from .class_losses import ClassLosses


def prediction_set(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits and boxes of a host's outputs, without what hangs on them."""
    return {key: outputs[key] for key in ("pred_logits", "pred_boxes")}


def initial_set(record: FDRRecord) -> dict[str, Tensor]:
    """The initial boxes with layer 1's class logits before LQE, as a prediction set."""
    assert record.initial_logits is not None
    return {"pred_logits": record.initial_logits, "pred_boxes": record.initial_boxes}


def layer_names(sets: Sequence[dict[str, Tensor]], record: FDRRecord, of: str = "") -> dict[str, dict[str, Tensor]]:
    """Prediction sets of the last layers of a forward, by the layers' names."""
    first = len(record.boxes) - len(sets) + 1
    return {f"{of}decoder layer {layer}": outputs for layer, outputs in enumerate(sets, start=first)}


def check_of_losses_inputs(record: FDRRecord, sets: Mapping[str, dict[str, Tensor]]) -> FiniteCheck:
    """The check of all predictions that losses are computed from: the corner logits of a forward, prediction sets under
    names that tell them, and what a teacher says."""
    tensors = {f"{key} of {name}": tensor for name, outputs in sets.items() for key, tensor in outputs.items()}
    if record.lesson is not None:
        said = record.lesson.record
        tensors |= {"boxes of the teacher": said.boxes[-1], "corner logits of the teacher": said.corner_logits[-1]}
    layers = enumerate(record.corner_logits, start=1)
    return FiniteCheck(tensors | {f"corner logits of decoder layer {layer}": logits for layer, logits in layers})


def check_losses(losses: Mapping[str, Tensor]) -> None:
    """:func:`check_finite` of a loss dict, on a CPU.

    On an accelerator it would wait for the device once more; what the losses are computed from has been checked.
    """
    if all(loss.device.type == "cpu" for loss in losses.values()):
        check_finite(losses)


def rename_suffixes(losses: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> dict[str, Tensor]:
    """A loss dict whose keys that end in a key of ``suffixes`` end in its value instead; the first that fits."""

    def renamed(key: str) -> str:
        for suffix, name in suffixes.items():
            if key.endswith(suffix):
                return key.removesuffix(suffix) + name
        return key

    return {renamed(key): value for key, value in losses.items()}


WithTargets = tuple[dict[str, Tensor], list[dict[str, Tensor]]]
"""A prediction set, and for each image what it is matched with."""

Terms = tuple[list[Tensor], list[Tensor]]
"""FGL of every layer, and DDF of every layer but the last."""


def named_terms(terms: Terms, suffixes: list[str]) -> dict[str, Tensor]:
    """The plugin's terms under their names in a loss dict, with the layers' suffixes in order."""
    fgl, ddf = terms
    named = {f"loss_fgl{suffix}": term for suffix, term in zip(suffixes, fgl, strict=True)}
    # the last layer teaches and has none
    return named | {f"loss_ddf{suffix}": term for suffix, term in zip(suffixes, ddf, strict=False)}


def weighted_terms(terms: Terms, suffixes: list[str], config: FDRConfig) -> dict[str, Tensor]:
    """:func:`named_terms` with their weights, for hosts whose loss dict holds weighted terms."""
    fgl, ddf = terms
    return named_terms(
        ([config.fgl_weight * term for term in fgl], [config.ddf_weight * term for term in ddf]), suffixes
    )


def take_in_idle(losses: dict[str, Tensor], idle: Sequence[Tensor]) -> None:
    """Give a batch's idle parameters a gradient of zero, for DistributedDataParallel waits for one."""
    for parameter in idle:
        losses["loss_bbox"] = losses["loss_bbox"] + 0 * parameter.sum()


def match_groups(sets: Sequence[SetToMatch], num_groups: int, cost: MatchingCost, check: FiniteCheck) -> list[Pairs]:
    """:func:`match_sets` by groups of queries, each a set of its own; pairs have the queries' places among all."""
    size = sets[0].boxes.shape[1] // num_groups
    groups = [slice(start, start + size) for start in range(0, size * num_groups, size)]
    parts = [one._replace(logits=one.logits[:, g], boxes=one.boxes[:, g]) for one in sets for g in groups]
    matches = iter(match_sets(parts, cost, check))
    return [_joined([next(matches) for _ in groups], [g.start for g in groups]) for _ in sets]


def _joined(groups: list[Pairs], starts: list[int]) -> Pairs:
    """For each image the pairs of all groups, whose first queries have these places."""
    return [
        (
            torch.cat([queries + start for (queries, _), start in zip(of_image, starts, strict=True)]),
            torch.cat([truths for _, truths in of_image]),
        )
        for of_image in zip(*groups, strict=True)
    ]


class UnionCriterion(ClassLosses, nn.Module):
    """Mixin before a host's criterion: box losses of the matched sets over the union, and the same criterion otherwise.

    Call :meth:`match` with all sets first, then the criterion itself, then :meth:`distribution_losses`. Sets that were
    not matched (denoising) keep their own pairs. An instance serves one step.
    """

    matcher: Any

    def matching_cost(self) -> MatchingCost | None:
        """What the host's matcher minimises, where it is one that is known; an unknown one is asked itself."""
        return None

    def match(
        self, sets: list[WithTargets], config: FDRConfig, check: FiniteCheck, apart: Sequence[WithTargets] = ()
    ) -> None:
        """Match prediction sets as the host's matcher does, and form their union if the config wants it.

        Args:
            sets: prediction sets of the same queries, with their targets.
            config: whether there is a union.
            check: settled before anything is matched.
            apart: sets of other queries, which stay out of the union.
        """
        device = sets[0][0]["pred_boxes"].device
        cost = self.matching_cost()
        self.matcher = GOLSDMatcher(self.matcher)
        if cost is None:
            check.settle(check.sums.cpu())
            matches = [self.ask(outputs, targets) for outputs, targets in sets]
        else:
            everything = [*sets, *apart]
            matches = self.solve([self._to_match(*pair) for pair in everything], cost, check)
            # hosts index with them: what lay on the CPU would be copied, and waited for, at every use
            for (outputs, _), pairs in zip(everything, copy_pairs(matches, device), strict=True):
                self.matcher.remember(outputs["pred_boxes"], pairs)
        self.choose_class_loss(config.class_loss)
        # for each boxes tensor its box losses, and the pairs and the normaliser that they were taken with
        self.terms: dict[int, dict[str, Tensor]] = {}
        self.latest: tuple[Any, Any] = (None, None)
        self.taken: dict[int, tuple[FlatPairs, float | Tensor]] = {}
        if config.union:
            united = zip(self.used(matches), sets, strict=False)  # those apart are the last
            union = union_matching([self.distinct(pairs, targets) for pairs, (_, targets) in united])
            boxes = [outputs["pred_boxes"] for outputs, _ in sets]
            flat = flatten_pairs(union, [target["boxes"] for target in sets[0][1]], device)
            count = mean_over_processes(len(flat.queries), device)
            for tensor, terms in zip(boxes, box_losses(boxes, flat, count), strict=True):
                self.terms[id(tensor)], self.taken[id(tensor)] = terms, (flat, count)

    def ask(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Pairs:
        """The host's matcher's answer."""
        return self.matcher(outputs, targets)

    def solve(self, sets: Sequence[SetToMatch], cost: MatchingCost, check: FiniteCheck) -> list[Pairs]:
        """Match the sets, for each image all queries at once."""
        return match_sets(sets, cost, check)

    def _to_match(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> SetToMatch:
        labels, truths = ([target[key] for target in targets] for key in (self.labels_key, "boxes"))
        return SetToMatch(outputs[self.logits_key], outputs["pred_boxes"], labels, truths)

    def used(self, matches: list[Pairs]) -> list[Pairs]:
        """What the host takes the sets' losses over, where that is not each set's own match."""
        return matches

    def distinct(self, pairs: Pairs, targets: list[dict[str, Tensor]]) -> Pairs:
        """The pairs with one index for each truth, where a host repeats its truths."""
        return pairs

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        if loss == "boxes":
            boxes = outputs["pred_boxes"]
            if id(boxes) not in self.terms:
                # denoising sets come with one object of pairs
                known, flat = self.latest
                if known is not indices:
                    flat = flatten_pairs(indices, [target["boxes"] for target in targets], boxes.device)
                    self.latest = indices, flat
                self.taken[id(boxes)] = flat, num_boxes
                (self.terms[id(boxes)],) = box_losses([boxes], flat, num_boxes)
            return self.terms[id(boxes)]
        return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)

    def distribution_losses(
        self,
        record: FDRRecord,
        sets: list[dict[str, Tensor]],
        config: FDRConfig,
        over_processes: bool = True,
    ) -> Terms:
        """FGL and DDF of a group of queries, over the pairs of their box losses, after the criterion has run.

        Args:
            record: their predictions, layer by layer.
            sets: the layers' prediction sets, in order.
            config: temperature, and whether there is DDF.
            over_processes: see :func:`~dfine_plugin.criterion.distribution_losses`; not for queries that only some
                processes may have.
        """
        pairs = [self.taken[id(outputs["pred_boxes"])][0] for outputs in sets]
        num_boxes = self.taken[id(sets[-1]["pred_boxes"])][1]
        return distribution_losses(record, sets[-1][self.logits_key], pairs, num_boxes, config, over_processes)
