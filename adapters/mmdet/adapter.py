"""MMDetection's Deformable-DETR (one stage, with box refinement, two-stage) and DINO."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from mmdet.models.detectors import DINO
from mmdet.models.layers import DeformableDetrTransformerDecoder, DinoTransformerDecoder
from mmdet.models.losses import FocalLoss, GIoULoss, L1Loss, QualityFocalLoss
from torch import Tensor, nn

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.head import FDRHead
from dfine_plugin.record import current_scope
from dfine_plugin.registry import Arguments, register_adapter
from dfine_plugin.validation import check_targets
from dfine_plugin.wrapping import binding_of

from .. import host_parts
from ..host_parts import Host, Retired
from ..refining_heads import RefiningBoxHead
from .decoder import FDRDeformableDetrDecoder, FDRDinoDecoder, InitialBoxHead
from .detector import MMDetDetector
from .head import DeformableDETRHead, DINOHead, FDRDeformableDETRHead, FDRDINOHead, relative_target

DECODER = "decoder"
NORMS = "norms.0", "norms.1"
"""Of a decoder layer, before and behind its attention to the image."""


@register_adapter("mmdet.models.detectors.deformable_detr.DeformableDETR", "mmdet.models.detectors.dino.DINO")
class DeformableDetrAdapter:
    """Deformable-DETR, and DINO, which is made of it."""

    decoder = DECODER
    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        DeformableDetrTransformerDecoder: FDRDeformableDetrDecoder,
        DinoTransformerDecoder: FDRDinoDecoder,
    }
    """From each host decoder class to its subclass that refines distributions."""
    head_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        DeformableDETRHead: FDRDeformableDETRHead,
        DINOHead: FDRDINOHead,
    }
    """From each class of heads to its subclass that reports and trains them."""

    def check(self, model: Host, config: FDRConfig) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        name = type(model).__name__
        head = model.bbox_head
        expected: list[tuple[Any, Any]] = [
            (model.decoder, self.decoder_classes),
            (head, self.head_classes),
            (head.reg_branches[0], [nn.Sequential]),
            (head.loss_bbox, [L1Loss]),
            (head.loss_iou, [GIoULoss]),
        ]
        if config.class_loss != "host":
            expected.append((head.loss_cls, [FocalLoss, QualityFocalLoss]))
        for part, classes in expected:
            if type(part) not in classes:
                names = " or ".join(cls.__name__ for cls in classes)
                raise UnsupportedModelError(f"this {name} has a {type(part).__name__} where {names} is expected")
        if not model.decoder.return_intermediate:
            raise UnsupportedModelError(f"this {name}'s decoder returns its last layer only (return_intermediate)")
        refines = model.with_box_refine
        if not refines and model.as_two_stage:
            raise UnsupportedModelError(
                f"this {name} is two-stage without box refinement (with_box_refine=False): its encoder's proposals "
                "come from the box head of all layers, which FDR replaces"
            )
        if not refines and not config.box_refinement:
            raise UnsupportedModelError(
                f"this {name} does not refine boxes (with_box_refine=False). FDR refines references from layer to "
                "layer, which changes what its decoder attends to; FDRConfig(box_refinement=True) consents to that"
            )
        host_parts.check_gates(model, DECODER, NORMS, config)

    def attach(self, model: Host, config: FDRConfig) -> Retired:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        decoder, head = model.decoder, model.bbox_head
        later = range(1, decoder.num_layers)
        retired = Retired(modules={f"bbox_head.reg_branches.{layer}": head.reg_branches[layer] for layer in later})
        if model.with_box_refine:
            retired.box_heads = [*retired.modules.values()]
        for layer in later:
            retired.replace(model, f"bbox_head.reg_branches.{layer}", RefiningBoxHead())
        retired.replace(model, "with_box_refine", True)  # the decoder gets the box heads
        retired.recast(model, "bbox_head.reg_branches.0", InitialBoxHead)
        retired.recast(model, DECODER, self.decoder_classes[type(decoder)])
        decoder.fdr = FDRHead(decoder.embed_dims, decoder.num_layers, config).to(next(decoder.parameters()))
        decoder.fdr.train(decoder.training)
        host_parts.gate_layers(model, DECODER, NORMS, retired)
        retired.recast(model, "bbox_head", self.head_classes[type(head)])
        head.fdr_config = config
        # no bound method: copies of the model have one of their own
        model.init_weights = partial(_init_weights, model)
        retired.load_hook = model.register_load_state_dict_pre_hook(_prepare_loading)
        return retired

    def detach(self, model: Host, retired: Retired) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        del model.decoder.fdr, model.bbox_head.fdr_config, model.init_weights
        retired.restore(model, like=next(model.decoder.parameters()))
        retired.load_hook.remove()

    def keep_layers(self, model: Host, num_layers: int) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        head, total = model.bbox_head, len(model.decoder.layers)
        host_parts.keep_first_layers(model, DECODER, num_layers, heads=())
        for name in ("reg_branches", "cls_branches"):
            of_layers = getattr(head, name)
            setattr(head, name, nn.ModuleList([*of_layers[:num_layers], *of_layers[total:]]))
        model.decoder.num_layers = num_layers

    def deploy(self, model: Host) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        decoder, head = model.decoder, model.bbox_head
        decoder.fdr.deploy()
        decoder.deployed = head.deployed = True
        for layer in range(decoder.num_layers - 1):
            head.cls_branches[layer] = nn.Identity()

    def begin(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        if not model.training or given.get("mode") != "loss":
            return
        host_parts.warn_of_frozen_head(model, f"{DECODER}.fdr")
        targets = [relative_target(sample.gt_instances, sample.metainfo) for sample in given["data_samples"]]
        named = [{"labels": target["labels"], "bboxes": target["boxes"]} for target in targets]  # as the host does
        num_classes = model.bbox_head.num_classes
        check_targets(named, num_classes, labels_key="labels", boxes_key="bboxes", images=given["inputs"])
        if isinstance(model, DINO) and not any(len(target["labels"]) for target in targets):
            current_scope().idle.append(model.dn_query_generator.label_embedding.weight)

    def without_truths(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Arguments]:
        """See :class:`~dfine_plugin.registry.AdapterOfLearners`."""
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        return [((given["inputs"], given["data_samples"], "tensor"), {})]

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        norm = getattr(model.decoder, "norm", nn.Identity())
        states = hidden_states, norm(hidden_states)
        next_reference, reported = (host_parts.host_box(model, layer, state, reference) for state in states)
        return next_reference, reported

    def detector(self, model: Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        return MMDetDetector(model)


def _init_weights(model: Host) -> None:
    """The host's, which draws all of its decoder anew; the FDR head, which begins where the boxes are, stays."""
    fdr = model.decoder.fdr
    kept = copy.deepcopy(fdr.state_dict())
    type(model).init_weights(model)
    fdr.load_state_dict(kept)


def _prepare_loading(model: Host, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    binding = binding_of(model)
    assert binding is not None
    host_parts.seed_from_baseline(state_dict, prefix, model, binding.retired, f"{DECODER}.fdr")
