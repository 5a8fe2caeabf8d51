"""Progress bars of many runs, fed by the messages that they send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dfine_plugin.benchmarks.gain.runs import RunSettings
from dfine_plugin.benchmarks.reporting import Result

Message = tuple[str, int, float | None]
"""A run's key, steps done, AP where an evaluation was made."""


class Messages(Protocol):
    """A queue that both sides of a process border can use."""

    def put(self, message: Message | None, /) -> None:
        """Send; None ends :func:`show`."""

    def get(self) -> Message | None:
        """Wait for the next one."""


def train(run: RunSettings, messages: Messages, models: Any) -> Result:
    """:func:`~dfine_plugin.benchmarks.gain.training.train_run` in a worker, telling how far it is."""
    from dfine_plugin.benchmarks.gain.training import train_run

    def report(step: int, metrics: dict[str, Any] | None) -> None:
        # A message is a round trip: not every step.
        if metrics or step % 5 == 0:
            messages.put((run.key(), step, metrics["AP"] if metrics else None))

    return train_run(run, report, models)


def bars(console: Console) -> Progress:
    """The bars, not yet drawn."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def show(messages: Messages, runs: Sequence[RunSettings], progress: Progress) -> None:
    """Draw a bar for all steps and one for each run at work, until None comes."""
    by_key = {run.key(): run for run in runs}
    total = progress.add_task("all runs", total=sum(run.steps for run in runs))
    tasks: dict[str, Any] = {}
    done: dict[str, int] = {}
    while (message := messages.get()) is not None:
        key, step, ap = message
        run = by_key[key]
        label = f"{run.variant}, seed {run.seed}"
        if key not in tasks:
            tasks[key] = progress.add_task(label, total=run.steps)
        done[key] = step
        progress.update(total, completed=sum(done.values()))
        progress.update(tasks[key], completed=step, description=label if ap is None else f"{label}: AP {ap:.1f}")
        if step == run.steps and ap is not None:
            progress.console.print(f"{label}: AP {ap:.2f}")
            progress.remove_task(tasks.pop(key))
