"""What the adapters for detrex share.

detrex's models run as they are. Their decoders ask a box head, layer by layer, for what to add to the reference's
logits; the model asks again, on the levels' hidden states, for what it reports. Both kinds of heads give way to heads
that answer ``logit(box) - isig(reference)``, so that what comes out is the refined box: exact, for the reference is the
very one that the host adds. The decoder's answer is detached, as refined references are, from everything but an initial
reference with a gradient, whose gradient it cancels; so nothing leaks where a host looks forward twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from detrex.layers import MLP, box_xyxy_to_cxcywh
from detrex.modeling import HungarianMatcher
from detrex.utils import inverse_sigmoid
from torch import Tensor, nn

from dfine_plugin.assignment import MatchingCost
from dfine_plugin.boxes import at_least_float32
from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError, WrapStateError
from dfine_plugin.head import FDRHead, Refinement
from dfine_plugin.record import (
    FDRRecord,
    close_scope,
    closes_on_interrupt,
    current_record,
    current_scope,
    in_scope,
    open_scope,
)
from dfine_plugin.validation import check_targets
from dfine_plugin.wrapping import binding_of

from .. import common, recomputed_boxes
from ..common import Host, Retired
from ..recomputed_boxes import four, logit

DECODER = "transformer.decoder"


@dataclass
class Progress:
    """How far one run of a decoder has come: what its box heads hand on from layer to layer.

    Attributes:
        fdr: the FDR head.
        reference_logits: ``(B, Q, 4)``, of the reference that the layer at work attends from.
        record: of the layers so far; None before the first.
        state: of the refinement after the latest layer.
    """

    fdr: FDRHead
    reference_logits: Tensor
    record: FDRRecord | None = None
    state: Refinement | None = None

    def begin(self, delta: Tensor) -> None:
        """Locate the initial boxes: b0 = sigmoid(delta + isig(initial reference)), isig being the host's."""
        initial_boxes = (at_least_float32(delta) + self.reference_logits).sigmoid()
        self.state = self.fdr.start(initial_boxes)
        self.record = FDRRecord(self.fdr.weights, initial_boxes)

    def refine(self, hidden_states: Tensor) -> Tensor:
        """Refine by the next layer, and return what the host has to add to this layer's reference for the next one."""
        assert self.record is not None
        assert self.state is not None
        layer = len(self.record.boxes)
        self.state = self.fdr(layer, hidden_states, self.state)
        assert self.state.corner_logits is not None
        assert self.state.probabilities is not None
        self.record.corner_logits.append(self.state.corner_logits)
        self.record.boxes.append(self.state.boxes)
        self.record.reference_logits.append(self.reference_logits)
        quality = self.fdr.quality_logits(layer, self.state.probabilities)
        if quality is not None:
            self.record.quality_logits.append(quality)
        delta = logit(self.state.boxes.detach()) - self.reference_logits
        # the host's arithmetic, step by step: bit for bit the logits that it will add next
        self.reference_logits = inverse_sigmoid((delta + self.reference_logits).detach().sigmoid())
        return delta


class RefiningBoxHead(nn.Module):
    """In place of a decoder's box head after its first one: refines the distributions."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return current_scope().progress.refine(hidden_states)


class InitialBoxHead(MLP):
    """The decoder's first box head, as the host has it, then the refinement by the first layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        progress = current_scope().progress
        progress.begin(super().forward(hidden_states))
        return progress.refine(hidden_states)


