"""Errors and deviations of edges: matching against pycocotools, statistics against slow sums and laws, the command."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from transformers import RTDetrImageProcessor
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin import wrap_decoder
from dfine_plugin.benchmarks import uncertainty
from dfine_plugin.benchmarks.data.detection_data import DetectionData, normalised
from dfine_plugin.benchmarks.gain.calibration_errors import (
    LEVELS,
    bin_edges,
    intervals,
    observed_levels,
    quantile_error,
    summarise,
)
from dfine_plugin.benchmarks.gain.edge_errors import EdgeErrors, cumulative, edge_errors, match
from dfine_plugin.benchmarks.trained_hosts import TRAINED, load_trained
from dfine_plugin.boxes import edge_offsets
from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.distributions import edge_distributions
from dfine_plugin.wrapping import predict_distributions

from ..adapters.hosts import images, wrapped
from ..adapters.transformers_hosts import HOSTS

COMMAND = Typer()
COMMAND.command()(uncertainty.main)
SIZE = (200, 100)
HOST = {host.name: host for host in HOSTS}["rt-detr"]
NORMALISATION = {"channels": "RGB", "scale": 1 / 255, "mean": [0.0] * 3, "std": [1.0] * 3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_errors(errors: Tensor, deviations: Tensor, levels: Tensor | None = None) -> EdgeErrors:
    """Of boxes with random sides and scores."""
    sides, scores = normal(len(errors), 4, seed=8).exp(), normal(len(errors), seed=9).sigmoid()
    return EdgeErrors(errors, deviations, torch.zeros_like(errors) if levels is None else levels, sides, scores)


@pytest.mark.parametrize("seed", range(8))
def test_matches_are_those_of_pycocotools(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truths = torch.cat([torch.rand(9, 2, generator=generator), 0.3 + 0.1 * torch.rand(9, 2, generator=generator)], 1)
    labels = torch.randint(2, (9,), generator=generator)
    copies = torch.randint(9, (40,), generator=generator)
    boxes = truths[copies] + 0.05 * torch.randn(40, 4, generator=generator)
    classes = torch.where(torch.rand(40, generator=generator) < 0.8, labels[copies], 1 - labels[copies])
    scores = torch.rand(40, generator=generator)
    queries, found = match(scores, classes, boxes, truths, labels, threshold=0.2)

    def rows(boxes: Tensor, classes: Tensor) -> list[dict]:
        return [
            {"image_id": 1, "id": index + 1, "category_id": int(label), "bbox": [cx - w / 2, cy - h / 2, w, h]}
            | {"area": w * h, "iscrowd": 0}
            for index, ((cx, cy, w, h), label) in enumerate(zip((1000 * boxes).tolist(), classes, strict=True))
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, "images": [{"id": 1}], "categories": [{"id": 0}, {"id": 1}]}
        coco.dataset["annotations"] = rows(truths, labels)
        coco.createIndex()
        detections = [row | {"score": s} for row, s in zip(rows(boxes, classes), scores.tolist(), strict=True)]
        evaluation = COCOeval(coco, coco.loadRes([row for row in detections if row["score"] >= 0.2]), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
    kept = [index for index, score in enumerate(scores.tolist()) if score >= 0.2]
    expected = {
        (kept[int(detection) - 1], int(truth) - 1)
        for part in evaluation.evalImgs
        if part and part["aRng"] == evaluation.params.areaRng[0]
        for detection, truth in zip(part["dtIds"], part["dtMatches"][0], strict=True)
        if truth
    }
    assert len(expected) > 4
    assert set(zip(queries.tolist(), found.tolist(), strict=True)) == expected


def test_an_image_without_truths_has_no_matches() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    queries, truths = match(torch.ones(3), torch.zeros(3), torch.rand(3, 4), *nothing, threshold=0.1)
    assert len(queries) == len(truths) == 0


def test_the_cumulative_distribution_is_linear_between_the_bins_borders() -> None:
    weights = torch.tensor([-1.0, -0.4, 0.0, 0.4, 1.0], dtype=torch.float64)
    probabilities = normal(3, 4, 5).softmax(-1)
    offsets = normal(3, 4, seed=1)
    borders = [-1, -0.7, -0.2, 0.2, 0.7, 1]
    found = cumulative(probabilities, weights, offsets)
    for index in np.ndindex(3, 4):
        heights = [0, *np.cumsum(probabilities[index].numpy())]
        assert float(found[index]) == pytest.approx(np.interp(float(offsets[index]), borders, heights))


def test_errors_are_what_truths_were_moved_by() -> None:
    """A model's own boxes, moved by known pixels, as truths in images of another size and shape than its input."""
    model = wrapped(HOST)
    pixels = (images(3) * 255).to(torch.uint8)
    logits, boxes, record = predict_distributions(model, normalised(pixels, NORMALISATION))
    best, classes = logits.sigmoid().max(-1)
    query = best.argmax(-1)
    rows = torch.arange(3)
    predicted = edge_distributions(
        record.initial_boxes[rows, query], record.corner_logits[-1][rows, query], record.weights, SIZE
    )
    moves = torch.tensor([[1.0, -0.5, 2.0, 0.25], [-1.0, 0.5, 0.0, -0.25], [0.5, 0.5, -0.5, -0.5]])
    scale = torch.tensor([*SIZE, *SIZE])
    x0, y0, x1, y1 = ((predicted.edges + moves) / scale).unbind(-1)
    truths = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    data = DetectionData(
        images=pixels,
        boxes=list(truths[:, None]),
        labels=list(classes[rows, query][:, None]),
        coco={"images": [{"id": index, "width": SIZE[0], "height": SIZE[1]} for index in range(3)]},
        image_ids=[0, 1, 2],
        category_ids=[0, 1, 2],
        class_names=["a", "b", "c"],
    )
    found = edge_errors(model, data, NORMALISATION, 0.0, 2, torch.device("cpu"))
    torch.testing.assert_close(found.errors, -moves, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.deviations, predicted.deviations)
    torch.testing.assert_close(found.sides, boxes[rows, query][:, 2:].repeat(1, 2) * scale)
    torch.testing.assert_close(found.scores, best[rows, query])
    offsets = edge_offsets(record.initial_boxes[rows, query], truths)
    torch.testing.assert_close(found.levels, cumulative(predicted.probabilities, record.weights, offsets))


