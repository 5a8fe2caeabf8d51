"""The examples as modules, and a folder of data for them."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from typer import Typer
from typer.testing import CliRunner

import dfine_plugin

from ..coco_folder import write_coco

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "my-data")
    return folder / "my-data"


@pytest.fixture(scope="session")
def examples() -> dict[str, ModuleType]:
    """Examples by their names; they calibrate in fewer steps than whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setattr(dfine_plugin, "calibrate", partial(dfine_plugin.calibrate, steps=20, progress=False))
        return {name: importlib.import_module(name) for name in ("fine_tune", "lora")}


def run(module: ModuleType, *arguments: object) -> tuple[int, str]:
    """Exit code of an example's command line, and what it printed, with progress bars and errors after the rest."""
    command = Typer()
    command.command()(module.main)
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], env={"COLUMNS": "500"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout + result.stderr
