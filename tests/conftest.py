"""Processes of pytest-xdist share the machine's cores: a thread each, or torch's threads wait for one another."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
