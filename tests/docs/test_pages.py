"""The code of every page: Python runs as it is written, and commands smaller, in the page's order; commands have the
options given there."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import typer
from PIL import Image
from typer.testing import CliRunner

import dfine_plugin
from dfine_plugin import FDRHead, is_wrapped, load_pretrained, registry, weighting_function, wrap_decoder
from dfine_plugin.benchmarks.data.detection_data import TrainingView, collate
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.models.mmdet_hosts import build_model
from dfine_plugin.benchmarks.trained_hosts import TRAINED, load_trained
from dfine_plugin.tools.commands import app as dfine_plugin_app

from ..adapters import mmdet_hosts, rtdetr_hosts
from ..adapters.detrex_hosts import missing
from ..adapters.hosts import images, labels
from ..coco_folder import SIDE, write_coco

ROOT = Path(__file__).parents[2]
DOCS = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "projects/README.md",
    *(f"benchmarks/results/{page.name}" for page in sorted((ROOT / "benchmarks" / "results").glob("*.md"))),
    *(f"docs/{name}" for name in DOCS),
]
HOST = TRAINED / "rt-detr"
LEFT_OUT = {
    "pip install": "the packages are those of this environment",
    "pre-commit install": "it changes the checkout",
    "pytest": "it runs this test",
    "python -m pytest": "other tests than this one",
    "DFINE_": "the same, longer",
    ".ci/run": "it runs this test",
    "CONFIGS=": "wants detrex: tests/projects/test_train_net.py runs its trainer",
    "python tools/train_net.py": "wants detrex: tests/projects/test_train_net.py",
    "python -O tools/train_net.py": "wants detrex: tests/projects/test_train_net.py",
    "PYTHONPATH=. dfine-plugin export": "wants a run of detrex: tests/projects/test_checkpoints.py",
    "python -m dfine_plugin.projects.paper_rows": "wants detrex and COCO: tests/projects/test_paper_rows.py",
    "python -m dfine_plugin.projects.rtdetr.train": "wants RT-DETR's repository: tests/projects/test_rtdetr_train.py",
    "python -m dfine_plugin.benchmarks": "minutes to hours: tests/benchmarks run each command, small",
    "python examples/uncertainty.py": "wants the models of a benchmark: tests/examples/test_uncertainty.py",
    "dfine-plugin build-engine": "a T4's engine of half a minute: tests/export/test_engine.py",
    "dfine-plugin export --model wrapped --image-size 640 --precision fp16": "tests/commands/test_export.py",
    "dfine-plugin export --model grounding-dino": "wants a host that takes a text: tests/commands/test_text.py",
}
"""How commands begin that are not run here, and why; they are checked by their options."""

OTHERS_OPTIONS = {"dfine_plugin.projects.rtdetr.train"}
"""Modules whose options are another repository's."""

SMALL = {"640": str(SIDE), "300": "20", "BCCD": "my-data"}
"""Words of commands that give way to others: the small host has neither time for 640 pixels nor 300 detections."""


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of code in a language, without the indentation that lists give them."""
    return [code for found, code in all_blocks(page) if found == language]


def all_blocks(page: str) -> list[tuple[str, str]]:
    """The page's blocks of Python and of shell in their order, each with its language."""
    found = re.findall(r"^( *)```(python|bash)\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [(language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in found]


def commands(page: str) -> list[list[str]]:
    """The commands of a page's blocks of shell, word by word."""
    return split_commands("\n".join(blocks(page, "bash")))


def split_commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in line.split("  #")[0].split("&&"))
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def smaller(code: str) -> str:
    """The same code, for as many steps, and pixels, as a test has time for."""
    return re.sub(r"\bmax_steps=\d+", "max_steps=2", re.sub(r"\bsize = 640\b", f"size = {SIDE}", code))


def is_detrex(code: str) -> bool:
    return "detectron2" in code


def is_rtdetr(code: str) -> bool:
    return "wrap_criterion" in code


def is_mmdet(code: str) -> bool:
    return "mmdet" in code


def is_snippet(code: str) -> bool:
    """Whether the block is a part of an example, which has a test of its own."""
    return code.startswith("--8<--")


