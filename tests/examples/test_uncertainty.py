"""The example of what deviations of edges are good for: it runs, and its figures are what they say they are."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin import wrap_decoder
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
from dfine_plugin.benchmarks.trained_hosts import TRAINED, load_trained
from dfine_plugin.benchmarks.uncertainty import MEASURE, SHAPES_SEEDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "uncertainty.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_precision_is_counted_up_to_the_recall(example: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks, right = torch.rand(50, generator=generator), (torch.rand(50, generator=generator) < 0.6).float()
    truths = int(right.sum()) + 5
    for recall in (0.1, 0.33, 0.8):
        found = taken = 0
        for index in sorted(range(50), key=lambda i: -float(ranks[i])):
            taken += 1
            found += int(right[index])
            if found / truths >= recall:
                break
        assert example["precision_at"](ranks, right, truths, recall) == pytest.approx(found / taken)


def test_boxes_fuse_with_near_ones_of_their_class_by_score_and_variance(example: dict[str, Any]) -> None:
    """Two that overlap by 9/11, one of another class in the same place, one far off."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    probabilities = torch.tensor([[0.8, 0.1], [0.4, 0.1], [0.1, 0.9], [0.6, 0.1]])
    deviations = torch.tensor([[0.03, 0.01, 0.01, 0.01], [0.01] * 4, [0.01] * 4, [0.01] * 4])

    def left(other: float) -> float:
        """Of the first box: its own at 0.4, its neighbour's, of less weight, at 0.42."""
        nearness = float(torch.exp(torch.tensor(-((2 / 11) ** 2) / 0.025)))
        return (0.8 * 0.4 + other * nearness * 0.42) / (0.8 + other * nearness)

    for given, expected in ((None, left(0.4)), (deviations, left(0.4 * 9))):
        fused: Tensor = example["fuse"](probabilities.logit(), boxes, given)
        assert float(fused[0, 0] - fused[0, 2] / 2) == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(fused[0, [1, 3]], boxes[0, [1, 3]])
        torch.testing.assert_close(fused[2:], boxes[2:])


@pytest.mark.slow
def test_it_runs(example: dict[str, Any], tmp_path: Path) -> None:
    model = wrap_decoder(load_trained("rt-detr")).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.copy(TRAINED / "rt-detr" / "preprocessor_config.json", tmp_path / "model")
    command = Typer()
    command.command()(example["main"])
    arguments = [str(tmp_path / "model"), "--images=12", f"--output={tmp_path / 'bands.png'}"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert sum(line.startswith("IoU ") for line in lines) == 9
    data = make_shapes(12, 96, SHAPES_SEEDS[MEASURE])
    expected = coco_metrics(detect(model, data, 12, torch.device("cpu")), data.coco, data.sides)
    assert any(line.startswith(f"as predicted: AP {expected['AP']:.2f}, AP50 {expected['AP50']:.2f}") for line in lines)
    assert (tmp_path / "bands.png").stat().st_size > 0