class RefiningDecoder(nn.Module):
    """Mixin before a host's decoder: its box heads share one :class:`Progress` a run, and leave one record."""

    fdr: FDRHead
    deployed: bool

    def initial_reference_logits(self, **inputs: Any) -> Tensor:
        """``isig`` of the initial reference among the decoder's inputs, ``(B, Q, 4)``."""
        return four(inverse_sigmoid(inputs["reference_points"]))

    @closes_on_interrupt
    def forward(self, *args, **kwargs):
        if in_scope():
            return self.run(*args, **kwargs)
        # of the decoder's own, where the model's forward has opened none
        open_scope()
        try:
            return self.run(*args, **kwargs)
        finally:
            close_scope()

    def run(self, *args, **kwargs):
        """The host's forward, within a scope."""
        scope = current_scope()
        scope.progress = Progress(self.fdr, self.initial_reference_logits(**kwargs))
        hidden_states, references = super().forward(*args, **kwargs)
        scope.record, scope.progress = scope.progress.record, None
        if not self.deployed:
            return hidden_states, references
        return self.last_level(scope.record, hidden_states, references)

    def last_level(self, record: FDRRecord, hidden_states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """What a deployed decoder returns: one level, for which the model adds the initial reference."""
        delta = logit(record.boxes[-1]) - record.reference_logits[0]
        channels = recomputed_boxes.with_channels(hidden_states[-1], delta, record.quality_logits)
        return channels[None], references[-1:]


def prediction_set(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits and boxes of a host's outputs, without what hangs on them."""
    return {key: outputs[key] for key in ("pred_logits", "pred_boxes")}


def initial_set(record: FDRRecord) -> dict[str, Tensor]:
    """The initial boxes with layer 1's class logits before LQE, as a prediction set."""
    assert record.initial_logits is not None
    return {"pred_logits": record.initial_logits, "pred_boxes": record.initial_boxes}


class GOLSDCriterion(common.UnionCriterion):
    """Mixin before a detrex criterion: the same losses, box losses over the union, and the plugin's terms with them.

    The initial boxes are one more auxiliary set of the host's, of the denoising queries as well. All terms are
    unweighted, as the host's: the model weighs them by ``weight_dict``.
    """

    fdr_config: FDRConfig
    logits_key = "pred_logits"
    labels_key = "labels"
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
        return common.sharing_copy(self).losses_of(outputs, targets, *args)

    def losses_of(self, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        """The loss dict, on an instance for this call alone."""
        known = self.denoising(outputs, args)
        queries = self.matched_queries(outputs, known)
        record = current_record().queries(queries)
        auxiliary = outputs.get("aux_outputs", [])
        layers = [*auxiliary, prediction_set(outputs)]
        initial = initial_set(record)
        united = [(layers[-1], targets), *((layer, targets) for layer in auxiliary), (initial, targets)]
        apart: list[common.WithTargets] = []
        named = {**common.layer_names(layers, record), "the initial boxes": initial}
        if "enc_outputs" in outputs:
            named["the encoder"] = encoder = prediction_set(outputs["enc_outputs"])
            (united if self.encoder_is_decoded else apart).append((encoder, self.encoder_targets(targets)))
        if known is not None:
            own = current_record().queries(slice(0, queries.start))
            known_layers = [*known.get("aux_outputs", []), prediction_set(known)]
            known_initial = initial_set(own)
            named |= common.layer_names(known_layers, record, of="the denoising queries in ")
            named["the denoising queries' initial boxes"] = known_initial
        self.match(united, self.fdr_config, common.check_of_losses_inputs(current_record(), named), apart)

        outputs = {**outputs, "aux_outputs": [*auxiliary, initial]}
        if known is not None:
            known = {**known, "aux_outputs": [*known_layers[:-1], known_initial]}
            outputs, args = self.with_denoising(outputs, args, known)
        losses = super().forward(outputs, targets, *args)
        count = len(auxiliary)
        losses = common.rename_suffixes(losses, {f"_dn_{count}": "_dn_pre", f"_{count}": "_pre"})

        names = [*(f"_{i}" for i in range(count)), ""]
        terms = self.distribution_losses(record.last(len(layers)), layers, self.fdr_config)
        losses.update(common.named_terms(terms, names))
        if self.denoises:
            names = [*(f"_dn_{i}" for i in range(count)), "_dn"]
            if known is None:
                # every process reports the same terms: the trainer averages them by name
                nothing = [record.initial_boxes.new_zeros(()) for _ in names]
                terms = nothing, nothing[:-1] if self.fdr_config.ddf else []
            else:
                own = own.last(len(layers))
                terms = self.distribution_losses(own, known_layers, self.fdr_config, over_processes=False)
            losses.update(common.named_terms(terms, names))
        common.check_losses(losses)
        common.take_in_idle(losses)
        return losses

    def encoder_targets(self, targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The targets that the host matches the encoder's proposals with."""
        if not (self.encoder_is_binary or getattr(self, "two_stage_binary_cls", False)):
            return targets
        return [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]


class DenoisingOutputs(GOLSDCriterion):
    """Mixin before a DN criterion, which finds the denoising queries' outputs beside the others."""

    denoises = True

    def denoising(self, outputs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any] | None:
        return outputs.get("denoising_output")

    def with_denoising(
        self, outputs: dict[str, Any], args: tuple[Any, ...], known: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        return {**outputs, "denoising_output": known}, args


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


class DetrexAdapter:
    """Base of the adapters for detrex. A subclass says which classes of the host's take over."""

    decoder = DECODER
    decoder_classes: ClassVar[dict[type[nn.Module], type[RefiningDecoder]]]
    """From each host decoder class to its subclass with :class:`RefiningDecoder`."""
    criterion_classes: ClassVar[dict[type[nn.Module], type[GOLSDCriterion]]]
    """From each host criterion class to its subclass with :class:`GOLSDCriterion`."""
    reported_norm: ClassVar[str | None] = None
    """The decoder's norm of the states that the model reports boxes from, where it has one (or None) by that name."""

    def check(self, model: Host, config: FDRConfig) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        name = type(model).__name__
        decoder = model.transformer.decoder
        for part, classes in ((decoder, self.decoder_classes), (model.criterion, self.criterion_classes)):
            if type(part) not in classes:
                expected = " or ".join(cls.__name__ for cls in classes)
                raise UnsupportedModelError(f"this {name} has a {type(part).__name__} where {expected} is expected")
        if not decoder.return_intermediate:
            raise UnsupportedModelError(f"this {name}'s decoder returns its last layer only (return_intermediate)")
        if decoder.bbox_embed is None and not config.box_refinement:
            raise UnsupportedModelError(
                f"this {name} does not refine boxes (with_box_refine=False). FDR refines references from layer to "
                "layer, which changes what its decoder attends to; FDRConfig(box_refinement=True) consents to that"
            )
        first = self.first_box_head(model)
        if type(first) is not MLP:
            raise UnsupportedModelError(f"this {name} has box heads of another class: {type(first)}")

    def first_box_head(self, model: Host) -> nn.Module:
        """The box head whose output makes the initial boxes."""
        return model.bbox_embed[0]

    def attach(self, model: Host, config: FDRConfig) -> Retired:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        decoder, criterion = model.transformer.decoder, model.criterion
        num_layers = decoder.num_layers
        retired = Retired()
        self.attach_heads(model, num_layers, retired)
        retired.recast(model, DECODER, self.decoder_classes[type(decoder)])
        decoder.deployed = False
        decoder.fdr = FDRHead(model.transformer.embed_dim, num_layers, config).to(next(decoder.parameters()))
        decoder.fdr.train(decoder.training)
        retired.recast(model, "criterion", self.criterion_classes[type(criterion)])
        criterion.fdr_config = config
        retired.replace(model, "criterion.weight_dict", extended_weights(criterion.weight_dict, criterion, num_layers))
        retired.load_hook = model.register_load_state_dict_pre_hook(_prepare_loading)
        return retired

    def attach_heads(self, model: Host, num_layers: int, retired: Retired) -> None:
        """Let decoder and model have heads that refine and that look up what was refined."""
        first = common.sharing_copy(model.bbox_embed[0])
        common.recast(first, InitialBoxHead)
        heads = [first, *(RefiningBoxHead() for _ in range(1, num_layers))]
        recomputed_boxes.replace_heads(model, DECODER, num_layers, heads, retired)

    def detach(self, model: Host, retired: Retired) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        del model.transformer.decoder.fdr, model.transformer.decoder.deployed, model.criterion.fdr_config
        retired.restore(model, like=next(model.transformer.decoder.parameters()))
        retired.load_hook.remove()

    def keep_layers(self, model: Host, num_layers: int) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        common.keep_first_layers(model, DECODER, num_layers)
        model.transformer.decoder.num_layers = num_layers

    def deploy(self, model: Host) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        decoder = model.transformer.decoder
        decoder.fdr.deploy()
        decoder.deployed = True
        self.deploy_heads(model)
        model.criterion = DeployedCriterion()

    def deploy_heads(self, model: Host) -> None:
        """Let the model have the heads of one level, which :meth:`RefiningDecoder.last_level` feeds."""
        recomputed_boxes.replace_heads_by_deployed(model, model.transformer.decoder.num_layers)

    def begin(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        if not model.training:
            return
        common.warn_of_frozen_head(model, f"{DECODER}.fdr")
        (batched_inputs,) = (*args, *kwargs.values())
        targets = [_relative_targets(inputs["instances"]) for inputs in batched_inputs]
        check_targets(targets, model.num_classes, labels_key="gt_classes", boxes_key="gt_boxes")
        if not any(len(target["gt_classes"]) for target in targets):
            current_scope().idle.extend(self.denoising_parameters(model))

    def denoising_parameters(self, model: Host) -> list[Tensor]:
        """Parameters that the host leaves without a gradient where a batch holds no truth."""
        return []

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        norm = getattr(model.transformer.decoder, self.reported_norm or "", None) or nn.Identity()
        states = hidden_states, norm(hidden_states)
        next_reference, reported = (common.host_box(model, layer, state, reference) for state in states)
        return next_reference, reported

    def detector(self, model: Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        return DetrexDetector(model)


class DetrexDetector(nn.Module):
    """A model's logits and boxes for images ``(B, 3, H, W)`` in its own scale and order of channels, all of one size.

    The model gets a list in place of detectron2's dicts: its own preprocessing gives way to taking the images out of
    it, and its selection of detections to putting logits and boxes in.
    """

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.model: Any = common.sharing_copy(model)
        # no bound methods: torch would name the model's modules by way of them
        self.model.preprocess_image = partial(_take_images, self.model.normalizer)
        self.model.inference = _put_predictions

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        exchange = [images]
        self.model(exchange)
        _, logits, boxes = exchange
        return logits, boxes


def _take_images(normalise: Callable[[Tensor], Tensor], exchange: list[Tensor]) -> SimpleNamespace:
    # hosts hand the sizes on to their selection of detections
    return SimpleNamespace(tensor=normalise(exchange[0]), image_sizes=exchange)


def _put_predictions(logits: Tensor, boxes: Tensor, exchange: list[Tensor]) -> list[Any]:
    exchange += [logits, boxes]
    return []


class DeployedCriterion(nn.Module):
    """What a deployed model has for a criterion."""

    def forward(self, *_: Any) -> None:
        raise WrapStateError("a deployed model is for inference only: keep it in evaluation mode")


def _relative_targets(instances: Any) -> dict[str, Tensor]:
    """detectron2's Instances, boxes as cxcywh in image sides, under their own names."""
    height, width = instances.image_size
    corners = instances.gt_boxes.tensor / instances.gt_boxes.tensor.new_tensor([width, height, width, height])
    return {"gt_classes": instances.gt_classes, "gt_boxes": box_xyxy_to_cxcywh(corners)}


def _prepare_loading(model: Host, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    binding = binding_of(model)
    assert binding is not None
    # a host without box refinement names its box head once, the wrapped one a second time for the decoder
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = [(f"{DECODER}.{name}", name) for name in names if name.startswith("bbox_embed")]
    ties = [tie for tie in ties if tie[0] in names]
    common.complete_ties(state_dict, prefix, ties)
    common.seed_from_baseline(state_dict, prefix, model, binding.retired, f"{DECODER}.fdr")
