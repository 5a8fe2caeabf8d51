"""RT-DETR's own trainer on a wrapped model: trains on images, evaluates, resumes, and goes on from a bare host."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ..adapters.rtdetr_hosts import missing
from ..coco_folder import SIDE, write_coco

_MISSING = missing("rtdetrv2_decoder")


def needs_repository(test: Any) -> Any:
    """Slow, and for RT-DETRv2's folder of the repository."""
    for mark in (pytest.mark.slow, pytest.mark.rtdetr, pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))):
        test = mark(test)
    return test


OPS = [
    {"type": "RandomHorizontalFlip"},
    {"type": "Resize", "size": [SIDE, SIDE]},
    {"type": "SanitizeBoundingBoxes", "min_size": 1},
    {"type": "ConvertPILImage", "dtype": "float32", "scale": True},
    {"type": "ConvertBoxes", "fmt": "cxcywh", "normalize": True},
]
STEPS_AN_EPOCH = 4


def repository() -> Path:
    import src

    return Path(src.__file__).parents[1]


def write_config(folder: Path) -> Path:
    """The repository's config of R18, for a data set of small images, with fewer queries and no weights to fetch."""
    write_coco(folder / "data")

    def loader(split: str, batch_size: int, **settings: Any) -> dict[str, Any]:
        dataset = {"img_folder": str(folder / "data/images"), "ann_file": str(folder / f"data/instances_{split}.json")}
        transforms = {"ops": OPS if split == "train" else [OPS[1], OPS[3]], **settings}
        return {
            "dataset": {**dataset, "transforms": transforms},
            "total_batch_size": batch_size,
            "num_workers": 0,
            "collate_fn": {"scales": None},
        }

    config = {
        "__include__": [str(repository() / "configs/rtdetrv2/rtdetrv2_r18vd_120e_coco.yml")],
        "num_classes": 2,
        "remap_mscoco_category": False,
        "eval_spatial_size": [SIDE, SIDE],
        "use_amp": False,
        "epoches": 5,
        "print_freq": 1,
        "output_dir": str(folder / "run"),
        "PResNet": {"pretrained": False},
        "RTDETRTransformerv2": {"num_queries": 30, "num_denoising": 10},
        "RTDETRPostProcessor": {"num_top_queries": 30},
        "lr_warmup_scheduler": {"warmup_duration": 2},
        "train_dataloader": loader("train", 8 // STEPS_AN_EPOCH, policy={"epoch": 99, "ops": []}),
        "val_dataloader": loader("val", 4),
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(module: list[str], *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", *module, *arguments, "--seed", "0", "-d", "cpu"]
    run = subprocess.run(
        command, cwd=repository(), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


WRAPPED = ["-m", "dfine_plugin.projects.rtdetr.train"]


def logged(folder: Path) -> list[dict[str, Any]]:
    """Of each epoch the means of the losses, and the evaluation."""
    return [json.loads(line) for line in (folder / "run/log.txt").read_text().splitlines()]


@needs_repository
def test_the_repositorys_trainer_trains_evaluates_resumes_and_tunes(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    recipe = ["FDRConfig.union=True", "FDRConfig.ddf=True", "FDRConfig.num_bins=16"]
    train(WRAPPED, "-c", str(config), "-u", *recipe)
    epochs = logged(tmp_path)
    assert len(epochs) == 5
    terms = {name.removeprefix("train_") for name in epochs[-1] if name.startswith("train_loss_")}
    assert {"loss_vfl", "loss_fgl", "loss_ddf_aux_0", "loss_fgl_dn_2", "loss_bbox_pre", "loss_giou_enc_0"} <= terms
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert sum(epochs[-1][f"train_{name}"] for name in terms) == pytest.approx(epochs[-1]["train_loss"], rel=1e-4)
    assert "test_coco_eval_bbox" in epochs[-1]

    last = torch.load(tmp_path / "run/last.pth", weights_only=True)
    head = [name for name in last["model"] if name.startswith("decoder.decoder.fdr.refine.")]
    assert last["model"]["decoder.decoder.fdr.refine.0.4.weight"].shape == (4 * 17, 256)
    trained = {name for name in head if last["model"][name].any()}
    assert trained == set(head)
    averaged = last["ema"]["module"]
    assert averaged.keys() == last["model"].keys()
    assert any(not torch.equal(averaged[name], last["model"][name]) for name in head)

    train(WRAPPED, "-c", str(config), "-r", str(tmp_path / "run/last.pth"), "-u", *recipe, "epoches=6")
    epochs = logged(tmp_path)
    assert epochs[-1]["epoch"] == 5
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


@needs_repository
def test_a_bare_hosts_checkpoint_tunes_a_wrapped_one(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    train(["tools/train.py"], "-c", str(config), "-u", "epoches=1")
    bare = torch.load(tmp_path / "run/last.pth", weights_only=True)
    output = train(
        WRAPPED, "-c", str(config), "-t", str(tmp_path / "run/last.pth"), "-u", "epoches=1", "optimizer.lr=0."
    )
    assert "'unmatched': []" in output
    wrapped = torch.load(tmp_path / "run/last.pth", weights_only=True)
    # the learning rate of all but the backbone is zero
    name = "decoder.dec_bbox_head.0.layers.0.weight"
    assert torch.equal(wrapped["model"][name], bare["ema"]["module"][name])
    assert not [name for name in wrapped["model"] if "dec_bbox_head.1" in name]
    groups = wrapped["optimizer"]["param_groups"]
    num_norms = sum("norm" in name or "bn" in name for name in wrapped["model"] if name.endswith(("weight", "bias")))
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0001]
    assert len(groups[0]["params"]) == num_norms


def test_a_missing_repository_is_said(tmp_path: Path) -> None:
    command = [sys.executable, *WRAPPED, "-c", "config.yml"]
    path = str(Path(__file__).parents[2])
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "this trains RT-DETR of its own repository: run it in that folder" in run.stderr
