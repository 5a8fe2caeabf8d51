"""Every test that asks for ``host`` runs over all hosts."""

import pytest

from .hosts import HOSTS, Host


@pytest.fixture(params=HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    return request.param
