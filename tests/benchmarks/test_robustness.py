"""Spoilt images, and the command that evaluates an ablation's models on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin.benchmarks import ablation, robustness
from dfine_plugin.benchmarks.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.runs import RunSettings, save_run
from dfine_plugin.benchmarks.robustness import CLEAN, conditions, gains

ABLATION, ROBUSTNESS = Typer(), Typer()
ABLATION.command()(ablation.main)
ROBUSTNESS.command()(robustness.main)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_corruptions_change_images_more(name: str) -> None:
    images = make_shapes(3, 64, seed=0).images
    state = torch.random.get_rng_state()
    spoilt = [corrupt(images, name, strength) for strength in STRENGTHS]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(x.shape == images.shape and x.dtype == torch.uint8 for x in spoilt)
    changes = [float((x.float() - images.float()).abs().mean()) for x in spoilt]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert torch.equal(corrupt(images, name, 2), spoilt[1])
    # an image's noise or rectangle is its own
    assert torch.equal(corrupt(images[:1], name, 2), spoilt[1][:1])


def test_occlusion_hides_the_share_it_says() -> None:
    image = torch.zeros(1, 3, 100, 100, dtype=torch.uint8)
    share = (corrupt(image, "occlusion", 2) == 127).float().mean()
    assert float(share) == pytest.approx(0.12, abs=0.01)


def test_boxes_stay_where_they_are() -> None:
    data = make_shapes(2, 32, seed=0)
    found = conditions(data)
    assert next(iter(found)) == CLEAN
    assert len(found) == 1 + len(CORRUPTIONS) * len(STRENGTHS)
    assert all(spoilt.coco is data.coco and spoilt.boxes is data.boxes for spoilt in found.values())


def test_gains_are_paired_by_seed() -> None:
    scores = {CLEAN: {"baseline": {0: 40.0, 1: 50.0, 2: 1.0}, "fdr": {0: 41.0, 1: 53.0}}}
    difference = gains(scores)[CLEAN]["fdr"]
    assert difference.differences == {0: 1.0, 1: 3.0}


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(ROBUSTNESS, [str(tmp_path)])
    assert result.exit_code == 2
    assert "--save-models" in result.output


def test_models_of_two_comparisons_are_not_taken_for_one(tmp_path: Path) -> None:
    settings = RunSettings("rt-detr", "baseline", 0, "shapes", 64, steps=10, batch_size=4, learning_rate=1e-3)
    for one in (settings, replace(settings, variant="fdr"), replace(settings, steps=20)):
        save_run(tmp_path / "runs", one, {"settings": vars(one)})
        (tmp_path / "models" / one.key()).mkdir(parents=True)
    result = CliRunner().invoke(ROBUSTNESS, [str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "rt-detr after 10 steps on shapes" in result.output
    assert "rt-detr after 20 steps on shapes" in result.output


@pytest.mark.slow
def test_the_command_evaluates_what_an_ablation_kept(tmp_path: Path) -> None:
    small = ["--steps=4", "--seeds=2", "--batch-size=4", "--train-images=8", "--val-images=4", "--image-size=64"]
    kept = [*small, "--variants=baseline fdr", "--jobs=2", f"--output={tmp_path}", "--save-models"]
    assert CliRunner().invoke(ABLATION, kept).exit_code == 0
    result = CliRunner().invoke(ROBUSTNESS, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "robustness.json").read_text())
    finals = json.loads((tmp_path / "ablation.json").read_text())["summary"]
    for variant in ("baseline", "fdr"):
        clean = written["AP"][CLEAN][variant]
        assert clean == pytest.approx(finals[variant]["metrics"]["AP"])
    assert "| occlusion 3 |" in (tmp_path / "robustness.md").read_text()
    assert (tmp_path / "robustness.png").stat().st_size > 0
