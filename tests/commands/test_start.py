"""Commands start at once: nothing that takes seconds to import is loaded before it is needed."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import dfine_plugin
from dfine_plugin.tools.installing import install_hint

SLOW = ("torch", "torchvision", "transformers", "scipy", "onnxruntime", "onnx_ir", "matplotlib", "pycocotools")
WITHIN = 2.0
"""Seconds of processor time, which busy neighbours do not lengthen much."""

COMMANDS = {
    "dfine_plugin.tools.cli": ["export", "build-engine", "show"],
    "dfine_plugin.benchmarks.ablation": [],
    "dfine_plugin.benchmarks.retrofit": [],
    "dfine_plugin.benchmarks.trained_hosts": [],
    "dfine_plugin.benchmarks.compare": [],
    "dfine_plugin.benchmarks.criterion": [],
    "dfine_plugin.benchmarks.latency": [],
    "dfine_plugin.benchmarks.latency_profile": [],
    "dfine_plugin.benchmarks.overhead": [],
    "dfine_plugin.benchmarks.robustness": [],
    "dfine_plugin.benchmarks.uncertainty": [],
    "dfine_plugin.benchmarks.photos": ["voc", "tiles"],
    "dfine_plugin.projects.paper_rows": ["train", "show"],
}

RUN = """
import json, runpy, sys, time
module, slow = sys.argv[1], json.loads(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
code = 0
try:
    if module == "dfine_plugin.tools.cli":
        from dfine_plugin.tools.cli import main
        main()
    else:
        runpy.run_module(module, run_name="__main__")
except SystemExit as exit:
    code = exit.code
print(json.dumps([code, [name for name in slow if name in sys.modules], time.process_time()]))
"""


def start(module: str, *arguments: str) -> tuple[object, list[str], float, str]:
    """Exit code, what was loaded of SLOW, processor time, and all that was printed."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, module, json.dumps(SLOW), *arguments], capture_output=True, text=True
    )
    assert result.stdout, result.stderr
    *printed, last = result.stdout.splitlines()
    return *json.loads(last), " ".join([*printed, result.stderr])


HELP = [(module, *([name] if name else []), "--help") for module, names in COMMANDS.items() for name in ("", *names)]


@pytest.mark.parametrize("call", HELP, ids=" ".join)
def test_help_comes_at_once(call: tuple[str, ...]) -> None:
    code, loaded, seconds, printed = start(*call)
    assert (code, loaded) == (0, [])
    assert "Usage" in printed
    assert seconds < WITHIN


WRONG = [
    ("dfine_plugin.tools.cli", "show", "--layers", "some"),
    ("dfine_plugin.tools.cli", "export", "--model", "m", "--image-size", "0"),
    ("dfine_plugin.benchmarks.ablation", "--host", "yolo"),
    ("dfine_plugin.benchmarks.ablation", "--variants", "N=15"),
    ("dfine_plugin.benchmarks.retrofit", "--rows", "default"),
    ("dfine_plugin.benchmarks.retrofit", "--trained", "nothing"),
    ("dfine_plugin.benchmarks.retrofit", "--image-size", "161"),
    ("dfine_plugin.benchmarks.criterion", "--truths", "many"),
    ("dfine_plugin.benchmarks.latency", "--backend", "tflite"),
    ("dfine_plugin.benchmarks.latency_profile", "--host", "yolo"),
    ("dfine_plugin.benchmarks.overhead", "--host", "yolo"),
    ("dfine_plugin.benchmarks.robustness", "nowhere"),
    ("dfine_plugin.benchmarks.uncertainty", "nowhere"),
    ("dfine_plugin.benchmarks.uncertainty", ".", "--data", "nowhere"),
]


@pytest.mark.parametrize("call", WRONG, ids=" ".join)
def test_wrong_arguments_are_told_at_once(call: tuple[str, ...]) -> None:
    code, loaded, seconds, printed = start(*call)
    assert (code, loaded) == (2, [])
    assert "Error" in printed
    assert "Traceback" not in printed
    assert seconds < WITHIN


def test_the_version_is_the_packages() -> None:
    assert start("dfine_plugin.tools.cli", "--version")[::3] == (0, f"dfine-plugin {version('dfine-plugin')} ")
    assert dfine_plugin.__version__ == version("dfine-plugin")


def test_without_the_extra_a_benchmark_names_it() -> None:
    code = "import sys; sys.modules['typer'] = None; import dfine_plugin.benchmarks.ablation"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: the benchmarks need typer: {install_hint('bench')}"
