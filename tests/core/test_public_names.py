"""What users import, and what importing it costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dfine_plugin

NAMES = [
    "FDRConfig",
    "wrap_decoder",
    "wrap_criterion",
    "unwrap_decoder",
    "deploy",
    "FDRHead",
    "weighting_function",
    "decode_boxes",
    "encode_boxes",
    "fgl_loss",
    "ddf_loss",
    "union_matching",
    "GOLSDMatcher",
    "is_wrapped",
    "calibrate",
    "load_pretrained",
    "edge_deviations",
    "ConformalScale",
]
PARAMETERS = {
    "wrap_decoder": ["model", "config"],
    "wrap_criterion": ["criterion", "model"],
    "deploy": ["model", "num_layers"],
    "calibrate": ["model", "images", "steps", "batch_size", "learning_rate", "progress"],
    "weighting_function": ["num_bins", "a", "c"],
    "decode_boxes": ["initial_boxes", "logits", "weights"],
    "encode_boxes": ["initial_boxes", "target_boxes", "weights"],
    "edge_deviations": ["corner_logits", "weights", "initial_boxes"],
    "fgl_loss": ["logits", "initial_boxes", "target_boxes", "iou", "weights", "num_boxes"],
    "ddf_loss": ["student", "teacher", "matched", "quality", "temperature"],
}
HOSTS = ["torch", "transformers", "detectron2", "detrex", "torchvision", "pycocotools"]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there_and_documented(name: str) -> None:
    """Every promised name is importable, listed in __all__ and says what it is."""
    assert name in dfine_plugin.__all__
    value = getattr(dfine_plugin, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # what dataclass writes when nobody did


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_keep_their_names(name: str) -> None:
    """The leading parameters are the promised ones, in order."""
    actual = list(inspect.signature(getattr(dfine_plugin, name)).parameters)
    assert actual[: len(PARAMETERS[name])] == PARAMETERS[name]


def test_everything_public_is_documented() -> None:
    """Whatever else __all__ lists exists, and every function and class of it has a docstring."""
    for name in dfine_plugin.__all__:
        value = getattr(dfine_plugin, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name
        if inspect.isclass(value) and value.__module__.startswith("dfine_plugin"):
            for method_name, method in vars(value).items():
                if inspect.isfunction(method) and not method_name.startswith("_"):
                    assert inspect.getdoc(method), f"{name}.{method_name}"


def test_importing_loads_no_host_nor_torch() -> None:
    """A fresh interpreter that imports the package has loaded none of them."""
    code = f"import json, sys, dfine_plugin\nprint(json.dumps([name for name in {HOSTS!r} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_names_are_found_when_they_are_asked_for() -> None:
    """In a fresh interpreter: listed, by star, as attributes, modules too; and what is not there is not."""
    code = (
        "import dfine_plugin\n"
        "assert set(dfine_plugin.__all__) <= set(dir(dfine_plugin))\n"
        "dfine_plugin.wrapping.predict_distributions\n"
        "from dfine_plugin import *\n"
        "assert wrap_decoder is dfine_plugin.wrapping.wrap_decoder\n"
        "print([name for name in dfine_plugin.__all__ if name not in globals()], hasattr(dfine_plugin, 'wrap_encoder'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] False"


def test_a_checkouts_root_first_on_the_path_hides_nothing() -> None:
    """As ``python -m`` starts there, which finds the folder ``dfine_plugin`` before an installed package."""
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path[:] = [{str(root)!r}, *{sys.path!r}]\n"
        "import dfine_plugin.adapters, dfine_plugin.benchmarks, dfine_plugin.projects\n"
        "print(dfine_plugin.__file__)"
    )
    # without site: an editable install would help out
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert Path(result.stdout.strip()).parents[1] == root
