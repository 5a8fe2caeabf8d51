"""Boxes, losses and gradients of every wrapped host of transformers against the slow loop with the same weights."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dfine_plugin import FDRConfig, UnsupportedModelError, learn_from, wrap_decoder

from . import slow_loop as slow
from .gradients import assert_same_gradients
from .hosts import Host, build, every_kind_of_loss, images, labels, randomise_fdr
from .transformers_hosts import HOSTS, PHRASES, TEXT_LENGTH, TextHost, TransformersHost


@pytest.fixture
def host(transformers_host: TransformersHost) -> TransformersHost:
    return transformers_host


def refine(model: PreTrainedModel, inputs: dict[str, Any]) -> slow.Predictions:
    """The decoder's loop by the design, section 1, from the inputs that the host's model gave its decoder."""
    decoder = model.model.decoder
    if model.config.model_type == "dab-detr":
        return refine_anchors(model, inputs)
    if model.config.model_type == "conditional_detr":
        return refine_from_points(model, inputs)
    if hasattr(decoder, "ref_point_head"):
        return refine_afterwards(model, inputs)
    if hasattr(decoder, "reference_points_head"):
        return refine_with_text(model, inputs)
    is_deformable = "valid_ratios" in inputs
    inputs = dict(inputs)
    hidden = inputs.pop("inputs_embeds")
    reference = inputs.pop("reference_points")
    if is_deformable:
        ratios = inputs.pop("valid_ratios")
        class_heads = model.class_embed
    else:
        reference = torch.sigmoid(reference)
        class_heads = decoder.class_embed
    fdr = slow.SlowFDR(decoder.fdr)
    for index, layer in enumerate(decoder.layers):
        if is_deformable:
            scale = torch.cat([ratios, ratios], -1) if reference.shape[-1] == 4 else ratios
            hidden = layer(hidden, reference_points=reference[:, :, None] * scale[:, None], **inputs)
        else:
            position = decoder.query_pos_head(reference)
            hidden = layer(
                hidden,
                object_queries_position_embeddings=position,
                reference_points=reference.unsqueeze(2),
                **inputs,
            )
        logits = F.linear(hidden, class_heads[index].weight, class_heads[index].bias)
        reference = fdr.layer(hidden, decoder.bbox_embed[0], reference, 1e-5, logits).detach()
    return fdr.out


def refine_afterwards(model: PreTrainedModel, inputs: dict[str, Any]) -> slow.Predictions:
    """The same where all layers attend from one reference and share their heads."""
    decoder = model.model.decoder
    inputs = dict(inputs)
    hidden, reference, ratios = (inputs.pop(key) for key in ("inputs_embeds", "reference_points", "valid_ratios"))
    points, position = decoder.get_reference(reference, ratios)
    states = []
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=position, reference_points=points, **inputs)
        states.append(decoder.layernorm(hidden))
    logits = [F.linear(state, model.class_embed.weight, model.class_embed.bias) for state in states]
    return slow.SlowScaledFDR(decoder.fdr).layers(states, model.bbox_embed.locate, reference, 0.0, logits)


def refine_anchors(model: PreTrainedModel, inputs: dict[str, Any]) -> slow.Predictions:
    """The same for DAB-DETR, whose queries attend by sines of the box, and by its sides. The images are whole."""
    decoder = model.model.decoder
    hidden, image = inputs["inputs_embeds"], inputs["encoder_hidden_states"]
    reference = inputs["query_position_embeddings"].sigmoid()
    width = hidden.shape[-1]
    fdr = slow.SlowFDR(decoder.fdr)
    for index, layer in enumerate(decoder.layers):
        sine = sines(reference, width // 2)
        position = decoder.ref_point_head(sine)
        vertical, horizontal = sine[..., : width // 2], sine[..., width // 2 : width]
        sides = decoder.ref_anchor_head(hidden).sigmoid() / reference[..., 2:]
        sine = torch.cat([vertical * sides[..., 1:], horizontal * sides[..., :1]], -1)
        if index > 0:
            sine = sine * decoder.query_scale(hidden)
        (hidden, *_) = layer(hidden, None, inputs["object_queries"], position, sine, image)
        logits = F.linear(decoder.layernorm(hidden), model.class_embed.weight, model.class_embed.bias)
        box = fdr.layer(hidden, slow.first_head(decoder.bbox_embed), reference, 1e-5, logits)
        reference = slow.reported(box.detach())
    return fdr.out


def refine_from_points(model: PreTrainedModel, inputs: dict[str, Any]) -> slow.Predictions:
    """The same for Conditional-DETR, whose layers all predict from one point of each query. The images are whole.

    With auxiliary losses the host norms a layer's states before the next one, and the last layer's twice.
    """
    decoder = model.model.decoder
    hidden, position = inputs["inputs_embeds"], inputs["object_queries_position_embeddings"]
    point = decoder.ref_point_head(position).sigmoid()
    width = hidden.shape[-1]
    at_point = sines(F.pad(point, (0, 2)), width // 2)[..., :width]
    states = []
    for index, layer in enumerate(decoder.layers):
        scale = slow.first_head(decoder.query_scale)(hidden) if index > 0 else 1
        hidden = layer(
            hidden,
            None,
            inputs["spatial_position_embeddings"],
            position,
            at_point * scale,
            inputs["encoder_hidden_states"],
            is_first=index == 0,
        )
        state = decoder.layernorm(hidden)
        if model.config.auxiliary_loss:
            hidden = state
            state = decoder.layernorm(hidden) if index == len(decoder.layers) - 1 else state
        states.append(state)
    classifier = model.class_labels_classifier
    logits = [F.linear(state, classifier.weight, classifier.bias) for state in states]
    return slow.SlowFDR(decoder.fdr).layers(states, slow.first_head(model.bbox_predictor), point, 1e-5, logits)


def refine_with_text(model: PreTrainedModel, inputs: dict[str, Any]) -> slow.Predictions:
    """The same where class logits are a query's similarities with the text's tokens, those that are not masked."""
    decoder = model.model.decoder
    inputs = dict(inputs)
    hidden, reference, ratios = (inputs.pop(key) for key in ("inputs_embeds", "reference_points", "valid_ratios"))
    masked = inputs.pop("text_encoder_attention_mask")
    attention = masked[:, None, None].expand(-1, decoder.config.decoder_attention_heads, hidden.shape[1], -1)
    attention = attention.to(hidden.dtype) * torch.finfo(hidden.dtype).min  # added to the scores
    text = inputs["text_encoder_hidden_states"][:, :TEXT_LENGTH]
    scaled = hasattr(model.class_embed[0], "bias")
    fdr = slow.SlowFDR(decoder.fdr)
    for index, layer in enumerate(decoder.layers):
        points = reference[:, :, None] * torch.cat([ratios, ratios], -1)[:, None]
        hidden, *_ = layer(
            hidden_states=hidden,
            position_embeddings=decoder.reference_points_head(sines(points[:, :, 0], hidden.shape[-1] // 2)),
            reference_points=points,
            text_encoder_attention_mask=attention,
            **{key: value for key, value in inputs.items() if not key.startswith(("output_", "return_"))},
        )
        logits = decoder.layer_norm(hidden) @ text.mT
        if scaled:
            logits = logits / hidden.shape[-1] ** 0.5 + model.class_embed[index].bias
        box = fdr.layer(hidden, slow.first_head(decoder.bbox_embed[0]), reference, 1e-5, logits)
        reference = box.detach().clamp(1e-5, 1 - 1e-5)  # the host's references are sigmoids
    return fdr.out


def sines(boxes: Tensor, size: int) -> Tensor:
    """For y, x, w, h so many sines and cosines each, in turns, of frequencies that fall from 2 pi to 2 pi / 10000."""
    angles = boxes[..., [1, 0, 2, 3], None] * 2 * math.pi / 10000 ** (torch.arange(0, size, 2) / size)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def run(
    host: TransformersHost, model: PreTrainedModel, targets: list[dict[str, Tensor]]
) -> tuple[Any, slow.Predictions]:
    """The adapter's outputs, and the slow loop's from the very inputs that the decoder was given."""
    given: dict[str, Any] = {}
    handle = model.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    dtype, default = next(model.parameters()).dtype, torch.get_default_dtype()
    torch.manual_seed(5)
    pixels = images(len(targets)).to(dtype)
    torch.set_default_dtype(dtype)  # DAB-DETR's queries begin as zeros of the default dtype
    try:
        outputs = model(**host.inputs(pixels), labels=targets)
    finally:
        torch.set_default_dtype(default)
    handle.remove()
    return outputs, refine(model, given)


def in_double(model: PreTrainedModel, targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    model.double()
    return [{"class_labels": t["class_labels"], "boxes": t["boxes"].double()} for t in targets]


@pytest.mark.parametrize("lqe", [True, False], ids=["lqe", "no-lqe"])
def test_boxes_and_logits_and_their_gradients(host: Host, lqe: bool) -> None:
    model = wrap_decoder(build(host), host.config(lqe=lqe)).train()
    randomise_fdr(host, model)
    targets = in_double(model, labels())
    outputs, expected = run(host, model, targets)
    last = outputs.pred_boxes.shape[1]
    boxes, logits = expected.boxes[-1][:, -last:], expected.logits[-1][:, -last:]
    if host.name.startswith("rt-detr"):
        boxes, logits = expected.boxes[-1], expected.logits[-1]
    torch.testing.assert_close(outputs.pred_boxes, boxes, atol=1e-5, rtol=0)
    found = outputs.logits[..., : logits.shape[-1]]  # behind the text there is minus infinity
    torch.testing.assert_close(found, logits.to(found.dtype), atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(7)
    probe = torch.randn(boxes.shape, generator=generator).double()
    assert_same_gradients(model, (outputs.pred_boxes * probe).sum(), (boxes * probe).sum(), 1e-4)
    assert_same_gradients(model, found.square().mean(), logits.square().mean(), 1e-4)


def test_layers_whose_states_are_normed_for_the_heads_alone() -> None:
    """Conditional-DETR without auxiliary losses, as the published checkpoints have it."""
    host = next(row for row in HOSTS if row.name == "conditional-detr")
    model = build(host)
    host.without_auxiliary_losses(model)
    wrap_decoder(model, host.config()).train()
    randomise_fdr(host, model)
    outputs, expected = run(host, model, in_double(model, labels()))
    boxes, logits = expected.boxes[-1], expected.logits[-1]
    torch.testing.assert_close(outputs.pred_boxes, boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=0)
    assert_same_gradients(model, outputs.pred_boxes.square().sum(), boxes.square().sum(), 1e-4)
    assert_same_gradients(model, outputs.logits.square().mean(), logits.square().mean(), 1e-4)


def slow_losses(
    host: Host,
    model: PreTrainedModel,
    outputs: Any,
    predictions: slow.Predictions,
    targets: list,
    config: FDRConfig,
    lesson: slow.Lesson | None = None,
) -> dict[str, Tensor]:
    """Every term of the loss dict, weighted, under the host's names."""
    own = model.config
    rt_detr = host.name.startswith("rt-detr")
    costs = (
        {"class": own.matcher_class_cost, "bbox": own.matcher_bbox_cost, "giou": own.matcher_giou_cost}
        if rt_detr
        else {"class": own.class_cost, "bbox": own.bbox_cost, "giou": own.giou_cost}
    )
    l1_weight = own.weight_loss_bbox if rt_detr else own.bbox_loss_coefficient
    giou_weight = own.weight_loss_giou if rt_detr else own.giou_loss_coefficient
    phrases = PHRASES if isinstance(host, TextHost) else None
    class_weight, class_name = (own.weight_loss_vfl, "loss_vfl") if rt_detr else (2.0 if phrases else 1.0, "loss_ce")
    grouped = hasattr(own, "group_detr")
    groups = own.group_detr if grouped else 1
    aux = "_aux_" if rt_detr else "_"

    meta = outputs.denoising_meta_values if rt_detr else None
    split = meta["dn_num_split"][0] if meta else 0
    normal = predictions.part(slice(split, None))
    num_layers = len(normal.boxes)
    suffixes = [f"{aux}{i}" for i in range(num_layers - 1)] + [""]
    # those of hosts whose boxes are sigmoids lie in the image
    boxes = normal.boxes if rt_detr or grouped else [slow.reported(of_layer) for of_layer in normal.boxes]
    sets = {s: (normal.logits[i], boxes[i]) for i, s in enumerate(suffixes)}
    sets["_pre"] = (normal.initial_logits, normal.initial_boxes)
    if rt_detr:
        sets[f"{aux}{num_layers - 1}"] = (outputs.enc_topk_logits, outputs.enc_topk_bboxes)
    if grouped:
        sets["_enc"] = (outputs.enc_outputs_class, outputs.enc_outputs_coord_logits)
    if phrases is not None:
        sets["_enc"] = (outputs.encoder_logits[..., :TEXT_LENGTH], outputs.encoder_pred_boxes)
        # the host's logits are float32 whatever its weights, and costs of sure ones depend on that
        sets = {s: (logits.float(), boxes) for s, (logits, boxes) in sets.items()}
    matches = {s: slow.match_groups(*sets[s], targets, costs, groups, phrases) for s in sets}
    truths = max(groups * sum(len(t["boxes"]) for t in targets), 1)
    united = slow.union(list(matches.values()))
    norm = max(sum(len(p) for p in united), 1) if config.union else truths

    losses: dict[str, Tensor] = {}

    def add_set(suffix: str, logits: Tensor, boxes: Tensor, own_pairs: Any, pairs: Any, n: float, n_box: float) -> None:
        if config.class_loss == "mal":
            term = slow.mal(logits, boxes, targets, own_pairs, n)
        elif rt_detr:
            term = slow.vfl(logits, boxes, targets, own_pairs, n)
        elif grouped:
            term = slow.iou_aware(logits, boxes, targets, own_pairs, n)
        else:
            term = slow.focal(logits, targets, own_pairs, n, phrases)
        losses[class_name + suffix] = class_weight * term
        terms = slow.box_terms(boxes, targets, pairs, n_box)
        losses["loss_bbox" + suffix] = l1_weight * terms["loss_bbox"]
        losses["loss_giou" + suffix] = giou_weight * terms["loss_giou"]

    for suffix, (logits, boxes) in sets.items():
        pairs = united if config.union else matches[suffix]
        add_set(suffix, logits, boxes, matches[suffix], pairs, truths, norm)
    losses.update(
        slow.distribution_terms(
            suffixes, normal, targets, [united if config.union else matches[s] for s in suffixes], norm, config, lesson
        )
    )
    if meta:
        noisy = predictions.part(slice(0, split))
        known = [
            [(int(q), k % len(t["boxes"])) for k, q in enumerate(positive)] if len(t["boxes"]) else []
            for positive, t in zip(meta["dn_positive_idx"], targets, strict=True)
        ]
        n = truths * meta["dn_num_group"]
        names = [f"_dn_{i}" for i in range(num_layers)]
        for i, suffix in enumerate(names):
            add_set(suffix, noisy.logits[i], noisy.boxes[i], known, known, n, n)
        add_set("_dn_pre", noisy.initial_logits, noisy.initial_boxes, known, known, n, n)
        losses.update(slow.distribution_terms(names, noisy, targets, [known] * num_layers, n, config, lesson))
    return losses


