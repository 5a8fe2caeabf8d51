"""RT-DETR and RT-DETRv2 of Hugging Face transformers.

Boxes and class logits are computed inside the decoder, once a layer, so a decoder with the same layers and another loop
is all there is to replace. Denoising queries come first on the query axis; the host's loss function splits them off.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher, RTDetrLoss
from transformers.models.rt_detr import modeling_rt_detr
from transformers.models.rt_detr_v2 import modeling_rt_detr_v2

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.config import FDRConfig
from dfine_plugin.criterion import distribution_losses, flatten_pairs, mean_over_processes
from dfine_plugin.head import FDRHead, locate_initial_boxes
from dfine_plugin.record import FDRRecord, current_record, current_scope, leave_record
from dfine_plugin.registry import register_adapter

from .. import host_parts, union_criterion
from . import adapter as hf


class RefiningLoop:
    """The host's decoder loop with the FDR head in it; a mixin before the host's decoder class."""

    fdr: FDRHead
    layers: Any
    query_pos_head: Any
    bbox_embed: Any
    class_embed: Any

    def refine(self, hidden_states: Tensor, reference_points: Tensor, **layer_inputs: Any) -> dict[str, Any]:
        """Run all layers.

        Args:
            hidden_states: ``(B, Q, C)``, the queries.
            reference_points: ``(B, Q, 4)``, logits of the initial references.
            layer_inputs: what the host gives each layer besides.

        Returns:
            The fields of the host's decoder output: hidden states, boxes and class logits, ``(B, L, Q, …)`` each.
        """
        reference = reference_points.sigmoid()
        hidden, boxes, class_logits = [], [], []
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                object_queries_position_embeddings=self.query_pos_head(reference),
                reference_points=reference.unsqueeze(2),
                **layer_inputs,
            )
            if index == 0:
                initial_boxes = locate_initial_boxes(self.bbox_embed[0](hidden_states), reference)
                state = self.fdr.start(initial_boxes)
                record = FDRRecord(self.fdr.weights, initial_boxes)
            state = self.fdr(index, hidden_states, state)
            reference = state.boxes.detach().to(reference.dtype)

            hidden.append(hidden_states)
            boxes.append(state.boxes)
            # all layers' logits are what training needs; a deployed model keeps the last layer's class head alone
            if not isinstance(self.class_embed[index], nn.Identity):
                logits = self.class_embed[index](hidden_states)
                if index == 0:
                    record.initial_logits = logits
                quality = self.fdr.quality_logits(index, state.probabilities)
                if quality is not None:
                    logits = logits + quality.to(logits.dtype)
                class_logits.append(logits)
            record.add(state)

        leave_record(record)
        return {
            "last_hidden_state": hidden_states,
            "intermediate_hidden_states": torch.stack(hidden, dim=1),
            "intermediate_logits": torch.stack(class_logits, dim=1),
            "intermediate_reference_points": torch.stack(boxes, dim=1),
        }


class FDRRTDetrDecoder(RefiningLoop, modeling_rt_detr.RTDetrDecoder):
    """RT-DETR's decoder, refining distributions."""

    @modeling_rt_detr.merge_with_config_defaults
    @modeling_rt_detr.capture_outputs
    def forward(self, inputs_embeds=None, reference_points=None, **kwargs):
        outputs = self.refine(inputs_embeds, reference_points, **kwargs)
        return modeling_rt_detr.RTDetrDecoderOutput(**outputs)


class FDRRTDetrV2Decoder(RefiningLoop, modeling_rt_detr_v2.RTDetrV2Decoder):
    """RT-DETRv2's decoder, refining distributions."""

    @modeling_rt_detr_v2.merge_with_config_defaults
    @modeling_rt_detr_v2.capture_outputs
    def forward(self, inputs_embeds=None, reference_points=None, **kwargs):
        outputs = self.refine(inputs_embeds, reference_points, **kwargs)
        return modeling_rt_detr_v2.RTDetrV2DecoderOutput(**outputs)


class UnionRTDetrLoss(union_criterion.UnionCriterion, RTDetrLoss):
    """The host's criterion, fed with the union."""

    class_losses: ClassVar = {"vfl": "loss_vfl"}

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not RTDetrHungarianMatcher or not matcher.use_focal_loss:
            return None
        return MatchingCost(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost, matcher.alpha, matcher.gamma)

    def loss_labels_vfl(self, outputs, targets, indices, num_boxes, log=True):
        return {"loss_vfl": self.varifocal_loss(outputs, targets, indices, num_boxes)}


