"""Checkpoints come back as they were saved, with the preprocessing that was saved with them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessor

from dfine_plugin.checkpoints import input_size, open_checkpoint

from ..adapters.hosts import assert_equal, build, wrapped
from ..adapters.transformers_hosts import HOSTS

RT_DETR = {host.name: host for host in HOSTS}["rt-detr"]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))


def test_models_come_back_as_they_were_saved(tmp_path: Path) -> None:
    models = {"bare": build(RT_DETR), "wrapped": wrapped(RT_DETR)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        checkpoint = open_checkpoint(tmp_path / name)
        assert str(checkpoint) == name
        assert_equal(RT_DETR, checkpoint.load(), model)
        assert checkpoint.class_names() == model.config.id2label


def test_preprocessing_is_what_the_checkpoint_says(image: Image.Image, tmp_path: Path) -> None:
    build(RT_DETR).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    plain = checkpoint.preprocess(image, (64, 96))
    assert plain.shape == (1, 3, 64, 96)
    assert checkpoint.preprocess(image).shape == (1, 3, 640, 640)
    assert input_size(checkpoint) == (640, 640)
    assert plain.min() >= 0
    assert 0.5 < plain.max() <= 1
    whole = checkpoint.preprocess(image, (80, 120))
    assert torch.equal(whole[0].permute(1, 2, 0), torch.from_numpy(np.array(image)) / 255)

    statistics = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    RTDetrImageProcessor(size={"height": 32, "width": 48}, **statistics).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.preprocess(image).shape == (1, 3, 32, 48)
    assert input_size(checkpoint) == (32, 48)
    normalised = checkpoint.preprocess(image, (64, 96))
    torch.testing.assert_close(normalised, (plain - 0.5) / 0.25, atol=0.05, rtol=0)


def test_code_that_lies_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """Nor asked for, where transformers would wait for an answer."""
    build(RT_DETR).save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    processor = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    for name, content in (
        ("preprocessor_config.json", processor),
        ("config.json", {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"cannot be read: .*custom code"):
            open_checkpoint(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        open_checkpoint(tmp_path)
    build(RT_DETR).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path).load()


def test_a_run_of_detrex_without_detrex_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("model: {}")
    monkeypatch.setitem(sys.modules, "detectron2.config", None)
    monkeypatch.delitem(sys.modules, "dfine_plugin.adapters.detrex.checkpoint", raising=False)
    with pytest.raises(ImportError, match="a run of detrex, which needs detrex and detectron2"):
        open_checkpoint(tmp_path)
