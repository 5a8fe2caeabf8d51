"""The command from end to end, at the smallest size, and what its settings mean."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoImageProcessor
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin import FDRConfig, FDRHead, adapters, load_pretrained, make_mosaics, wrap_decoder
from dfine_plugin.benchmarks import ablation
from dfine_plugin.benchmarks.ablation import main
from dfine_plugin.benchmarks.data.detection_data import normalise
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain import training
from dfine_plugin.benchmarks.gain.ema import make_ema
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
from dfine_plugin.benchmarks.gain.report import markdown
from dfine_plugin.benchmarks.gain.runs import (
    RetrofitSettings,
    RunSettings,
    code_digest,
    find_model,
    load_run,
    save_model,
    save_run,
)
from dfine_plugin.benchmarks.gain.training import build_model, load_data
from dfine_plugin.benchmarks.gain.variants import fdr_settings, parse_variants
from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls
from dfine_plugin.benchmarks.models.hosts import HOSTS, WIDTH, build_host, width_of
from dfine_plugin.benchmarks.models.rtdetr_hosts import missing as rtdetr_missing
from dfine_plugin.benchmarks.trained_hosts import TRAINED

APP = Typer()
APP.command()(main)

SMALL = ["--steps=10", "--seeds=1", "--batch-size=4", "--train-images=16", "--val-images=6", "--image-size=64"]
SMALL += ["--lr=1e-3"]
SETTINGS = RunSettings("rt-detr", "baseline", 0, "shapes", 64, steps=10, batch_size=4, learning_rate=1e-3)


@pytest.mark.slow
def test_the_command_trains_writes_and_resumes(tmp_path: Path) -> None:
    arguments = [*SMALL, "--variants=baseline fdr+go-lsd", "--jobs=1", "--longer-schedule=2", f"--output={tmp_path}"]
    arguments += ["--first-seed=3"]
    first = CliRunner().invoke(APP, arguments)
    assert first.exit_code == 0, first.output
    for name in ("ablation.md", "ablation.json", "ap_over_steps.png", "ap_per_threshold.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert first.output.splitlines()[-1].startswith("fdr+go-lsd: AP ")
    figures = json.loads((tmp_path / "ablation.json").read_text())
    baseline, wrapped = figures["runs"]
    assert wrapped["parameters"] > baseline["parameters"]
    assert [point["step"] for point in baseline["curve"]] == SETTINGS.evaluation_steps()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(times) == 4
    assert [run["settings"]["steps"] for run in figures["longer"]] == [20, 20]
    assert {run["settings"]["seed"] for run in [*figures["runs"], *figures["longer"]]} == {3}
    assert "| AP after 10 steps | AP after 20 steps |" in (tmp_path / "ablation.md").read_text()

    again = CliRunner().invoke(APP, arguments)
    assert again.output.count("2 of 2 runs are finished already") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == times


@pytest.mark.slow
def test_twins_learn_from_the_same_mosaics_in_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[torch.Tensor]] = {}
    settings = replace(SETTINGS, train_images=16, val_images=6, mosaics=0.75)

    def keep(*given: Any) -> Any:
        made = make_mosaics(*given)
        drawn[variant] += [made[0], *(target["boxes"] for target in made[1])]
        return made

    monkeypatch.setattr(training, "make_mosaics", keep)
    for variant in ("baseline", "fdr"):
        drawn[variant] = []
        result = training.train_run(replace(settings, variant=variant))
        assert "mosaics for 75 % of the images of all in the first half" in markdown([result])
    images = 5 * (1 + SETTINGS.batch_size)  # of the first five steps of ten
    assert [len(made) for made in drawn.values()] == [images, images]
    assert all(torch.equal(one, other) for one, other in zip(*drawn.values(), strict=True))
    truths = [len(boxes) for boxes in drawn["fdr"] if boxes.dim() == 2]
    assert max(truths) > 5  # which is the most that an image of the embedded data has


@pytest.mark.slow
def test_saved_models_are_the_ones_that_were_evaluated(tmp_path: Path) -> None:
    arguments = [*SMALL, "--variants=fdr", "--jobs=1", f"--output={tmp_path}", "--save-models"]
    settings = replace(SETTINGS, variant="fdr", train_images=16, val_images=6)
    # A run that has finished without keeping its weights is trained once more, and then no more.
    save_run(tmp_path / "runs", settings, {})
    for finished in (False, True):
        result = CliRunner().invoke(APP, arguments)
        assert ("finished already" in result.output) is finished, result.output
    (folder,) = (tmp_path / "models").iterdir()
    assert folder.name == settings.key()
    val = load_data("shapes", "val", 64, 6)
    metrics = coco_metrics(detect(load_pretrained(folder), val, 50, torch.device("cpu")), val.coco, val.sides)
    run = load_run(tmp_path / "runs", settings)
    assert run is not None
    assert run["final"].items() >= metrics.items()


def test_a_saved_model_comes_with_the_preprocessing_that_it_was_trained_with(tmp_path: Path) -> None:
    settings = replace(SETTINGS, host="deformable-detr", variant="fdr+go-lsd")
    assert find_model(tmp_path, settings) is None
    save_model(tmp_path, settings, build_model(settings, make_shapes(1, 64, seed=0)))
    (folder,) = tmp_path.iterdir()
    assert find_model(tmp_path, settings) == folder
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalise(image[None]))


def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ap: Callable[[float], float | None]) -> dict[str, Any]:
    """What tuning from 1e-3 finds where a baseline's AP is a function of its rate, None for a run that fails."""

    def run_all(runs: list[RunSettings], *_: Any, **__: Any) -> tuple[list[dict[str, Any]], list[str]]:
        assert {run.variant for run in runs} == {"baseline"}
        found = [(asdict(run), ap(run.learning_rate)) for run in runs]
        trained = [(run, value) for run, value in found if value is not None]
        results = [{"settings": run, "final": {"AP": value + run["seed"] % 2}} for run, value in trained]
        return results, [str(run) for run, value in found if value is None]

    monkeypatch.setattr(ablation, "run_all", run_all)
    return ablation.tune_learning_rate(SETTINGS, tmp_path, 1, Console(quiet=True), None)


