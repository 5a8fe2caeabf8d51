"""What ``dfine-plugin`` can do, by subcommand."""

from __future__ import annotations

import typer

app = typer.Typer(help="Export, build and look at wrapped DETRs.", no_args_is_help=True, add_completion=False)


@app.callback()
def _commands() -> None:
    """Keeps the names of subcommands, however many there are."""
