"""The page on trained models: its code for transformers runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from dfine_plugin import is_wrapped, load_pretrained
from dfine_plugin.benchmarks.detection_data import TrainingView, collate
from dfine_plugin.benchmarks.trained_hosts import TRAINED
from dfine_plugin.benchmarks.training import load_data

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str) -> list[str]:
    """The page's blocks of Python, in order."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_trained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def short(**arguments: Any) -> TrainingArguments:
        # what the page says, but for as many steps as a test has time for
        return TrainingArguments(
            **{**arguments, "max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True}
        )

    data = load_data("shapes", "train", 96, 64)
    names: dict[str, Any] = {
        "checkpoint": TRAINED / "rt-detr",
        "train_dataset": TrainingView(data, flip=True, seed=0),
        "collate": collate,
    }
    train, average, *_ = code("trained_models.md")
    assert "TrainingArguments(" in train
    monkeypatch.setattr("transformers.TrainingArguments", short)
    exec(train, names)
    assert is_wrapped(names["model"])
    trained = load_pretrained("wrapped")
    exec(average, names)
    averaged = load_pretrained("wrapped")
    fdr = [model.get_submodule("model.decoder.fdr.refine.2.4").weight for model in (trained, averaged)]
    assert fdr[0].abs().max() > 0.05  # calibrated
    assert not fdr[0].equal(fdr[1])
