"""What the adapters for detrex share: how decoder, heads and criterion of a host give way to those that refine."""

from collections.abc import Mapping
from typing import Any, ClassVar

from detrex.layers import MLP, box_xyxy_to_cxcywh
from torch import Tensor, nn

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.head import FDRHead
from dfine_plugin.record import current_scope
from dfine_plugin.registry import Arguments
from dfine_plugin.validation import check_targets
from dfine_plugin.wrapping import binding_of

from .. import host_parts, recomputed_boxes
from ..host_parts import Host, Retired
from ..refining_heads import RefiningBoxHead
from .criterion import DeployedCriterion, GOLSDCriterion, extended_weights
from .decoder import InitialBoxHead, RefiningDecoder
from .detector import DetrexDetector

DECODER = "transformer.decoder"
NORMS = "norms.0", "norms.1"
"""Of a decoder layer: all hosts norm after self-attention, after cross-attention, and at the end."""


class DetrexAdapter:
    """Base of the adapters for detrex. A subclass says which classes of the host's take over."""

    decoder = DECODER
    decoder_classes: ClassVar[dict[type[nn.Module], type[RefiningDecoder]]]
    """From each host decoder class to its subclass with :class:`RefiningDecoder`."""
    criterion_classes: ClassVar[dict[type[nn.Module], type[GOLSDCriterion]]]
    """From each host criterion class to its subclass with :class:`GOLSDCriterion`."""
    reported_norm: ClassVar[str | None] = None
    """The decoder's norm of the states that the model reports boxes from, where it has one (or None) by that name."""
    fixed_references: ClassVar[bool] = False
    """Whether all layers predict from the first one's references, wrapped as well."""

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
        if decoder.bbox_embed is None and not self.fixed_references and not config.box_refinement:
            raise UnsupportedModelError(
                f"this {name} does not refine boxes (with_box_refine=False). FDR refines references from layer to "
                "layer, which changes what its decoder attends to; FDRConfig(box_refinement=True) consents to that"
            )
        own = self.criterion_classes[type(model.criterion)].class_losses
        kind = getattr(model.criterion, "loss_class_type", "focal_loss")  # some leave no choice
        if config.class_loss != "host" and (not own or kind != "focal_loss"):
            raise UnsupportedModelError(
                f"class_loss={config.class_loss!r} takes the place of a focal loss of pairs matched one to one, which "
                f"this {name}'s loss of classes is not"
            )
        first = self.first_box_head(model)
        if type(first) is not MLP:
            raise UnsupportedModelError(f"this {name} has box heads of another class: {type(first)}")
        host_parts.check_gates(model, DECODER, NORMS, config)

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
        host_parts.gate_layers(model, DECODER, NORMS, retired)
        retired.recast(model, "criterion", self.criterion_classes[type(criterion)])
        criterion.fdr_config = config
        retired.replace(model, "criterion.weight_dict", extended_weights(criterion.weight_dict, criterion, num_layers))
        retired.load_hook = model.register_load_state_dict_pre_hook(_prepare_loading)
        return retired

    def attach_heads(self, model: Host, num_layers: int, retired: Retired) -> None:
        """Let decoder and model have heads that refine and that look up what was refined."""
        first = host_parts.sharing_copy(model.bbox_embed[0])
        host_parts.recast(first, InitialBoxHead)
        heads = [first, *(RefiningBoxHead() for _ in range(1, num_layers))]
        recomputed_boxes.replace_heads(model, DECODER, num_layers, heads, retired)

    def detach(self, model: Host, retired: Retired) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        del model.transformer.decoder.fdr, model.transformer.decoder.deployed, model.criterion.fdr_config
        retired.restore(model, like=next(model.transformer.decoder.parameters()))
        retired.load_hook.remove()

    def keep_layers(self, model: Host, num_layers: int) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        host_parts.keep_first_layers(model, DECODER, num_layers)
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
        host_parts.warn_of_frozen_head(model, f"{DECODER}.fdr")
        (batched_inputs,) = (*args, *kwargs.values())
        targets = [_relative_targets(inputs["instances"]) for inputs in batched_inputs]
        images = [inputs["image"] for inputs in batched_inputs]
        check_targets(targets, model.num_classes, labels_key="gt_classes", boxes_key="gt_boxes", images=images)
        if not any(len(target["gt_classes"]) for target in targets):
            current_scope().idle.extend(self.denoising_parameters(model))

    def denoising_parameters(self, model: Host) -> list[Tensor]:
        """Parameters that the host leaves without a gradient where a batch holds no truth."""
        return []

    def without_truths(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Arguments]:
        """See :class:`~dfine_plugin.registry.AdapterOfLearners`. In evaluation hosts do not look at truths, nor most of
        them at where images are padded."""
        (batched_inputs,) = (*args, *kwargs.values())
        if len({inputs["image"].shape for inputs in batched_inputs}) == 1:
            return [((batched_inputs,), {})]
        return [(([inputs],), {}) for inputs in batched_inputs]

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        norm = getattr(model.transformer.decoder, self.reported_norm or "", None) or nn.Identity()
        states = hidden_states, norm(hidden_states)
        next_reference, reported = (host_parts.host_box(model, layer, state, reference) for state in states)
        return next_reference, reported

    def detector(self, model: Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        return DetrexDetector(model)


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
    host_parts.complete_ties(state_dict, prefix, ties)
    host_parts.seed_from_baseline(state_dict, prefix, model, binding.retired, f"{DECODER}.fdr")