def test_the_tuned_rate_has_a_worse_one_on_either_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tuned(monkeypatch, tmp_path, lambda rate: 50 - 1e4 * abs(rate - 1e-3))
    assert inside["chosen"] == 1e-3
    assert list(inside["ap"]) == [5e-4, 1e-3, 2e-3]
    above = tuned(monkeypatch, tmp_path, lambda rate: 1e3 * rate if rate < 5e-3 else 0.0)
    assert above["chosen"] == 4e-3
    assert list(above["ap"]) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    below = tuned(monkeypatch, tmp_path, lambda rate: 50 - 1e4 * abs(rate - 2.5e-4))
    assert below["chosen"] == 2.5e-4
    assert min(below["ap"]) == 1.25e-4


def test_a_rate_that_does_not_train_bounds_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = tuned(monkeypatch, tmp_path, lambda rate: None if rate > 2e-3 else 1000 * rate)
    assert found["chosen"] == 2e-3
    assert len(found["failures"]) == 2
    with pytest.raises(RuntimeError, match="no learning rate"):
        tuned(monkeypatch, tmp_path, lambda rate: None)
    with pytest.raises(RuntimeError, match="has a worse one on either side"):
        tuned(monkeypatch, tmp_path, lambda rate: 1e3 * rate)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host=yolo"], "'yolo' is not one of rt-detr, rt-detr-v2"),
        (["--variants=baseline fdrr"], "unknown variant 'fdrr'"),
        (["--variants=N=15"], "num_bins must be an even integer of at least 4, got 15"),
        (["--variants=fdr:bins=16"], "FDRConfig has no setting 'bins'"),
        (["--host=detrex/dino", "--device=cuda", "--save-models"], "detrex/dino has no save_pretrained"),
        (["--image-size=161"], "this host cannot take images of 161 x 161"),
        (["--queries=100", "--image-size=64"], "they have 84 places on its levels, and it takes the 100 best"),
        (["--data=nowhere"], "there is no nowhere/instances_train.json and no nowhere/instances_val.json"),
        (["--device=gpu"], "'gpu' is neither cpu nor cuda"),
        (["--width=72"], "72 is no multiple of 32"),
        (
            ["--host=detrex/focus-detr", "--width=128"],
            "128 is not for detrex/focus-detr, whose code takes a width of 256",
        ),
        (["--host=deformable-detr", "--variants=baseline twice"], "the row 'twice' is for rt-detr and rt-detr-v2"),
        (["--variants=baseline taught"], "the row taught learns from one"),
        ([f"--teacher={TRAINED / 'rt-detr'}"], "no row learns from one, as 'taught' does"),
        (["--variants=taught", f"--teacher={TRAINED / 'rt-detr'}"], "rt-detr is not wrapped: its boxes come from no"),
        (["--variants=taught", f"--teacher={TRAINED}"], "has no config.json that can be read"),
        (["--variants=taught:fgl_weight=0", f"--teacher={TRAINED}"], "fgl_weight is 0, and FGL is what a teacher"),
        (["--host=detrex/dino", "--variants=taught", f"--teacher={TRAINED}"], "detrex/dino takes other inputs than"),
        (["--class-loss=focal"], "'focal' is neither host nor mal"),
        (["--host=grounding-dino", "--class-loss=mal"], "no baseline grounding-dino learns its classes by MAL"),
        (["--host=mmdet/dino", "--class-loss=mal"], "no baseline mmdet/dino learns its classes by MAL"),
    ],
)
def test_what_is_wrong_is_told_before_any_training(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, [*SMALL, *arguments, f"--output={tmp_path}"], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())