def own_blocks(page: str) -> list[tuple[str, str]]:
    """What of a page is run: blocks of Python, and commands that are not left out."""
    found = []
    for language, code in all_blocks(page):
        if language == "python" and not any(kind(code) for kind in (is_detrex, is_rtdetr, is_mmdet, is_snippet)):
            found.append((language, code))
        elif language == "bash":
            found += [("bash", shlex.join(words)) for words in split_commands(code) if left_out(words) is None]
    return found


def left_out(words: list[str]) -> str | None:
    """How the command begins, if it is one of those that are not run."""
    return next((start for start in LEFT_OUT if " ".join(words).startswith(start)), None)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages take for given, in an empty folder; the small trained host is what the hub has."""
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "my-data")
    photo = Image.open(tmp_path / "my-data" / "images" / "val-1.png").resize((300, 200))
    for name in ("photo.jpg", "my-data/images/1.jpg"):
        photo.save(tmp_path / name)
    wrap_decoder(load_trained("rt-detr")).save_pretrained(tmp_path / "wrapped")
    shutil.copy(HOST / "preprocessor_config.json", tmp_path / "wrapped")
    load = transformers.RTDetrForObjectDetection.from_pretrained

    def from_hub(name: Any, **arguments: Any) -> Any:
        shipped = {"pretrained_model_name_or_path": HOST, "dtype": torch.float32}  # its file is in half precision
        return load(**{**shipped, **arguments}) if str(name).startswith("PekingU/") else load(name, **arguments)

    monkeypatch.setattr(transformers.RTDetrForObjectDetection, "from_pretrained", from_hub)
    monkeypatch.setattr(dfine_plugin, "calibrate", partial(dfine_plugin.calibrate, steps=5, progress=False))

    data = make_shapes(8, SIDE, seed=5)
    batch = collate([TrainingView(data, flip=False, seed=0)[i] for i in range(2)])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    pair = torch.tensor([0]), torch.tensor([0])
    yield {
        "torch": torch,
        "checkpoint": HOST,
        "deformable_checkpoint": TRAINED / "deformable-detr",
        "train_dataset": TrainingView(data, flip=True, seed=0),
        "collate": collate,
        "processor": transformers.AutoImageProcessor.from_pretrained(HOST),
        "arguments": transformers.TrainingArguments("output", max_steps=2, remove_unused_columns=False),
        "pixel_batches": [batch["pixel_values"]],
        "pixels": batch["pixel_values"],
        "labels": batch["labels"],
        "host": load_trained("rt-detr"),
        "model": load_trained("rt-detr"),
        "initial_boxes": boxes,
        "fresh_host": load_trained("rt-detr"),
        "logits": torch.zeros(1, 4, len(weighting_function(32, 0.5, 0.25))),
        "last_layers_pairs": [pair],
        "first_layers_pairs": [pair],
    }
    registry._registered.pop("my_package.models.MyDetr", None)  # the one of the page on new hosts


def run_command(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A command as its shell would run it, on less."""
    words = [SMALL.get(word, word) for word in words]
    if words[0] == "dfine-plugin":
        result = CliRunner().invoke(dfine_plugin_app, words[1:])
        assert result.exit_code == 0, (words, result.output)
    else:
        assert words[0] == "python"
        script = ROOT / words[1]
        if words[1] in ("examples/fine_tune.py", "examples/lora.py"):
            words += ["--host", str(HOST), "--steps", "2"]
        patch.syspath_prepend(script.parent)
        patch.setattr(sys, "argv", words[1:])
        code: Any = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as exited:
            code = exited.code
        assert not code, words
    if "--output" in words:
        assert Path(words[words.index("--output") + 1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if own_blocks(page)])
