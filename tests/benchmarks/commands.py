"""Running a benchmark's command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner


def run(main: Callable[..., None], *arguments: str | Path) -> tuple[int, str]:
    """Exit status and output of the command with these arguments."""
    app = Typer(rich_markup_mode=None)
    app.command()(main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output
