"""transformers' D-FINE next to its own FDR head as ours: the same boxes and the same logits."""

import pytest
import torch
from torch import Tensor
from transformers import DFineConfig, DFineForObjectDetection

from dfine_plugin import decode_boxes
from dfine_plugin.adapters.transformers.d_fine import fdr_head_of
from dfine_plugin.boxes import inverse_sigmoid

from .hosts import images
from .transformers_hosts import _BACKBONE, _RT_DETR


def test_it_is_found_where_it_was() -> None:
    from dfine_plugin.adapters import transformers_d_fine

    assert transformers_d_fine.fdr_head_of is fdr_head_of


def d_fine(**settings: object) -> DFineForObjectDetection:
    sizes = {key: value for key, value in _RT_DETR.items() if key != "freeze_backbone_batch_norms"}
    backbone = {"model_type": "rt_detr_resnet", **_BACKBONE}
    torch.manual_seed(0)
    model = DFineForObjectDetection(DFineConfig(**{**sizes, "backbone_config": backbone, **settings})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bbox", "lqe", "class_embed")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("settings", [{}, {"max_num_bins": 16, "reg_scale": 8.0, "up": 0.25}], ids=str)
def test_its_head_decodes_to_the_same_boxes_and_logits(settings: dict[str, object]) -> None:
    model = d_fine(**settings)
    decoder = model.model.decoder
    head = fdr_head_of(model)
    hidden: list[Tensor] = []
    references: list[Tensor] = []
    for layer in decoder.layers[: head.num_layers]:
        layer.register_forward_hook(lambda _, __, output: hidden.append(output[0] if type(output) is tuple else output))
    decoder.register_forward_pre_hook(
        lambda _, __, inputs: references.append(inputs["reference_points"].sigmoid()), with_kwargs=True
    )
    with torch.no_grad():
        outputs = model(images())
        initial = (decoder.pre_bbox_head(hidden[0]) + inverse_sigmoid(references[0])).sigmoid()
        state = head.start(initial)
        for index in range(head.num_layers):
            state = head(index, hidden[index], state)
        logits = decoder.class_embed[head.num_layers - 1](hidden[-1])
        logits = logits + head.quality_logits(head.num_layers - 1, state.probabilities)
    torch.testing.assert_close(state.boxes, outputs.pred_boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, outputs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_boxes(initial, state.corner_logits, head.weights), state.boxes)
    assert (state.boxes - initial).abs().max() > 0.01  # the head does move them


def test_heads_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="of other sizes than the paper's"):
        fdr_head_of(d_fine(lqe_hidden_dim=16))
