"""Boxes, losses and gradients of RT-DETR of its own repository, wrapped, against the slow loop with the same weights.

In float64: the host's own tensors are made in the default dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin import FDRConfig, wrap_decoder

from . import rtdetr_hosts
from . import slow_loop as slow
from .gradients import assert_same_gradients
from .hosts import NUM_LAYERS, build, every_kind_of_loss, images, labels, randomise_fdr
from .rtdetr_hosts import WEIGHTS, RTDETRHost

COSTS = {"class": 2.0, "bbox": 5.0, "giou": 2.0}


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Step:
    """What a training step gave, and the slow loop's predictions from what its decoder was given."""

    losses: dict[str, Tensor]
    outputs: dict[str, Any]
    expected: slow.Predictions


def refine(model: nn.Module, inputs: tuple[Any, ...], attn_mask: Tensor | None) -> slow.Predictions:
    """The decoder's loop by the design, section 1."""
    hidden, logits, *features, box_heads, class_heads, position_head = inputs
    fdr = slow.SlowFDR(model.decoder.decoder.fdr)
    reference = logits.sigmoid()
    for index, layer in enumerate(model.decoder.decoder.layers):
        hidden = layer(hidden, reference[:, :, None], *features, attn_mask, None, position_head(reference))
        box = fdr.layer(hidden, slow.first_head(box_heads[0]), reference, 1e-5, class_heads[index](hidden))
        reference = box.detach()
    return fdr.out


def run(host: RTDETRHost, config: FDRConfig, targets: list[dict[str, Tensor]]) -> tuple[nn.Module, Step]:
    model = wrap_decoder(build(host), config).train().double()
    randomise_fdr(host, model)
    given: list[Any] = []
    outputs: list[dict[str, Any]] = []
    model.decoder.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs["attn_mask"])), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, out: outputs.append(out))
    torch.manual_seed(5)
    losses = host.losses(model, images(len(targets)), targets)[1]
    return model, Step(losses, outputs[0], refine(model, *given[0]))


@pytest.mark.parametrize("lqe", [True, False], ids=["lqe", "no-lqe"])
def test_boxes_and_logits_and_their_gradients(rtdetr_host: RTDETRHost, lqe: bool) -> None:
    model, step = run(rtdetr_host, rtdetr_host.config(lqe=lqe), labels())
    out = step.outputs
    known = out["dn_aux_outputs"]
    layers = [*out["aux_outputs"][: NUM_LAYERS - 1], out]
    for index, layer in enumerate(layers):
        boxes, logits = (torch.cat([known[index][key], layer[key]], 1) for key in ("pred_boxes", "pred_logits"))
        wanted, wanted_logits = step.expected.boxes[index], step.expected.logits[index]
        torch.testing.assert_close(boxes, wanted, atol=1e-7, rtol=0)
        torch.testing.assert_close(logits, wanted_logits, atol=1e-7, rtol=0)
        probe = torch.randn(boxes.shape, generator=torch.Generator().manual_seed(7))
        assert_same_gradients(model, (boxes * probe).sum(), (wanted * probe).sum(), 1e-6)
        assert_same_gradients(model, logits.square().mean(), wanted_logits.square().mean(), 1e-6)


