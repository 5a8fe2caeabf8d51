"""What installing the package brings, what its distributions hold, and where its page leads."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT = ROOT / "pyproject.toml"
LOWEST = ROOT / ".ci" / "lowest.txt"
IN_USE = ("dfine_plugin", "adapters", "benchmarks", "projects")
"""Folders of the checkout that an installation has."""


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    return tomllib.loads(PYPROJECT.read_text())["project"]


def test_the_transformers_extra_trains(project: dict[str, Any]) -> None:
    """transformers' Trainer raises without accelerate, which transformers itself does not require."""
    assert any(requirement.startswith("accelerate") for requirement in project["optional-dependencies"]["transformers"])


def test_the_page_leads_to_the_paper_and_to_the_libraries(project: dict[str, Any]) -> None:
    assert project["urls"]["Paper"] in PYPROJECT.with_name("README.md").read_text()
    assert {"Transformers", "detrex"} <= project["urls"].keys()
    assert all(url.startswith("https://") for url in project["urls"].values())


TOOLS = ("hypothesis", "peft", "pytest", "pytest-xdist")
"""What the tests of the core and of the adapters need besides."""


def bounds(requirements: list[str], operator: str) -> dict[str, Version]:
    """The versions that an operator bounds, by package."""
    found = (re.fullmatch(rf"([\w-]+){operator}([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: Version(match[2]) for match in found if match}


def test_the_lowest_versions_that_are_tested_are_the_ones_that_are_promised(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    promised = bounds(project["dependencies"], ">=")
    for extra in ("transformers", "bench", "export"):
        promised |= bounds(extras[extra], ">=")
    tools = {name: version for name, version in bounds(extras["test"], ">=").items() if name in TOOLS}
    assert len(tools) == len(TOOLS)
    assert bounds(LOWEST.read_text().split(), "==") == promised | tools


@pytest.mark.slow
def test_the_distributions_are_whole_and_work_without_the_checkout(tmp_path: Path) -> None:
    """A source distribution of all files, a wheel made of it alone, and that wheel in a folder of its own."""
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the package is what git knows")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = {name for name in listed if (ROOT / name).is_file()}
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    call = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(call, capture_output=True, check=True)

    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        packed = {name.partition("/")[2] for name in source.getnames()}
    assert files - packed == {".gitignore"}

    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as built:
        built.extractall(tmp_path / "site")
        names = set(built.namelist())
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"dfine_plugin"}
    code = {name for name in files if name.startswith(IN_USE) and name.endswith(".py")}
    assert {name if name.startswith("dfine_plugin/") else f"dfine_plugin/{name}" for name in code} <= names
    trained = {f"dfine_plugin/{name}" for name in files if name.startswith("benchmarks/trained/")}
    assert trained <= names
    assert not any("/results/" in name for name in names)

    run = (
        f"import sys; sys.path[:] = [{str(tmp_path / 'site')!r}, *{sys.path!r}]\n"
        "import dfine_plugin\n"
        "from dfine_plugin.benchmarks.trained_hosts import load_trained\n"
        "print(dfine_plugin.wrap_decoder(load_trained('rt-detr')).__class__.__name__, dfine_plugin.__file__)\n"
        "sys.argv = ['dfine-plugin', '--version']\n"
        "from dfine_plugin.tools.cli import main; main()"
    )
    # without site: an editable install would help out
    result = subprocess.run([sys.executable, "-S", "-c", run], capture_output=True, text=True, cwd=tmp_path, check=True)
    *_, model, version = result.stdout.splitlines()
    assert model == f"RTDetrForObjectDetection {tmp_path / 'site' / 'dfine_plugin' / '__init__.py'}"
    assert version.startswith("dfine-plugin ")
