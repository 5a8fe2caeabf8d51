"""Many runs on a Ray cluster: one CPU and, if asked for, a GPU or a share of one for each, on whatever nodes there are.

A run whose worker or node is lost starts again elsewhere; results come back to this process, which stores them. The
nodes need this package, and the data under the same path.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console

from dfine_plugin.benchmarks.gain import progress
from dfine_plugin.benchmarks.gain.runs import RunSettings, save_run
from dfine_plugin.benchmarks.reporting import Result
from dfine_plugin.tools.installing import install_hint
from dfine_plugin.tools.writing import written_whole

LOCAL = "local"
"""In place of a cluster's address: a cluster of this machine alone, for this command alone."""

Files = dict[str, bytes]


def run_on_cluster(
    runs: Sequence[RunSettings],
    folder: Path,
    console: Console,
    models: Path | None,
    address: str,
    gpus_per_run: float = 0.0,
    local_jobs: int | None = None,
) -> dict[str, str]:
    """Train `runs` and store their results; what failed, by run.

    Args:
        runs: what to train.
        folder: the store of finished runs.
        console: for progress bars.
        models: a folder for a checkpoint of each run.
        address: :data:`LOCAL`, ``"auto"``, ``ray://host:port`` or ``host:port``. A cluster that this process is
            connected to already is used as it is.
        gpus_per_run: 1, or less to let runs share a GPU.
        local_jobs: how many runs at a time, of a local cluster.

    Raises:
        ImportError: where Ray is not installed; names the extra.
    """
    try:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise ImportError(f"runs on a cluster need Ray: {install_hint('cluster')}") from error

    ours = not ray.is_initialized()
    if ours and address == LOCAL:
        ray.init(num_cpus=local_jobs, include_dashboard=False, log_to_driver=False)
    elif ours:
        ray.init(address=address, log_to_driver=False)
    # beside this process, so that no other node takes it along when it is lost
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    train = ray.remote(num_cpus=1, num_gpus=gpus_per_run, max_retries=-1)(_train)
    errors: dict[str, str] = {}
    try:
        with progress.bars(console) as bars:
            listener = Thread(target=progress.show, args=(messages, runs, bars), daemon=True)
            listener.start()
            waiting = {train.remote(run, messages, models is not None): run for run in runs}
            while waiting:
                (done, *_), _ = ray.wait(list(waiting))
                run = waiting.pop(done)
                try:
                    result, files = ray.get(done)
                # Whatever stops one run must not lose the others; it is reported at the end.
                except Exception as error:
                    cause = getattr(error, "cause", None) or error
                    errors[run.key()] = f"{type(cause).__name__}: {cause}"
                else:
                    if models is not None:
                        _write(models, files)
                    save_run(folder, run, result)
            messages.put(None)
            listener.join()
    finally:
        messages.shutdown(force=True)
        if ours:
            ray.shutdown()
    return errors


def _train(run: RunSettings, messages: Any, keep_model: bool) -> tuple[Result, Files]:
    """One run on a node, and the files of its checkpoint: the node's disk is its own."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result = progress.train(run, messages, Path(scratch) if keep_model else None)
        paths = [path for path in Path(scratch).rglob("*") if path.is_file()]
        return result, {path.relative_to(scratch).as_posix(): path.read_bytes() for path in paths}


def _write(folder: Path, files: Files) -> None:
    """The one checkpoint that the files are of."""
    (name,) = {file.partition("/")[0] for file in files}
    with written_whole(folder / name) as part:
        for file, content in files.items():
            path = part.parent / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
