"""Boxes, losses and gradients of every wrapped host of detrex against the slow loop with the same weights.

In float64: the hosts' own tensors are made in the default dtype.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine_plugin import FDRConfig, UnsupportedModelError, unwrap_decoder, wrap_decoder

from . import slow_loop as slow
from .detrex_hosts import COPIES, TAU, batched_inputs
from .gradients import assert_same_gradients
from .hosts import IMAGE_SIZE, Host, build, every_kind_of_loss, images, labels, randomise_fdr

OWN_CLASS_LOSS = ("detrex-align-detr", "detrex-deta")
EPS = 1e-3  # of detrex's inverse_sigmoid


@pytest.fixture
def host(detrex_host: Host) -> Host:
    return detrex_host


@pytest.fixture(autouse=True)
def in_double(detrex_host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from detectron2.structures import Boxes

    # on its way to the device a Boxes makes itself float32
    monkeypatch.setattr(Boxes, "to", lambda boxes, device: boxes)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def refine(host: Host, model: nn.Module, inputs: dict[str, Any]) -> slow.Predictions:
    """The decoder's loop by the design, section 1, from the inputs that the host's transformer gave its decoder."""
    inputs = dict(inputs)
    if host.fixed_references:
        return refine_from_points(model, inputs)
    if host.one_box_head:
        return refine_queries_first(model, inputs)
    from detrex.layers import get_sine_pos_embed

    decoder = model.transformer.decoder
    hidden, reference, ratios = inputs.pop("query"), inputs.pop("reference_points"), inputs.pop("valid_ratios")
    fixed_position = inputs.pop("query_pos")
    if reference.dim() == 2:
        reference = reference.expand(len(hidden), -1, -1)
    fdr = slow.SlowFDR(decoder.fdr)
    for index, layer in enumerate(decoder.layers):
        scale = torch.cat([ratios, ratios], -1) if reference.shape[-1] == 4 else ratios
        scaled = reference[:, :, None] * scale[:, None]
        extra = {}
        position = fixed_position
        if hasattr(decoder, "ref_point_head"):
            extra["query_sine_embed"] = get_sine_pos_embed(scaled[:, :, 0, :])
            position = decoder.ref_point_head(extra["query_sine_embed"])
            if hasattr(decoder, "query_scale") and index > 0:
                position = decoder.query_scale(hidden) * position
        hidden = layer(hidden, query_pos=position, reference_points=scaled, **inputs, **extra)
        normed = decoder.norm(hidden) if host.dino else hidden
        logits = F.linear(normed, model.class_embed[index].weight, model.class_embed[index].bias)
        box = fdr.layer(hidden, slow.first_head(decoder.bbox_embed[0]), reference, EPS, logits)
        reference = slow.reported(box.detach())
    return fdr.out


def refine_queries_first(model: nn.Module, inputs: dict[str, Any]) -> slow.Predictions:
    """The same for DAB-DETR and DN-DETR, whose decoders have queries before images."""
    from detrex.layers import get_sine_pos_embed

    decoder = model.transformer.decoder
    hidden, anchors = inputs.pop("query"), inputs.pop("anchor_box_embed")
    reference = anchors.sigmoid().transpose(0, 1)
    half = decoder.embed_dim // 2
    fdr = slow.SlowFDR(decoder.fdr)
    for index, layer in enumerate(decoder.layers):
        boxes = reference.transpose(0, 1)
        sine = get_sine_pos_embed(boxes)
        position = decoder.ref_point_head(sine)
        sine = sine[..., : decoder.embed_dim]
        if index > 0:
            sine = sine * decoder.query_scale(hidden)
        modulation = decoder.ref_anchor_head(hidden).sigmoid() / boxes[..., 2:]
        sine = torch.cat([sine[..., :half] * modulation[..., 1:], sine[..., half:] * modulation[..., :1]], -1)
        hidden = layer(hidden, query_pos=position, query_sine_embed=sine, is_first_layer=index == 0, **inputs)
        normed = decoder.post_norm_layer(hidden).transpose(0, 1)
        logits = F.linear(normed, model.class_embed.weight, model.class_embed.bias)
        box = fdr.layer(hidden.transpose(0, 1), slow.first_head(decoder.bbox_embed), reference, EPS, logits)
        reference = slow.reported(box.detach())
    return fdr.out


def refine_from_points(model: nn.Module, inputs: dict[str, Any]) -> slow.Predictions:
    """The same for Conditional-DETR and Group-DETR, whose layers all attend, and predict, from one point a query."""
    from detrex.layers import get_sine_pos_embed

    decoder = model.transformer.decoder
    hidden, position = inputs.pop("query"), inputs.pop("query_pos")
    points = decoder.ref_point_head(position).sigmoid()
    sine = get_sine_pos_embed(points)[..., : decoder.embed_dim]
    states = []
    for index, layer in enumerate(decoder.layers):
        scaled = sine * decoder.query_scale(hidden) if index > 0 else sine
        hidden = layer(hidden, query_pos=position, query_sine_embed=scaled, is_first_layer=index == 0, **inputs)
        states.append(decoder.post_norm_layer(hidden).transpose(0, 1))
    logits = [F.linear(state, model.class_embed.weight, model.class_embed.bias) for state in states]
    head = slow.first_head(decoder.bbox_embed)
    return slow.SlowFDR(decoder.fdr).layers(states, head, points.transpose(0, 1), EPS, logits)


ASSIGNERS = {"stg1_assigner": "_enc", "stg2_assigner": ""}
"""DETA's, to the suffix of the set whose pairs they draw; the last layer's are those of all layers."""


def run(host: Host, model: nn.Module, targets: list[dict[str, Tensor]]) -> tuple[dict, list[Any], slow.Predictions]:
    """The adapter's weighted losses, what each call of the criterion was given, and the slow loop's predictions.

    Pairs that the host's criterion draws at random are among what its first call was given, as ``assigned``.
    """
    assigned: dict[str, slow.Pairs] = {}
    given: dict[str, Any] = {}
    calls: list[Any] = []
    handles = [
        model.transformer.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
        ),
        model.criterion.register_forward_pre_hook(lambda module, args: calls.append(args)),
    ]
    for name, suffix in ASSIGNERS.items():
        if hasattr(model.criterion, name):
            assigner = model.criterion.get_submodule(name)
            handles.append(assigner.register_forward_hook(partial(keep_pairs, assigned, suffix)))
    torch.manual_seed(5)
    losses = model(batched_inputs(images(len(targets)), targets))
    for handle in handles:
        handle.remove()
    calls[0][0]["assigned"] = assigned
    return losses, calls, refine(host, model, given)


def keep_pairs(kept: dict[str, slow.Pairs], suffix: str, module: nn.Module, args: Any, pairs: Any) -> None:
    assert suffix not in kept  # drawn once
    kept[suffix] = [[*zip(queries.tolist(), truths.tolist(), strict=True)] for queries, truths in pairs]


def doubled(host: Host, config: FDRConfig) -> nn.Module:
    model = wrap_decoder(build(host), config).train().double()
    randomise_fdr(host, model)
    model.position_embedding.register_forward_hook(lambda module, args, position: position.double())
    return model


def in_order(host: Host, calls: list[Any]) -> tuple[Tensor, Tensor]:
    """Boxes and logits of the last layer over all the decoder's queries, as the model gave them to the criterion."""
    outputs = [calls[0][0]]
    known = outputs[0].get("denoising_output")
    if len(calls[0]) > 2:
        known = calls[0][2]["output_known_lbs_bboxes"]
    if known is not None:
        outputs.insert(0, known)
    outputs += [call[0] for call in calls[1:]]
    return torch.cat([o["pred_boxes"] for o in outputs], 1), torch.cat([o["pred_logits"] for o in outputs], 1)


