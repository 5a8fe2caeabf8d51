"""Heads of MMDetection, which hold the criterion: they report what the decoder has refined, and are fed with the union
and the plugin's terms.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmdet.models.dense_heads import DeformableDETRHead, DINOHead
from mmdet.models.task_modules.assigners import (
    AssignResult,
    BBoxL1Cost,
    FocalLossCost,
    HungarianAssigner,
    IoUCost,
)
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmengine.structures import InstanceData
from torch import Tensor, nn

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.config import FDRConfig
from dfine_plugin.criterion import flatten_pairs, mean_over_processes
from dfine_plugin.errors import WrapStateError
from dfine_plugin.matching import Pairs
from dfine_plugin.record import FDRRecord, closes_on_interrupt, current_record, current_scope

from .. import host_parts, union_criterion
from ..refining_heads import RefiningBoxHead


class Answered:
    """In place of a host's assigner: pairs that are known, image by image."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = iter(pairs)

    def assign(self, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: Any = None) -> AssignResult:
        """As the host's: for each query the number of its truth, from 1, or 0."""
        queries, truths = next(self.pairs)
        numbers = gt_instances.labels.new_zeros(len(pred_instances.scores))
        numbers[queries] = truths + 1
        return AssignResult(len(gt_instances.labels), numbers, max_overlaps=None, labels=None)


class AssignerAsMatcher:
    """A host's assigner, of costs that are not known, as a matcher of prediction sets."""

    def __init__(self, assigner: Any) -> None:
        self.assigner = assigner

    def __call__(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Any]]) -> Pairs:
        """For each image the assigner's pairs."""
        pairs = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            predicted, truths = (bbox_cxcywh_to_xyxy(x) * target["scale"] for x in (boxes, target["boxes"]))
            numbers = self.assigner.assign(
                InstanceData(scores=logits, bboxes=predicted),
                InstanceData(labels=target["labels"], bboxes=truths),
                target["meta"],
            ).gt_inds
            (queries,) = (numbers > 0).nonzero(as_tuple=True)
            pairs.append((queries, numbers[queries] - 1))
        return pairs