def test_code_runs_as_it_is_written(page: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for language, code in own_blocks(page):
        if language == "python":
            exec(compile(smaller(code), page, "exec"), names)
        else:
            run_command(shlex.split(code), monkeypatch)


def test_examples_that_pages_show_are_tested() -> None:
    shown = {code for page in PAGES for code in blocks(page, "python") if is_snippet(code)}
    assert shown
    for snippet in shown:
        (name, region) = re.fullmatch(r"--8<--\nexamples/(\w+)\.py:(\w+)\n--8<--\n", snippet).groups()
        source = (ROOT / "examples" / f"{name}.py").read_text()
        assert source.count(f"# --8<-- [start:{region}]") == source.count(f"# --8<-- [end:{region}]") == 1
        assert (ROOT / "tests" / "examples" / f"test_{name}.py").is_file()


def test_commands_that_are_left_out_are_on_a_page() -> None:
    assert {left_out(words) for page in PAGES for words in commands(page)} - {None} == LEFT_OUT.keys()


@pytest.mark.slow
def test_trained_models(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says comes out of it does."""
    monkeypatch.setattr(dfine_plugin, "calibrate", dfine_plugin.calibrate.func)  # the whole calibration
    train, mal, new_classes, average, *_ = blocks("docs/trained-models.md", "python")
    exec(smaller(train), names)
    assert is_wrapped(names["model"])
    trained = load_pretrained("wrapped")
    exec(average, names)
    averaged = load_pretrained("wrapped")
    fdr = [model.get_submodule("model.decoder.fdr.refine.2.4").weight for model in (trained, averaged)]
    assert fdr[0].abs().max() > 0.05  # calibrated
    assert not fdr[0].equal(fdr[1])
    exec(new_classes, names)
    assert names["model"].get_submodule("model.decoder.fdr").config.distribution_losses_train == "head"
    exec(mal, names)
    assert type(names["model"]) is transformers.DeformableDetrForObjectDetection
    assert names["model"].get_submodule("model.decoder.fdr").config.class_loss == "mal"


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


@pytest.mark.rtdetr
@pytest.mark.skipif(rtdetr_hosts.missing() is not None, reason=rtdetr_hosts.missing() or "")
def test_rt_detr_of_its_authors_trains_as_it_is_written() -> None:
    (code,) = filter(is_rtdetr, blocks("docs/get-started.md", "python"))
    found: dict[str, Any] = {
        "model": rtdetr_hosts.build_model(1).train(),
        "criterion": rtdetr_hosts.build_criterion(1),
        "samples": images(),
        "targets": rtdetr_hosts.targets_of(labels()),
    }
    exec(compile(code, "docs/get-started.md", "exec"), found)
    assert {"loss_vfl", "loss_fgl", "loss_bbox_pre"} <= found["loss_dict"].keys()


@pytest.mark.mmdet
@pytest.mark.skipif(mmdet_hosts.missing() is not None, reason=mmdet_hosts.missing() or "")
@pytest.mark.parametrize("page", ["README.md", "docs/get-started.md"])
def test_configs_of_mmdetection_are_as_they_are_written(page: str, tmp_path: Path) -> None:
    from mmengine.config import Config

    (code,) = filter(is_mmdet, blocks(page, "python"))
    (tmp_path / "config.py").write_text(code)
    written = Config.fromfile(tmp_path / "config.py")
    assert written.model.backbone.depth == 50  # of the base
    small = Config({"model": mmdet_hosts.config("DINO")})
    small.merge_from_dict({"model": {key: written.model[key] for key in ("type", "fdr")}})
    assert is_wrapped(build_model(small.model))


def find_command(words: list[str]) -> tuple[Any, list[str]] | None:
    """The command of this package among the words, and what it is given; of examples those that are not run."""
    while words and "=" in words[0]:  # an environment variable
        words = words[1:]
    if not words:
        return None
    if words[0] == "dfine-plugin":
        group, words = typer.main.get_command(dfine_plugin_app), words[1:]
    elif words[0] == "python" and words[1].startswith("examples/") and left_out(words):
        group, words = as_command(runpy.run_path(str(ROOT / words[1]))["main"]), words[2:]
    elif words[:2] == ["python", "-m"] and words[2].startswith("dfine_plugin.") and words[2] not in OTHERS_OPTIONS:
        module, words = importlib.import_module(words[2]), words[3:]
        group = typer.main.get_command(module.app) if hasattr(module, "app") else as_command(module.main)
    else:
        return None
    subcommands = getattr(group, "commands", None)
    return (subcommands[words[0]], words[1:]) if subcommands else (group, words)


def as_command(main: Any) -> Any:
    app = typer.Typer()
    app.command()(main)
    return typer.main.get_command(app)


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
