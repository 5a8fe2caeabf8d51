"""Grounding DINOs from scratch learn their proposals, by the loss that transformers gives detached boxes to."""

from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from dfine_plugin import wrap_decoder
from dfine_plugin.benchmarks.models.hosts import build_host

pytestmark = pytest.mark.parametrize("host", ["grounding-dino", "mm-grounding-dino"])
PIXELS = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
BOXES = [[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.7, 0.7, 0.3, 0.3]]
LABELS = [
    {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor(BOXES[:2])},
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor(BOXES[2:])},
]


def build(host: str) -> Any:
    torch.manual_seed(0)
    return build_host(host, ["a", "b"], num_queries=6).train()


def box_losses(model: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """L1 and GIoU of the six best proposals, each truth with the one that the matcher would take."""
    l1, giou = [], []
    for scores, logits, target in zip(outputs.enc_outputs_class, outputs.enc_outputs_coord_logits, LABELS, strict=True):
        best = sorted(range(len(scores)), key=lambda place: -scores[place].max().item())[:6]
        boxes, truths = logits[best].sigmoid(), target["boxes"]
        distance = (boxes[:, None] - truths).abs().sum(-1)
        overlap = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, truths)))
        # a class's name is one token, at 1 and 3 of the text
        chance = scores[best][:, 1 + 2 * target["class_labels"]].sigmoid()
        focal = 0.25 * (1 - chance) ** 2 * -(chance + 1e-8).log() - 0.75 * chance**2 * -(1 - chance + 1e-8).log()
        config = model.config
        cost = config.class_cost * focal + config.bbox_cost * distance - config.giou_cost * overlap
        queries, of = linear_sum_assignment(cost.detach())
        l1.append(distance[queries, of].sum())
        giou.append((1 - overlap[queries, of]).sum())
    return sum(l1) / len(BOXES), sum(giou) / len(BOXES)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_encoders_loss_is_of_the_proposals(host: str, wrapped: bool) -> None:
    model = build(host)
    if wrapped:
        wrap_decoder(model)
    outputs = model(pixel_values=PIXELS, labels=LABELS)
    l1, giou = box_losses(model, outputs)
    torch.testing.assert_close(outputs.loss_dict["loss_bbox_enc"], l1)
    torch.testing.assert_close(outputs.loss_dict["loss_giou_enc"], giou)
    head = list(model.model.encoder_output_bbox_embed.parameters())
    config = model.config
    weighted = config.bbox_loss_coefficient * l1 + config.giou_loss_coefficient * giou
    ours = torch.autograd.grad(weighted, head, retain_graph=True)
    for found, expected in zip(torch.autograd.grad(outputs.loss, head), ours, strict=True):
        torch.testing.assert_close(found, expected)
    assert ours[-1].any()


def test_transformers_own_do_not_learn_them(host: str) -> None:
    """Else there is nothing to mend: the hook may go."""
    model = build(host)
    model.model._forward_hooks.clear()
    model(pixel_values=PIXELS, labels=LABELS).loss.backward()
    gradients = [parameter.grad for parameter in model.model.encoder_output_bbox_embed.parameters()]
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert model.bbox_embed[0].layers[-1].weight.grad.any()


def test_predictions_are_the_hosts(host: str) -> None:
    model = build(host).eval()
    with torch.no_grad():
        ours = model(pixel_values=PIXELS)
        model.model._forward_hooks.clear()
        own = model(pixel_values=PIXELS)
    for name in ("logits", "pred_boxes", "encoder_logits", "encoder_pred_boxes"):
        torch.testing.assert_close(ours[name], own[name], rtol=0, atol=0)
