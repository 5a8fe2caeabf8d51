"""What installing the package brings, and where its page leads."""

from pathlib import Path
from typing import Any

import pytest

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


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
