"""How latencies are taken: all models in turn, round after round, with pauses; and what is made of all the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np


def interleave(
    runs: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int,
    pause: float,
    after_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> list[list[float]]:
    """Time every run once a round.

    Every other round goes backwards, so that none always comes after the same other one.

    Args:
        runs: each does one inference and waits for it.
        rounds: at least one. No time is left out.
        warmup: rounds before that, without pauses, that do not count.
        pause: seconds before every timed run, so that none runs on a device that the one before has heated.
        after_round: is called right after the last run of each round.
        clock: in seconds.
        sleep: waits for so many seconds.

    Returns:
        For each run its seconds, round by round.
    """
    for _ in range(warmup):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    for index in range(rounds):
        order = range(len(runs)) if index % 2 == 0 else reversed(range(len(runs)))
        for which in order:
            sleep(pause)
            start = clock()
            runs[which]()
            times[which].append(clock() - start)
        after_round()
    return times


def summarise(times: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, of all of them."""
    return {"median": float(np.median(times)), "p95": float(np.percentile(times, 95))}


def paired_ratio(times: Sequence[float], first: Sequence[float]) -> float:
    """The median over rounds of one's time over the other's in that round."""
    return median(own / others for own, others in zip(times, first, strict=True))