def test_runs_of_before_a_setting_was_added_are_found() -> None:
    assert SETTINGS.digest() == "c1ecb581bf"
    retrofit = RetrofitSettings("rt_detr", "calibrated", 0, "shapes", 96, 1000, 16, 4e-3, trained="rt-detr")
    assert retrofit.digest() == "eb48e9f8b0"
    for change in ({"width": 128}, {"mosaics": 0.5}, {"teacher": "wrapped"}):
        assert replace(SETTINGS, **change).digest() != SETTINGS.digest()


def test_only_the_very_same_settings_are_the_same_run(tmp_path: Path) -> None:
    save_run(tmp_path, SETTINGS, {"final": 1})
    assert load_run(tmp_path, SETTINGS) == {"final": 1}
    for change in ({"seed": 1}, {"learning_rate": 2e-3}, {"variant": "fdr"}, {"data": "elsewhere"}):
        assert load_run(tmp_path, replace(SETTINGS, **change)) is None


def test_every_adapters_source_is_in_the_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = shutil.copytree(adapters.__path__[0], tmp_path / "adapters")
    monkeypatch.setattr(adapters, "__path__", [str(copied)])
    digests = {code_digest()}
    sources = sorted(copied.rglob("*.py"))
    for path in sources:
        path.write_text(path.read_text() + "\n")
        digests.add(code_digest())
    assert len(digests) == len(sources) + 1


def test_names_on_disk_have_no_equals_sign_and_those_that_had_one_are_still_found(tmp_path: Path) -> None:
    settings = replace(SETTINGS, variant="N=16")
    assert settings.key() == f"rt-detr-N_16-seed0-{settings.digest()}"
    former = f"rt-detr-N=16-seed0-{settings.digest()}"
    assert load_run(tmp_path, settings) is None
    (tmp_path / f"{former}.json").write_text('{"final": 1}')
    assert find_model(tmp_path, settings) is None
    (tmp_path / former).mkdir()
    assert load_run(tmp_path, settings) == {"final": 1}
    assert find_model(tmp_path, settings) == tmp_path / former
    assert load_run(tmp_path, replace(settings, variant="N=32")) is None


ONE_LEVEL = ("dab-detr", "dn-detr", "conditional-detr", "group-detr")


def rows() -> list[Any]:
    """All hosts; those of detrex, of MMDetection and of RT-DETR's own repository where it is there."""
    try:
        absent = find_spec("projects.dino.modeling") is None
    except ModuleNotFoundError:
        absent = True
    marks: dict[str, Any] = {
        "detrex": [pytest.mark.detrex, pytest.mark.skipif(absent, reason="detrex's checkout is not on PYTHONPATH")],
        "mmdet": [pytest.mark.mmdet, pytest.mark.skipif(find_spec("mmdet") is None, reason="mmdet is not installed")],
        "rtdetr": [pytest.mark.rtdetr, pytest.mark.skipif(bool(rtdetr_missing()), reason=str(rtdetr_missing()))],
    }
    return [pytest.param(name, marks=marks.get(name.partition("/")[0], [])) for name in HOSTS]


@pytest.mark.parametrize("host", rows())
def test_twins_share_the_weights_of_all_they_share(host: str) -> None:
    data = make_shapes(1, 64, seed=0)
    settings = replace(SETTINGS, host=host, width=width_of(host))
    baseline = build_model(settings, data).state_dict()
    wrapped = build_model(replace(settings, variant="fdr+go-lsd"), data).state_dict()
    shared = baseline.keys() & wrapped.keys()
    # All but the box heads, which FDR replaces.
    heads = "bbox_embed", "reg_branches", "dec_bbox_head"
    assert not [name for name in baseline.keys() - shared if not any(head in name for head in heads)]
    assert all(torch.equal(baseline[name], wrapped[name]) for name in shared)


