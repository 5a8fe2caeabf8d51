"""Output folders of detrex's trainer as checkpoints: export and pictures start from them."""

import pickle
import re
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
@pytest.mark.parametrize("host", ["deformable_detr", "dino", "dino_eva", "deta", "dab_detr", "rt_detr"])
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
@pytest.mark.parametrize("host", ["deformable_detr", "dino_eva", "rt_detr"])
def test_images_are_those_of_the_test_data(host: str, image_format: str, tmp_path: Path) -> None:
    from detectron2.config import LazyConfig, instantiate

    config, model = written_by_the_trainer(tmp_path, host)
    # DINO with EVA reads images by detectron2's mapper
    config.dataloader.test.mapper["image_format" if host == "dino_eva" else "img_format"] = image_format
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
    from dfine_plugin.tools.commands import app

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


def run_of(folder: Path, **changes: Any) -> Path:
    """A run's folder, with other things in its config."""
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    config, _ = written_by_the_trainer(folder, "deformable_detr")
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), None, force_add=True)  # nothing of what was there stays
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    LazyConfig.save(config, str(folder / "config.yaml"))
    return folder


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.check_call",
        "builtins.eval",
        "transformers.AutoModel.from_pretrained",
    ],
)
def test_a_config_that_calls_what_is_no_models_is_refused_before_anything_runs(target: str, tmp_path: Path) -> None:
    call = {"_target_": target, "command": "touch ran"}
    run = open_checkpoint(run_of(tmp_path, model__model__neck=call))
    with pytest.raises(ValueError, match=rf"the run's config calls {re.escape(target)}, and code that is neither"):
        run.load()
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("target", "origin"),
    [
        ("torch.load", "torch.serialization.load"),
        ("torch.hub.load", "torch.hub.load"),
        ("detectron2.config.LazyConfig.load", "detectron2.config.lazy.LazyConfig.load"),
        ("detectron2.layers.wrappers.torch.load", "torch.serialization.load"),
        ("detrex.modeling.ema.copy.deepcopy", "copy.deepcopy"),
        ("dfine_plugin.projects.paper_rows.train", "dfine_plugin.projects.paper_rows.train"),
    ],
)
def test_a_name_that_leads_to_no_part_of_a_model_is_refused(target: str, origin: str, tmp_path: Path) -> None:
    run = open_checkpoint(run_of(tmp_path, model__model__neck={"_target_": target}))
    with pytest.raises(ValueError, match=rf"calls {re.escape(target)}, which is {re.escape(origin)}: no part of"):
        run.load()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("projects.nowhere.modeling.Detr", r"cannot be imported: .*: detrex's checkout must be on PYTHONPATH"),
        ("detrex.modeling.Nowhere", r"calls detrex\.modeling\.Nowhere, which cannot be imported: "),
        ({"_target_": "os.getcwd"}, r"calls \{'_target_': 'os\.getcwd'\}, which is no name"),
    ],
)
def test_what_is_not_there_is_told(target: Any, message: str, tmp_path: Path) -> None:
    run = open_checkpoint(run_of(tmp_path, model__model__neck={"_target_": target}))
    with pytest.raises(ValueError, match=message):
        run.load()


@pytest.mark.parametrize("where", ["dataloader.test.mapper.augmentation", "dataloader.test.dataset.names"])
def test_what_lies_beside_the_model_is_looked_at_as_well(where: str, tmp_path: Path) -> None:
    run = open_checkpoint(run_of(tmp_path, **{where.replace(".", "__"): {"_target_": "os.getcwd"}}))
    with pytest.raises(ValueError, match=r"calls os\.getcwd"):
        run.class_names() if "names" in where else run.preprocess(Image.new("RGB", (64, 64)))


def test_yaml_and_pickles_run_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    run_of(tmp_path)
    config = tmp_path / "config.yaml"
    text = config.read_text()

    class Malicious:
        def __reduce__(self) -> Any:
            return ran.touch, ()

    (tmp_path / "config.yaml.pkl").write_bytes(pickle.dumps(Malicious()))
    open_checkpoint(tmp_path).load()
    for tag in ("apply", "new"):
        config.write_text(f"{text}\nevil: !!python/object/{tag}:os.system ['touch {ran}']\n")
        with pytest.raises(ValueError, match=r"config\.yaml cannot be read: could not determine a constructor"):
            open_checkpoint(tmp_path)
    # names and objects that nothing makes are no more than names
    config.write_text(f"{text}\nevil: !!python/name:os.system\nworse: !!python/object:subprocess.Popen {{args: ls}}\n")
    open_checkpoint(tmp_path).load()
    partial = "!!python/object/apply:functools.partial {state: [!!python/name:os.system '', [], {}, null]}"
    config.write_text(f"{text}\nevil: {partial}\nworse: !!python/object/apply:functools.partial {{}}\n")
    read = open_checkpoint(tmp_path).config
    assert read.evil == read.worse == {"_target_": "functools.partial"}
    torch.save({"model": Malicious()}, tmp_path / "model_0000019.pth")
    with pytest.raises(ValueError, match=r"model_0000019\.pth cannot be read: "):
        open_checkpoint(tmp_path).load()
    assert not ran.exists()
    for broken in ("a: [", "just words", "", "\x00"):
        config.write_text(broken)
        with pytest.raises(ValueError, match=r"config\.yaml cannot be read: "):
            open_checkpoint(tmp_path)


def test_a_users_own_code_runs_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfine_plugin.adapters.detrex.config import read_config

    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("from detrex.modeling import ChannelMapper as _Mapper\n\n\n")
    (package / "necks.py").write_text(
        "from detrex.modeling import ChannelMapper\n\n\nclass Neck(ChannelMapper):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    run_of(run, model__model__neck___target_="own_package.necks.Neck")
    with pytest.raises(ValueError, match=r"trust it \(--trust own_package\)"):
        open_checkpoint(run).load()
    assert type(open_checkpoint(run, trust=["own_package"]).load().neck).__name__ == "Neck"
    with pytest.raises(ValueError, match=r"calls own_package"):
        open_checkpoint(run, trust=["own"]).load()
    as_argument = tmp_path / "config.yaml"  # as detectron2 writes a class
    as_argument.write_text("neck: !!python/name:own_package.necks.Neck ''\n")
    assert read_config(as_argument).neck == {"_target_": "own_package.necks.Neck"}
    assert read_config(as_argument, ["own_package"]).neck.__name__ == "Neck"


def test_every_config_of_the_projects_can_be_made_from_what_is_saved_of_it(tmp_path: Path) -> None:
    """All that they name is trusted; no pickle is needed."""
    from detectron2.config import LazyConfig

    from dfine_plugin.adapters.detrex.checkpoint import _only_wrapped
    from dfine_plugin.adapters.detrex.config import find_trusted, parts, read_config

    checked = 0
    for path in sorted((ROOT / "projects").glob("*/configs/*.py")):
        LazyConfig.save(LazyConfig.load(str(path)), str(tmp_path / "config.yaml"))
        config = read_config(tmp_path / "config.yaml")
        mapper = config.dataloader.test.mapper
        augmentation = mapper["augmentations" if "augmentations" in mapper else "augmentation"]
        for part in [*parts(_only_wrapped(config.model)), *parts(augmentation)]:
            if "_target_" in part:
                find_trusted(part._target_)
                checked += 1
    assert checked > 100
