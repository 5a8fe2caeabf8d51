"""RT-DETR and RT-DETRv2 of their authors' own repository, whose package is called ``src``.

The criterion is no part of the model: what the loss needs goes there in the outputs.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError, WrapStateError
from dfine_plugin.head import FDRHead
from dfine_plugin.record import current_scope
from dfine_plugin.registry import Arguments, register_adapter
from dfine_plugin.validation import check_targets
from dfine_plugin.wrapping import binding_of

from .. import host_parts
from ..host_parts import Host
from .criteria import unwrap_criterion, wrap_criterion
from .decoder import DECODERS, TRANSFORMERS

DECODER = "decoder.decoder"
NORMS = "norm1", "norm2"
"""Of a decoder layer, before and behind its attention to the image."""

_check_targets = torch.compiler.disable(check_targets)  # it looks at values


@dataclass
class Retired(host_parts.Retired):
    """With the criteria that train the model, which are no part of it."""

    criteria: list[Any] = field(default_factory=list)


@register_adapter("src.zoo.rtdetr.rtdetr.RTDETR")
class RTDETRAdapter:
    """RT-DETR and RT-DETRv2."""

    decoder = DECODER

    def check(self, model: Host, config: FDRConfig) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        transformer = model.decoder
        for part, twins in ((transformer, TRANSFORMERS), (getattr(transformer, "decoder", None), DECODERS)):
            if type(part) not in twins:
                expected = " or ".join(cls.__name__ for cls in twins)
                raise UnsupportedModelError(
                    f"this {type(model).__name__} has a {type(part).__name__} where {expected} is expected"
                )
        host_parts.check_gates(model, DECODER, NORMS, config)

    def attach(self, model: Host, config: FDRConfig) -> Retired:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        transformer, decoder = model.decoder, model.decoder.decoder
        num_layers = len(decoder.layers)
        retired = Retired(box_heads=[*transformer.dec_bbox_head[1:]])
        host_parts.retire(model, [f"decoder.dec_bbox_head.{i}" for i in range(1, num_layers)], retired)
        retired.recast(model, "decoder", TRANSFORMERS[type(transformer)])
        retired.recast(model, DECODER, DECODERS[type(decoder)])
        decoder.fdr = FDRHead(transformer.hidden_dim, num_layers, config).to(next(decoder.parameters()))
        decoder.fdr.train(decoder.training)
        host_parts.gate_layers(model, DECODER, NORMS, retired)
        retired.load_hook = model.register_load_state_dict_pre_hook(_prepare_loading)
        return retired

    def detach(self, model: Host, retired: Retired) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        del model.decoder.decoder.fdr
        retired.restore(model, like=next(model.decoder.decoder.parameters()))
        retired.load_hook.remove()
        for criterion in retired.criteria:
            unwrap_criterion(criterion)

    def attach_criterion(self, model: Host, retired: Retired, criterion: nn.Module) -> None:
        """See :class:`~dfine_plugin.registry.AdapterWithCriterion`."""
        wrap_criterion(criterion)
        retired.criteria.append(criterion)

    def keep_layers(self, model: Host, num_layers: int) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        host_parts.keep_first_layers(model, DECODER, num_layers, heads=("dec_bbox_head", "dec_score_head"))
        model.decoder.decoder.num_layers = num_layers
        model.decoder.decoder.eval_idx = num_layers - 1

    def deploy(self, model: Host) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        transformer, decoder = model.decoder, model.decoder.decoder
        self.keep_layers(model, decoder.eval_idx + 1)  # the host evaluates no further
        decoder.fdr.deploy()
        decoder.deployed = True
        for index in range(len(decoder.layers) - 1):
            transformer.dec_score_head[index] = nn.Identity()

    def begin(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        if not model.training:
            return
        binding = binding_of(model)
        assert binding is not None
        if torch.is_grad_enabled() and not binding.retired.criteria:
            raise WrapStateError(
                f"no criterion of this {type(model).__name__} is wrapped, and the host's own would not train FDR: "
                "criterion = wrap_criterion(criterion, model) first"
            )
        host_parts.warn_of_frozen_head(model, f"{DECODER}.fdr")
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        targets = given.get("targets")
        if targets is None:
            return
        _check_targets(targets, model.decoder.num_classes, "labels", "boxes", images=given["x"])
        if model.decoder.num_denoising > 0 and not any(len(target["labels"]) for target in targets):
            # version 1 makes no denoising queries then
            current_scope().idle.append(model.decoder.denoising_class_embed.weight)

    def without_truths(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Arguments]:
        """See :class:`~dfine_plugin.registry.AdapterOfLearners`."""
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        return [((given["x"],), {})]

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        box = host_parts.host_box(model, layer, hidden_states, reference)
        return box, box

    def detector(self, model: Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        return Detector(model)


class Detector(nn.Module):
    """A model's logits and boxes, as a tuple; of images of one size where the host has its anchors for that."""

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        size = self.model.decoder.eval_spatial_size
        if size and [height, width] != [*size]:
            raise ValueError(f"this model takes {size[0]}x{size[1]} images (eval_spatial_size), not {height}x{width}")
        outputs = self.model(images)
        return outputs["pred_logits"], outputs["pred_boxes"]


def _prepare_loading(model: Host, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    binding = binding_of(model)
    assert binding is not None
    host_parts.seed_from_baseline(state_dict, prefix, model, binding.retired, f"{DECODER}.fdr")
