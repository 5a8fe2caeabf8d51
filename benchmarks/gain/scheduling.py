"""Many runs side by side: processes of one thread each, with progress bars, each result stored as it comes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from threading import Thread

from rich.console import Console

from dfine_plugin.benchmarks.gain import progress
from dfine_plugin.benchmarks.gain.runs import RunSettings, find_model, load_run, save_run
from dfine_plugin.benchmarks.reporting import Result


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to run on: see :func:`~dfine_plugin.benchmarks.gain.cluster.run_on_cluster`."""

    address: str
    gpus_per_run: float = 0.0


def run_all(
    runs: Sequence[RunSettings],
    folder: Path,
    jobs: int,
    console: Console,
    models: Path | None = None,
    cluster: Cluster | None = None,
) -> tuple[list[Result], list[str]]:
    """The results of `runs` in their order, and what failed; runs already in `folder` are read, not repeated.

    With `models`, that folder gets a checkpoint of each run, and a run without one is repeated.
    Under torchrun or accelerate launch the processes are one job: the runs come one after the other in this process.
    """
    missing = [run for run in runs if load_run(folder, run) is None or (models and find_model(models, run) is None)]
    if len(missing) < len(runs):
        console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already and not run again")
    if not missing:
        errors: dict[str, str] = {}
    elif "WORLD_SIZE" in os.environ:
        errors = _run_here(missing, folder, console, models)
    elif cluster is not None:
        from dfine_plugin.benchmarks.gain.cluster import run_on_cluster

        errors = run_on_cluster(
            missing, folder, console, models, cluster.address, cluster.gpus_per_run, local_jobs=jobs
        )
    else:
        errors = _run_in_processes(missing, folder, jobs, console, models)
    results = [load_run(folder, run) for run in runs]
    return [result for result in results if result is not None], [f"{key}: {text}" for key, text in errors.items()]


def _run_here(runs: Sequence[RunSettings], folder: Path, console: Console, models: Path | None) -> dict[str, str]:
    from dfine_plugin.benchmarks.gain.training import train_run

    for run in runs:
        result = train_run(run, models=models)
        # The other processes have no metrics: the first one evaluates.
        if os.environ.get("RANK", "0") == "0":
            save_run(folder, run, result)
            console.print(f"{run.key()}: AP {result['final']['AP']:.2f}")
    return {}


def _run_in_processes(
    runs: Sequence[RunSettings], folder: Path, jobs: int, console: Console, models: Path | None
) -> dict[str, str]:
    errors: dict[str, str] = {}
    # One thread a process: OpenMP threads that wait for one another beside busy processes can slow a step twentyfold.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager, progress.bars(console) as bars:
        messages: Queue[progress.Message | None] = manager.Queue()
        listener = Thread(target=progress.show, args=(messages, runs, bars), daemon=True)
        listener.start()
        pool = ProcessPoolExecutor(min(jobs, len(runs)), mp_context=context, initializer=_start_worker)
        futures: dict[Future[Result], RunSettings] = {
            pool.submit(progress.train, run, messages, models): run for run in runs
        }
        try:
            for future in as_completed(futures):
                try:
                    save_run(folder, futures[future], future.result())
                # Whatever stops one run must not lose the others; it is reported at the end.
                except Exception as error:
                    errors[futures[future].key()] = f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            for process in pool._processes.values():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        messages.put(None)
        listener.join()
    return errors


def _start_worker() -> None:
    import torch

    _end_with_parent()
    torch.set_num_threads(1)
    # One warning a process and step about the hosts' own code; it would tear the progress bars.
    warnings.filterwarnings("ignore")


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its processes: let this one watch for that."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