def slow_losses(host: RTDETRHost, config: FDRConfig, step: Step, truths: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every term of the loss dict, weighted, under the host's names."""
    losses: dict[str, Tensor] = {}

    def add_set(suffix: str, logits: Tensor, boxes: Tensor, targets: Any, own: Any, pairs: Any, n: float, m: float):
        of_classes = slow.mal if config.class_loss == "mal" else slow.vfl
        losses["loss_vfl" + suffix] = WEIGHTS["loss_vfl"] * of_classes(logits, boxes, targets, own, n)
        for name, term in slow.box_terms(boxes, targets, pairs, m).items():
            losses[name + suffix] = WEIGHTS[name] * term

    auxiliary, queries = step.outputs.get("aux_outputs"), step.outputs["pred_boxes"].shape[1]
    part = step.expected.part(slice(-queries, None))
    supervised = range(NUM_LAYERS) if auxiliary else [NUM_LAYERS - 1]
    names = [*(f"_aux_{i}" for i in supervised[:-1]), ""]
    sets = {s: (part.logits[i], part.boxes[i]) for s, i in zip(names, supervised, strict=True)}
    sets["_pre"] = (part.initial_logits, part.initial_boxes)
    targets_of = dict.fromkeys(sets, truths)
    if auxiliary:
        suffix, encoder = f"_aux_{NUM_LAYERS - 1}", auxiliary[-1]
        if host.version == 2:
            suffix, (encoder,) = "_enc_0", step.outputs["enc_aux_outputs"]
        sets[suffix] = encoder["pred_logits"], encoder["pred_boxes"]
        of_one_class = encoder["pred_logits"].shape[-1] == 1
        targets_of[suffix] = [{**t, "class_labels": t["class_labels"] * 0} for t in truths] if of_one_class else truths
    matches = {s: slow.match(*sets[s], targets_of[s], COSTS) for s in sets}
    if host.criterion_settings.get("share_matched_indices"):
        matches |= dict.fromkeys((*names, "_pre"), matches[""])
    united = slow.union([*matches.values()])
    count = max(sum(len(t["boxes"]) for t in truths), 1)
    norm = max(sum(len(pairs) for pairs in united), 1) if config.union else count
    for s, (logits, boxes) in sets.items():
        add_set(s, logits, boxes, targets_of[s], matches[s], united if config.union else matches[s], count, norm)
    part.boxes, part.logits = [part.boxes[i] for i in supervised], [part.logits[i] for i in supervised]
    part.corner_logits = [part.corner_logits[i] for i in supervised]
    pairs_of = [united if config.union else matches[s] for s in names]
    losses.update(slow.distribution_terms(names, part, truths, pairs_of, norm, config))

    if "dn_meta" in step.outputs:
        groups, counts = step.outputs["dn_meta"]["dn_num_group"], [len(t["boxes"]) for t in truths]
        # the positives are the first half of each group
        known = [[(2 * max(counts) * group + t, t) for group in range(groups) for t in range(n)] for n in counts]
        own, names = step.expected.part(slice(0, -queries)), [f"_dn_{i}" for i in range(NUM_LAYERS)]
        n = count * groups
        for i, s in enumerate(names):
            add_set(s, own.logits[i], own.boxes[i], truths, known, known, n, n)
        add_set("_dn_pre", own.initial_logits, own.initial_boxes, truths, known, known, n, n)
        losses.update(slow.distribution_terms(names, own, truths, [known] * NUM_LAYERS, n, config))
    return losses


def check_losses(host: RTDETRHost, config: FDRConfig, truths: list[dict[str, Tensor]]) -> None:
    model, step = run(host, config, truths)
    expected = slow_losses(host, config, step, truths)
    assert step.losses.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(step.losses[name], term, atol=1e-7, rtol=1e-7, msg=name)
    total = torch.stack([*expected.values()]).sum()
    assert_same_gradients(model, torch.stack([*step.losses.values()]).sum(), total, 1e-6)


@every_kind_of_loss
def test_every_loss_term_and_its_gradient(
    rtdetr_host: RTDETRHost, settings: dict[str, Any], counts: tuple[int, ...]
) -> None:
    check_losses(rtdetr_host, rtdetr_host.config(**settings), labels(counts))


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("authors-rt-detr", {"num_denoising": 0, "learnt_init_query": True, "eval_idx": 0}, {}),
    ("authors-rt-detr", {"aux_loss": False}, {}),
    ("authors-rt-detr-v2", {"query_select_method": "one2many", "cross_attn_method": "discrete"}, {}),
    ("authors-rt-detr-v2", {"query_select_method": "agnostic", "learn_query_content": True}, {}),
    ("authors-rt-detr-v2", {"aux_loss": False, "num_denoising": 0}, {}),
    ("authors-rt-detr-v2", {"eval_idx": 1}, {"share_matched_indices": True}),
]


@pytest.mark.rtdetr
@pytest.mark.parametrize("union", [True, False], ids=["union", "own-matches"])
@pytest.mark.parametrize(("name", "settings", "criterion_settings"), OPTIONS, ids=str)
def test_the_options_of_the_host(
    name: str, settings: dict[str, Any], criterion_settings: dict[str, Any], union: bool
) -> None:
    host = rtdetr_hosts.row(name, criterion_settings, **settings)
    if host.missing:
        pytest.skip(host.missing)
    check_losses(host, host.config(union=union), labels())
