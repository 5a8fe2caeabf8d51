"""The criteria of RT-DETR's own repository, by class, each with the one that is fed with the union."""

from importlib.util import find_spec
from typing import Any

from src.zoo.rtdetr import rtdetr_criterion
from torch import Tensor, nn

from dfine_plugin.errors import UnsupportedModelError, WrapStateError
from dfine_plugin.matching import Pairs

from .. import host_parts
from .criterion import GOLSDCriterion


class IndicesByName(GOLSDCriterion):
    """Mixin before a criterion of version 2's folder, whose matcher answers with a dict."""

    def ask(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Pairs:
        pairs = self.matcher.matcher(outputs, targets)["indices"]
        self.matcher.remember(outputs["pred_boxes"], pairs)
        return pairs

    def match(self, *args: Any) -> None:
        super().match(*args)
        self.matcher = NamingIndices(self.matcher)


class NamingIndices(nn.Module):
    """A matcher whose pairs come under the name of ``indices``."""

    def __init__(self, matcher: nn.Module) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Pairs]:
        return {"indices": self.matcher(outputs, targets)}


if find_spec("src.zoo.rtdetr.rtdetrv2_criterion") is None:

    class GOLSDSetCriterion(GOLSDCriterion, rtdetr_criterion.SetCriterion):
        """The criterion of version 1's folder."""

        host_class = rtdetr_criterion.SetCriterion

    TWINS: list[type[GOLSDCriterion]] = [GOLSDSetCriterion]
else:
    from src.zoo.rtdetr import rtdetrv2_criterion

    class GOLSDRTDETRCriterion(IndicesByName, rtdetr_criterion.RTDETRCriterion):
        """The criterion of version 1 in version 2's folder."""

        host_class = rtdetr_criterion.RTDETRCriterion

    class GOLSDRTDETRCriterionv2(IndicesByName, rtdetrv2_criterion.RTDETRCriterionv2):
        """The criterion of version 2."""

        host_class = rtdetrv2_criterion.RTDETRCriterionv2

        def used(self, matches: list[Pairs]) -> list[Pairs]:
            if not self.share_matched_indices:
                return matches
            num_shared = len(matches) - self.num_encoder_sets
            return [matches[0]] * num_shared + matches[num_shared:]

    TWINS = [GOLSDRTDETRCriterion, GOLSDRTDETRCriterionv2]

CRITERIA = {twin.host_class: twin for twin in TWINS}
"""From each host criterion class to its subclass that is fed with the union."""


def wrap_criterion(criterion: Any) -> None:
    """Turn a host's criterion into its subclass, in place."""
    name = type(criterion).__name__
    if isinstance(criterion, GOLSDCriterion):
        raise WrapStateError(f"this {name} is wrapped already: each model takes a criterion of its own")
    if type(criterion) not in CRITERIA:
        expected = " or ".join(cls.__name__ for cls in CRITERIA)
        raise UnsupportedModelError(f"wrap_criterion takes a {expected} for this model, got {name}")
    if "boxes" not in criterion.losses:
        raise UnsupportedModelError(f"this {name} has no losses of boxes: {criterion.losses}")
    if getattr(criterion, "boxes_weight_format", None) is not None:
        raise UnsupportedModelError(
            f"this {name} weighs its losses by each set's own pairs "
            f"(boxes_weight_format={criterion.boxes_weight_format!r}), which a union has not: set it to None"
        )
    host_parts.recast(criterion, CRITERIA[type(criterion)])


def unwrap_criterion(criterion: GOLSDCriterion) -> None:
    """Undo :func:`wrap_criterion`."""
    host_parts.recast(criterion, criterion.host_class)
