"""detrex's own ``tools/train_net.py`` runs our configs: trains on real images, evaluates, and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.wrapping import binding_of

ROOT = Path(__file__).parents[2]
HOSTS = [
    "deformable_detr",
    "h_deformable_detr",
    "dab_deformable_detr",
    "dn_deformable_detr",
    "dino",
    "dino_eva",
    "align_detr",
    "focus_detr",
    "deta",
    "dab_detr",
    "dn_detr",
    "conditional_detr",
    "group_detr",
    "rt_detr",
]


def detrex_checkout() -> Path | None:
    """The checkout of detrex that is on the path."""
    for entry in sys.path:
        if (Path(entry) / "tools/train_net.py").is_file() and (Path(entry) / "projects/dino/modeling").is_dir():
            return Path(entry)
    return None


pytestmark = [
    pytest.mark.detrex,
    pytest.mark.skipif(detrex_checkout() is None, reason="detrex's checkout is not on PYTHONPATH"),
]

# Without CUDA the trainer's assertion and two hosts' calls of .cuda() would stop it: python -O drops the one, this the
# others.
RUNNER = """
import contextlib, runpy, sys, torch
from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls
with contextlib.nullcontext() if torch.cuda.is_available() else without_cuda_calls():
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def train_net(config: Path, folder: Path, *arguments: str) -> str:
    checkout = detrex_checkout()
    assert checkout is not None
    command = [sys.executable, "-W", "ignore", "-O", "-c", RUNNER, str(checkout / "tools/train_net.py")]
    command += ["--config-file", str(config), *arguments, f"train.output_dir={folder}"]
    command += [f"dataloader.evaluator.output_dir={folder}"]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def trained_baseline(configs: Path, folder: Path, steps: int) -> Path:
    """The checkpoint of a baseline's debug config after so many steps."""
    folder.mkdir()
    train_net(configs / "debug_baseline.py", folder, f"train.max_iter={steps}", "train.eval_period=100")
    return folder / "model_final.pth"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.fixture
def bccd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ROOT.parent / "shared/data/bccd"
    if not data.is_dir():
        pytest.skip("the BCCD images are not beside the checkout")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data.parent))


@pytest.mark.slow
@pytest.mark.usefixtures("bccd")
@pytest.mark.parametrize("host", HOSTS)
def test_a_debug_config_trains_evaluates_and_resumes(host: str, tmp_path: Path) -> None:
    config = ROOT / f"projects/{host}/configs/debug_dfine.py"
    short = ["train.log_period=5", "train.checkpointer.period=10"]
    output = train_net(config, tmp_path, "train.max_iter=20", "train.eval_period=20", *short)
    assert "Evaluation results for bbox" in output
    steps = metrics(tmp_path)
    losses = [entry for entry in steps if "total_loss" in entry]
    assert losses[-1]["total_loss"] < losses[0]["total_loss"]
    terms = {name: value for name, value in losses[-1].items() if name.startswith("loss_")}
    assert {"loss_fgl", "loss_ddf_0", "loss_bbox_pre"} <= {name.replace("_aux_", "_") for name in terms}
    assert sum(terms.values()) == pytest.approx(losses[-1]["total_loss"], rel=0.2)  # medians of a window, each
    output = train_net(config, tmp_path, "--resume", "train.max_iter=25", "train.eval_period=100", *short)
    assert "Starting training from iteration 20" in output
    assert metrics(tmp_path)[-1]["iteration"] in (24, 25)
    model = open_checkpoint(tmp_path).load()
    assert binding_of(model) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("bccd")
def test_a_baseline_checkpoint_starts_a_plugin_config(tmp_path: Path) -> None:
    configs = ROOT / "projects/deformable_detr/configs"
    (tmp_path / "dfine").mkdir()
    checkpoint = trained_baseline(configs, tmp_path / "baseline", steps=5)
    output = train_net(
        configs / "debug_dfine.py",
        tmp_path / "dfine",
        f"train.init_checkpoint={checkpoint}",
        "train.max_iter=5",
        "train.eval_period=100",
    )
    assert "not found in the checkpoint" not in output
    assert "not used by the model" not in output


@pytest.mark.slow
@pytest.mark.usefixtures("bccd")
def test_a_trained_host_goes_on_calibrated(tmp_path: Path) -> None:
    configs = ROOT / "projects/dino/configs"
    (tmp_path / "retrofit").mkdir()
    checkpoint = trained_baseline(configs, tmp_path / "baseline", steps=30)
    output = train_net(
        configs / "debug_retrofit.py",
        tmp_path / "retrofit",
        f"model.checkpoint={checkpoint}",
        "train.max_iter=5",
        "train.eval_period=5",
        "train.log_period=5",
        "train.checkpointer.period=5",
    )
    assert "Evaluation results for bbox" in output
    assert any({"loss_fgl", "loss_bbox_pre"} <= entry.keys() for entry in metrics(tmp_path / "retrofit"))
    model = open_checkpoint(tmp_path / "retrofit").load()
    assert binding_of(model) is not None
    # five steps at the schedule's first rates move a head of zeros hardly: calibration has
    last = model.transformer.decoder.fdr.refine[-1][-1]
    assert last.weight.detach().abs().max() > 0.05


