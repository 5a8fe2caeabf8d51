"""Faults of the disk, in a process of their own: one that is full, and a writer that is killed."""

import os
import resource
import signal
import time
from collections.abc import Callable


def on_a_full_disk(num_bytes: int, write: Callable[[], object]) -> bool:
    """Whether a writer comes to its end in a process whose files can have so many bytes each."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        write()

    _, status = os.waitpid(_start(limited), 0)
    return status == 0


def killed_after(seconds: float, write: Callable[[], object]) -> None:
    """A process that writes, over and over, and is killed at a moment of its work."""

    def write_on() -> None:
        while True:
            write()

    process = _start(write_on)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def _start(work: Callable[[], None]) -> int:
    """The number of a copy of this process that works, and ends without what pytest does at its end."""
    if process := os.fork():
        return process
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)
