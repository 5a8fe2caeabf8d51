"""What torchrun runs in several processes: transformers' Trainer from start to end, and once more until one process is
killed; restarted, from the last checkpoint on."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from . import transformers_hosts
from .hosts import wrapped
from .test_trainer import trainer

STEPS = 6
SAVE_EVERY = 2
KILLED_AFTER = 3
SECONDS_TO_WAIT = 120
FOUND = "found.json"


class Kill(TrainerCallback):
    """Ends the second process without a word, once."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark = Path(args.output_dir, "killed")
        if state.global_step == KILLED_AFTER and args.process_index == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, checkpoint: str | None, *callbacks: TrainerCallback) -> None:
    """To the end, from a checkpoint if there is one; writes what each step logged, and where it began."""
    model = wrapped(transformers_hosts.HOSTS[0])
    often = {"save_steps": SAVE_EVERY, "logging_steps": 1}
    run = trainer(model, folder, max_steps=STEPS, ddp_timeout=SECONDS_TO_WAIT, **often)
    for callback in callbacks:
        run.add_callback(callback)
    run.train(resume_from_checkpoint=checkpoint)
    if run.is_world_process_zero():
        found = {"from": checkpoint and Path(checkpoint).name, "log": run.state.log_history}
        (folder / FOUND).write_text(json.dumps(found))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    unbroken, broken = folder / "unbroken", folder / "broken"
    if not (unbroken / FOUND).exists():
        train(unbroken, None)
    train(broken, get_last_checkpoint(broken) if broken.exists() else None, Kill())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
