"""Every test that asks for ``host`` runs over all hosts; for ``transformers_host`` or ``detrex_host``, over theirs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from . import detrex_hosts, transformers_hosts
from .hosts import Host

_MISSING = detrex_hosts.missing()


def _params(detrex: Sequence[Host] = (), transformers: Sequence[Host] = ()) -> list[Any]:
    marks = [pytest.mark.detrex, pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))]
    return [*transformers, *(pytest.param(row, marks=marks) for row in detrex)]


@pytest.fixture(params=_params(detrex_hosts.HOSTS, transformers_hosts.HOSTS), ids=str)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    without_cuda_calls(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=transformers_hosts.HOSTS, ids=str)
def transformers_host(request: pytest.FixtureRequest) -> Host:
    return request.param


@pytest.fixture(params=_params(detrex_hosts.HOSTS), ids=str)
def detrex_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    without_cuda_calls(request.param, monkeypatch)
    return request.param


def without_cuda_calls(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirect the ``.cuda()`` and ``.to("cuda")`` that two hosts of detrex call even where their model is on a CPU."""
    if host.name not in detrex_hosts.CUDA_ONLY:
        return
    to = torch.Tensor.to

    def to_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(tensor, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
