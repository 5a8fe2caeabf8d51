"""The example of LoRA: what comes back from its folders is what was trained."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dfine_plugin import load_pretrained
from dfine_plugin.benchmarks.trained_hosts import TRAINED, load_trained

from .conftest import run

HOST = TRAINED / "rt-detr"


@pytest.mark.slow
def test_the_adapters_come_back(
    examples: dict[str, ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = examples["lora"]
    trained: list[Any] = []

    def train(model: nn.Module, *arguments: Any, **schedule: Any) -> None:
        examples["fine_tune"].train(model, *arguments, **schedule)
        trained.append(model.eval())

    monkeypatch.setattr(lora, "train", train)
    options = ["--host", HOST, "--output", tmp_path / "adapters", "--steps", 4, "--learning-rate", 1e-2]
    code, printed = run(lora, data, *options)
    assert code == 0, printed
    (model,) = trained

    host = dict(load_trained("rt-detr").named_buffers())
    base = model.get_base_model()
    still = {name: buffer for name, buffer in base.named_buffers() if name.endswith(("running_mean", "running_var"))}
    assert still
    assert all(torch.equal(buffer, host[name]) for name, buffer in still.items())
    assert all(p.abs().max() > 0 for name, p in base.named_parameters() if "lora_B" in name)

    pixels = examples["fine_tune"].CocoSplit(data, "val", examples["fine_tune"].load_processor(str(HOST)))[0]
    images = pixels["pixel_values"][None]
    adapters = lora.load_adapters(tmp_path / "adapters", str(HOST), base.config.id2label)
    with torch.no_grad():
        expected = model(images)
        start = load_trained("rt-detr").eval()(images)
        for loaded in (adapters, load_pretrained(tmp_path / "adapters" / "merged")):
            found = loaded(images)
            torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(start.logits, expected.logits, atol=1e-1)


@pytest.mark.slow
def test_other_hosts_are_told_before_anything_slow(examples: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    code, printed = run(
        examples["lora"], data, "--host", TRAINED / "deformable-detr", "--output", tmp_path / "adapters"
    )
    assert code == 2
    assert "is no RT-DETR" in printed
    assert not (tmp_path / "adapters").exists()
