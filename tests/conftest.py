"""What holds for every test.

Processes of pytest-xdist share the machine's cores: a thread each, or torch's threads wait for one another. And what
hypothesis draws is the same each time, unless `DFINE_EXAMPLES` asks for so many other examples.
"""

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("dfine", derandomize="DFINE_EXAMPLES" not in os.environ, deadline=None)
settings.load_profile("dfine")
