"""The rows of a latency run: every subject on every backend that can run it, with its parity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console

from dfine_plugin.benchmarks.speed.backends import LOWERED
from dfine_plugin.benchmarks.speed.runners import Runner
from dfine_plugin.benchmarks.speed.subjects import Subject
from dfine_plugin.export import measure_parity
from dfine_plugin.export.parity import LARGEST_MOVE, Detections, torch_detections
from dfine_plugin.tools.targets import BACKENDS as ENGINE_BACKENDS

CONFIDENT = 0.3
"""The score from which on a detection counts in parity."""
NUM_BEST = 50
"""How many of an image's best detections count, where weights are fresh and no score means anything."""


def build_rows(
    subjects: Sequence[Subject],
    backends: Sequence[str],
    precision: str,
    batch_size: int,
    device: torch.device,
    folder: Path,
    console: Console,
) -> tuple[list[dict[str, Any]], list[Runner], list[str]]:
    """Every subject on every backend that can run it, with its parity; the runners; and what failed and why.

    Raises:
        typer.Exit: nothing could be built.
    """
    rows, runners, failures = [], [], []
    for number, subject in enumerate(subjects):
        expected = torch_detections(subject.model, subject.images) if subject.model is not None else None
        batch = subject.images[0].expand(batch_size, -1, -1, -1).contiguous().to(device)
        own_folder = folder / str(number)
        own_folder.mkdir()
        for backend in filter(subject.runs_on, backends):
            console.print(f"building {subject.name} on {backend} ...")
            try:
                runner = subject.runner(backend, batch, precision, own_folder)
                parity = measure_row(runner, subject, expected)
            except Exception as error:  # whatever a backend refuses a model with, the others still run
                failures.append(f"{subject.name} on {backend}: {type(error).__name__}: {error}")
                console.print(f"failed: {failures[-1]}", markup=False, soft_wrap=True)
                continue
            built = subject.engine is not None and backend in ENGINE_BACKENDS
            row = {"model": subject.name, "host": subject.host, "backend": backend, "parity": parity}
            rows.append({**row, "precision": None if built else LOWERED.get(backend, precision)})
            runners.append(runner)
    if not rows:
        raise typer.Exit(1)
    return rows, runners, failures


def measure_row(runner: Runner, subject: Subject, expected: Sequence[Detections] | None) -> dict[str, Any] | str:
    """The parity of what a runner detects in its subject's images, or why there is none.

    Args:
        runner: has run at least once when this returns.
        subject: whose runner it is.
        expected: what it should detect in each image, None if that is not known.
    """
    found = runner.detect(subject.images)
    if expected is None:
        return "no model to compare with"
    if not all(np.isfinite(values).all() for detections in found for values in detections):
        return "**failed**: not finite"
    if subject.fresh:
        best = [detections.above(np.sort(detections.scores)[-NUM_BEST:][0]) for detections in expected]
        total = sum(len(detections.scores) for detections in best)
        return {"num_detections": total, "num_near": sum(map(count_near, best, found))}
    if not any(len(detections.above(CONFIDENT).scores) for detections in expected):
        return f"no detection of score {CONFIDENT}"
    parity = measure_parity(expected, found, threshold=CONFIDENT)
    return {**asdict(parity), "passed": parity.passed}


def count_near(expected: Detections, found: Detections) -> int:
    """How many of an image's expected detections have one of the same label with all edges near."""
    distance = np.abs(expected.boxes[:, None] - found.boxes[None]).max(-1)
    near = (distance <= LARGEST_MOVE) & (expected.labels[:, None] == found.labels[None])
    return int(near.any(1).sum())
