"""Baselines of releases whose RT-DETR learns from the wrong queries are refused, and no others."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import RTDetrConfig
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss
from typer import BadParameter, Typer
from typer.testing import CliRunner

from dfine_plugin.benchmarks import ablation, options, retrofit
from dfine_plugin.benchmarks.options import FAIR_BASELINES, check_fair_baseline


def test_the_release_is_the_first_that_leaves_denoising_queries_out() -> None:
    """By what the installed one does: the main loss has a gradient on denoising queries, or has not."""
    denoising, matched = 4, 3
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, denoising + matched, 2, generator=generator, requires_grad=True)
    boxes = torch.rand(1, denoising + matched, 4, generator=generator) * 0.3 + 0.3
    meta = {"dn_num_split": [denoising, matched], "dn_positive_idx": [torch.arange(1)], "dn_num_group": 1}
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    config = RTDetrConfig(num_labels=2, auxiliary_loss=False)
    loss, *_ = RTDetrForObjectDetectionLoss(
        logits, labels, "cpu", boxes, config, None, None, None, None, denoising_meta_values=meta
    )
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:, denoising:].any()
    fair = Version(transformers.__version__) >= Version(FAIR_BASELINES)
    assert fair is not bool(logits.grad[:, :denoising].any())


@pytest.mark.parametrize("command", [ablation, retrofit], ids=["ablation", "retrofit"])
def test_earlier_ones_are_refused(command: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "version", lambda package: "5.17.0")
    app = Typer()
    app.command()(command.main)  # type: ignore[attr-defined]
    result = CliRunner().invoke(app, [], env={"COLUMNS": "1000"})
    assert result.exit_code == 2
    assert "pip install 'transformers>=5.18.0'" in result.output
    with pytest.raises(BadParameter, match=r"transformers 5.17.0 matches rt-detr-v2's denoising queries"):
        check_fair_baseline("rt-detr-v2")
    check_fair_baseline("deformable-detr")
    monkeypatch.setattr(options, "version", lambda package: FAIR_BASELINES)
    check_fair_baseline("rt-detr")