@pytest.mark.parametrize("host", rows())
def test_hosts_have_as_many_queries_as_asked_for(host: str) -> None:
    torch.manual_seed(0)
    model = build_host(host, ["a", "b"], num_queries=12).eval()
    with torch.no_grad():
        boxes = model(pixel_values=torch.rand(1, 3, 64, 64)).pred_boxes
    # detrex's report (query, class) pairs
    assert boxes.shape[1] == (24 if host.startswith("detrex/") else 12)


@pytest.mark.parametrize("host", rows())
def test_hosts_look_at_the_pixels_that_they_are_given(host: str) -> None:
    """And do not normalise them a second time."""
    model = build_host(host, ["a", "b"], num_queries=12).eval()
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(pixel_values=pixels)
    assert torch.equal(seen[0], pixels)


@pytest.mark.parametrize("host", [row for row in rows() if row.values[0] == "detrex/dino-eva"])
def test_dino_with_eva_is_dino_where_neither_has_its_backbone(host: str) -> None:
    """So that what the one gains is what the other does."""
    data = make_shapes(2, 64, seed=0)
    labels = [{"boxes": boxes, "class_labels": torch.zeros(len(boxes), dtype=torch.long)} for boxes in data.boxes]
    models = [build_model(replace(SETTINGS, host=name, variant="fdr"), data) for name in ("detrex/dino", host)]
    models[1].load_state_dict(models[0].state_dict())
    losses = []
    with without_cuda_calls():
        for model in models:
            torch.manual_seed(0)
            losses.append(model.train()(normalise(data.images), labels).loss_dict)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(loss, losses[1][name]) for name, loss in losses[0].items())


@pytest.mark.parametrize("host", [row for row in rows() if HOSTS[row.values[0]].only_width is None])
def test_hosts_have_the_width_that_is_asked_for(host: str) -> None:
    models: list[Any] = [build_host(host, ["a", "b"], 12, width) for width in (64, 128)]
    outputs = [model.eval()(pixel_values=torch.rand(1, 3, 64, 64)).pred_boxes for model in models]
    assert all(torch.isfinite(boxes).all() for boxes in outputs)
    wrapped = [wrap_decoder(getattr(model, "detector", model)) for model in models]
    heads = [next(module for module in model.modules() if isinstance(module, FDRHead)) for model in wrapped]
    assert [head.refine[0][0].in_features for head in heads] == [64, 128]


def test_hosts_whose_code_takes_one_width_have_that() -> None:
    assert (width_of("rt-detr"), width_of("rt-detr", 128)) == (WIDTH, 128)
    assert width_of("detrex/focus-detr") == width_of("detrex/focus-detr", 256) == 256
    with pytest.raises(ValueError, match="96 is not for detrex/focus-detr, whose code takes a width of 256 only"):
        build_host("detrex/focus-detr", ["a"], 12, 96)


@pytest.mark.parametrize("host", [row for row in rows() if row.values[0] == "detrex/h-deformable-detr"])
def test_a_narrow_host_of_detrex_leaves_wide_ones_as_they_are(host: str) -> None:
    """Its positions are embedded by functions of all of detrex's models."""
    pixels = torch.rand(1, 3, 64, 64)
    wide: Any = build_host(host, ["a", "b"], 12, 256).eval()
    before = wide(pixel_values=pixels).pred_boxes
    narrow: Any = build_host(host, ["a", "b"], 12, 64).eval()
    narrow(pixel_values=pixels)
    assert torch.equal(wide(pixel_values=pixels).pred_boxes, before)
    with pytest.raises(AttributeError):
        narrow.detector([{"image": None}])
    assert torch.equal(wide(pixel_values=pixels).pred_boxes, before)


@pytest.mark.parametrize("host", [row for row in rows() if row.values[0] == "detrex/h-deformable-detr"])
def test_a_narrow_host_of_detrex_is_copied_and_loaded(host: str, tmp_path: Path) -> None:
    """Wrapped, with what embeds its positions: the same boxes, and the same gradients."""
    data = make_shapes(2, 64, seed=0)
    labels = [{"boxes": boxes, "class_labels": torch.zeros(len(boxes), dtype=torch.long)} for boxes in data.boxes]
    model, fresh = (build_model(replace(SETTINGS, host=host, variant="fdr", seed=seed), data) for seed in (0, 1))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    boxes, gradients = [], []
    for one in (model, deepcopy(model), fresh):
        boxes.append(one.eval()(pixel_values=normalise(data.images)).pred_boxes)
        one.train()(pixel_values=normalise(data.images), labels=labels).loss.backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    for again in (1, 2):
        assert torch.equal(boxes[again], boxes[0])
        assert len(gradients[again]) == len(gradients[0]) > 100
        assert all(torch.equal(*pair) for pair in zip(gradients[again], gradients[0], strict=True))


