"""Criteria of detrex, fed with the union and the plugin's terms."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from detrex.modeling import HungarianMatcher, SetCriterion
from torch import Tensor, nn

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import WrapStateError
from dfine_plugin.record import closes_on_interrupt, current_record, current_scope

from .. import host_parts, union_criterion


class GOLSDCriterion(union_criterion.UnionCriterion):
    """Mixin before a detrex criterion: the same losses, box losses over the union, and the plugin's terms with them.

    The initial boxes are one more auxiliary set of the host's, of the denoising queries as well. All terms are
    unweighted, as the host's: the model weighs them by ``weight_dict``.
    """

    fdr_config: FDRConfig
    logits_key = "pred_logits"
    labels_key = "labels"
    class_losses: ClassVar = {"class": "loss_class"}
    denoises: ClassVar[bool] = False
    """Whether the host reports denoising losses, which are zero where there are no such queries."""
    encoder_is_decoded: ClassVar[bool] = False
    """Whether the encoder's set holds the very proposals that the decoder's queries start from, in their order. Where
    it holds every token instead, its pairs are of other queries than the decoder's and stay out of the union."""
    encoder_is_binary: ClassVar[bool] = False
    """Whether the host matches the encoder's set without regard to classes, always; some let their config say it."""

    def denoising(self, outputs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any] | None:
        """The denoising queries' outputs, of the last layer and ``aux_outputs``, if there are any."""
        return None

    def with_denoising(
        self, outputs: dict[str, Any], args: tuple[Any, ...], known: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The criterion's arguments with other outputs of the denoising queries."""
        raise NotImplementedError

    def matched_queries(self, outputs: dict[str, Any], known: dict[str, Any] | None) -> slice:
        """Where this call's queries lie among the decoder's: denoising queries come first."""
        return slice(0 if known is None else known["pred_boxes"].shape[1], None)

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not HungarianMatcher or matcher.cost_class_type != "focal_loss_cost":
            return None
        return MatchingCost(matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, matcher.alpha, matcher.gamma)

    @closes_on_interrupt
    def forward(self, outputs, targets, *args):
        # what a call remembers goes with its copy: nothing is kept on the module
        return host_parts.sharing_copy(self).losses_of(outputs, targets, *args)

    def losses_of(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        """The loss dict, on an instance for this call alone."""
        known = self.denoising(outputs, args)
        queries = self.matched_queries(outputs, known)
        record = current_record().queries(queries)
        auxiliary = outputs.get("aux_outputs", [])
        layers = [*auxiliary, union_criterion.prediction_set(outputs)]
        initial = union_criterion.initial_set(record)
        united = [(layers[-1], targets), *((layer, targets) for layer in auxiliary), (initial, targets)]
        apart: list[union_criterion.WithTargets] = []
        named = {**union_criterion.layer_names(layers, record), "the initial boxes": initial}
        if "enc_outputs" in outputs:
            named["the encoder"] = encoder = union_criterion.prediction_set(outputs["enc_outputs"])
            (united if self.encoder_is_decoded else apart).append((encoder, self.encoder_targets(targets)))
        if known is not None:
            own = current_record().queries(slice(0, queries.start))
            known_layers = [*known.get("aux_outputs", []), union_criterion.prediction_set(known)]
            known_initial = union_criterion.initial_set(own)
            named |= union_criterion.layer_names(known_layers, record, of="the denoising queries in ")
            named["the denoising queries' initial boxes"] = known_initial
        self.match(united, self.fdr_config, union_criterion.check_of_losses_inputs(current_record(), named), apart)

        outputs = {**outputs, "aux_outputs": [*auxiliary, initial]}
        if known is not None:
            known = {**known, "aux_outputs": [*known_layers[:-1], known_initial]}
            outputs, args = self.with_denoising(outputs, args, known)
        losses = super().forward(outputs, targets, *args)
        count = len(auxiliary)
        losses = union_criterion.rename_suffixes(losses, {f"_dn_{count}": "_dn_pre", f"_{count}": "_pre"})

        names = [*(f"_{i}" for i in range(count)), ""]
        terms = self.distribution_losses(record.last(len(layers)), layers, self.fdr_config)
        losses.update(union_criterion.named_terms(terms, names))
        if self.denoises:
            names = [*(f"_dn_{i}" for i in range(count)), "_dn"]
            if known is None:
                # every process reports the same terms: the trainer averages them by name
                nothing = [record.initial_boxes.new_zeros(()) for _ in names]
                terms = nothing, nothing[:-1] if self.fdr_config.ddf else []
            else:
                own = own.last(len(layers))
                terms = self.distribution_losses(own, known_layers, self.fdr_config, over_processes=False)
            losses.update(union_criterion.named_terms(terms, names))
        union_criterion.check_losses(losses)
        union_criterion.take_in_idle(losses, current_scope().idle)
        return losses

    def encoder_targets(self, targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The targets that the host matches the encoder's proposals with."""
        if not (self.encoder_is_binary or getattr(self, "two_stage_binary_cls", False)):
            return targets
        return [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]


class GOLSDSetCriterion(GOLSDCriterion, SetCriterion):
    """detrex's own criterion, fed with the union."""


class DenoisingOutputs(GOLSDCriterion):
    """Mixin before a DN criterion, which finds the denoising queries' outputs beside the others."""

    denoises = True

    def denoising(self, outputs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any] | None:
        return outputs.get("denoising_output")

    def with_denoising(
        self, outputs: dict[str, Any], args: tuple[Any, ...], known: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        return {**outputs, "denoising_output": known}, args


class DenoisingMetas(GOLSDCriterion):
    """Mixin before the criterion of DINO or of a host made of it, which finds the denoising queries' outputs in
    ``dn_metas``. Its encoder's set holds the proposals that the decoder starts from."""

    denoises = True
    encoder_is_decoded = True

    def denoising(self, outputs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any] | None:
        return (args[0] or {}).get("output_known_lbs_bboxes") if args else None

    def with_denoising(
        self, outputs: dict[str, Any], args: tuple[Any, ...], known: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        return outputs, ({**args[0], "output_known_lbs_bboxes": known},)


def extended_weights(weights: Mapping[str, float], criterion: GOLSDCriterion, num_layers: int) -> dict[str, float]:
    """A host's ``weight_dict`` with the weights of the terms that a wrapped criterion adds."""
    config = criterion.fdr_config
    extended = dict(weights)
    for group in ["", "_dn"] if criterion.denoises else [""]:
        for name in ("loss_class", "loss_bbox", "loss_giou"):
            if name in weights:
                extended[f"{name}{group}_pre"] = weights.get(name + group, weights[name])
        for name in [group, *(f"{group}_{i}" for i in range(num_layers - 1))]:
            extended[f"loss_fgl{name}"] = config.fgl_weight
            if config.ddf and name != group:
                extended[f"loss_ddf{name}"] = config.ddf_weight
    return extended


class DeployedCriterion(nn.Module):
    """What a deployed model has for a criterion."""

    def forward(self, *_: Any) -> None:
        raise WrapStateError("a deployed model is for inference only: keep it in evaluation mode")
