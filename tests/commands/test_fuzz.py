"""Files from outside, whatever is in them: what they hold, or an error that names the file.

Few examples, and always the same ones; ``DFINE_EXAMPLES=10000`` draws so many new ones for each test.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dfine_plugin import SettingsMismatchError, load_pretrained
from dfine_plugin.benchmarks.data.coco_data import read_split
from dfine_plugin.tools.pictures import read_picture

from ..adapters.hosts import wrapped
from ..adapters.transformers_hosts import HOSTS
from ..coco_folder import write_coco

LAW = settings(
    max_examples=int(os.environ.get("DFINE_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 700), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


def spoil(draw: Callable[..., Any], content: Any) -> Any:
    """A JSON document with one of its values, wherever it lies, replaced or gone."""
    if isinstance(content, dict | list) and content and draw(st.integers(0, 5)):
        content = content.copy()
        key = draw(st.sampled_from(sorted(content) if isinstance(content, dict) else range(len(content))))
        if draw(st.integers(0, 9)):
            content[key] = spoil(draw, content[key])
        else:
            del content[key]
        return content
    return draw(JUNK)


def assert_names(path: Path, error: Exception) -> None:
    assert str(path) in str(error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is wrong with the file
@LAW
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]), data=st.data())
def test_a_picture_is_read_or_refused(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    """One that is cut short, has other bytes in it, or nothing but them."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "picture"
    path.write_bytes(data.draw(st.sampled_from([content, content[: data.draw(st.integers(0, len(content)))], b"junk"])))
    try:
        picture = read_picture(path)
    except ValueError as error:
        return assert_names(path, error)
    assert picture.mode == "RGB"
    assert picture.width * picture.height > 0


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "data"
    write_coco(folder)
    return folder


@LAW
@given(data=st.data())
def test_annotations_are_read_or_refused(coco_folder: Path, data: st.DataObject) -> None:
    content = json.loads((coco_folder / "instances_val.json").read_text())
    path = coco_folder / "instances_test.json"
    path.write_text(json.dumps(spoil(data.draw, content)))
    try:
        found = read_split(coco_folder, "test", 32, 32)
    except ValueError as error:
        return assert_names(path, error)
    assert len(found.images) == len(found.boxes) == len(found.labels) == len(found.image_ids)
    for boxes, labels in zip(found.boxes, found.labels, strict=True):
        assert boxes.isfinite().all()
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert ((labels >= 0) & (labels < len(found.class_names))).all()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    wrapped(HOSTS[0]).save_pretrained(folder)
    return folder


@LAW
@given(junk=JUNK)
def test_a_folders_settings_are_taken_or_refused(model_folder: Path, junk: Any) -> None:
    path = model_folder / "config.json"
    whole = model_folder / "config.whole"
    if not whole.exists():
        shutil.copy(path, whole)
    path.write_text(json.dumps({**json.loads(whole.read_text()), "dfine_plugin": junk}))
    with pytest.raises((ValueError, SettingsMismatchError)):
        load_pretrained(model_folder)
