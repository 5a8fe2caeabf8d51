"""Grounding DINO of Hugging Face transformers, and what MM Grounding DINO shares with it.

Its classes are phrases of a text, and a query's class logits are its similarities with the text's tokens: minus
infinity where the text is masked, and for a truth's class those of the phrase's tokens. The decoder runs as it is and
refines in its box heads, on un-normed states; the model computes each level's box a second time, on normed ones: see
:mod:`~dfine_plugin.adapters.refining_heads` and :mod:`~dfine_plugin.adapters.recomputed_boxes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.loss.loss_grounding_dino import (
    GroundingDinoHungarianMatcher,
    GroundingDinoImageLoss,
    sigmoid_focal_loss,
)
from transformers.models.grounding_dino import modeling_grounding_dino as host

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.record import FDRRecord, current_record
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes, refining_heads, union_criterion
from . import adapter as hf
from .prompt import PromptedDetector, count_phrases, token_shares

LEAST_RELEASE = "5.23.0"
"""Of transformers: the losses of wrapped hosts were compared with slow ones there, and differ with release 5.2."""

CLASS_WEIGHT = 2.0
"""Of the class losses: a constant in the host's loss function."""


class RefiningDecoder(refining_heads.RefiningDecoder):
    """Mixin before a host's decoder, refining distributions."""

    config: Any

    def inverse_sigmoid(self, reference: Tensor) -> Tensor:
        return torch.special.logit(reference, eps=1e-5)

    def run(self, *args, return_dict=None, **kwargs):
        outputs = super().run(*args, return_dict=True, **kwargs)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    def last_level(self, record: FDRRecord, outputs: Any) -> Any:
        delta = recomputed_boxes.logit(record.boxes[-1]) - record.reference_logits[0]
        hidden = outputs.intermediate_hidden_states[:, -1]
        channels = recomputed_boxes.with_channels(hidden, delta, record.quality_logits)
        outputs.intermediate_hidden_states = channels[:, None]
        outputs.intermediate_reference_points = outputs.intermediate_reference_points[:, -1:]
        return outputs


class DeployedLogits(nn.Module):
    """Mixin before the host's last class head: takes the hidden channels, and adds the quality behind the box."""

    def forward(self, vision_hidden_state: Tensor, text_hidden_state: Tensor, text_token_mask: Tensor) -> Tensor:
        width = text_hidden_state.shape[-1]
        hidden, _, quality = vision_hidden_state.tensor_split([width, width + 4], dim=-1)
        logits = super().forward(hidden, text_hidden_state, text_token_mask)
        return logits + quality if quality.shape[-1] else logits


class FDRGroundingDinoDecoder(RefiningDecoder, host.GroundingDinoDecoder):
    """Grounding DINO's decoder, refining distributions."""


class InitialGroundingDinoBoxHead(refining_heads.InitialBoxHead, host.GroundingDinoMLPPredictionHead):
    """The decoder's first box head."""


class RecordedGroundingDinoClassHead(recomputed_boxes.RecordedLogits, host.GroundingDinoContrastiveEmbedding):
    """The model's class head of one level."""


class DeployedGroundingDinoClassHead(DeployedLogits, host.GroundingDinoContrastiveEmbedding):
    """The deployed model's class head."""


