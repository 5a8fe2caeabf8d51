"""Criteria of RT-DETR's own repository, fed with the union and the plugin's terms."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from src.zoo.rtdetr.matcher import HungarianMatcher
from torch import Tensor, nn

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.config import FDRConfig
from dfine_plugin.record import FDRRecord

from .. import host_parts, union_criterion

HANDOVER = "fdr"
"""The key of the :class:`Handover` among a wrapped model's outputs in training."""


@dataclass
class Handover:
    """What a wrapped model's outputs carry to its criterion, beside the host's own.

    Attributes:
        record: of the forward.
        config: which terms there are, and their weights.
        idle: the parameters that the batch leaves without a gradient.
    """

    record: FDRRecord
    config: FDRConfig
    idle: list[Tensor]


class GOLSDCriterion(union_criterion.UnionCriterion):
    """Mixin before a host's criterion: the same losses, box losses over the union, and the plugin's terms with them.

    The initial boxes are one more auxiliary set of the host's, of the denoising queries as well. Outputs of a model in
    evaluation, or of one that is not wrapped, carry no :class:`Handover`: for these it is the host's.
    """

    logits_key = "pred_logits"
    labels_key = "labels"
    class_losses: ClassVar = {"vfl": "loss_vfl", "focal": "loss_focal"}
    host_class: ClassVar[type[nn.Module]]
    num_encoder_sets: int

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not HungarianMatcher or not matcher.use_focal_loss:
            return None
        return MatchingCost(matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, matcher.alpha, matcher.gamma)

    def forward(self, outputs, targets, **kwargs):
        # what a call remembers goes with its copy: nothing is kept on the module
        twin = host_parts.sharing_copy(self)
        if HANDOVER in outputs:
            return twin.losses_of(outputs, targets, **kwargs)
        host_parts.recast(twin, self.host_class)
        return twin(outputs, targets, **kwargs)

    def losses_of(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], **kwargs: Any) -> dict[str, Tensor]:
        """The loss dict, on an instance for this call alone."""
        handover: Handover = outputs[HANDOVER]
        count = outputs["pred_boxes"].shape[1]
        matched = handover.record.queries(slice(-count, None))
        auxiliary, known = outputs.get("aux_outputs", []), outputs.get("dn_aux_outputs", [])
        num_auxiliary = len(handover.record.boxes) - 1 if auxiliary else 0
        layers = [*auxiliary[:num_auxiliary], union_criterion.prediction_set(outputs)]
        # version 1 has the encoder's set behind the layers'
        encoder = [*auxiliary[num_auxiliary:], *outputs.get("enc_aux_outputs", [])]
        initial = union_criterion.initial_set(matched)
        named = {**union_criterion.layer_names(layers, matched), "the initial boxes": initial}
        named |= dict(zip(["the encoder"], encoder, strict=False))
        outputs = {**outputs, "aux_outputs": [*auxiliary, initial]}
        if known:
            own = handover.record.queries(slice(0, -count))
            known_initial = union_criterion.initial_set(own)
            outputs["dn_aux_outputs"] = [*known, known_initial]
            named |= union_criterion.layer_names(known, own, of="the denoising queries in ")
            named["the denoising queries' initial boxes"] = known_initial

        self.num_encoder_sets = len(encoder)
        united = [(of_layer, targets) for of_layer in (layers[-1], *layers[:-1], initial)]
        united += [(of_encoder, self.encoder_targets(outputs, targets)) for of_encoder in encoder]
        check = union_criterion.check_of_losses_inputs(handover.record, named)
        self.match(united, handover.config, check)
        losses = super().forward(outputs, targets, **kwargs)
        losses = union_criterion.rename_suffixes(
            losses, {f"_aux_{len(auxiliary)}": "_pre", f"_dn_{len(known)}": "_dn_pre"}
        )

        suffixes = [*(f"_aux_{i}" for i in range(num_auxiliary)), ""]
        terms = self.distribution_losses(matched.last(len(layers)), layers, handover.config)
        losses.update(union_criterion.weighted_terms(terms, suffixes, handover.config))
        if known:
            suffixes = [f"_dn_{i}" for i in range(len(known))]
            terms = self.distribution_losses(own, known, handover.config, over_processes=False)
            losses.update(union_criterion.weighted_terms(terms, suffixes, handover.config))
        union_criterion.check_losses(losses)
        union_criterion.take_in_idle(losses, handover.idle)
        return losses

    def encoder_targets(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The targets of the encoder's proposals, which have one class where queries are selected by one."""
        if not outputs.get("enc_meta", {}).get("class_agnostic"):
            return targets
        return [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]

    def loss_labels_vfl(self, outputs, targets, indices, num_boxes, **_):
        return {"loss_vfl": self.varifocal_loss(outputs, targets, indices, num_boxes)}