class RTDetrGOLSDLoss(hf.GOLSDLoss):
    """Stands in for ``RTDetrForObjectDetectionLoss`` on a wrapped model; takes the same arguments, gives the same.

    The initial boxes and, for the denoising queries, theirs are one more set each for the host's criterion. It runs
    with the union; FGL and DDF join its loss dict, weighted as all its terms are.
    """

    def total(
        self,
        logits: Tensor,
        labels: list[dict[str, Tensor]],
        device: torch.device,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Tensor,
        outputs_coord: Tensor,
        enc_topk_logits: Tensor,
        enc_topk_bboxes: Tensor,
        denoising_meta_values: dict[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        record = current_record()
        labels = hf.with_boxes_in_rows(labels)
        num_layers = outputs_class.shape[1]
        num_denoising = denoising_meta_values["dn_num_split"][0] if denoising_meta_values is not None else 0
        denoising, queries = slice(0, num_denoising), slice(num_denoising, None)
        matched = record.queries(queries)
        assert matched.initial_logits is not None  # this decoder computes the class logits itself

        layers = _prediction_sets(outputs_class[:, :, queries], outputs_coord[:, :, queries])
        encoder = hf.prediction_set(enc_topk_logits, enc_topk_bboxes)
        initial = hf.prediction_set(matched.initial_logits, matched.initial_boxes)
        auxiliary = [*layers[:-1], encoder] if config.auxiliary_loss else []
        named = {**union_criterion.layer_names(layers, record), "the encoder": encoder, "the initial boxes": initial}
        noisy: list[dict[str, Tensor]] = []  # the denoising queries' sets, the initial boxes last
        if denoising_meta_values is not None and config.auxiliary_loss:
            own = record.queries(denoising)
            assert own.initial_logits is not None
            noisy = _prediction_sets(outputs_class[:, :, denoising], outputs_coord[:, :, denoising])
            named |= union_criterion.layer_names(noisy, record, of="the denoising queries in ")
            noisy.append(hf.prediction_set(own.initial_logits, own.initial_boxes))
            named["the denoising queries' initial boxes"] = noisy[-1]

        # not moved to the device, which would wait: its one buffer serves a loss that RT-DETR has no use for
        criterion = UnionRTDetrLoss(config)
        check = union_criterion.check_of_losses_inputs(record, named)
        criterion.match([(outputs, labels) for outputs in (layers[-1], *auxiliary, initial)], self.config, check)
        outputs = {**layers[-1], "auxiliary_outputs": [*auxiliary, initial]}
        rename = {f"_aux_{len(auxiliary)}": "_pre"}
        if noisy:
            outputs["dn_auxiliary_outputs"] = noisy
            outputs["denoising_meta_values"] = denoising_meta_values
            rename[f"_dn_{num_layers}"] = "_dn_pre"
        losses = union_criterion.rename_suffixes(criterion(outputs, labels), rename)

        supervised = layers if config.auxiliary_loss else layers[-1:]
        terms = criterion.distribution_losses(matched.last(len(supervised)), supervised, self.config)
        suffixes = [*(f"_aux_{i}" for i in range(len(supervised) - 1)), ""]
        losses.update(union_criterion.weighted_terms(terms, suffixes, self.config))
        known = criterion.get_cdn_matched_indices(denoising_meta_values, labels) if denoising_meta_values else []
        # outside of the branch: a process without a truth has no denoising queries, yet the others wait for its count
        num_known = mean_over_processes(sum(len(queries) for queries, _ in known), outputs_class.device)
        if noisy:
            flat = flatten_pairs(known, [target["boxes"] for target in labels], outputs_class.device)
            terms = distribution_losses(own, noisy[-2]["logits"], [flat] * num_layers, num_known, self.config)
            suffixes = [f"_dn_{i}" for i in range(num_layers)]
            losses.update(union_criterion.weighted_terms(terms, suffixes, self.config))
        union_criterion.check_losses(losses)
        union_criterion.take_in_idle(losses, current_scope().idle)
        return torch.stack([*losses.values()]).sum(), losses, auxiliary or None


def _prediction_sets(logits: Tensor, boxes: Tensor) -> list[dict[str, Tensor]]:
    # unbind, not [:, i], whose backward would fill zeros for all layers at each layer
    return [hf.prediction_set(*layer) for layer in zip(logits.unbind(1), boxes.unbind(1), strict=True)]


@register_adapter(
    "transformers.models.rt_detr.modeling_rt_detr.RTDetrForObjectDetection",
    "transformers.models.rt_detr_v2.modeling_rt_detr_v2.RTDetrV2ForObjectDetection",
)
class RTDetrAdapter(hf.TransformersAdapter):
    """RT-DETR and RT-DETRv2."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        modeling_rt_detr.RTDetrDecoder: FDRRTDetrDecoder,
        modeling_rt_detr_v2.RTDetrV2Decoder: FDRRTDetrV2Decoder,
    }
    loss_class = RTDetrGOLSDLoss

    def attach_heads(self, model: host_parts.Host, config: FDRConfig, retired: hf.Retired) -> None:
        later = range(1, len(model.model.decoder.layers))
        retired.box_heads = [model.model.decoder.bbox_embed[i] for i in later]
        lists = ["model.decoder.bbox_embed"]
        if hasattr(model, "bbox_embed"):  # RT-DETRv2 declares every head a second time
            lists.append("bbox_embed")
        host_parts.retire(model, [f"{name}.{i}" for name in lists for i in later], retired)

    def begin(self, model: host_parts.Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        labels = super().begin(model, args, kwargs)
        embedding = getattr(model.model, "denoising_class_embed", None)
        if model.training and embedding is not None and labels and not any(len(t["boxes"]) for t in labels):
            current_scope().idle.append(embedding.weight)  # without a truth the host makes no denoising queries

    def deploy(self, model: host_parts.Host) -> None:
        super().deploy(model)
        lists = [model.model.decoder.class_embed]
        if hasattr(model, "class_embed"):  # RT-DETRv2 declares every head a second time
            lists.append(model.class_embed)
        for class_heads in lists:
            for index in range(len(class_heads) - 1):
                class_heads[index] = nn.Identity()
        hf.retie(model)
