"""The code of every page: Python runs as it is written, block after block; commands have the options given there."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import typer
from torchvision.transforms.functional import to_pil_image

import dfine_plugin
from dfine_plugin import FDRHead, is_wrapped, load_pretrained, registry, weighting_function, wrap_decoder
from dfine_plugin.benchmarks.detection_data import TrainingView, collate
from dfine_plugin.benchmarks.shapes import make_shapes
from dfine_plugin.benchmarks.trained_hosts import TRAINED, load_trained
from dfine_plugin.commands import app as dfine_plugin_app

from ..adapters.detrex_hosts import missing

ROOT = Path(__file__).parents[2]
DOCS = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "projects/README.md", *(f"docs/{name}" for name in DOCS)]
HOST = TRAINED / "rt-detr"
SIDE = 96
ELSEWHERE = {
    "docs/ship.md": "tests/commands/test_export.py runs it, without torch",
    "docs/lora.md": "wants peft's own hosts: test_lora",
}
"""Pages whose Python is run by a test of its own."""


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of code in a language, without the indentation that lists give them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def smaller(code: str) -> str:
    """The same code, for as many steps, and pixels, as a test has time for."""
    return re.sub(r"\bmax_steps=\d+", "max_steps=2", re.sub(r"\bsize = 640\b", f"size = {SIDE}", code))


def is_detrex(code: str) -> bool:
    return "detectron2" in code


def own_python(page: str) -> list[str]:
    return [code for code in blocks(page, "python") if not is_detrex(code)]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take for given, in an empty folder; the small trained host is what the hub has."""
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "my-data")
    load = transformers.RTDetrForObjectDetection.from_pretrained

    def from_hub(name: Any, **arguments: Any) -> Any:
        shipped = {"pretrained_model_name_or_path": HOST, "dtype": torch.float32}  # its file is in half precision
        return load(**shipped, **arguments) if str(name).startswith("PekingU/") else load(name, **arguments)

    monkeypatch.setattr(transformers.RTDetrForObjectDetection, "from_pretrained", from_hub)
    monkeypatch.setattr(dfine_plugin, "calibrate", partial(dfine_plugin.calibrate, steps=5, progress=False))

    data = make_shapes(8, SIDE, seed=5)
    batch = collate([TrainingView(data, flip=False, seed=0)[i] for i in range(2)])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    pair = torch.tensor([0]), torch.tensor([0])
    yield {
        "torch": torch,
        "checkpoint": HOST,
        "train_dataset": TrainingView(data, flip=True, seed=0),
        "collate": collate,
        "arguments": transformers.TrainingArguments("output", max_steps=2, remove_unused_columns=False),
        "pixel_batches": [batch["pixel_values"]],
        "pixels": batch["pixel_values"],
        "labels": batch["labels"],
        "host": load_trained("rt-detr"),
        "model": load_trained("rt-detr"),
        "initial_boxes": boxes,
        "logits": torch.zeros(1, 4, len(weighting_function(32, 0.5, 0.25))),
        "last_layers_pairs": [pair],
        "first_layers_pairs": [pair],
    }
    registry._registered.pop("my_package.models.MyDetr", None)  # the one of the page on new hosts


def write_coco(folder: Path) -> None:
    """A data set of shapes as a COCO-format folder."""
    (folder / "images").mkdir(parents=True)
    for seed, split in enumerate(("train", "val")):
        data = make_shapes(8, SIDE, seed=seed)
        for image, pixels in zip(data.coco["images"], data.images, strict=True):
            image["file_name"] = f"{split}-{image['id']}.png"
            to_pil_image(pixels).save(folder / "images" / image["file_name"])
        (folder / f"instances_{split}.json").write_text(json.dumps({"info": {}, **data.coco}))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if own_python(page) and page not in ELSEWHERE])
def test_python_runs_as_it_is_written(page: str, names: dict[str, Any]) -> None:
    for code in own_python(page):
        exec(compile(smaller(code), page, "exec"), names)


@pytest.mark.slow
def test_trained_models(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says comes out of it does."""
    monkeypatch.setattr(dfine_plugin, "calibrate", dfine_plugin.calibrate.func)  # the whole calibration
    train, average, *_ = blocks("docs/trained-models.md", "python")
    exec(smaller(train), names)
    assert is_wrapped(names["model"])
    trained = load_pretrained("wrapped")
    exec(average, names)
    averaged = load_pretrained("wrapped")
    fdr = [model.get_submodule("model.decoder.fdr.refine.2.4").weight for model in (trained, averaged)]
    assert fdr[0].abs().max() > 0.05  # calibrated
    assert not fdr[0].equal(fdr[1])


@pytest.mark.detrex
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_detrex, blocks(page, "python")))])
def test_lazy_configs_are_as_they_are_written(page: str) -> None:
    from detectron2.config import LazyCall

    for code in filter(is_detrex, blocks(page, "python")):
        train = SimpleNamespace(init_checkpoint="", device="cpu", model_ema=SimpleNamespace(device=""))
        lazy = LazyCall(torch.nn.Linear)(in_features=1, out_features=1)
        found: dict[str, Any] = {"model": lazy, "train": train, "dataloader": SimpleNamespace(train=None)}
        exec(compile(code, page, "exec"), found)
        assert found["model"]["model"] == lazy
        assert found["model"]["_target_"] in (wrap_decoder, found.get("wrap_trained"))


def commands(page: str) -> list[list[str]]:
    """The commands of a page's blocks of shell, word by word."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in line.split("  #")[0].split("&&"))
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def find_command(words: list[str]) -> tuple[Any, list[str]] | None:
    """The command of this package among the words, and what it is given."""
    while words and "=" in words[0]:  # an environment variable
        words = words[1:]
    if not words:
        return None
    if words[0] == "dfine-plugin":
        group, words = typer.main.get_command(dfine_plugin_app), words[1:]
    elif words[:2] == ["python", "-m"] and words[2].startswith("dfine_plugin."):
        module, words = importlib.import_module(words[2]), words[3:]
        app = getattr(module, "app", None) or typer.Typer()
        if not hasattr(module, "app"):
            app.command()(module.main)
        group = typer.main.get_command(app)
    else:
        return None
    subcommands = getattr(group, "commands", None)
    return (subcommands[words[0]], words[1:]) if subcommands else (group, words)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_have_the_options_that_a_page_gives_them(page: str) -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[:2] == ["pip", "install"]:
            wanted = re.findall(r"\[([\w,]+)\]", " ".join(words))
            assert {extra for group in wanted for extra in group.split(",")} <= extras, words
        found = find_command(words)
        if found is None:
            continue
        command, given = found
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in given if word.startswith("-")} <= options, words


def test_every_page_is_in_the_sites_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(re.search(rf"- (?:[\w ]+: )?{name}\n", navigation) for name in DOCS)


def test_new_hosts_page_counts_the_smallest_adapter() -> None:
    """The length that the page gives is the file's."""
    page = (ROOT / "docs/new-host.md").read_text()
    (name, lines), *_ = re.findall(r"`(adapters/\w+/\w+\.py)` is (\d+) lines", page)
    assert len((ROOT / name).read_text().splitlines()) == int(lines)
    assert FDRHead.__name__ in page
