"""A full disk, and a process killed at any moment: what lies on the disk is whole, or is not taken for anything."""

import os
import random
import time
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dfine_plugin import load_pretrained
from dfine_plugin.benchmarks.gain.plots import plot_ap_over_steps
from dfine_plugin.benchmarks.gain.runs import RunSettings, find_model, load_run, save_model, save_run
from dfine_plugin.benchmarks.reporting import write_text
from dfine_plugin.benchmarks.robustness import find_models

from ..adapters.hosts import randomise_fdr, wrapped
from ..adapters.transformers_hosts import HOSTS
from ..faults import killed_after, on_a_full_disk

TRIALS = int(os.environ.get("DFINE_FAULT_TRIALS", "5"))
"""Kills of each writer, and sizes of its disk."""

SETTINGS = RunSettings("rt-detr", "fdr", 0, "shapes", 64, steps=10, batch_size=4, learning_rate=1e-3)
RT_DETR = HOSTS[0]


class Store(ABC):
    """Something that can be written in two versions, and read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def write(self, version: int) -> None: ...

    @abstractmethod
    def read(self) -> int | None:
        """The version that is there as a whole, None where a reader is told that there is none."""


class Run(Store):
    """A finished run of the ablation."""

    def write(self, version: int) -> None:
        save_run(self.folder / "runs", SETTINGS, {"settings": vars(SETTINGS), "x": [version] * 20_000})

    def read(self) -> int | None:
        assert find_models(self.folder) == {}  # reads all that lies there
        run = load_run(self.folder / "runs", SETTINGS)
        return run and _version(run["x"], 20_000)


class Report(Store):
    """A table."""

    def write(self, version: int) -> None:
        write_text(self.folder / "report.md", f"{version}\n" * 100_000)

    def read(self) -> int | None:
        return _version([int(line) for line in (self.folder / "report.md").read_text().split()], 100_000)


class Plot(Store):
    """A figure, of more points in its second version."""

    def write(self, version: int) -> None:
        curve = [{"step": step, "AP": float(step)} for step in range(1, version + 2)]
        settings = {**vars(SETTINGS), "seed": 0}
        plot_ap_over_steps([{"settings": settings, "curve": curve, "final": curve[-1]}], self.folder / "plot.png")

    def read(self) -> int | None:
        with Image.open(self.folder / "plot.png") as picture:
            picture.load()  # raises where the file is cut
        return self.written.index((self.folder / "plot.png").read_bytes()) + 1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written: list[bytes] = []
        for version in (1, 2):
            self.write(version)
            self.written.append((folder / "plot.png").read_bytes())


class SavedModel(Store):
    """The folder of `save_pretrained`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = {version: wrapped(RT_DETR) for version in (1, 2)}
        for version, model in self.models.items():
            randomise_fdr(RT_DETR, model, seed=10 + version)

    def write(self, version: int) -> None:
        self.models[version].save_pretrained(self.folder / "model")

    def read(self) -> int | None:
        return self.version_of(self.folder / "model")

    def version_of(self, folder: Path) -> int | None:
        try:
            found = load_pretrained(folder)
        except (OSError, ValueError):
            return None
        (version,) = [v for v, model in self.models.items() if _same(found, model)]
        return version


class KeptModel(SavedModel):
    """A run's model, with its preprocessing."""

    def write(self, version: int) -> None:
        save_model(self.folder / "models", SETTINGS, self.models[version])

    def read(self) -> int | None:
        folder = find_model(self.folder / "models", SETTINGS)
        if folder is None:
            return None
        assert (folder / "preprocessor_config.json").is_file()
        version = self.version_of(folder)
        assert version is not None
        return version


def _version(values: list[int], count: int) -> int:
    (version,) = set(values)
    assert len(values) == count
    return version


def _same(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())


STORES = [Run, Report, Plot, SavedModel, KeptModel]


@pytest.fixture(params=STORES, ids=lambda store: store.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = request.param(tmp_path)
    store.write(1)
    assert store.read() == 1
    store.write(2)
    assert store.read() == 2
    return store


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(store: Store) -> None:
    """For files of at most so many bytes: whoever comes to the end has written all, and who does not, nothing."""
    largest = max(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    random_sizes = random.Random(0)
    for size in [0, 100, *(random_sizes.randrange(largest) for _ in range(TRIALS)), largest + 4096]:
        store.write(1)
        finished = on_a_full_disk(size, lambda: store.write(2))
        assert finished is (size > largest)
        if isinstance(store, KeptModel) or not isinstance(store, SavedModel):
            assert store.read() == (2 if finished else 1)
        else:  # a file after another: the host's own way
            assert store.read() in ((2,) if finished else (1, None))


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_by_halves(store: Store) -> None:
    moments = random.Random(1)
    start = time.perf_counter()
    store.write(1)
    seconds = time.perf_counter() - start
    for _ in range(TRIALS):
        killed_after(moments.uniform(0, 6 * seconds), lambda: (store.write(2), store.write(1)))
        assert store.read() in (1, 2) or isinstance(store, SavedModel)
        store.write(1)  # whatever was left is in nobody's way
        assert store.read() == 1
