"""A small slice of the ablation: not luck, but whether what FDR and GO-LSD rest on happens in training."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch
from torch import nn

from dfine_plugin import FDRConfig, wrap_decoder
from dfine_plugin.adapters import union_criterion
from dfine_plugin.benchmarks.data.detection_data import TrainingView, collate
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.diagnosis import INITIAL, predict_layers
from dfine_plugin.benchmarks.models.hosts import build_host
from dfine_plugin.boxes import aligned_iou

STEPS = 500


@pytest.fixture
def union_sizes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of each criterion call, how many pairs the union has for each of one set's."""
    sizes: list[float] = []
    unite = union_criterion.union_matching

    def counted(sets: Any) -> Any:
        union = unite(sets)
        sizes.append(sum(len(q) for q, _ in union) / sum(len(q) for q, _ in sets[0]))
        return union

    monkeypatch.setattr(union_criterion, "union_matching", counted)
    return sizes


@pytest.mark.slow
def test_layers_improve_on_the_initial_boxes_and_the_union_converges_on_the_matches(union_sizes: list[float]) -> None:
    data = make_shapes(64, 64, seed=0)
    view = TrainingView(data, flip=False, seed=0)
    torch.manual_seed(0)
    model: Any = build_host("rt-detr", data.class_names)
    wrap_decoder(model, FDRConfig.paper(residual_scale=2.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        batch = collate([view[(8 * step + i) % len(view)] for i in range(8)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    # the layers come to agree on who answers for which truth
    late, most = sum(union_sizes[-25:]) / 25, max(sum(union_sizes[i : i + 25]) / 25 for i in range(STEPS - 25))
    assert 1 <= late < 1.15 < 1.3 < most
    # whoever the last layer sends for a truth has come closer to it than its initial box
    batch = collate([view[i] for i in range(len(view))])
    layers = predict_layers(model.eval(), batch["pixel_values"], batch["labels"])
    sent: dict[str, list[float]] = {name: [] for name in layers}
    for image, truths in enumerate(data.boxes):
        logits, boxes = (tensor[image] for tensor in layers["layer 3"])
        for truth in truths:
            iou = aligned_iou(boxes, truth.expand_as(boxes))
            query = int(torch.where(iou > 0.5, logits.sigmoid().amax(-1), 0).argmax())
            if iou[query] > 0.5:
                for name, (_, of_layer) in layers.items():
                    sent[name].append(float(aligned_iou(of_layer[image, query][None], truth[None])))
    mean = {name: fmean(values) for name, values in sent.items()}
    assert len(sent[INITIAL]) > 100
    assert mean["layer 3"] > mean[INITIAL] + 0.002, mean