def test_images_are_normalised_as_the_checkpoint_does_it(tmp_path: Path) -> None:
    wrapped(HOST).save_pretrained(tmp_path)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    size = {"height": 32, "width": 32}
    RTDetrImageProcessor(size=size, do_normalize=True, image_mean=mean, image_std=deviation).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = checkpoint.preprocess(Image.fromarray(pixels))
    found = normalised(torch.from_numpy(pixels).permute(2, 0, 1)[None], checkpoint.normalisation())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    blue_first = {**checkpoint.normalisation(), "channels": "BGR", "mean": mean[::-1], "std": deviation[::-1]}
    reordered = normalised(torch.from_numpy(pixels).permute(2, 0, 1)[None], blue_first)
    torch.testing.assert_close(reordered.flip(1), expected, atol=1e-5, rtol=1e-5)


def test_the_calibration_error_is_that_of_the_slow_sums() -> None:
    deviations, errors = normal(11, 4).exp(), normal(11, 4, seed=1)
    pairs = sorted(zip(deviations.flatten().tolist(), errors.flatten().tolist(), strict=True))
    terms = []
    for start in range(0, 44, 11):
        part = pairs[start : start + 11]
        predicted = math.sqrt(sum(d * d for d, _ in part) / 11)
        terms.append(abs(predicted - math.sqrt(sum(e * e for _, e in part) / 11)) / predicted)
    assert bin_edges(deviations, errors, 4).ence() == pytest.approx(sum(terms) / 4)
    with pytest.raises(ValueError, match="44 edges do not fill 45 bins"):
        bin_edges(deviations, errors, 45)


def test_quantiles_are_counted() -> None:
    levels = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    shares = [sum(level <= p for level in levels.flatten().tolist()) / 200 for p in LEVELS]
    observed = observed_levels(levels)
    assert observed.tolist() == pytest.approx(shares)
    assert quantile_error(observed) == pytest.approx(np.mean([abs(s - p) for s, p in zip(shares, LEVELS, strict=True)]))


