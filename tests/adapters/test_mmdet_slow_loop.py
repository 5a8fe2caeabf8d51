"""Boxes, losses and gradients of MMDetection's hosts, wrapped, against the slow loop with the same weights.

In float64: the hosts' own tensors are made in the default dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine_plugin import FDRConfig, wrap_decoder

from . import slow_loop as slow
from .gradients import assert_same_gradients
from .hosts import NUM_LAYERS, build, every_kind_of_loss, images, labels, randomise_fdr
from .mmdet_hosts import COSTS, WEIGHTS, MMDetHost


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Step:
    """What a training step gave: its losses, class logits and boxes ``(L, B, Q, …)``, what the host's own criterion was
    called with besides, and the slow loop's predictions from what its decoder was given."""

    losses: dict[str, Tensor]
    logits: Tensor
    boxes: Tensor
    given: dict[str, Any]
    expected: slow.Predictions


def refine(host: MMDetHost, model: nn.Module, inputs: dict[str, Any]) -> slow.Predictions:
    """The decoder's loop by the design, section 1."""
    from mmdet.models.layers.transformer.utils import coordinate_to_encoding

    decoder = model.decoder
    hidden, reference = inputs.pop("query"), inputs.pop("reference_points")
    position, first, ratios = inputs.pop("query_pos", None), inputs.pop("reg_branches")[0], inputs["valid_ratios"]
    fdr = slow.SlowFDR(decoder.fdr)
    for index, layer in enumerate(decoder.layers):
        scale = torch.cat([ratios, ratios], -1) if reference.shape[-1] == 4 else ratios
        scaled = reference[:, :, None] * scale[:, None]
        if host.dino:
            num_feats = decoder.ref_point_head.layers[0].in_features // 4
            position = decoder.ref_point_head(coordinate_to_encoding(scaled[:, :, 0], num_feats))
        hidden = layer(hidden, query_pos=position, reference_points=scaled, **inputs)
        head = model.bbox_head.cls_branches[index]
        logits = F.linear(decoder.norm(hidden) if host.dino else hidden, head.weight, head.bias)
        eps = 1e-3 if host.dino else 1e-5
        box = fdr.layer(hidden, partial(nn.Sequential.forward, first), reference, eps, logits)
        reference = slow.reported(box.detach())
    return fdr.out


def run(host: MMDetHost, config: FDRConfig, targets: list[dict[str, Tensor]]) -> tuple[nn.Module, Step]:
    model = wrap_decoder(build(host), config).train().double()
    randomise_fdr(host, model)
    model.positional_encoding.register_forward_hook(lambda module, args, position: position.double())
    inputs: list[dict[str, Any]] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    handles = [
        model.decoder.register_forward_pre_hook(lambda m, args, kwargs: inputs.append({**kwargs}), with_kwargs=True),
        model.bbox_head.register_forward_hook(lambda m, args, out: outputs.append(out)),
    ]
    given: dict[str, Any] = {}
    loss = model.bbox_head.loss
    model.bbox_head.loss = lambda *args, **kwargs: given.update(kwargs) or loss(*args, **kwargs)
    torch.manual_seed(5)
    losses = host.losses(model, images(len(targets)), targets)[1]
    for handle in handles:
        handle.remove()
    return model, Step(losses, *outputs[0], given, refine(host, model, inputs[0]))


@pytest.mark.parametrize("lqe", [True, False], ids=["lqe", "no-lqe"])
def test_boxes_and_logits_and_their_gradients(mmdet_host: MMDetHost, lqe: bool) -> None:
    model, step = run(mmdet_host, mmdet_host.config(lqe=lqe), labels())
    for layer in range(NUM_LAYERS):
        boxes, logits = step.boxes[layer], step.logits[layer]
        wanted, wanted_logits = step.expected.boxes[layer], step.expected.logits[layer]
        torch.testing.assert_close(boxes, wanted, atol=1e-7, rtol=0)
        torch.testing.assert_close(logits, wanted_logits, atol=1e-7, rtol=0)
        probe = torch.randn(boxes.shape, generator=torch.Generator().manual_seed(7))
        assert_same_gradients(model, (boxes * probe).sum(), (wanted * probe).sum(), 1e-6)
        assert_same_gradients(model, logits.square().mean(), wanted_logits.square().mean(), 1e-6)


