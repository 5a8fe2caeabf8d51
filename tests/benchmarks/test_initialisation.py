"""Hosts start as their authors' do: the spread of weights by kind of layer, and box heads that learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin.benchmarks.data.detection_data import TrainingView, collate
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.models.hosts import build_host
from dfine_plugin.benchmarks.models.initialisation import PRIOR, initialise_from_scratch

RT_DETRS = ["rt-detr", "rt-detr-v2"]
GROUPED = ["lw-detr", "rf-detr"]
GROUNDED = ["grounding-dino", "mm-grounding-dino"]
DEFORMABLE_DETRS = ["deformable-detr", "deformable-detr-two-stage"]


def build(host: str) -> Any:
    torch.manual_seed(0)
    return build_host(host, ["a", "b"])


def spread(weight: Tensor) -> float:
    return float(weight.detach().std())


def xavier(weight: Tensor) -> float:
    """The standard deviation of Xavier's uniform distribution."""
    return math.sqrt(2 / sum(weight.shape[:2]) / weight[0, 0].numel())


@pytest.mark.parametrize("host", [*RT_DETRS, *DEFORMABLE_DETRS, *GROUPED])
def test_self_attention_starts_as_torchs_own(host: str) -> None:
    attention = build(host).model.decoder.layers[1].self_attn
    reference = nn.MultiheadAttention(64, 4)
    ours = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert spread(ours) == pytest.approx(spread(reference.in_proj_weight), rel=0.03)
    largest, expected = (float(weight.detach().abs().max()) for weight in (ours, reference.in_proj_weight))
    assert largest == pytest.approx(expected, rel=0.01)
    for projection in (attention.q_proj, attention.v_proj, attention.o_proj):
        assert not projection.bias.any()


@pytest.mark.parametrize("host", [*RT_DETRS, *DEFORMABLE_DETRS])
def test_deformable_attention_looks_around_evenly(host: str) -> None:
    attention = build(host).model.decoder.layers[0].encoder_attn
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    assert spread(attention.value_proj.weight) == pytest.approx(xavier(attention.value_proj.weight), rel=0.05)


@pytest.mark.parametrize("host", RT_DETRS)
def test_rt_detr_starts_as_the_authors(host: str) -> None:
    model = build(host).model
    layer = model.decoder.layers[0]
    for linear in (layer.mlp.fc1, layer.mlp.fc2, *model.decoder.query_pos_head.layers, model.enc_output[0]):
        assert spread(linear.weight) == pytest.approx(xavier(linear.weight), rel=0.06)
    for head in (*model.decoder.bbox_embed, model.enc_bbox_head):
        first, last = head.layers[0], head.layers[-1]
        assert not last.weight.any()
        assert not last.bias.any()
        assert spread(first.weight) == pytest.approx(spread(nn.Linear(64, 64).weight), rel=0.05)
    for head in (*model.decoder.class_embed, model.enc_score_head):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full_like(head.bias, PRIOR))
    conv = model.encoder.lateral_convs[0].conv
    assert spread(conv.weight) == pytest.approx(spread(nn.Conv2d(64, 64, 1).weight), rel=0.05)


@pytest.mark.parametrize("host", DEFORMABLE_DETRS)
def test_deformable_detr_starts_as_the_authors(host: str) -> None:
    model = build(host)
    encoder, decoder = model.model.encoder.layers[0], model.model.decoder.layers[0]
    projection = model.model.input_proj[0][0]
    for module in (encoder.mlp.fc1, decoder.mlp.fc1, decoder.mlp.fc2, projection):
        assert spread(module.weight) == pytest.approx(xavier(module.weight), rel=0.06)
    assert not projection.bias.any()
    assert spread(model.model.level_embed) == pytest.approx(1, rel=0.2)
    for level, head in enumerate(model.bbox_embed):
        assert not head.layers[-1].weight.any()
        sides = -2.0 if level == 0 and host == "deformable-detr" else 0.0
        assert head.layers[-1].bias.tolist() == [0.0, 0.0, sides, sides]
        torch.testing.assert_close(head.layers[0].weight, model.bbox_embed[0].layers[0].weight)
    torch.testing.assert_close(model.class_embed[0].bias.sigmoid(), torch.full((2,), PRIOR))


@pytest.mark.parametrize("host", GROUPED)
def test_lw_detr_and_rf_detr_start_as_the_authors(host: str) -> None:
    model = build(host)
    inner, layer = model.model, model.model.decoder.layers[0]
    for linear in (layer.mlp.fc1, layer.mlp.fc2, *inner.decoder.ref_point_head.layers, *inner.enc_output):
        assert spread(linear.weight) == pytest.approx(xavier(linear.weight), rel=0.06)
    assert not layer.cross_attn.sampling_offsets.weight.any()
    assert not inner.reference_point_embed.weight.any()
    for name, parameter in inner.backbone.backbone.named_parameters():
        if name.endswith("fc1.weight"):
            assert spread(parameter) == pytest.approx(0.02, rel=0.05)
    for head in (model.bbox_embed, *inner.enc_out_bbox_embed):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
        torch.testing.assert_close(head.layers[0].weight, model.bbox_embed.layers[0].weight)
    for head in (model.class_embed, *inner.enc_out_class_embed):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((2,), PRIOR))
        torch.testing.assert_close(head.weight, model.class_embed.weight)


