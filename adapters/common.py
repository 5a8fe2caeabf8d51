"""What the adapters share, whatever the library: swapped modules, seeding, and the criterion that takes the union."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from dfine_plugin.assignment import MatchingCost, match_sets
from dfine_plugin.config import FDRConfig
from dfine_plugin.criterion import FlatPairs, box_losses, distribution_losses, flatten_pairs, mean_over_processes
from dfine_plugin.matching import GOLSDMatcher, Pairs, union_matching
from dfine_plugin.record import FDRRecord, current_scope
from dfine_plugin.validation import check_finite

Host = Any
"""A host model whose parts are found by their names, which differ from host to host: beyond a type checker."""


@dataclass
class Retired:
    """What wrapping took out of a host, for :meth:`~dfine_plugin.registry.Adapter.detach` to put back.

    Attributes:
        modules: the box heads that the FDR head replaces, by their dotted names in the model.
        attributes: what was replaced as a whole (such as a ModuleList, or None where there was none), by dotted name.
        classes: the host's classes of modules that became another class, by their dotted names.
        load_hook: what seeds the model from a baseline's state dict.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, type[nn.Module]] = field(default_factory=dict)
    load_hook: Any = None

    def replace(self, model: Host, name: str, value: Any) -> None:
        """Set the model's attribute of this dotted name, and keep what it was."""
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        self.attributes[name] = getattr(owner, attribute)
        setattr(owner, attribute, value)

    def recast(self, model: Host, name: str, twin: type[nn.Module]) -> None:
        """:func:`recast` the model's module of this dotted name, and keep the class it was of."""
        self.classes[name] = recast(model.get_submodule(name), twin)

    def restore(self, model: Host, like: Tensor) -> None:
        """Put everything back. The retired heads follow a move of the model, to the device and dtype of ``like``."""
        for module in self.modules.values():
            module.to(like).train(model.training)
        for name, value in self.attributes.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, value)
        for name, host_class in self.classes.items():
            recast(model.get_submodule(name), host_class)


def recast(module: nn.Module, twin: type[nn.Module]) -> type[nn.Module]:
    """Turn a module into an instance of a class with another forward, in place, and return the class it had.

    Its parameters, hooks and place in the model stay; and copies and pickles behave, for a class is no closure.
    """
    former = type(module)
    module.__class__ = twin
    return former


def sharing_copy(module: nn.Module) -> Any:
    """A second module of the same class with the same submodules and parameters."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def seed_from_baseline(
    state_dict: dict[str, Any], prefix: str, model: Host, retired: Retired, head: str, ties: Iterable[tuple[str, str]]
) -> None:
    """Before a state dict is loaded: if it is a baseline's, hand over what a strict load would stumble on.

    A baseline has no FDR parameters, which stay as they are, and box heads that the wrapped model has retired, which
    go to where they are kept for unwrapping. All else, the first box head too, loads under its own name.

    Args:
        state_dict: what is about to be loaded, changed in place.
        prefix: of all its keys.
        model: the wrapped model.
        retired: its retired heads.
        head: the dotted name of the FDR head in the model.
        ties: pairs of names of one parameter; a state dict may have one of the two.
    """
    marker = f"{prefix}{head}."
    if any(key.startswith(marker) for key in state_dict):
        return
    for name, module in retired.modules.items():
        for key, parameter in module.state_dict(prefix=f"{prefix}{name}.").items():
            if key in state_dict:
                parameter.copy_(state_dict.pop(key))
    for first, second in ties:
        for missing, present in ((first, second), (second, first)):
            if prefix + present in state_dict:
                state_dict.setdefault(prefix + missing, state_dict[prefix + present])
    own = model.state_dict(prefix=prefix)
    state_dict.update({key: value for key, value in own.items() if key.startswith(marker)})


def check_sets(layers: list[dict[str, Tensor]], others: Mapping[str, dict[str, Tensor]]) -> None:
    """:func:`check_finite` of the decoder layers' and other prediction sets, under names that tell them."""
    sets = {**{f"decoder layer {i}": outputs for i, outputs in enumerate(layers, start=1)}, **others}
    check_finite({f"{key} of {name}": tensor for name, outputs in sets.items() for key, tensor in outputs.items()})


