"""A process of a run is killed, and torchrun starts all of them again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .killed_training import FOUND, KILLED_AFTER, SAVE_EVERY, STEPS
from .test_trainer import differing

ROOT = Path(__file__).parents[2]


def steps(found: dict[str, Any]) -> list[dict[str, float]]:
    """What is logged of each step, without times."""
    return [{name: entry[name] for name in ("step", "loss", "grad_norm")} for entry in found["log"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.skipif("DFINE_KILL" not in os.environ, reason="waits for processes that may hang; DFINE_KILL=1 runs it")
def test_a_run_that_torchrun_restarts_is_the_one_that_was_not_killed(tmp_path: Path) -> None:
    """All losses, gradients' norms and weights, bit for bit: one thread adds up in one order, of two processes' sums
    there is one order, and denoising queries are drawn from generators that the checkpoint restores. Processes may
    hang as they start again on a machine with much else to do: they wait no longer than told, and torchrun starts them
    once more."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    call = [*torchrun, "--module", "tests.adapters.killed_training", str(tmp_path)]
    said = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert said.returncode == 0, said.stderr
    assert "exitcode: -9" in said.stderr, said.stderr

    unbroken, broken = (json.loads((tmp_path / run / FOUND).read_text()) for run in ("unbroken", "broken"))
    assert (unbroken["from"], broken["from"]) == (None, f"checkpoint-{KILLED_AFTER - KILLED_AFTER % SAVE_EVERY}")
    assert [step["step"] for step in steps(broken)] == [*range(1, STEPS + 1)]
    assert steps(broken) == steps(unbroken)
    ends = [load_file(tmp_path / run / f"checkpoint-{STEPS}" / "model.safetensors") for run in ("broken", "unbroken")]
    assert differing(*ends) == []