@pytest.mark.parametrize("host", [row for row in rows() if row.values[0].removeprefix("detrex/") in ONE_LEVEL])
def test_hosts_that_attend_to_all_of_one_level_have_one_of_stride_8(host: str) -> None:
    model: Any = build_host(host, ["a", "b"]).eval()
    seen: list[torch.Size] = []
    encoder = model.detector.transformer.encoder if host.startswith("detrex/") else model.model.encoder

    def keep_shape(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).shape)

    encoder.register_forward_hook(keep_shape)
    with torch.no_grad():
        model(pixel_values=torch.rand(1, 3, 48, 48))
    assert 36 in seen[0]  # of an image, wherever a host has them


@pytest.mark.parametrize("host", rows())
def test_hosts_train_all_of_themselves_from_ordinary_weights(host: str) -> None:
    model = build_host(host, ["a", "b"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    labels = [{"class_labels": torch.tensor([1]), "boxes": boxes}] * 2
    with without_cuda_calls() if HOSTS[host].calls_cuda else nullcontext():
        loss = model.train()(pixel_values=torch.rand(2, 3, 64, 64), labels=labels).loss
        loss.backward()
    assert loss.shape == ()  # the Trainer adds it up in place
    backbone = [p for name, p in model.named_parameters() if "backbone" in name]
    assert backbone
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone)


@pytest.mark.parametrize("host", [row for row in rows() if row.values[0].removeprefix("detrex/") in ONE_LEVEL])
def test_backbones_for_one_level_are_as_deep_and_wide_in_both_libraries(host: str) -> None:
    def convolutions(model: nn.Module) -> list[int]:
        modules = [module for name, module in model.named_modules() if "backbone" in name]
        return [m.out_channels for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    assert convolutions(build_host(host, ["a"])) == convolutions(build_host("dab-detr", ["a"])) != []


def test_variants_are_rows_with_settings() -> None:
    assert parse_variants("baseline fdr; N=16 a=0.25,c=0.5 fdr") == ["baseline", "fdr", "N=16", "a=0.25,c=0.5"]
    assert fdr_settings("baseline") is None
    assert fdr_settings("fdr") == {"union": False, "ddf": False}
    assert fdr_settings("default") == {}
    assert fdr_settings("fdr+go-lsd:N=16,a=0.25") == {"union": True, "ddf": True, "num_bins": 16, "a": 0.25}
    paper = FDRConfig.paper()
    assert FDRConfig(**fdr_settings("paper") or {}) == paper
    assert FDRConfig(**fdr_settings("T=2") or {}) == replace(paper, temperature=2)
    assert FDRConfig(**fdr_settings("uniform:lqe=false") or {}) == replace(paper, weighting="uniform", lqe=False)
    with pytest.raises(ValueError, match="unknown variant 'fdrr'"):
        parse_variants("fdrr")
    with pytest.raises(ValueError, match="'N' is not of the form name=value"):
        parse_variants("fdr:N")


def test_ema_ramps_its_decay_and_averages_buffers() -> None:
    model = nn.BatchNorm1d(1)
    ema = make_ema(model, decay=0.9, ramp_steps=2)
    ema.update_parameters(model)
    decay = 0.9 * (1 - torch.exp(torch.tensor(-0.5)))
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(5.0)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(float(decay * 1 + (1 - decay) * 3))
    assert ema.module.running_mean.item() == pytest.approx(float((1 - decay) * 5))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks the processes up in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    arguments = ["--steps", "10000", "--train-images", "16", "--val-images", "4", "--image-size", "64", "--jobs", "1"]
    command = [sys.executable, "-m", "dfine_plugin.benchmarks.ablation", *arguments, "--output", str(tmp_path)]
    # from elsewhere, lest the checkout hide the installed package
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, **quiet) as process:
        children: set[int] = set()
        # the manager of the messages, the resource tracker and the worker
        deadline = time.monotonic() + 120
        while len(children) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
            children = children_of(process.pid)
        time.sleep(10)  # let the worker come to its work
        process.kill()
    assert len(children) >= 3
    deadline = time.monotonic() + 30
    while any(running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [child for child in children if running(child)]


def children_of(parent: int) -> set[int]:
    found = set()
    for task in Path("/proc").glob(f"{parent}/task/*/children"):
        found |= {int(child) for child in task.read_text().split()}
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
