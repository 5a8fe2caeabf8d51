"""Deformable-DETR of Hugging Face transformers: two-stage, with box refinement, and plain by explicit consent.

The decoder refines references, and the model computes each level's box a second time from them: see
:mod:`~dfine_plugin.adapters.recomputed_boxes`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr import modeling_deformable_detr as host

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.config import FDRConfig
from dfine_plugin.criterion import mean_over_processes
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.head import FDRHead, locate_initial_boxes
from dfine_plugin.record import FDRRecord, current_record, leave_record
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes, union_criterion
from . import adapter as hf


class FDRDeformableDetrDecoder(host.DeformableDetrDecoder):
    """The host's decoder with the FDR head in its loop.

    Deployed, the boxes of the last level travel to the model's heads as further channels of its hidden states, and not
    by the record.
    """

    fdr: FDRHead
    bbox_embed: Any
    deployed = False

    @host.merge_with_config_defaults
    @host.capture_outputs
    def forward(
        self,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        object_queries_position_embeddings=None,
        reference_points=None,
        spatial_shapes=None,
        spatial_shapes_list=None,
        level_start_index=None,
        valid_ratios=None,
        **kwargs,
    ):
        hidden_states, reference = inputs_embeds, recomputed_boxes.split_initial_reference(reference_points)
        hidden: list[Tensor] = []
        references: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            ratios = torch.cat([valid_ratios] * (reference.shape[-1] // 2), dim=-1)
            hidden_states = layer(
                hidden_states,
                object_queries_position_embeddings,
                reference[:, :, None] * ratios[:, None],
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                encoder_hidden_states,  # positional, for gradient checkpointing
                encoder_attention_mask,
                **kwargs,
            )
            if index == 0:
                initial_boxes = locate_initial_boxes(self.bbox_embed[0](hidden_states), reference)
                state = self.fdr.start(initial_boxes)
                record = FDRRecord(self.fdr.weights, initial_boxes)
            state = self.fdr(index, hidden_states, state)
            added = references[-1] if references else reference_points  # by the model, to what its box head gives
            record.reference_logits.append(recomputed_boxes.four(host.inverse_sigmoid(added)))
            record.add(state, self.fdr.quality_logits(index, state.probabilities))
            reference = state.boxes.detach().to(reference.dtype)
            hidden.append(hidden_states)
            references.append(recomputed_boxes.finite_logits(reference))

        leave_record(record)
        if self.deployed:
            delta = recomputed_boxes.logit(state.boxes) - record.reference_logits[0]
            hidden = [recomputed_boxes.with_channels(hidden_states, delta, record.quality_logits)]
            references = references[-1:]
        return host.DeformableDetrDecoderOutput(
            last_hidden_state=hidden_states,
            intermediate_hidden_states=torch.stack(hidden, dim=1),
            intermediate_reference_points=torch.stack(references, dim=1),
        )


class UnionDeformableDetrLoss(union_criterion.UnionCriterion, DeformableDetrImageLoss):
    """The host's criterion, fed with the union, and with the number of truths averaged over all processes.

    The host divides that number by the number of processes twice where accelerate runs them, and does not average it
    elsewhere: its losses would weigh more beside those over the union, the more processes there are.
    """

    num_truths: float | Tensor

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        return super().get_loss(loss, outputs, targets, indices, self.num_truths, **kwargs)

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not DeformableDetrHungarianMatcher:
            return None
        return MatchingCost(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost)


class DeformableDetrGOLSDLoss(hf.GOLSDLoss):
    """Stands in for ``DeformableDetrForObjectDetectionLoss`` on a wrapped model; same arguments, same results.

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
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        record = current_record()
        labels = hf.with_boxes_in_rows(labels)
        layers = [hf.prediction_set(logits, pred_boxes)]
        if outputs_class is not None and outputs_coord is not None:
            before = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
            layers = [*(hf.prediction_set(*layer) for layer in before), *layers]
        assert record.initial_logits is not None
        initial = hf.prediction_set(record.initial_logits, record.initial_boxes)
        named = {**union_criterion.layer_names(layers, record), "the initial boxes": initial}
        check = union_criterion.check_of_losses_inputs(record, named)
        auxiliary = layers[:-1] if config.auxiliary_loss else []

        matcher = DeformableDetrHungarianMatcher(
            class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
        )
        criterion = UnionDeformableDetrLoss(
            matcher=matcher,
            num_classes=config.num_labels,
            focal_alpha=config.focal_alpha,
            losses=["labels", "boxes", "cardinality"],
        )
        criterion.num_truths = mean_over_processes(sum(len(target["boxes"]) for target in labels), logits.device)
        criterion.match([(outputs, labels) for outputs in (layers[-1], *auxiliary, initial)], self.config, check)
        losses = criterion({**layers[-1], "auxiliary_outputs": [*auxiliary, initial]}, labels)
        losses = union_criterion.rename_suffixes(losses, {f"_{len(auxiliary)}": "_pre"})

        total = self.with_distribution_losses(losses, criterion, [*auxiliary, layers[-1]], config)
        return total, losses, auxiliary or None


@register_adapter("transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrForObjectDetection")
class DeformableDetrAdapter(hf.TransformersAdapter):
    """Deformable-DETR."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        host.DeformableDetrDecoder: FDRDeformableDetrDecoder
    }
    loss_class = DeformableDetrGOLSDLoss

    def check(self, model: host_parts.Host, config: FDRConfig) -> None:
        super().check(model, config)
        if model.model.decoder.bbox_embed is None and not config.box_refinement:
            raise UnsupportedModelError(
                f"this {type(model).__name__} has with_box_refine=False. FDR refines references from layer to layer, "
                "which changes what its decoder attends to; FDRConfig(box_refinement=True) consents to that"
            )
        if model.model.decoder.bbox_embed is not None:
            hf.check_box_heads_are_shared(model)

    def attach_heads(self, model: host_parts.Host, config: FDRConfig, retired: hf.Retired) -> None:
        decoder = model.model.decoder
        num_layers = len(decoder.layers)
        first = host_parts.sharing_copy((decoder.bbox_embed or model.bbox_embed)[0])
        heads = [first, *(nn.Identity() for _ in range(1, num_layers))]
        recomputed_boxes.replace_heads(model, "model.decoder", num_layers, heads, retired)

    def deploy(self, model: host_parts.Host) -> None:
        super().deploy(model)
        decoder = model.model.decoder
        decoder.deployed = True
        recomputed_boxes.replace_heads_by_deployed(model, len(decoder.layers))
        hf.retie(model)