@dataclass(frozen=True)
class PhraseCost(MatchingCost):
    """A matching cost whose class cost is the mean of the focal costs of the tokens in the phrase of a truth's class.

    Attributes:
        shares: ``(B, T, K)``, of T tokens in K classes: :func:`~.prompt.token_shares`.
    """

    shares: Tensor = field(kw_only=True)

    def class_costs(self, logits: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """See :class:`MatchingCost`; the logits are ``(B, Q, T)`` each."""
        with torch.autocast(self.shares.device.type, enabled=False):
            costs = torch.stack([self.focal(x) @ self.shares.to(x.dtype) for x in logits], dim=1)  # (B, S, Q, K)
        return costs[images, :, :, labels]


class UnionGroundingDinoLoss(union_criterion.UnionCriterion, GroundingDinoImageLoss):
    """The host's criterion, fed with the union."""

    def __init__(self, label_maps: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(**settings)
        self.label_maps = label_maps

    def matching_cost(self) -> MatchingCost | None:
        matcher = self.matcher
        if type(matcher) is not GroundingDinoHungarianMatcher:
            return None
        shares = token_shares(self.label_maps)
        return PhraseCost(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost, shares=shares)

    def _get_target_classes_one_hot(self, outputs, targets, indices):
        """The tokens of each truth's class in its own image's text: the host takes other texts' where texts differ."""
        tokens = torch.zeros_like(outputs["logits"])
        of_images = zip(self.label_maps, targets, indices, strict=True)
        found = [label_map[target["class_labels"][truths]] for label_map, target, (_, truths) in of_images]
        tokens[self._get_source_permutation_idx(indices)] = torch.cat(found).to(tokens)
        return tokens

    def loss_labels(self, outputs, targets, indices, num_boxes):
        """The host's focal loss, which does not wait for the device: a masked token's logit is not selected away but
        held where its loss is zero."""
        logits, masked = outputs["logits"], ~outputs["text_mask"]
        classes = self._get_target_classes_one_hot(outputs, targets, indices)
        logits = logits.masked_fill(masked, torch.finfo(logits.dtype).min)
        loss = sigmoid_focal_loss(logits, classes.masked_fill(masked, 0), num_boxes, self.focal_alpha)
        return {"loss_ce": loss}


class GroundingDinoGOLSDLoss(hf.GOLSDLoss):
    """Stands in for ``GroundingDinoForObjectDetectionLoss`` on a wrapped model; same arguments, same results.

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
        label_maps: Sequence[Tensor],
        text_mask: Tensor,
        outputs_class: Tensor,
        outputs_coord: Tensor,
        encoder_logits: Tensor,
        encoder_pred_boxes: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Any]] | None]:
        record = current_record()
        labels = hf.with_boxes_in_rows(labels)
        assert record.initial_logits is not None
        text: dict[str, Any] = {"label_maps": label_maps, "text_mask": text_mask}
        predicted = zip(outputs_class, outputs_coord, strict=True)
        layers = [{**hf.prediction_set(*layer), **text} for layer in predicted]
        initial = {**hf.prediction_set(record.initial_logits, record.initial_boxes), **text}
        encoder = {**hf.prediction_set(encoder_logits, encoder_pred_boxes), **text}
        named = {**union_criterion.layer_names(layers, record), "the initial boxes": initial, "the encoder": encoder}
        unmasked = {
            name: hf.prediction_set(outputs["logits"].masked_fill(~text_mask, 0), outputs["pred_boxes"])
            for name, outputs in named.items()
        }
        check = union_criterion.check_of_losses_inputs(record, unmasked)
        auxiliary = layers[:-1] if config.auxiliary_loss else []

        criterion = UnionGroundingDinoLoss(
            label_maps,
            matcher=GroundingDinoHungarianMatcher(
                class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
            ),
            focal_alpha=config.focal_alpha,
            losses=["labels", "boxes", "cardinality"],
        )
        sets = (layers[-1], *auxiliary, initial, encoder)
        criterion.match([(outputs, labels) for outputs in sets], self.config, check)
        losses = criterion({**layers[-1], "auxiliary_outputs": [*auxiliary, initial]}, labels)
        losses = union_criterion.rename_suffixes(losses, {f"_{len(auxiliary)}": "_pre"})
        losses.update({f"{name}_enc": loss for name, loss in criterion(encoder, labels).items()})

        total = self.with_distribution_losses(losses, criterion, [*auxiliary, layers[-1]], config, CLASS_WEIGHT)
        return total, losses, auxiliary or None


def release_too_old() -> str | None:
    """What to install, if transformers is older than :data:`LEAST_RELEASE`."""
    found = version("transformers")
    if Version(found) >= Version(LEAST_RELEASE):
        return None
    return f"is of transformers {found}: pip install 'transformers>={LEAST_RELEASE}'"


@register_adapter("transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoForObjectDetection")
class GroundingDinoAdapter(hf.TransformersAdapter):
    """Grounding DINO."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        host.GroundingDinoDecoder: FDRGroundingDinoDecoder
    }
    loss_class = GroundingDinoGOLSDLoss
    norms = ("encoder_attn_text_layer_norm", "encoder_attn_layer_norm")
    initial_box_head: ClassVar[type[refining_heads.InitialBoxHead]] = InitialGroundingDinoBoxHead
    recorded_class_head: ClassVar[type[recomputed_boxes.RecordedLogits]] = RecordedGroundingDinoClassHead
    deployed_class_head: ClassVar[type[DeployedLogits]] = DeployedGroundingDinoClassHead

    def check(self, model: host_parts.Host, config: FDRConfig) -> None:
        super().check(model, config)
        if too_old := release_too_old():
            raise UnsupportedModelError(f"this {type(model).__name__} {too_old}")
        if config.class_loss != "host":
            raise UnsupportedModelError(
                f"this {type(model).__name__} classifies tokens of a text, and class_loss={config.class_loss!r} is for "
                "logits of classes"
            )
        hf.check_box_heads_are_shared(model)

    def attach_heads(self, model: host_parts.Host, config: FDRConfig, retired: hf.Retired) -> None:
        decoder = model.model.decoder
        num_layers = len(decoder.layers)
        first = host_parts.sharing_copy(decoder.bbox_embed[0])
        host_parts.recast(first, self.initial_box_head)
        heads = [first, *(refining_heads.RefiningBoxHead() for _ in range(1, num_layers))]
        recomputed_boxes.replace_heads(model, self.decoder, num_layers, heads, retired, self.recorded_class_head)

    def num_classes(self, model: host_parts.Host, given: Mapping[str, Any]) -> int | Tensor:
        text = given.get("input_ids")
        if text is None:  # the model's own, which a subclass adds
            return super().num_classes(model, given)
        return count_phrases(text)

    def deploy(self, model: host_parts.Host) -> None:
        super().deploy(model)
        model.model.decoder.deployed = True
        class_head = model.class_embed[-1]
        host_parts.recast(class_head, self.deployed_class_head)
        model.class_embed = nn.ModuleList([class_head])
        model.bbox_embed = nn.ModuleList([recomputed_boxes.DeployedBoxHead(model.config.d_model)])
        hf.retie(model)

    def host_boxes(
        self, model: host_parts.Host, layer: int, hidden_states: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`. The model reports boxes from normed states."""
        states = hidden_states, model.model.decoder.layer_norm(hidden_states)
        following, reported = (host_parts.host_box(model, layer, state, reference) for state in states)
        return following, reported

    def detector(self, model: host_parts.Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`. For one text, that of :func:`~.prompt.fix_prompt`."""
        return PromptedDetector(model)
