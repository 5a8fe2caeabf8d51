"""The retrofit: the hosts that come with the package, its rows, its report, and the whole command at a small size."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin import calibrate, is_wrapped, learn_from, wrap_decoder
from dfine_plugin.benchmarks import retrofit
from dfine_plugin.benchmarks.data.detection_data import TrainingView, collate, normalise
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
from dfine_plugin.benchmarks.gain.runs import RetrofitSettings, save_model
from dfine_plugin.benchmarks.gain.training import build_model, load_data
from dfine_plugin.benchmarks.gain.variants import fdr_settings, is_calibrated, parse_variants
from dfine_plugin.benchmarks.models.hosts import build_host
from dfine_plugin.benchmarks.trained_hosts import STEPS, TRAINED, facts, load_trained
from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.wrapping import binding_of

from ..adapters.detrex_hosts import missing
from . import commands

CPU = torch.device("cpu")
FACTS = facts()


@pytest.mark.parametrize("name", STEPS)
def test_a_shipped_host_is_the_recorded_one_and_small(name: str) -> None:
    weights = (TRAINED / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == FACTS[name]["sha256"]
    assert len(weights) < 2 * 1024**2
    assert {p.dtype for p in load_trained(name).parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_shipped_host_has_the_recorded_ap_and_calibration_keeps_it(name: str) -> None:
    data, train = load_data("shapes", "val", 96, 400), load_data("shapes", "train", 96, 2000)
    model = load_trained(name)
    host = coco_metrics(detect(model, data, 50, CPU), data.coco, data.sides)["AP"]
    assert host == pytest.approx(FACTS[name]["AP"]["AP"], abs=0.1)
    torch.manual_seed(0)
    wrap_decoder(model)
    fresh = coco_metrics(detect(model, data, 50, CPU), data.coco, data.sides)["AP"]
    result = calibrate(model, (normalise(batch) for batch in train.images[:256].split(32)), progress=False)
    calibrated = coco_metrics(detect(model, data, 50, CPU), data.coco, data.sides)["AP"]
    assert fresh < calibrated
    assert calibrated >= 0.99 * host
    assert result.after > 0.9


@pytest.mark.slow
@pytest.mark.detrex
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_calibration_keeps_the_ap_of_a_host_of_detrex() -> None:
    """Trained for some minutes, it finds something on new images."""
    train, data = load_data("shapes", "train", 64, 1000), load_data("shapes", "val", 64, 200)
    view = TrainingView(train, flip=True, seed=0)
    torch.manual_seed(0)
    model: Any = build_host("detrex/deformable-detr", train.class_names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=400)
    for step in range(400):
        batch = collate([view[(8 * step + i) % len(view)] for i in range(8)])
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    model.eval()
    host = coco_metrics(detect(model, data, 50, CPU), data.coco, data.sides)["AP"]
    wrap_decoder(model.detector)
    fresh = coco_metrics(detect(model, data, 50, CPU), data.coco, data.sides)["AP"]
    calibrate(model.detector, (normalise(batch) for batch in train.images[:256].split(32)), progress=False)
    calibrated = coco_metrics(detect(model, data, 50, CPU), data.coco, data.sides)["AP"]
    assert host > 5
    assert fresh < calibrated
    assert calibrated >= 0.99 * host


@pytest.mark.slow
def test_calibration_leaves_the_first_step_to_all_losses() -> None:
    """A head that is sure of what the host does not know would spend the clipped gradient on FGL."""
    train = load_data("shapes", "train", 96, 2000)
    view = TrainingView(train, flip=False, seed=0)
    batch = collate([view[i] for i in range(300, 348)])
    fgl, share = {}, {}
    for row in ("wrapped", "calibrated"):
        settings = RetrofitSettings("rt_detr", row, 0, "shapes", 96, 100, 16, 1e-3, trained="rt-detr")
        model: Any = build_model(settings, train).train()
        torch.manual_seed(0)
        losses = model(**batch).loss_dict
        parameters = [p for p in model.model.decoder.layers.parameters() if p.requires_grad]

        def norm(terms: list[torch.Tensor], of: list[torch.nn.Parameter] = parameters) -> float:
            gradients = torch.autograd.grad(sum(terms), of, retain_graph=True, allow_unused=True)
            return sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5

        ours = [term for name, term in losses.items() if name.startswith("loss_fgl")]
        fgl[row] = sum(float(term.detach()) for term in ours)
        share[row] = norm(ours) / norm([term for name, term in losses.items() if not name.startswith("loss_fgl")])
    assert fgl["calibrated"] < 0.8 * fgl["wrapped"]
    assert share["calibrated"] < 1


def test_other_classes_get_new_class_heads_and_all_else_stays() -> None:
    own, other = load_trained("rt-detr"), load_trained("rt-detr", ["cell", "platelet"])
    assert other.config.id2label == {0: "cell", 1: "platelet"}
    theirs = other.state_dict()
    differing = {name for name, value in own.state_dict().items() if not torch.equal(value, theirs[name])}
    assert differing
    assert all("class_embed" in name or "score_head" in name for name in differing)
    with pytest.raises(ValueError, match="neither one of rt-detr, deformable-detr nor a folder with a trained host"):
        load_trained("nothing")


def test_a_host_takes_images_as_it_was_trained_with_them(tmp_path: Path) -> None:
    load_trained("rt-detr").save_pretrained(tmp_path)  # type: ignore[operator]
    mean, deviation = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    preprocessing = {"do_normalize": True, "image_mean": mean, "image_std": deviation}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    model: Any = load_trained(str(tmp_path)).eval()
    seen: list[torch.Tensor] = []
    model.model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.rand(2, 3, 96, 96) * 2 - 1
    with torch.no_grad():
        model(pixels)
        model(pixel_values=pixels)
    assert len(seen) == 2
    for taken in seen:
        for channel in range(3):
            expected = ((pixels[:, channel] + 1) / 2 - mean[channel]) / deviation[channel]
            torch.testing.assert_close(taken[:, channel], expected)


def test_a_teacher_and_kept_models_take_images_as_they_were_trained_with_them(tmp_path: Path) -> None:
    mean, deviation = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    preprocessing = {
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
        "image_processor_type": "RTDetrImageProcessor",
    }
    for name, model in {"host": load_trained("rt-detr"), "teacher": wrap_decoder(load_trained("rt-detr"))}.items():
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    train = load_data("shapes", "train", 96, 4)
    settings = RetrofitSettings(
        "rt_detr",
        "taught",
        0,
        "shapes",
        96,
        1,
        4,
        1e-3,
        trained=str(tmp_path / "host"),
        teacher=str(tmp_path / "teacher"),
    )
    model: Any = build_model(replace(settings, variant="wrapped"), train).train()
    teacher: Any = binding_of(build_model(replace(settings, variant="wrapped"), train)).teacher.model
    seen: list[torch.Tensor] = []
    for one in (model, teacher):
        one.model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learn_from(model, teacher)
    view = TrainingView(train, flip=False, seed=0)
    model(**collate([view[i] for i in range(4)]))
    learner_saw, teacher_saw = seen
    expected = (train.images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    for pixels in (learner_saw, teacher_saw):
        torch.testing.assert_close(pixels.contiguous(), expected, atol=1e-5, rtol=1e-5)

    save_model(tmp_path / "models", settings, model)
    (kept,) = (tmp_path / "models").iterdir()
    found = open_checkpoint(kept).normalisation()
    assert (found["mean"], found["std"], found["scale"]) == (mean, deviation, pytest.approx(1 / 255))


def test_rows_of_the_retrofit_and_of_the_ablation_are_told_apart() -> None:
    assert parse_variants("baseline calibrated:union=true head", retrofit=True) == [
        "baseline",
        "calibrated:union=true",
        "head",
    ]
    assert fdr_settings("calibrated:union=true") == {"union": True}
    assert fdr_settings("head:lqe=true") == {"trainable": "head", "lqe": True}
    assert [is_calibrated(row) for row in ("baseline", "wrapped", "calibrated:lqe=true", "head")] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="no row of this comparison: baseline, twice, default"):
        parse_variants("calibrated")
    for row in ("default", "foo"):
        with pytest.raises(ValueError, match="no row of this comparison: baseline, twice, wrapped, calibrated, head"):
            parse_variants(row, retrofit=True)


def test_a_run_starts_from_the_trained_host() -> None:
    data = load_data("shapes", "train", 96, 32)
    settings = RetrofitSettings("rt_detr", "wrapped", 3, "shapes", 96, 100, 16, 1e-3, trained="rt-detr")
    model = build_model(settings, data)
    assert is_wrapped(model)
    host = load_trained("rt-detr").state_dict()
    assert all(torch.equal(value, host[name]) for name, value in model.state_dict().items() if ".fdr." not in name)
    assert settings.evaluation_steps() == [0, 100]


def run(variant: str, seed: int, curve: dict[int, float]) -> dict[str, Any]:
    points = [
        {"step": step, "seconds": float(step), **dict.fromkeys(retrofit.METRICS, ap)} for step, ap in curve.items()
    ]
    settings = RetrofitSettings("rt_detr", variant, seed, "shapes", 96, max(curve), 16, 1e-3, trained="rt-detr")
    return {
        "settings": vars(settings),
        "curve": points,
        "final": points[-1],
        "seconds_per_step": 0.1,
        "code": "x",
    }


def test_the_report_says_what_is_kept_the_worst_lag_and_the_gain() -> None:
    results = [
        run("baseline", 0, {0: 50.0, 100: 51.0, 200: 52.0}),
        run("baseline", 1, {0: 50.0, 100: 53.0, 200: 54.0}),
        run("calibrated", 0, {0: 49.5, 100: 50.0, 200: 53.0}),
        run("calibrated", 1, {0: 49.9, 100: 53.2, 200: 55.0}),
    ]
    (line,) = retrofit.closing_lines(results)
    # (49.5 + 49.9) / 100; (-1.0 + 0.2) / 2 at step 100; both +1.0 at the end
    assert line.startswith(
        "calibrated: 99.4 % of the host's AP at step 0; at worst -0.40 AP (step 100); after 200 steps"
    )
    assert "+1.00 ± 0.00" in line
    assert line.endswith("the 95 % interval excludes zero: a gain.")
    table = retrofit.markdown(results)
    assert "| baseline | 50.00 | 52.00 | 53.00 |" in table
    assert "| calibrated | 49.70 | 51.60 | 54.00 |" in table
    assert "AP by class" not in table  # of the one that there is
    for one in results:
        one["final"]["by_class"] = {"red": one["final"]["AP"], "rare": 1.0}
    assert retrofit.markdown(results).count("| calibrated, gain | +1.00 ± 0.00 | +0.00 ± 0.00 |") == 1


@pytest.mark.slow
def test_the_command_compares_from_end_to_end(tmp_path: Path) -> None:
    app = Typer()
    app.command()(retrofit.main)
    options = "--rows|baseline calibrated head|--seeds|2|--steps|6|--train-images|48|--val-images|16|--jobs|2"
    result = CliRunner().invoke(app, [*options.split("|"), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "retrofit.json").read_text())
    assert [point["step"] for point in figures["runs"][0]["curve"]] == [0, 6]
    starts = {r["settings"]["variant"]: r["curve"][0]["AP"] for r in figures["runs"]}
    assert starts["calibrated"] == starts["head"] > 0.97 * starts["baseline"]
    assert "calibrated: " in (tmp_path / "retrofit.md").read_text()
    assert (tmp_path / "ap_over_steps.png").stat().st_size > 10_000


@pytest.mark.parametrize(("queries", "said"), [({"num_queries": 100}, "the 100 best"), ({}, "the 300 best")])
def test_images_with_too_few_places_for_the_trained_hosts_queries_are_refused(
    tmp_path: Path, queries: dict[str, int], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rt_detr"} | queries))
    code, output = commands.run(retrofit.main, "--trained", tmp_path, "--image-size", "64", "--lr", "1e-3")
    assert code == 2
    assert f"they have 84 places on its levels, and it takes {said}" in output
