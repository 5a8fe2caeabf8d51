"""LW-DETR of Hugging Face transformers, and what RF-DETR shares with it.

Every decoder layer predicts from one fixed reference, by one box head that all share. So the decoder runs as it is;
then the head's box for the first layer is the frame whose edges the distributions move, layer by layer. The model's
heads, which are asked for the last layer and then for all, look the outcome up. In training, queries come in groups,
and each group is matched by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.models.lw_detr import modeling_lw_detr

from dfine_plugin.assignment import MatchingCost, SetToMatch
from dfine_plugin.boxes import at_least_float32
from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.head import FDRHead
from dfine_plugin.matching import Pairs
from dfine_plugin.record import current_record, current_scope, in_scope, leave_record
from dfine_plugin.registry import register_adapter
from dfine_plugin.validation import FiniteCheck

from .. import host_parts, recomputed_boxes, union_criterion
from ..refining_heads import refine_afterwards
from . import adapter as hf

LEAST_SIDE = 1e-6
"""Of a reference that deltas are relative to: padded proposals have no area."""


def deltas(boxes: Tensor, references: Tensor) -> Tensor:
    """What the host's ``refine_bboxes`` makes boxes of, with these references; ``(B, Q, 4)`` cxcywh all of them."""
    sides = references[..., 2:].clamp(min=LEAST_SIDE)
    return torch.cat([(boxes[..., :2] - references[..., :2]) / sides, (boxes[..., 2:] / sides).log()], dim=-1)


class RecordedBoxHead:
    """Mixin before the host's box head: the refined boxes, as the deltas that the model expects."""

    def locate(self, hidden_states: Tensor) -> Tensor:
        """What the host's own head answers, ``(B, Q, 4)``: it locates the initial boxes."""
        return super().forward(hidden_states)  # type: ignore[misc]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(B, Q, 4)`` for the last layer's states, ``(L, B, Q, 4)`` for those of all layers."""
        boxes, references = current_record().boxes, current_scope().progress.references
        if hidden_states.ndim == 3:
            return deltas(boxes[-1], references)
        return torch.stack([deltas(layer, references) for layer in boxes])


class RecordedLwDetrBoxHead(RecordedBoxHead, modeling_lw_detr.LwDetrMLPPredictionHead):
    """LW-DETR's box head."""


@dataclass
class Progress:
    """What decoder and heads hand to one another in a forward.

    Attributes:
        box_head: the model's.
        references: ``(B, Q, 4)`` cxcywh, of all layers.
        first_hidden_states: ``(B, Q, C)``, of the first layer.
    """

    box_head: RecordedBoxHead
    references: Tensor | None = None
    first_hidden_states: Tensor | None = None


class RefiningAfterwards:
    """Mixin before a host's decoder: refines distributions on the hidden states of all layers, when these have run.

    Deployed, it holds the box head that locates the initial boxes, and its last level alone goes on, with the box and
    the quality as further channels of the hidden states.
    """

    fdr: FDRHead
    bbox_embed: Any
    deployed = False

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not self.deployed and not in_scope():
            return outputs  # the model's heads, which would ask for boxes, do not run
        hidden = outputs.intermediate_hidden_states.unbind(0)
        references = at_least_float32(outputs.intermediate_reference_points[-1])
        if self.deployed:
            locate = self.bbox_embed
        else:
            progress = current_scope().progress
            progress.references, progress.first_hidden_states = references, hidden[0]
            locate = progress.box_head.locate

        def boxes_of(states: Tensor) -> Tensor:
            return modeling_lw_detr.refine_bboxes(references, at_least_float32(locate(states)))

        record = refine_afterwards(self.fdr, boxes_of, hidden)
        leave_record(record)
        if self.deployed:
            delta = deltas(record.boxes[-1], references)
            last = recomputed_boxes.with_channels(hidden[-1], delta, record.quality_logits)
            outputs.last_hidden_state, outputs.intermediate_hidden_states = last, last[None]
        return outputs


class FDRLwDetrDecoder(RefiningAfterwards, modeling_lw_detr.LwDetrDecoder):
    """LW-DETR's decoder, refining distributions."""