@pytest.mark.parametrize("host", GROUNDED)
def test_grounding_dino_starts_as_the_authors(host: str) -> None:
    model = build(host)
    inner = model.model
    encoder, decoder = inner.encoder.layers[0], inner.decoder.layers[1]
    drawn = [decoder.fc1, encoder.deformable_layer.fc2, encoder.text_enhancer_layer.fc1, inner.enc_output]
    for linear in (*drawn, *inner.decoder.reference_points_head.layers, inner.text_projection):
        assert spread(linear.weight) == pytest.approx(xavier(linear.weight), rel=0.06)
    attention = decoder.self_attn
    assert spread(attention.query.weight) == pytest.approx(xavier(torch.empty(192, 64)), rel=0.06)
    assert spread(attention.out_proj.weight) == pytest.approx(xavier(attention.out_proj.weight), rel=0.06)
    assert not decoder.encoder_attn.sampling_offsets.weight.any()
    assert encoder.fusion_layer.vision_param.tolist() == pytest.approx([1e-4] * 64)
    fused = encoder.fusion_layer.attn.values_text_proj.weight
    assert spread(fused) == pytest.approx(xavier(fused), rel=0.06)
    assert spread(inner.text_backbone.embeddings.word_embeddings.weight) == pytest.approx(0.02, rel=0.05)
    for head in (*model.bbox_embed, inner.encoder_output_bbox_embed):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
        assert spread(head.layers[0].weight) == pytest.approx(spread(nn.Linear(64, 64).weight), rel=0.05)
    if host == "mm-grounding-dino":
        biases = torch.stack([head.bias for head in (*model.class_embed, inner.encoder_output_class_embed)])
        torch.testing.assert_close(biases.sigmoid(), torch.full_like(biases, PRIOR))


def test_dab_detr_starts_as_the_authors() -> None:
    model = build("dab-detr")
    layer, decoder = model.model.decoder.layers[1], model.model.decoder
    for linear in (layer.mlp.fc1, layer.cross_attn.cross_attn_value_proj, *decoder.ref_point_head.layers):
        assert spread(linear.weight) == pytest.approx(xavier(linear.weight), rel=0.06)
    assert spread(model.model.query_refpoint_embeddings.weight) == pytest.approx(1, rel=0.2)
    assert not model.bbox_predictor.layers[-1].weight.any()
    assert model.bbox_predictor.layers[0].weight is decoder.bbox_embed.layers[0].weight
    torch.testing.assert_close(model.class_embed.bias.sigmoid(), torch.full((2,), PRIOR))
    attention = model.model.encoder.layers[0].self_attn
    assert spread(attention.q_proj.weight) == pytest.approx(xavier(torch.empty(192, 64)), rel=0.06)


def test_conditional_detr_starts_as_the_authors() -> None:
    model = build("conditional-detr")
    decoder = model.model.decoder
    attention = decoder.layers[1].encoder_attn
    linears = (decoder.layers[1].mlp.fc1, *decoder.ref_point_head.layers[:1], *decoder.query_scale.layers)
    for linear in (*linears, *(module for module in attention.children() if isinstance(module, nn.Linear))):
        assert spread(linear.weight) == pytest.approx(xavier(linear.weight), rel=0.06)
    assert not model.bbox_predictor.layers[-1].weight.any()
    bias = model.class_labels_classifier.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, PRIOR))


@pytest.mark.parametrize("host", [*RT_DETRS, *DEFORMABLE_DETRS, "dab-detr", "conditional-detr"])
def test_backbones_start_as_torchvisions(host: str) -> None:
    backbone = build(host).model.backbone
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions
    for conv in convolutions:
        if conv.weight.numel() > 1000:
            expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]))
            assert spread(conv.weight) == pytest.approx(expected, rel=0.15)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="no initialisation from scratch is known for Linear"):
        initialise_from_scratch(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["rt-detr", "deformable-detr", "dab-detr"])
def test_the_baselines_box_heads_are_alive(host: str) -> None:
    """At step 100 the box losses' gradient in the decoder is of the classification's order.

    With transformers' own weights it is a thousandth of it in RT-DETR.
    """
    model = build_host_for_one_class(host)
    view = TrainingView(make_shapes(160, 64, seed=0), flip=True, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(100):
        batch = collate([view[(8 * step + i) % len(view)] for i in range(8)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    losses = model(**batch).loss_dict
    parameters = [p for p in model.model.decoder.layers.parameters() if p.requires_grad]

    def gradient(*kinds: str) -> float:
        total = torch.stack([value for name, value in losses.items() if any(kind in name for kind in kinds)]).sum()
        found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return float(torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt())

    assert gradient("bbox", "giou") > 0.1 * gradient("vfl", "ce")


def build_host_for_one_class(host: str) -> Any:
    torch.manual_seed(0)
    return build_host(host, ["shape"]).train()