def slow_losses(host: MMDetHost, config: FDRConfig, step: Step, truths: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every term of the loss dict, weighted, under the host's names."""
    losses: dict[str, Tensor] = {}
    of_classes = (lambda logits, boxes, *rest: slow.focal(logits, *rest)) if config.class_loss == "host" else slow.mal

    def add_set(name: str, logits: Tensor, boxes: Tensor, targets: Any, own: Any, pairs: Any, n: float, m: float):
        terms = {"loss_cls": of_classes(logits, boxes, targets, own, n)}
        box_terms = slow.box_terms(boxes, targets, pairs, m)
        terms |= {"loss_bbox": box_terms["loss_bbox"], "loss_iou": box_terms["loss_giou"]}
        losses.update({name.format(term): WEIGHTS[term] * value for term, value in terms.items()})

    def add_distributions(names: list[str], *args: Any):
        suffixes = [f"_{layer}" for layer in range(NUM_LAYERS)]
        for term, value in slow.distribution_terms(suffixes, *args).items():
            name, _, layer = term.rpartition("_")
            losses[names[int(layer)].format(name)] = value

    known = step.given.get("dn_meta", {}).get("num_denoising_queries", 0)
    part = step.expected.part(slice(known, None))
    names = [*(f"d{layer}.{{}}" for layer in range(NUM_LAYERS - 1)), "{}"]
    sets = {name: (part.logits[i], part.boxes[i]) for i, name in enumerate(names)}
    sets["{}_pre"] = part.initial_logits, part.initial_boxes
    targets_of = dict.fromkeys(sets, truths)
    if step.given["enc_outputs_class"] is not None:
        sets["enc_{}"] = step.given["enc_outputs_class"], step.given["enc_outputs_coord"]
        one_class = [{**t, "class_labels": t["class_labels"] * 0} for t in truths]
        targets_of["enc_{}"] = truths if host.dino else one_class
    matches = {name: slow.match(*of_set, targets_of[name], COSTS) for name, of_set in sets.items()}
    together = [name for name in sets if name != "enc_{}" or host.dino]
    united = slow.union([matches[name] for name in together])
    count = max(sum(len(t["boxes"]) for t in truths), 1)
    norm = max(sum(len(pairs) for pairs in united), 1)
    for name, of_set in sets.items():
        pairs, m = (united, norm) if config.union and name in together else (matches[name], count)
        add_set(name, *of_set, targets_of[name], matches[name], pairs, count, m)
    pairs_of = [united if config.union else matches[name] for name in names]
    add_distributions(names, part, truths, pairs_of, norm if config.union else count, config)

    if host.dino:
        own, groups = step.expected.part(slice(0, known)), step.given["dn_meta"]["num_denoising_groups"]
        pairs = [[(known // groups * g + t, t) for g in range(groups) for t in range(len(x["boxes"]))] for x in truths]
        n, names = count * groups, [name.replace("{}", "dn_{}") for name in names]
        for i, name in enumerate(names):
            add_set(name, own.logits[i], own.boxes[i], truths, pairs, pairs, n, n)
        add_set("dn_{}_pre", own.initial_logits, own.initial_boxes, truths, pairs, pairs, n, n)
        add_distributions(names, own, truths, [pairs] * NUM_LAYERS, n, config)
    return losses


def check_losses(host: MMDetHost, config: FDRConfig, counts: tuple[int, ...]) -> None:
    truths = labels(counts)
    model, step = run(host, config, truths)
    expected = slow_losses(host, config, step, truths)
    assert step.losses.keys() == expected.keys()
    for name, term in expected.items():
        found = step.losses[name].squeeze()  # the host's losses of classes are of shape (1,)
        torch.testing.assert_close(found, term, atol=1e-6, rtol=1e-6, msg=name)
    assert_same_gradients(model, sum(step.losses.values()).squeeze(), sum(expected.values()), 1e-5)


@every_kind_of_loss
def test_every_loss_term_and_its_gradient(
    mmdet_host: MMDetHost, settings: dict[str, Any], counts: tuple[int, ...]
) -> None:
    check_losses(mmdet_host, mmdet_host.config(**settings), counts)


def test_truths_are_relative_to_their_own_image_where_it_is_padded(mmdet_host: MMDetHost) -> None:
    padded = replace(mmdet_host, sizes=[(64, 40), (48, 64)])
    check_losses(padded, padded.config(), (2, 3))
