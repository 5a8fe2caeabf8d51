"""detrex's Group-DETR: Conditional-DETR whose queries, in training, are of several groups, each matched by itself."""

from collections.abc import Sequence
from typing import Any, ClassVar

from projects.group_detr.modeling import GroupDetrTransformerDecoder, GroupHungarianMatcher, GroupSetCriterion
from torch import Tensor

from dfine_plugin.assignment import MatchingCost, SetToMatch
from dfine_plugin.matching import Pairs
from dfine_plugin.registry import register_adapter
from dfine_plugin.validation import FiniteCheck

from .. import union_criterion
from .conditional_detr import FixedPointAdapter, FixedPointDecoder
from .criterion import GOLSDCriterion


class FDRGroupDetrDecoder(FixedPointDecoder, GroupDetrTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDGroupCriterion(GOLSDCriterion, GroupSetCriterion):
    """The host's criterion, fed with the union of each group's matches."""

    group_nums: int

    def groups(self) -> int:
        """How many groups there are: one in evaluation."""
        return self.group_nums if self.training else 1

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not GroupHungarianMatcher:
            return None
        return MatchingCost(matcher.cost_class, matcher.cost_bbox, matcher.cost_giou)

    def ask(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> Pairs:
        return self.matcher(outputs, targets, group_nums=self.groups())

    def solve(self, sets: Sequence[SetToMatch], cost: MatchingCost, check: FiniteCheck) -> list[Pairs]:
        return union_criterion.match_groups(sets, self.groups(), cost, check)


@register_adapter("projects.group_detr.modeling.group_detr.GroupDETR")
class GroupDetrAdapter(FixedPointAdapter):
    """Group-DETR."""

    decoder_classes: ClassVar = {GroupDetrTransformerDecoder: FDRGroupDetrDecoder}
    criterion_classes: ClassVar = {GroupSetCriterion: GOLSDGroupCriterion}
