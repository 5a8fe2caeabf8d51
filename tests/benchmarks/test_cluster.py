"""Runs on a Ray cluster give the table that runs on this machine give, whatever becomes of the nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from dfine_plugin import load_pretrained
from dfine_plugin.benchmarks.gain.report import markdown
from dfine_plugin.benchmarks.gain.runs import RunSettings
from dfine_plugin.benchmarks.gain.scheduling import Cluster, run_all
from dfine_plugin.benchmarks.reporting import Result

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra 'cluster'")

SETTINGS = RunSettings(
    "rt-detr", "baseline", 0, "shapes", 64, steps=12, batch_size=4, learning_rate=1e-3, train_images=16, val_images=6
)
RUNS = [replace(SETTINGS, seed=seed, variant=variant) for seed in range(3) for variant in ("baseline", "fdr")]


@pytest.fixture(autouse=True)
def _as_urgent_as_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside busy processes a test would take minutes


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A cluster of this process's node and another one, with one CPU each: the cluster, the other node."""
    from ray.cluster_utils import Cluster as Nodes

    # nodes are processes of this machine, which find what this process finds
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])))
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    other = nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes, other
    ray.shutdown()
    nodes.shutdown()


def timeless(results: list[Result]) -> list[Result]:
    """The results as if all runs had been equally fast: what the table says besides times."""
    points = [[{**point, "seconds": float(point["step"])} for point in run["curve"]] for run in results]
    return [
        {**run, "curve": curve, "seconds": 1.0, "seconds_per_step": 1.0}
        for run, curve in zip(results, points, strict=True)
    ]


def alive_nodes_become(count: int, within: float = 60.0) -> bool:
    """Whether the cluster comes to count so many nodes as alive: a lost one it may notice seconds later."""
    deadline = time.monotonic() + within
    while sum(node["Alive"] for node in ray.nodes()) != count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_the_same_table_comes_out_when_a_node_is_killed_half_way(two_nodes: tuple[Any, Any], tmp_path: Path) -> None:
    nodes, other = two_nodes
    store = tmp_path / "cluster"
    killed: list[int] = []

    def kill() -> None:
        while len(list(store.glob("*.json"))) < 2:
            time.sleep(0.05)
        nodes.remove_node(other, allow_graceful=False)
        killed.append(len(list(store.glob("*.json"))))

    killer = Thread(target=kill, daemon=True)
    killer.start()
    console = Console(quiet=True)
    results, failures = run_all(RUNS, store, 2, console, cluster=Cluster("auto"))
    killer.join(timeout=60)
    assert killed
    assert killed[0] < len(RUNS)
    assert failures == []
    assert alive_nodes_become(1)
    expected, _ = run_all(RUNS, tmp_path / "pool", 2, console)
    assert markdown(timeless(results)) == markdown(timeless(expected))


@pytest.mark.slow
def test_checkpoints_come_back_and_failures_are_told(tmp_path: Path) -> None:
    good, bad = replace(SETTINGS, variant="fdr"), replace(SETTINGS, variant="fdr", data=str(tmp_path / "nowhere"))
    console = Console(quiet=True)
    results, failures = run_all(
        [good, bad], tmp_path / "runs", 1, console, tmp_path / "models", cluster=Cluster("local")
    )
    assert [result["settings"]["data"] for result in results] == ["shapes"]
    (failure,) = failures
    assert failure.startswith(f"{bad.key()}: FileNotFoundError: ")
    assert "nowhere" in failure
    load_pretrained(tmp_path / "models" / good.key())
    assert not ray.is_initialized()