class GOLSDHead(union_criterion.UnionCriterion):
    """Mixin before a head of MMDetection's: reports refined boxes, and trains them.

    The host's loss runs with the initial boxes as one layer more. Its losses of classes and of denoising queries are
    its own, and its loss dict holds weighted terms.
    """

    fdr_config: FDRConfig
    deployed = False
    logits_key = "pred_logits"
    labels_key = "labels"
    losses = ("class",)
    class_losses: ClassVar[Mapping[str, str]] = {"class": "loss_cls"}
    denoises: ClassVar[bool] = False
    """Whether the host has denoising queries, which come first, and reports losses of them, if there are none as well.
    """
    encoder_is_decoded: ClassVar[bool] = False
    """Whether the encoder's set holds the very proposals that the decoder's queries start from, in their order. Where
    it holds every token instead, its pairs, of one class, stay out of the union."""
    assigner: Any
    cls_branches: Any
    reg_branches: Any
    loss_cls: Any
    loss_bbox: Any
    loss_iou: Any
    sync_cls_avg_factor: bool
    as_two_stage: bool

    def init_weights(self) -> None:
        """As the host does, where there still are weights."""
        twin = host_parts.sharing_copy(self)
        twin.reg_branches = nn.ModuleList(h for h in self.reg_branches if not isinstance(h, RefiningBoxHead))
        super(GOLSDHead, twin).init_weights()  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and boxes ``(L, B, Q, …)`` of states ``(L, B, Q, C)``; of the last layer where deployed."""
        if self.deployed:
            classifier = self.cls_branches[-1 - self.as_two_stage]
            width = classifier.in_features
            hidden, boxes, quality = hidden_states.tensor_split([width, width + 4], dim=-1)
            logits = classifier(hidden)
            return (logits + quality if quality.shape[-1] else logits), boxes
        record = current_record()
        logits = [head(hidden) for head, hidden in zip(self.cls_branches, hidden_states, strict=False)]
        record.initial_logits = logits[0]
        if record.quality_logits:
            logits = [x + quality.to(x.dtype) for x, quality in zip(logits, record.quality_logits, strict=True)]
        return torch.stack(logits), torch.stack(record.boxes)

    def matching_cost(self) -> MatchingCost | None:
        costs = {type(cost): cost for cost in getattr(self.assigner, "match_costs", [])}
        if type(self.assigner) is not HungarianAssigner or costs.keys() != {FocalLossCost, BBoxL1Cost, IoUCost}:
            return None
        focal, bbox, iou = costs[FocalLossCost], costs[BBoxL1Cost], costs[IoUCost]
        if focal.binary_input or bbox.box_format != "xywh" or iou.iou_mode != "giou":
            return None
        return MatchingCost(focal.weight, bbox.weight, iou.weight, focal.alpha, focal.gamma, focal.eps)

    @closes_on_interrupt
    def loss_by_feat(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As the host's, with the plugin's terms. In evaluation, or deployed, there is no record to train."""
        if self.deployed:
            raise WrapStateError("a deployed model is for inference only: keep it in evaluation mode")
        # what a call remembers goes with its copy: nothing is kept on the module
        return host_parts.sharing_copy(self).losses_of(*args, **kwargs)

    def losses_of(
        self,
        scores: Tensor,
        boxes: Tensor,
        enc_scores: Tensor | None,
        enc_boxes: Tensor | None,
        truths: Sequence[InstanceData],
        metas: Sequence[Mapping[str, Any]],
        *dn_meta: Mapping[str, int],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The loss dict, on an instance for this call alone.

        Args:
            scores, boxes: ``(L, B, Q, …)``, denoising queries first.
            enc_scores, enc_boxes: of the encoder, if there is a first stage.
            truths, metas: of each image.
            dn_meta: of the denoising queries, where the host has them.
            kwargs: others of the host's.
        """
        config, record = self.fdr_config, current_record()
        assert record.initial_logits is not None
        self.targets = [relative_target(*of_image) for of_image in zip(truths, metas, strict=True)]
        known = sum(meta["num_denoising_queries"] for meta in dn_meta)
        own, matched = record.queries(slice(0, known)), record.queries(slice(known, None))
        self.known_layers = [prediction_set(*of) for of in zip(scores[:, :, :known], boxes[:, :, :known], strict=True)]
        layers = [prediction_set(*of) for of in zip(scores[:, :, known:], boxes[:, :, known:], strict=True)]
        initial = union_criterion.initial_set(matched)
        named = {**union_criterion.layer_names(layers, matched), "the initial boxes": initial}
        if known:
            named |= union_criterion.layer_names(self.known_layers, own, of="the denoising queries in ")
            named["the denoising queries' initial boxes"] = union_criterion.initial_set(own)
        sets, encoder = [(layer, self.targets) for layer in (initial, *layers)], []
        if enc_scores is not None and enc_boxes is not None:
            named["the encoder"] = prediction_set(enc_scores, enc_boxes)
            encoder = [(named["the encoder"], self.encoder_targets())]
        self.matcher = AssignerAsMatcher(self.assigner)
        check = union_criterion.check_of_losses_inputs(record, named)
        if self.encoder_is_decoded:
            self.match([*sets, *encoder], config, check)
        else:
            self.match(sets, config, check, encoder)

        self.asked_for = iter([*sets, *encoder])
        self.known_pairs = denoising_pairs(self.targets, *dn_meta) if self.denoises else []
        losses = super().loss_by_feat(  # type: ignore[misc]
            torch.cat([record.initial_logits[None], scores]),
            torch.cat([record.initial_boxes[None], boxes]),
            enc_scores,
            enc_boxes,
            truths,
            metas,
            *dn_meta,
            **kwargs,
        )
        losses = {name_by_layer(name): term for name, term in losses.items()}
        losses |= weighted_terms("", self.distribution_losses(matched, layers, config), config)
        if self.denoises:
            losses |= weighted_terms("dn_", self.denoising_terms(own), config)
        union_criterion.check_losses(losses)
        union_criterion.take_in_idle(losses, current_scope().idle)
        return losses

    def encoder_targets(self) -> list[dict[str, Any]]:
        """The targets that the host matches the encoder's proposals with."""
        if self.encoder_is_decoded:
            return self.targets
        return [{**target, "labels": torch.zeros_like(target["labels"])} for target in self.targets]

    def loss_by_feat_single(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of one prediction set, in the order of :attr:`asked_for`."""
        outputs, targets = next(self.asked_for)
        pairs = self.matcher(outputs, targets)
        self.assigner = Answered(pairs)
        of_classes, _, _ = super().loss_by_feat_single(*args, **kwargs)  # type: ignore[misc]
        count, device = sum(len(queries) for queries, _ in pairs), outputs["pred_boxes"].device
        if self.class_loss != "host":
            of_classes = self.own_class_loss(outputs, targets, pairs, count)
        terms = self.get_loss("boxes", outputs, targets, pairs, mean_over_processes(count, device))
        return (
            of_classes,
            self.loss_bbox.loss_weight * terms["loss_bbox"],
            self.loss_iou.loss_weight * terms["loss_giou"],
        )

    def own_class_loss(self, outputs: dict[str, Tensor], targets: Any, pairs: Pairs, count: int) -> Tensor:
        """What stands in for the host's loss of classes, with its weight and its normaliser."""
        device = outputs["pred_boxes"].device
        normaliser = mean_over_processes(count, device) if self.sync_cls_avg_factor else max(count, 1)
        return self.loss_cls.loss_weight * self.get_loss("class", outputs, targets, pairs, normaliser)["loss_cls"]

    def _loss_dn_single(self, dn_cls_scores: Tensor, dn_bbox_preds: Tensor, *args: Any, **kwargs: Any) -> Any:
        terms = super()._loss_dn_single(dn_cls_scores, dn_bbox_preds, *args, **kwargs)  # type: ignore[misc]
        of_classes, of_boxes, of_iou = terms
        if self.class_loss != "host":
            count = sum(len(queries) for queries, _ in self.known_pairs)
            known = prediction_set(dn_cls_scores, dn_bbox_preds)
            of_classes = self.own_class_loss(known, self.targets, self.known_pairs, count)
        return of_classes, of_boxes, of_iou

    def denoising_terms(self, record: FDRRecord) -> union_criterion.Terms:
        """FGL and DDF of the denoising queries; zero without any."""
        device = record.initial_boxes.device
        flat = flatten_pairs(self.known_pairs, [target["boxes"] for target in self.targets], device)
        count = mean_over_processes(len(flat.queries), device)  # in every process, or others would wait for it
        if not len(flat.queries):
            nothing = [record.initial_boxes.new_zeros(()) for _ in record.boxes]
            return nothing, nothing[:-1] if self.fdr_config.ddf else []
        self.taken |= {id(layer["pred_boxes"]): (flat, count) for layer in self.known_layers}
        return self.distribution_losses(record, self.known_layers, self.fdr_config, over_processes=False)


class FDRDeformableDETRHead(GOLSDHead, DeformableDETRHead):
    """Deformable-DETR's head."""


class FDRDINOHead(GOLSDHead, DINOHead):
    """DINO's head."""

    denoises = True
    encoder_is_decoded = True


def prediction_set(logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """A prediction set, as the union's criterion takes it."""
    return {"pred_logits": logits, "pred_boxes": boxes}


def relative_target(truths: InstanceData, meta: Mapping[str, Any]) -> dict[str, Any]:
    """An image's truths, boxes as cxcywh in image sides, with what an assigner needs to know of it."""
    height, width = meta["img_shape"][:2]
    scale = truths.bboxes.new_tensor([width, height, width, height])
    boxes = bbox_xyxy_to_cxcywh(truths.bboxes / scale)
    return {"labels": truths.labels, "boxes": boxes, "scale": scale, "meta": meta}


def denoising_pairs(targets: Sequence[Mapping[str, Tensor]], dn_meta: Mapping[str, int]) -> Pairs:
    """For each image the denoising queries that are to find their truths: the first half of each group."""
    groups, queries = dn_meta["num_denoising_groups"], dn_meta["num_denoising_queries"]
    pairs = []
    for target in targets:
        truths = torch.arange(len(target["labels"]), device=target["labels"].device)
        starts = torch.arange(groups, device=truths.device) * (queries // groups)
        pairs.append(((starts[:, None] + truths).flatten(), truths.repeat(groups)))
    return pairs


def name_by_layer(name: str) -> str:
    """The name of a term of the host's, which has counted the initial boxes as a layer, ``d0``."""
    found = re.fullmatch(r"d(\d+)\.(.*)", name)
    if found is None:
        return name
    layer = int(found[1])
    return f"d{layer - 1}.{found[2]}" if layer else f"{found[2]}_pre"


def weighted_terms(prefix: str, terms: union_criterion.Terms, config: FDRConfig) -> dict[str, Tensor]:
    """FGL and DDF with their weights, under names like the host's."""
    fgl, ddf = terms
    layers = [*(f"d{layer}.{prefix}" for layer in range(len(fgl) - 1)), prefix]
    named = {f"{layer}loss_fgl": config.fgl_weight * term for layer, term in zip(layers, fgl, strict=True)}
    # the last layer teaches and has none
    return named | {f"{layer}loss_ddf": config.ddf_weight * term for layer, term in zip(layers, ddf, strict=False)}
