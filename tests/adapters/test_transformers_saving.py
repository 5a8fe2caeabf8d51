"""Folders of wrapped transformers models: load_pretrained reads them as they were, and nothing else reads them."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    pipeline,
)

from dfine_plugin import (
    FDRConfig,
    UnsupportedModelError,
    WrapStateError,
    deploy,
    is_wrapped,
    load_pretrained,
    unwrap_decoder,
    wrap_decoder,
)
from dfine_plugin.adapters.transformers.prompt import fix_prompt
from dfine_plugin.benchmarks.models.hosts import build_host

from .hosts import Host, assert_equal, build, predict, randomise_fdr, train_step, wrapped
from .transformers_hosts import HOSTS, TEXT, TextHost

RT_DETR = {host.name: host for host in HOSTS}["rt-detr"]

FIRST_OF_HEADS = re.compile(r"bbox_embed\.\d+\.layers\.0\.weight")
"""The first weights of each layer's box head."""

NO_FILE = r"load_this_with_dfine_plugin\.load_pretrained"
"""What the error of a loader that is not the plugin's says."""


class MyDetr(RTDetrForObjectDetection):
    """A user's own host."""


@pytest.fixture
def host(transformers_host: Host) -> Host:
    return transformers_host


def on_a_hub(folder: Path, cache: Path, name: str) -> dict:
    """Put a folder where huggingface_hub keeps what it downloaded of a repository; how to look there only."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return {"cache_dir": cache, "local_files_only": True}


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def test_save_pretrained_and_load(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    train_step(host, model)
    model.save_pretrained(tmp_path / "one")
    loaded = load_pretrained(tmp_path / "one")
    assert type(loaded) is type(model)
    assert_equal(host, model, loaded)
    assert_same_weights(model, loaded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB", variant="mine")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_equal(host, model, load_pretrained(tmp_path / "shards", variant="mine"))
    assert train_step(host, model) == train_step(host, loaded)
    assert is_wrapped(loaded)
    assert load_pretrained(tmp_path / "one", dtype=torch.float64).dtype == torch.float64


def test_no_other_loader_takes_a_wrapped_folder(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    model.save_pretrained(tmp_path / "folder")
    RTDetrImageProcessor().save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    takes_text = isinstance(host, TextHost)
    task = "zero-shot-object-detection" if takes_text else "object-detection"
    auto_class = AutoModelForZeroShotObjectDetection if takes_text else AutoModelForObjectDetection
    assert ModelCard.load(tmp_path / "folder" / "README.md").data.pipeline_tag == task
    for folder in (tmp_path / "folder", tmp_path / "shards"):
        for cls in (type(model), auto_class):
            with pytest.raises(OSError, match=NO_FILE):
                cls.from_pretrained(folder)
    with pytest.raises((OSError, ValueError), match=NO_FILE):
        pipeline(task, model=str(tmp_path / "folder"))
    hub = on_a_hub(tmp_path / "folder", tmp_path / "cache", "me/my-detr")
    with pytest.raises(OSError, match="does not appear to have a file"):
        type(model).from_pretrained("me/my-detr", **hub)


def test_nor_does_one_that_never_heard_of_the_plugin(tmp_path: Path) -> None:
    wrapped(RT_DETR).save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        "for cls in (transformers.RTDetrForObjectDetection, transformers.AutoModelForObjectDetection):\n"
        "    try:\n"
        "        cls.from_pretrained(sys.argv[1])\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "assert 'dfine_plugin' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout.count("load_this_with_dfine_plugin.load_pretrained") == 2


def test_what_a_wrapped_folder_says_of_its_host_stays_readable(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).id2label == model.config.id2label


def test_a_pipeline_takes_what_load_pretrained_gives(tmp_path: Path) -> None:
    model = wrapped(RT_DETR)
    model.save_pretrained(tmp_path)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    found, expected = (
        pipeline("object-detection", model=detector, image_processor=processor)(image, threshold=0.0)
        for detector in (load_pretrained(tmp_path), model)
    )
    assert found == expected
    assert len(found) == 12


def test_a_repository_of_the_hub_loads_as_its_folder_does(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    for name, settings in (("one", {}), ("shards", {"max_shard_size": "50KB"}), ("variant", {"variant": "fp16"})):
        model.save_pretrained(tmp_path / name, **settings)
        hub = on_a_hub(tmp_path / name, tmp_path / "cache", f"me/{name}")
        variant = {"variant": settings["variant"]} if "variant" in settings else {}
        assert_equal(host, model, load_pretrained(f"me/{name}", **hub, **variant))


def test_a_subclass_of_a_host_comes_back_as_such(tmp_path: Path) -> None:
    bare = build(RT_DETR)
    bare.__class__ = MyDetr
    model = wrap_decoder(bare, RT_DETR.config())
    randomise_fdr(RT_DETR, model)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is MyDetr
    assert_equal(RT_DETR, model, loaded)
    assert_same_weights(model, loaded)
    # what a notebook's cell defines when it is run again
    again = type("MyDetr", (RTDetrForObjectDetection,), {})
    assert type(load_pretrained(tmp_path)) is again
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["TheirDetr"]}))
    with pytest.raises(ValueError, match=r"holds a TheirDetr, .*: import its module first"):
        load_pretrained(tmp_path)


def test_a_state_dict_gives_a_wrapped_model_on_meta_its_weights(host: Host) -> None:
    model = wrapped(host)
    with torch.device("meta"):
        empty = wrap_decoder(type(model)(build(host).config), host.config())
    if isinstance(host, TextHost):
        fix_prompt(empty, **TEXT)
    with pytest.raises(WrapStateError, match="has no weights for its FDR head: load it before the wrap"):
        empty.load_state_dict(build(host).state_dict(), assign=True)
    empty.load_state_dict(model.state_dict(), assign=True)
    left = [name for name, x in (*empty.named_parameters(), *empty.named_buffers()) if x.is_meta]
    assert not [name for name in left if ".fdr." in name]
    if not left:  # other buffers that no state dict holds are the host's
        assert_equal(host, model, empty.eval())


def test_folders_of_version_0_1_0_load(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["transformers_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(host, model, load_pretrained(tmp_path))


def test_folders_without_a_whole_wrapped_model_are_refused(host: Host, tmp_path: Path) -> None:
    build(host).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no wrapped model"):
        load_pretrained(tmp_path / "bare")
    model = wrapped(host)
    weights = model.state_dict()
    removed = "model.decoder.fdr.refine.1.4.bias"
    model.save_pretrained(tmp_path / "part", state_dict={k: v for k, v in weights.items() if k != removed})
    with pytest.raises(ValueError, match=f"lacks weights of the wrapped model: {removed}"):
        load_pretrained(tmp_path / "part")


def test_a_host_with_a_wrapped_models_config_is_not_wrapped(host: Host) -> None:
    bare = type(build(host))(wrapped(host).config)
    with pytest.raises(UnsupportedModelError, match="load_pretrained"):
        wrap_decoder(bare, host.config())


def test_a_wrapped_models_config_is_copied_and_pickled(host: Host) -> None:
    config = wrapped(host).config
    assert isinstance(config, type(build(host).config))
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config)
        assert twin.to_json_string() == config.to_json_string()


@pytest.mark.parametrize("num_layers", [3, 1])
def test_a_deployed_model_comes_back_deployed(host: Host, num_layers: int, tmp_path: Path) -> None:
    config = build(host).config
    config.decoder_layers = num_layers
    torch.manual_seed(0)
    try:
        bare = type(build(host))(config).eval()
    except ValueError as error:
        pytest.skip(f"the bare host cannot be built: {error}")
    model = wrap_decoder(bare, host.config(residual_scale=8.0))
    randomise_fdr(host, model, scale=0.05)
    expected = predict(host, model)
    deploy(model)
    for found, wanted in zip(predict(host, model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_equal(host, model, loaded)
    assert_same_weights(model, loaded)
    with pytest.raises(WrapStateError, match="deployed already"):
        deploy(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_equal(host, model, load_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_model_deployed_with_fewer_layers_comes_back_with_them(host: Host, num_layers: int, tmp_path: Path) -> None:
    model = deploy(wrapped(host), num_layers)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_equal(host, model, loaded)
    assert_same_weights(model, loaded)
    assert len(loaded.model.decoder.layers) == num_layers


def test_a_model_with_live_batch_norms_comes_back_with_the_hosts_frozen_ones(tmp_path: Path) -> None:
    """The ablation's Deformable-DETR: its class freezes the backbone's statistics, and training from scratch cannot."""
    torch.manual_seed(0)
    model = wrap_decoder(build_host("deformable-detr", ["a", "b"])).eval()
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, wanted = (network(pixels) for network in (loaded, model))
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes)
    torch.testing.assert_close(found.logits, wanted.logits)


def test_the_model_card_says_how_to_load_and_its_code_does(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "dfine-plugin"
    assert model.config.model_type in card.data.tags
    name = type(model).__name__
    assert f"# {name} with D-FINE's box regression" in card.content
    (settings,) = re.findall(r"```json\n(.*?)```", card.content, re.DOTALL)
    assert FDRConfig.from_json(settings) == host.config()
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("path/or/name", str(tmp_path)), found)
    assert_equal(host, found["model"], model)
    deploy(model, 2).save_pretrained(tmp_path / "deployed")
    assert f"`{name}` of transformers, deployed with 2 decoder layers" in (tmp_path / "deployed/README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    found["model"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_save_pretrained_wrote_loads_as_a_state_dict(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    model.save_pretrained(tmp_path / "wrapped")
    other = wrap_decoder(build(host, seed=9), host.config())
    other.load_state_dict(load_file(tmp_path / "wrapped" / "model.safetensors"))
    assert_same_weights(model, other)
    baseline = build(host)
    baseline.save_pretrained(tmp_path / "baseline")
    other.load_state_dict(load_file(tmp_path / "baseline" / "model.safetensors"))
    assert_equal(host, unwrap_decoder(other), baseline)


def test_unwrapping_a_loaded_model_says_which_heads_are_not_its_own(host: Host, tmp_path: Path) -> None:
    wrapped(host).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    heads = [p for name, p in build(host).named_parameters(remove_duplicate=False) if FIRST_OF_HEADS.search(name)]
    if host.one_box_head or len({id(p) for p in heads}) == 1:  # layers share one box head, which stays
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_equal(host, unwrap_decoder(model), build(host))
        return
    with pytest.warns(UserWarning, match=r"bbox_embed\.1.* of no use before these heads are trained") as warned:
        unwrap_decoder(model)
    assert warned[0].filename == __file__


def test_settings_come_back(host: Host, tmp_path: Path) -> None:
    config = FDRConfig(num_bins=8, a=0.3, weighting="uniform", lqe=True, **host.settings)
    model = wrap_decoder(build(host), config)
    randomise_fdr(host, model)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert host.fdr(loaded).config == host.fdr(model).config
    assert replace(host.fdr(loaded).config, initial_layer=None) == config  # the host's own has been put there
    assert_equal(host, model, loaded)