@every_kind_of_loss
def test_every_loss_term_and_its_gradient(host: Host, settings: dict[str, Any], counts: tuple[int, ...]) -> None:
    config = host.config(**settings)
    if config.class_loss == "mal" and isinstance(host, TextHost):
        with pytest.raises(UnsupportedModelError, match="classifies tokens of a text, and class_loss='mal' is for"):
            wrap_decoder(build(host), config)
        return
    compare_every_loss_term(host, config, counts)


@pytest.mark.parametrize("layer", [2, 3])
def test_every_loss_term_with_initial_boxes_of_a_later_layer(host: Host, layer: int) -> None:
    if not host.fixed_references:
        with pytest.raises(UnsupportedModelError, match=f"have to come of the first layer, and not of layer {layer}"):
            wrap_decoder(build(host), host.config(initial_layer=layer))
        return
    compare_every_loss_term(host, host.config(initial_layer=layer), (2, 3))


def compare_every_loss_term(host: TransformersHost, config: FDRConfig, counts: tuple[int, ...]) -> None:
    model = wrap_decoder(build(host), config).train()
    randomise_fdr(host, model)
    targets = in_double(model, labels(counts))
    outputs, predictions = run(host, model, targets)
    compare(host, model, outputs, slow_losses(host, model, outputs, predictions, targets, config))


