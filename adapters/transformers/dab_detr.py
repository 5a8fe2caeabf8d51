"""DAB-DETR of Hugging Face transformers, whose loss is Deformable-DETR's.

The decoder asks its box head once a layer, the model asks once on all layers' normed states; the two heads are one. Its
decoder refines on un-normed states; wrapped, all boxes are those that were refined on them.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.dab_detr import modeling_dab_detr as host

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError
from dfine_plugin.record import FDRRecord, current_scope
from dfine_plugin.registry import register_adapter

from .. import host_parts, recomputed_boxes, refining_heads
from . import adapter as hf
from .deformable_detr import DeformableDetrGOLSDLoss


class SharedBoxHead(refining_heads.InitialBoxHead, host.DabDetrMLP):
    """The decoder's only box head."""


class FDRDabDetrDecoder(refining_heads.RefiningDecoder, host.DabDetrDecoder):
    """The host's decoder, refining distributions."""

    def inverse_sigmoid(self, reference: Tensor) -> Tensor:
        return host.inverse_sigmoid(reference)

    def initial_reference_logits(self, **inputs: Any) -> Tensor:
        return host.inverse_sigmoid(inputs["query_position_embeddings"].sigmoid())

    def run(self, *args, **kwargs):
        # the model reads these outputs as a tuple, too
        outputs = super().run(*args, **{**kwargs, "return_dict": True})
        current_scope().progress.first_hidden_states = outputs.intermediate_hidden_states[0]
        return outputs

    def last_level(self, record: FDRRecord, outputs: Any) -> Any:
        outputs.intermediate_hidden_states = recomputed_boxes.last_level(
            record, outputs.intermediate_hidden_states, record.reference_logits[-1]
        )
        outputs.reference_points = outputs.reference_points[-1:]
        return outputs


@register_adapter("transformers.models.dab_detr.modeling_dab_detr.DabDetrForObjectDetection")
class DabDetrAdapter(hf.TransformersAdapter):
    """DAB-DETR. Its box head stays, to locate the initial boxes: nothing retires."""

    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {host.DabDetrDecoder: FDRDabDetrDecoder}
    loss_class = DeformableDetrGOLSDLoss
    hidden_dim = "hidden_size"
    norms = ("self_attn.self_attn_layer_norm", "cross_attn.cross_attn_layer_norm")

    def check(self, model: host_parts.Host, config: FDRConfig) -> None:
        super().check(model, config)
        head, own = model.bbox_predictor, model.model.decoder.bbox_embed
        name = type(model).__name__
        if type(head) is not host.DabDetrMLP or type(own) is not host.DabDetrMLP:
            raise UnsupportedModelError(f"this {name} has box heads of another class: {type(head)}, {type(own)}")
        if own.layers[0].weight is not head.layers[0].weight:
            raise UnsupportedModelError(
                f"this {name} has different box heads on model and decoder (tie_word_embeddings=False)"
            )

    def attach_heads(self, model: host_parts.Host, config: FDRConfig, retired: hf.Retired) -> None:
        recomputed_boxes.replace_shared_heads(
            model, "model.decoder.bbox_embed", "bbox_predictor", SharedBoxHead, len(model.model.decoder.layers), retired
        )

    def keep_layers(self, model: host_parts.Host, num_layers: int) -> None:
        super().keep_layers(model, num_layers)
        model.model.decoder.num_layers = num_layers

    def deploy(self, model: host_parts.Host) -> None:
        super().deploy(model)
        model.model.decoder.deployed = True
        recomputed_boxes.replace_shared_heads_by_deployed(model, "bbox_predictor")
        hf.retie(model)

    def host_boxes(
        self, model: host_parts.Host, layer: int, hidden_states: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`. What the model reports comes of normed states."""
        states = hidden_states, model.model.decoder.layernorm(hidden_states)
        next_reference, reported = (host_parts.host_box(model, layer, state, reference) for state in states)
        return next_reference, reported