def rename_suffixes(losses: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> dict[str, Tensor]:
    """A loss dict whose keys that end in a key of ``suffixes`` end in its value instead; the first that fits."""

    def renamed(key: str) -> str:
        for suffix, name in suffixes.items():
            if key.endswith(suffix):
                return key.removesuffix(suffix) + name
        return key

    return {renamed(key): value for key, value in losses.items()}


Terms = tuple[list[Tensor], list[Tensor]]
"""FGL of every layer, and DDF of every layer but the last."""


def named_terms(terms: Terms, suffixes: list[str]) -> dict[str, Tensor]:
    """The plugin's terms under their names in a loss dict, with the layers' suffixes in order."""
    fgl, ddf = terms
    named = {f"loss_fgl{suffix}": term for suffix, term in zip(suffixes, fgl, strict=True)}
    # the last layer teaches and has none
    return named | {f"loss_ddf{suffix}": term for suffix, term in zip(suffixes, ddf, strict=False)}


def take_in_idle(losses: dict[str, Tensor]) -> None:
    """Give this batch's idle parameters a gradient of zero, for DistributedDataParallel waits for one."""
    for parameter in current_scope().idle:
        losses["loss_bbox"] = losses["loss_bbox"] + 0 * parameter.sum()


def solve_outputs(
    sets: list[dict[str, Tensor]],
    targets: list[dict[str, Tensor]],
    cost: MatchingCost,
    logits_key: str,
    labels_key: str,
) -> list[Pairs]:
    """:func:`~dfine_plugin.assignment.match_sets` of a host's outputs and targets."""
    return match_sets(
        [outputs[logits_key] for outputs in sets],
        [outputs["pred_boxes"] for outputs in sets],
        [target[labels_key] for target in targets],
        [target["boxes"] for target in targets],
        cost,
    )


class UnionCriterion(nn.Module):
    """Mixin before a host's criterion: box losses of the matched sets over the union, and the same criterion otherwise.

    Call :meth:`match` with all sets first, then the criterion itself, then :meth:`distribution_losses`. Sets that were
    not matched (denoising) keep their own pairs. An instance serves one step.
    """

    matcher: Any
    logits_key = "logits"
    labels_key = "class_labels"

    def matching_cost(self) -> MatchingCost | None:
        """What the host's matcher minimises, where it is one that is known; an unknown one is asked itself."""
        return None

    def match(self, sets: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]], config: FDRConfig) -> None:
        """Match prediction sets of the same queries by the host's matcher, and form their union if the config wants it.

        Args:
            sets: prediction sets with their targets.
            config: whether there is a union.
        """
        cost = self.matching_cost()
        # no bound method: the matcher in a circle with this would keep the step's graph until the next collection
        solve = None
        if cost is not None:
            solve = partial(solve_outputs, cost=cost, logits_key=self.logits_key, labels_key=self.labels_key)
        self.matcher = GOLSDMatcher(self.matcher, solve=solve)
        matches: list[Pairs] = []
        for _, alike in groupby(sets, key=lambda pair: (id(pair[1]), pair[0]["pred_boxes"].shape)):
            group = list(alike)
            targets = group[0][1]
            found = self.matcher.match([outputs for outputs, _ in group], targets)
            matches += [self.distinct(pairs, targets) for pairs in found]
        # for each boxes tensor its box losses, and the pairs and the normaliser that they were taken with
        self.terms: dict[int, dict[str, Tensor]] = {}
        self.latest: tuple[Any, Any] = (None, None)
        self.taken: dict[int, tuple[FlatPairs, float | Tensor]] = {}
        if config.union:
            union = union_matching(matches)
            boxes = [outputs["pred_boxes"] for outputs, _ in sets]
            flat = flatten_pairs(union, [target["boxes"] for target in sets[0][1]], boxes[0].device)
            count = mean_over_processes(len(flat.queries), boxes[0].device)
            for tensor, terms in zip(boxes, box_losses(boxes, flat, count), strict=True):
                self.terms[id(tensor)], self.taken[id(tensor)] = terms, (flat, count)

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
        return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)  # type: ignore[misc]

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
