"""Output folders of detrex's trainer as checkpoints: export and pictures start from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dfine_plugin.checkpoints import input_size, open_checkpoint

from ..adapters.detrex_hosts import missing

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.detrex, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def written_by_the_trainer(folder: Path, host: str, kind: str = "dfine", averages: bool = False) -> tuple[Any, Any]:
    """A run's config and model, saved to the folder by what detrex's trainer saves them with."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate
    from detrex.modeling import ema

    config = LazyConfig.load(str(ROOT / f"projects/{host}/configs/debug_{kind}.py"))
    config.train.output_dir = config.dataloader.evaluator.output_dir = str(folder)
    config.train.model_ema.enabled = averages
    torch.manual_seed(0)
    model = instantiate(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ema.may_build_model_ema(config, model)
    if averages:
        with torch.no_grad():
            ema.EMAUpdater(model.ema_state).init_state(model)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))  # what the averages have not followed
    checkpointer = DetectionCheckpointer(model, str(folder), **ema.may_get_ema_checkpointer(config, model))
    checkpointer.save("model_0000019", iteration=19)
    if averages:
        ema.apply_model_ema(model)
        del model.ema_state
    # as from a machine with a GPU
    whole = config.model if "device" in config.model or "detector" in config.model else config.model.model
    whole.device = "cuda"
    LazyConfig.save(config, str(folder / "config.yaml"))
    return config, model


@pytest.mark.parametrize("kind", ["baseline", "dfine"])
@pytest.mark.parametrize("averages", [False, True], ids=["latest", "averages"])
@pytest.mark.parametrize("host", ["deformable_detr", "dino", "dab_detr", "rt_detr"])
def test_a_run_comes_back(host: str, averages: bool, kind: str, tmp_path: Path) -> None:
    _, model = written_by_the_trainer(tmp_path, host, kind, averages)
    for path in (tmp_path, tmp_path / "model_0000019.pth"):
        checkpoint = open_checkpoint(path)
        assert str(checkpoint) == "model_0000019.pth" + (", averaged weights" if averages else "")
        found = checkpoint.load()
        assert not found.training
        expected = (model.detector if host == "rt_detr" else model).state_dict()
        assert found.state_dict().keys() == expected.keys()
        for name, value in found.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert input_size(checkpoint) == (160, 160)


def test_a_run_from_a_trained_host_comes_back_without_that_host(tmp_path: Path) -> None:
    from detectron2.config import LazyCall as L
    from detectron2.config import LazyConfig

    from dfine_plugin import FDRConfig
    from dfine_plugin.projects.trained import wrap_trained

    config, model = written_by_the_trainer(tmp_path, "dino")
    parts = {"model": config.model.model, "config": L(FDRConfig.paper)(), "dataloader": config.dataloader.train}
    config.model = L(wrap_trained)(**parts, checkpoint="gone.pth")
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    found = open_checkpoint(tmp_path).load()
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_broken_weights_are_said(tmp_path: Path) -> None:
    written_by_the_trainer(tmp_path, "dino")
    file = tmp_path / "model_0000019.pth"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no weights at all"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model_0000019\.pth cannot be read: "):
            open_checkpoint(tmp_path).load()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("host", ["deformable_detr", "rt_detr"])
def test_images_are_those_of_the_test_data(host: str, image_format: str, tmp_path: Path) -> None:
    from detectron2.config import LazyConfig, instantiate

    config, model = written_by_the_trainer(tmp_path, host)
    config.dataloader.test.mapper.img_format = image_format
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    checkpoint = open_checkpoint(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 160, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    entry = instantiate(config.dataloader.test.mapper)(
        {"file_name": str(tmp_path / "image.png"), "height": 80, "width": 160}
    )
    pixels = checkpoint.preprocess(image)
    assert pixels.shape == (1, 3, 160, 320)
    scale = 1 / 255 if host == "rt_detr" else 1.0
    assert checkpoint.normalisation() == {"channels": image_format, "scale": scale, "mean": [0.0] * 3, "std": [1.0] * 3}
    torch.testing.assert_close(pixels[0] * (255 if host == "rt_detr" else 1), entry["image"].float())
    assert checkpoint.preprocess(image, (96, 64)).shape == (1, 3, 96, 64)

    # and the adapter's detector makes of them what the whole model makes of the entry
    from dfine_plugin.export.postprocess import select_detections
    from dfine_plugin.registry import find_adapter

    detector = checkpoint.load()
    with torch.no_grad():
        logits, boxes = find_adapter(detector).detector(detector)(pixels)
        instances = model.eval()([entry])[0]["instances"]
    scores, _, corners = select_detections(logits, boxes, torch.tensor([[80, 160]]), len(instances))
    torch.testing.assert_close(instances.scores, scores[0], atol=1e-5, rtol=1e-4)
    expected = instances.pred_boxes.tensor
    corners = torch.minimum(corners[0].clamp(min=0), corners.new_tensor([160, 80, 160, 80]))
    torch.testing.assert_close(expected, corners, atol=1e-2, rtol=1e-4)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    from detectron2.config import LazyConfig

    config, _ = written_by_the_trainer(tmp_path, "deformable_detr")
    with pytest.raises(ValueError, match=r"no file .*nothing\.pth"):
        open_checkpoint(tmp_path / "nothing.pth")
    config.train.model_ema.enabled = True
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    with pytest.raises(ValueError, match="has no averaged weights"):
        open_checkpoint(tmp_path).load()
    config.train.model_ema.enabled = False
    config.model.model.num_queries = 40
    config.model.model.transformer.two_stage_num_proposals = 40
    config.model.model.num_classes = 7
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    with pytest.raises(ValueError, match="does not fit its config"):
        open_checkpoint(tmp_path).load()
    (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(ValueError, match="no last_checkpoint"):
        open_checkpoint(tmp_path)
    for name in ("config.yaml", "config.yaml.pkl"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="neither"):
        open_checkpoint(tmp_path)


@pytest.mark.slow
def test_the_commands_take_it(tmp_path: Path) -> None:
    from dfine_plugin.commands import app

    written_by_the_trainer(tmp_path, "deformable_detr")
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(random.integers(0, 256, (80, 120, 3), dtype=np.uint8)).save(photos / f"{i}.png")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})
        assert result.exit_code == 0, result.output
        return result.output

    sources = ("--model", tmp_path, "--image-size", "96x128")
    compare = ("--images", photos, "--threshold", 0.001)
    output = run("export", *sources, *compare, "--output", tmp_path / "model.onnx")
    assert "fp32, 1 images of 96 x 128" in output
    assert "0 lost" in output
    picture = tmp_path / "picture.png"
    run("show", *sources, "--image", photos / "0.png", "--threshold", 0, "--top", 1, "--output", picture)
    assert picture.is_file()