@pytest.mark.parametrize("counts", [(2, 3), (0, 2)], ids=["truths", "empty-image"])
def test_every_loss_term_with_a_teacher(host: Host, counts: tuple[int, ...]) -> None:
    """Which is of other bins, and sees what it is given by the learner."""
    config = host.config()
    model = wrap_decoder(build(host), config).train()
    teacher = wrap_decoder(build(host, seed=4), host.config(num_bins=16, a=0.75)).double().eval()
    for seed, one in enumerate((model, teacher), start=1):
        randomise_fdr(host, one, seed)
    targets = in_double(learn_from(model, teacher, 0.6), labels(counts))
    given: dict[str, Any] = {}
    teacher.model.decoder.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    outputs, predictions = run(host, model, targets)
    with torch.no_grad():
        lesson = slow.Lesson(refine(teacher, given), teacher.model.decoder.fdr.config.bin_values().tolist(), 0.6)
    compare(host, model, outputs, slow_losses(host, model, outputs, predictions, targets, config, lesson))


def compare(host: Host, model: PreTrainedModel, outputs: Any, expected: dict[str, Tensor]) -> None:
    """Each term where the host's are weighted, the total, and its gradients."""
    ours = {name: term for name, term in outputs.loss_dict.items() if "cardinality" not in name}
    assert ours.keys() == expected.keys()
    if host.weighted_loss_dict:
        for name, term in expected.items():
            torch.testing.assert_close(ours[name], term.to(ours[name].dtype), atol=1e-5, rtol=1e-5, msg=name)
    total = torch.stack([term.double() for term in expected.values()]).sum()
    torch.testing.assert_close(outputs.loss.double(), total, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, outputs.loss, total, 1e-4)
