"""The commands on a model that takes a text beside images."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer
from typer.testing import CliRunner

from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.registry import find_adapter
from dfine_plugin.tools.commands import app

from ..adapters.hosts import build, wrapped
from ..adapters.transformers_hosts import HOSTS, NO_TEXT_HOSTS, TextHost

pytestmark = pytest.mark.skipif(NO_TEXT_HOSTS is not None, reason=str(NO_TEXT_HOSTS))

ROWS = {host.name: host for host in HOSTS if isinstance(host, TextHost)}
TEXT = "red cell. a platelet."
CLASSES = {"0": "red cell", "1": "a platelet"}
TOKENS = [[101, 20, 21, 1012, 40, 30, 31, 1012, 102]]


def tokenizer() -> BertTokenizer:
    """A few words, and the delimiters where BERT has them."""
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    known |= {20: "red", 21: "cell", 30: "plate", 31: "##let", 40: "a"}
    return BertTokenizer(vocab={known.get(number, f"[unused{number}]"): number for number in range(1100)})


@pytest.fixture(params=list(ROWS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    wrapped(ROWS[request.param]).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "picture.png")
    return tmp_path / "images" / "picture.png"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "1000"})
    assert result.exit_code == 0, result.output
    return result.output


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Of images alone."""
    with torch.no_grad():
        return find_adapter(model).detector(model)(images)[0]


def test_a_checkpoint_is_asked_with_its_text(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, text=TEXT)
    assert checkpoint.class_names() == {int(number): name for number, name in CLASSES.items()}
    model = checkpoint.load()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images, torch.tensor(TOKENS).expand(2, -1))
    probabilities = expected.logits.sigmoid()
    classes = torch.stack([probabilities[..., [1, 2]].mean(-1), probabilities[..., [4, 5, 6]].mean(-1)], dim=-1)
    torch.testing.assert_close(logits(model, images).sigmoid(), classes, atol=1e-6, rtol=1e-4)


def test_a_bare_checkpoint_opens_too(tmp_path: Path) -> None:
    build(ROWS["mm-grounding-dino"]).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = open_checkpoint(tmp_path, text=TEXT).load()
    assert logits(model, torch.zeros(1, 3, 64, 64)).shape == (1, 12, 2)


@pytest.mark.slow
def test_a_graph_looks_for_the_phrases_of_its_text(folder: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.onnx"
    call = ("export", "--model", folder, "--image-size", 64, "--text", TEXT, "--output", output)
    said = run(*call, "--detections", 5, "--images", picture.parent, "--threshold", 0)
    assert "5 confident detections on 1 images: 0 lost" in said
    model = onnx.load(output)
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["class_names"] == CLASSES
    assert not [weight.name for weight in model.graph.initializer if "text_backbone.e" in weight.name]
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    images = np.zeros((1, 3, 64, 64), dtype=np.float32)
    scores, labels, boxes = session.run(None, {"images": images, "target_sizes": np.array([[64, 64]])})
    assert scores.shape == (1, 5)
    assert set(labels.ravel()) <= {0, 1}
    assert np.isfinite(boxes).all()


def test_what_is_shown_has_the_phrases_for_names(folder: Path, picture: Path, tmp_path: Path) -> None:
    call = ("show", "--model", folder, "--image", picture, "--image-size", 64, "--text", TEXT, "--threshold", 0)
    said = run(*call, "--output", tmp_path / "picture.png")
    assert "red cell" in said or "a platelet" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [(". ?", "the text names no class"), ("red cell. " * 6, "the text has 20 tokens, and the model takes 16")],
)
def test_a_text_that_asks_for_nothing_or_too_much_is_refused(folder: Path, text: str, said: str) -> None:
    checkpoint = open_checkpoint(folder, text=text)
    with pytest.raises(ValueError, match=said):
        checkpoint.load()