def plugin_configs() -> list[Path]:
    return sorted(ROOT.glob("projects/*/configs/*_dfine.py"))


@pytest.mark.parametrize("path", plugin_configs(), ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_a_plugin_config_is_the_baseline_and_the_wrap(path: Path) -> None:
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    plugin = LazyConfig.load(str(path))
    baseline = LazyConfig.load(str(path.with_name(path.name.replace("_dfine", "_baseline"))))
    wrapped = plugin.model.detector if "detector" in plugin.model else plugin.model
    assert "wrap_decoder" in str(wrapped._target_)
    assert plugin.train.output_dir != baseline.train.output_dir
    if "detector" in plugin.model:
        plugin.model.detector = wrapped.model
    else:
        plugin.model = wrapped.model
    for config in (plugin, baseline):
        config.train.output_dir = config.dataloader.evaluator.output_dir = "."
        config.optimizer.params.pop("lr_factor_func", None)  # a function: the same code, another object
    first, second = (OmegaConf.to_container(config, resolve=False) for config in (plugin, baseline))
    assert str(first) == str(second)


@pytest.mark.parametrize("depth", [18, 50])
def test_rt_detr_of_detectron2_is_that_of_transformers(depth: int) -> None:
    import torch
    from detectron2.structures import Boxes, Instances

    from dfine_plugin import wrap_decoder
    from dfine_plugin.projects.rt_detr.modeling import RTDETR, rt_detr

    torch.manual_seed(0)
    detector = rt_detr(depth, num_classes=3, num_queries=20, num_denoising=0).eval()
    model = RTDETR(detector, select_box_nums_for_evaluation=10, device="cpu").eval()
    small, large = torch.rand(3, 96, 64) * 255, torch.rand(3, 128, 160) * 255
    with torch.no_grad():
        results = model([{"image": small, "height": 192, "width": 128}, {"image": large}])
    padded = torch.zeros(2, 3, 128, 160)
    padded[0, :, :96, :64], padded[1] = small, large
    outputs = detector(padded / 255)
    for image, ((height, width), scale) in enumerate([((192, 128), 2), ((128, 160), 1)]):
        found = results[image]["instances"]
        scores, indices = outputs.logits[image].sigmoid().flatten().topk(10)
        cx, cy, w, h = (outputs.pred_boxes[image][indices // 3] * torch.tensor([160, 128, 160, 128]) * scale).unbind(-1)
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
        corners = torch.minimum(corners.clamp(min=0), torch.tensor([width, height, width, height]))
        kept = (corners[:, 2:] > corners[:, :2]).all(-1)  # detectron2 drops what lies in the padding
        torch.testing.assert_close(found.pred_boxes.tensor, corners[kept], atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, scores[kept])
    # in training: the very losses, of boxes relative to the padded images
    wrap_decoder(detector)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    instances = Instances((96, 64), gt_boxes=Boxes(torch.tensor([[8.0, 16, 40, 80]])), gt_classes=torch.tensor([2]))
    losses = model([{"image": small, "instances": instances}, {"image": large, "instances": instances}])
    label = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[24 / 160, 48 / 128, 32 / 160, 64 / 128]])}
    expected = detector(padded / 255, labels=[label, label])
    assert losses.keys() == expected.loss_dict.keys()
    torch.testing.assert_close(sum(losses.values()), expected.loss)


def test_rt_detr_names_what_is_wrong(tmp_path: Path) -> None:
    from dfine_plugin.projects.rt_detr.modeling import rt_detr

    with pytest.raises(ValueError, match="18, 34, 50, 101 layers, not 51"):
        rt_detr(51)
    with pytest.raises(FileNotFoundError, match="no folder"):
        rt_detr(pretrained=str(tmp_path / "nothing"))


def test_rt_detr_starts_from_a_local_checkpoint_of_transformers(tmp_path: Path) -> None:
    import torch

    from dfine_plugin.projects.rt_detr.modeling import rt_detr

    source = rt_detr(18, num_classes=5, num_queries=20)
    source.save_pretrained(tmp_path)
    model = rt_detr(18, num_classes=3, pretrained=str(tmp_path))
    assert model.config.num_labels == 3
    assert model.config.num_queries == 20
    for (name, p), q in zip(model.named_parameters(), source.parameters(), strict=True):
        assert p.shape != q.shape or torch.equal(p, q), name


def test_a_missing_detrex_is_said() -> None:
    from dfine_plugin.projects.common import detrex_config

    with pytest.raises(FileNotFoundError, match="detrex's checkout must be on the path"):
        detrex_config("dino/configs/nothing.py")