@pytest.mark.parametrize("lqe", [True, False], ids=["lqe", "no-lqe"])
def test_boxes_and_logits_and_their_gradients(host: Host, lqe: bool) -> None:
    model = doubled(host, host.config(lqe=lqe))
    _, calls, expected = run(host, model, labels())
    boxes, logits = in_order(host, calls)
    wanted = slow.reported(expected.boxes[-1])
    torch.testing.assert_close(boxes, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected.logits[-1], atol=1e-5, rtol=0)
    probe = torch.randn(boxes.shape, generator=torch.Generator().manual_seed(7))
    assert_same_gradients(model, (boxes * probe).sum(), (wanted * probe).sum(), 1e-4)
    assert_same_gradients(model, logits.square().mean(), expected.logits[-1].square().mean(), 1e-4)


def known_pairs(counts: list[int], groups: int, padding: int) -> slow.Pairs:
    return [[(group * padding + t, t) for group in range(groups) for t in range(count)] for count in counts]


GROUPS = 11
"""Of Group-DETR's queries."""


def slow_losses(
    host: Host,
    weights: dict[str, float],
    calls: list[Any],
    predictions: slow.Predictions,
    truths: list[dict[str, Tensor]],
    config: FDRConfig,
) -> dict[str, Tensor]:
    """Every term of the loss dict, weighted, under the host's names; ``weights`` are the bare host's."""
    costs = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
    losses: dict[str, Tensor] = {}
    ranked = host.name == "detrex-align-detr"
    groups = GROUPS if host.name == "detrex-group-detr" else 1

    def add_set(suffix: str, logits: Tensor, boxes: Tensor, targets: Any, own: Any, pairs: Any, n: float, m: float):
        base = {k: weights.get(k + suffix, weights[k]) for k in ("loss_class", "loss_bbox", "loss_giou")}
        ranks = None
        if config.class_loss == "mal":
            of_classes = slow.mal(logits, boxes, targets, own, n)
        elif ranked:
            ranks = None if "_dn" in suffix else slow.rank_weights(logits, boxes, targets, own, TAU)
            of_classes = slow.iou_aware(logits, boxes, targets, own, n, ranks, slow.DETREX_EPS)
        else:
            of_classes = slow.focal(logits, targets, own, n)
        losses["loss_class" + suffix] = base["loss_class"] * of_classes
        for name, term in slow.box_terms(boxes, targets, pairs, m, ranks if pairs is own else None).items():
            losses[name + suffix] = base[name] * term

    def add_branch(part: slow.Predictions, targets: list, encoder: dict[str, Tensor] | None, tail: str) -> None:
        num_layers = len(part.boxes)
        suffixes = [f"_{i}" for i in range(num_layers - 1)] + [""]
        sets = {s: (part.logits[i], slow.reported(part.boxes[i])) for i, s in enumerate(suffixes)}
        sets["_pre"] = (part.initial_logits, part.initial_boxes)
        encoded = targets
        decoded = host.dino or "dab" in host.name  # encoder sets of the decoder's queries
        if encoder is not None:
            sets["_enc"] = (encoder["pred_logits"], encoder["pred_boxes"])
            if not decoded:
                encoded = [{**t, "class_labels": t["class_labels"] * 0} for t in targets]
        copies = dict.fromkeys(sets, 1)
        if ranked:
            copies = dict(zip(["_enc", *suffixes], COPIES, strict=True), _pre=COPIES[1])
        matches = {
            s: slow.match_groups(*sets[s], encoded if s == "_enc" else targets, costs, groups, copies=copies[s])
            for s in sets
        }
        for s in matches if "" in assigned else []:
            matches[s] = assigned["_enc" if s == "_enc" else ""]
        count = max(sum(len(t["boxes"]) for t in targets) * groups, 1)
        candidates = [m for s, m in matches.items() if s != "_enc" or decoded]
        if tail:  # the copies of a truth are one truth
            lengths = [len(t["boxes"]) // 2 for t in targets]
            candidates = [[[(q, t % n) for q, t in i] for i, n in zip(m, lengths, strict=True)] for m in candidates]
        united = slow.union(candidates)
        norm = max(sum(len(p) for p in united), 1)
        for suffix, (logits, boxes) in sets.items():
            take = config.union and (suffix != "_enc" or decoded)
            own = matches[suffix]
            goal = encoded if suffix == "_enc" else targets
            add_set(suffix + tail, logits, boxes, goal, own, united if take else own, count, norm if take else count)
        pairs_of = [united if config.union else matches[s] for s in suffixes]
        losses.update(
            slow.distribution_terms(
                [s + tail for s in suffixes], part, targets, pairs_of, norm if config.union else count, config
            )
        )

    outputs, assigned = calls[0][0], calls[0][0]["assigned"]
    if "srcs" in outputs:
        losses["select_loss"] = 1.5 * foreground_loss(outputs, truths)
    count = outputs["pred_boxes"].shape[1]
    total = predictions.initial_boxes.shape[1]
    if host.name == "detrex-h-deformable-detr":
        repeated = [{k: t[k].repeat(2, *[1] * (t[k].dim() - 1)) for k in t} for t in truths]
        add_branch(predictions.part(slice(0, count)), truths, outputs["enc_outputs"], "")
        add_branch(predictions.part(slice(count, None)), repeated, None, "_one2many")
        return losses
    add_branch(predictions.part(slice(total - count, None)), truths, outputs.get("enc_outputs"), "")
    if host.dino or "-dn-" in host.name:
        meta = calls[0][2] if host.dino else outputs
        counts = [len(t["boxes"]) for t in truths]
        if host.dino:
            groups, padding = meta["dn_num"], meta["single_padding"]
        else:
            groups, padding = int(meta["denoising_groups"]), int(meta["max_gt_num_per_image"])
        known = known_pairs(counts, groups, padding)
        part = predictions.part(slice(0, total - count))
        n = max(sum(counts), 1) * groups
        names = [*(f"_dn_{i}" for i in range(len(part.boxes) - 1)), "_dn"]
        for i, suffix in enumerate(names):
            add_set(suffix, part.logits[i], slow.reported(part.boxes[i]), truths, known, known, n, n)
        add_set("_dn_pre", part.initial_logits, part.initial_boxes, truths, known, known, n, n)
        losses.update(slow.distribution_terms(names, part, truths, [known] * len(names), n, config))
    return losses


def foreground_loss(outputs: dict[str, Any], truths: list[dict[str, Tensor]]) -> Tensor:
    """Focus-DETR's focal loss of all tokens. A level's are foreground in boxes whose farthest edge is in its range.

    Of an image over its number of such tokens, at least 1; averaged over the images.
    """
    of_images = []
    for image, target in enumerate(truths):
        scores = iter(outputs["temp_backbone_mask_prediction"][image, :, 0].sigmoid())
        total, positives = torch.zeros(()), 0
        for stride, least, most, level in zip(
            (8, 16, 32, 64), (-1, 64, 128, 256), (64, 128, 256, math.inf), outputs["srcs"], strict=True
        ):
            for row, column in itertools.product(range(level.shape[2]), range(level.shape[3])):
                x, y = column * stride + stride // 2, row * stride + stride // 2
                edges = [
                    min(offsets) > 0 and least < max(offsets) <= most
                    for x0, y0, x1, y1 in (slow.xyxy(target["boxes"]) * IMAGE_SIZE).tolist()
                    for offsets in [(x - x0, y - y0, x1 - x, y1 - y)]
                ]
                p = next(scores)
                positives += any(edges)
                total = total - (0.25 * (1 - p) ** 2 * p.log() if any(edges) else 0.75 * p**2 * (1 - p).log())
        of_images.append(total / max(positives, 1))
    return torch.stack(of_images).mean()


@every_kind_of_loss
def test_every_loss_term_and_its_gradient(host: Host, settings: dict[str, Any], counts: tuple[int, ...]) -> None:
    compare_every_loss_term(host, host.config(**settings), counts)


def test_every_loss_term_with_initial_boxes_of_a_later_layer(host: Host) -> None:
    if not host.fixed_references:
        with pytest.raises(UnsupportedModelError, match="have to come of the first layer, and not of layer 2"):
            wrap_decoder(build(host), host.config(initial_layer=2))
        return
    compare_every_loss_term(host, host.config(initial_layer=2), (2, 3))


def compare_every_loss_term(host: Host, config: FDRConfig, counts: tuple[int, ...]) -> None:
    if config.class_loss == "mal" and host.name.startswith(OWN_CLASS_LOSS):
        with pytest.raises(UnsupportedModelError, match="class_loss='mal' takes the place of a focal loss of pairs"):
            wrap_decoder(build(host), config)
        return
    model = doubled(host, config)
    weights = build(host).criterion.weight_dict
    losses, calls, predictions = run(host, model, labels(counts))
    weights = {k: v for k, v in weights.items() if k in ("loss_class", "loss_bbox", "loss_giou")}
    expected = slow_losses(host, weights, calls, predictions, labels(counts), config)
    assert losses.keys() == expected.keys()
    for name, term in expected.items():
        found = losses[name].double().squeeze()  # Align-DETR's terms of the encoder are of shape (1,)
        torch.testing.assert_close(found, term, atol=1e-5, rtol=1e-5, msg=name)
    total = torch.stack([*expected.values()]).sum()
    assert_same_gradients(model, sum(losses.values()), total, 1e-4)


def test_the_weights_are_the_hosts_again_after_unwrapping(host: Host) -> None:
    bare = build(host)
    model = build(host)
    assert unwrap_decoder(wrap_decoder(model, host.config())).criterion.weight_dict == bare.criterion.weight_dict