class UnionLwDetrLoss(union_criterion.UnionCriterion, LwDetrImageLoss):
    """The host's criterion, fed with the union."""

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not LwDetrHungarianMatcher:
            return None
        return MatchingCost(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost)

    def ask(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Pairs:
        return self.matcher(outputs, targets, self.group_detr)

    def solve(self, sets: Sequence[SetToMatch], cost: MatchingCost, check: FiniteCheck) -> list[Pairs]:
        return union_criterion.match_groups(sets, self.group_detr, cost, check)


class LwDetrGOLSDLoss(hf.GOLSDLoss):
    """Stands in for ``LwDetrForObjectDetectionLoss`` on a wrapped model; same arguments, same results.

    The host's loss dict is unweighted, and so are the terms that join it: ``loss_fgl*``, ``loss_ddf*`` and the initial
    boxes' (``*_pre``). The total takes each with its weight.
    """

    def total(
        self,
        logits: Tensor,
        labels: list[dict[str, Tensor]],
        device: torch.device,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Tensor | None,
        outputs_coord: Tensor | None,
        enc_outputs_class: Tensor,
        enc_outputs_coord: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        record = current_record()
        labels = hf.with_boxes_in_rows(labels)
        layers = [hf.prediction_set(logits, pred_boxes)]
        if outputs_class is not None and outputs_coord is not None:
            layers = [hf.prediction_set(*layer) for layer in zip(outputs_class, outputs_coord, strict=True)]
        auxiliary = layers[:-1]
        assert record.initial_logits is not None
        initial = hf.prediction_set(record.initial_logits, record.initial_boxes)
        encoder = hf.prediction_set(enc_outputs_class, enc_outputs_coord)
        named = {**union_criterion.layer_names(layers, record), "the initial boxes": initial, "the encoder": encoder}
        check = union_criterion.check_of_losses_inputs(record, named)

        criterion = UnionLwDetrLoss(
            matcher=LwDetrHungarianMatcher(
                class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
            ),
            num_classes=config.num_labels,
            focal_alpha=config.focal_alpha,
            losses=["labels", "boxes", "cardinality"],
            group_detr=config.group_detr,
        )
        sets = (layers[-1], *auxiliary, initial, encoder)
        criterion.match([(outputs, labels) for outputs in sets], self.config, check)
        outputs = {**layers[-1], "auxiliary_outputs": [*auxiliary, initial], "enc_outputs": encoder}
        losses = union_criterion.rename_suffixes(criterion(outputs, labels), {f"_{len(auxiliary)}": "_pre"})
        class_weight = getattr(config, "class_loss_coefficient", 1)  # not in all releases
        total = self.with_distribution_losses(losses, criterion, layers, config, class_weight)
        return total, losses, auxiliary or None


@register_adapter("transformers.models.lw_detr.modeling_lw_detr.LwDetrForObjectDetection")
class LwDetrAdapter(hf.TransformersAdapter):
    """LW-DETR. Its box head stays, to locate the initial boxes: nothing retires."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        modeling_lw_detr.LwDetrDecoder: FDRLwDetrDecoder
    }
    loss_class = LwDetrGOLSDLoss
    fixed_references = True
    norms = ("self_attn_layer_norm", "cross_attn_layer_norm")
    box_head_classes: ClassVar[dict[type[nn.Module], type[Any]]] = {
        modeling_lw_detr.LwDetrMLPPredictionHead: RecordedLwDetrBoxHead
    }
    """From the host's class of box heads to its subclass with :class:`RecordedBoxHead`."""

    def check(self, model: host_parts.Host, config: FDRConfig) -> None:
        super().check(model, config)
        if type(model.bbox_embed) not in self.box_head_classes:
            name = type(model).__name__
            raise UnsupportedModelError(f"this {name} has a box head of another class: {type(model.bbox_embed)}")

    def attach_heads(self, model: host_parts.Host, config: FDRConfig, retired: hf.Retired) -> None:
        retired.box_heads = [model.bbox_embed] * (len(model.model.decoder.layers) - 1)
        retired.recast(model, "bbox_embed", self.box_head_classes[type(model.bbox_embed)])
        retired.recast(model, "class_embed", recomputed_boxes.StackedClassifier)

    def begin(self, model: host_parts.Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().begin(model, args, kwargs)
        current_scope().progress = Progress(model.bbox_embed)

    def deploy(self, model: host_parts.Host) -> None:
        super().deploy(model)
        decoder, head = model.model.decoder, model.bbox_embed
        own = {twin: host_class for host_class, twin in self.box_head_classes.items()}
        host_parts.recast(head, own[type(head)])
        decoder.bbox_embed, decoder.deployed = head, True
        recomputed_boxes.replace_shared_heads_by_deployed(model, "bbox_embed")

    def host_boxes(
        self, model: host_parts.Host, layer: int, hidden_states: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`. The decoder goes on with the references that it began with."""
        progress = current_scope().progress
        moved = at_least_float32(progress.box_head.locate(hidden_states))
        return reference, modeling_lw_detr.refine_bboxes(progress.references, moved)