def test_deviations_of_half_the_size_have_a_factor_of_two_and_no_error_when_scaled() -> None:
    """Errors are normal with twice the deviations said, which differ a hundredfold: RMSE is 2 RMV in every bin."""
    deviations = (4.6 * torch.rand(20_000, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).exp()
    errors = 2 * deviations * normal(20_000, 4)
    level = torch.special.ndtr(errors / deviations)
    found = summarise(
        some_errors(errors[:10_000], deviations[:10_000]),
        some_errors(errors[10_000:], deviations[10_000:], level[10_000:]),
        coverage=0.9,
        bins=10,
    )
    assert found["factor"] == pytest.approx(2, rel=0.02)
    assert found["ence"] == pytest.approx(1, rel=0.03)
    assert found["ence_scaled"] < 0.03
    quantiles = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64))
    assert found["observed_levels"] == pytest.approx(torch.special.ndtr(quantiles / 2).tolist(), abs=0.01)
    by_deviation, constant = found["intervals"]["deviation"], found["intervals"]["constant"]
    assert by_deviation["edge_factors"] == pytest.approx([2 * 1.645] * 4, rel=0.05)
    assert [*by_deviation["edge_coverage"], by_deviation["box_coverage"]] == pytest.approx([0.9] * 5, abs=0.015)
    assert by_deviation["edge_width"] == pytest.approx(4 * 1.645 * float(deviations.mean()), rel=0.05)
    assert by_deviation["edge_width"] < 0.8 * constant["edge_width"]


def test_intervals_hold_what_the_rank_says_of_those_they_were_fitted_on() -> None:
    data = some_errors(normal(99, 4), normal(99, 4, seed=1).exp())
    for found in intervals(data, data, 0.8).values():
        assert [*found["edge_coverage"], found["box_coverage"]] == pytest.approx([80 / 99] * 5)
    constant = [sorted(data.errors[:, edge].abs().tolist())[79] for edge in range(4)]
    assert intervals(data, data, 0.8)["constant"]["edge_width"] == pytest.approx(2 * sum(constant) / 4)


@pytest.mark.slow
def test_the_command_reports_on_the_embedded_data(tmp_path: Path) -> None:
    """A trained host, freshly wrapped: its distributions are flat, and far wider than its errors."""
    wrap_decoder(load_trained("rt-detr")).save_pretrained(tmp_path / "model")
    shutil.copy(TRAINED / "rt-detr" / "preprocessor_config.json", tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    given = [str(tmp_path / "model"), f"twin={tmp_path / 'other'}", f"--output={tmp_path}"]
    few = CliRunner().invoke(COMMAND, [*given, "--images=2", "--coverage=0.99"], env={"COLUMNS": "500"})
    assert few.exit_code == 2
    assert "a coverage of 0.99 takes at least 99 scores to fit" in few.output
    result = CliRunner().invoke(COMMAND, [*given, "--images=12", "--bins=3", "--coverage=0.8"])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "uncertainty.json").read_text())
    model, twin = written["models"].values()
    assert model == twin
    assert model["image_size"] == 96
    assert model["detections"]["measure"] > 0.6 * written["settings"]["truths"]["test"]
    assert model["factor"] < 0.5
    report = (tmp_path / "uncertainty.md").read_text()
    assert f"| ENCE | {model['ence']:.3f} ± 0.000 | {model['ence_scaled']:.3f} ± 0.000 |" in report
    assert (tmp_path / "uncertainty.png").stat().st_size > 0


def test_a_bare_model_and_a_folder_without_test_split_are_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(COMMAND, [str(TRAINED / "rt-detr")], env={"COLUMNS": "500"})
    assert run.exit_code == 2
    assert "rt-detr is not wrapped: its boxes come from no distributions" in run.output
    (tmp_path / "instances_val.json").write_text("{}")
    run = CliRunner().invoke(COMMAND, [str(TRAINED / "rt-detr"), f"--data={tmp_path}"], env={"COLUMNS": "500"})
    assert run.exit_code == 2
    assert f"there is no {tmp_path / 'instances_test.json'}" in run.output
    twice = CliRunner().invoke(COMMAND, ["a=here", "a=there"], env={"COLUMNS": "500"})
    assert twice.exit_code == 2
    assert "two models have the same name" in twice.output


def test_models_for_images_of_different_sizes_are_not_compared(tmp_path: Path) -> None:
    for side in (64, 96):
        shutil.copytree(TRAINED / "rt-detr", tmp_path / str(side))
        size = {"height": side, "width": side}
        RTDetrImageProcessor(size=size).save_pretrained(tmp_path / str(side))
    run = CliRunner().invoke(COMMAND, [str(tmp_path / "64"), str(tmp_path / "96")], env={"COLUMNS": "500"})
    assert run.exit_code == 2
    assert "models for images of [64, 96] pixels" in run.output
