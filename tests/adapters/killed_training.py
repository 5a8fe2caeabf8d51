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


class Kill(TrainerCallback):
    """Ends the second process without a word."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AFTER and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *callbacks: TrainerCallback) -> None:
    """To the end, from the last checkpoint if there is one; writes what each step logged, and where it began."""
    checkpoint = get_last_checkpoint(folder) if folder.exists() else None
    run = trainer(wrapped(transformers_hosts.HOSTS[0]), folder, max_steps=STEPS, save_steps=SAVE_EVERY, logging_steps=1)
    for callback in callbacks:
        run.add_callback(callback)
    run.train(resume_from_checkpoint=checkpoint)
    if run.is_world_process_zero():
        found = {"from": checkpoint and Path(checkpoint).name, "log": run.state.log_history}
        (folder / "found.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        train(folder / "unbroken")
        train(folder / "broken", Kill())
    train(folder / "broken")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
