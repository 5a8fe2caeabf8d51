"""What all reports share: files that are there as a whole or not at all, tables, and the machine behind the figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfine_plugin.tools.writing import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
NONE = "-"  # a cell without a figure


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole: a reader, or a stop in between, never meets half a file."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write whole, as :func:`write_json` does."""
    with written_whole(path) as part:
        part.write_text(text)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a picture whole, and close it."""
    from matplotlib import pyplot

    with written_whole(path) as part:
        figure.savefig(part, dpi=dpi)
    pyplot.close(figure)


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_header(cells: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_row(cells), table_row(["---"] * len(cells))]


def machine() -> dict[str, Any]:
    """What figures were made with: versions, CPU and threads."""
    import torch

    return {
        "versions": {name: version(name) for name in ("dfine-plugin", "torch", "transformers", "pycocotools")},
        "machine": {"cpu": cpu_model(), "python": platform.python_version(), "threads": torch.get_num_threads()},
    }


def cpu_model() -> str:
    """The CPU's own name where the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
