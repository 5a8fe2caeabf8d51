"""Every test that asks for ``host`` runs over all hosts; for ``transformers_host``, ``detrex_host``, ``rtdetr_host`` or
``mmdet_host``, over theirs."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from . import detrex_hosts, mmdet_hosts, rtdetr_hosts, transformers_hosts
from .hosts import Host

_MISSING = detrex_hosts.missing()


def _params(
    detrex: Sequence[Host] = (),
    transformers: Sequence[Host] = (),
    rtdetr: Sequence[Host] = (),
    mmdet: Sequence[Host] = (),
) -> list[Any]:
    marks = [pytest.mark.detrex, _skip_if(_MISSING)]
    rows = [pytest.param(row, marks=_skip_if(row.missing)) for row in transformers]
    rows += [pytest.param(row, marks=[pytest.mark.rtdetr, _skip_if(row.missing)]) for row in rtdetr]
    rows += [pytest.param(row, marks=[pytest.mark.mmdet, _skip_if(row.missing)]) for row in mmdet]
    return [*rows, *(pytest.param(row, marks=marks) for row in detrex)]


def _skip_if(missing: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(
    params=_params(detrex_hosts.HOSTS, transformers_hosts.HOSTS, rtdetr_hosts.HOSTS, mmdet_hosts.HOSTS), ids=str
)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with _on_the_tests_device(request):
        yield request.param


@pytest.fixture(params=_params(transformers=transformers_hosts.HOSTS), ids=str)
def transformers_host(request: pytest.FixtureRequest) -> Host:
    return request.param


@pytest.fixture(params=_params(detrex_hosts.HOSTS), ids=str)
def detrex_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with _on_the_tests_device(request):
        yield request.param


@pytest.fixture(params=_params(rtdetr=rtdetr_hosts.HOSTS), ids=str)
def rtdetr_host(request: pytest.FixtureRequest) -> Host:
    return request.param


@pytest.fixture(params=_params(mmdet=mmdet_hosts.HOSTS), ids=str)
def mmdet_host(request: pytest.FixtureRequest) -> Host:
    return request.param


def _on_the_tests_device(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    on_gpu = request.node.get_closest_marker("gpu") is not None
    return nullcontext() if on_gpu else detrex_hosts.on_a_cpu(request.param)
