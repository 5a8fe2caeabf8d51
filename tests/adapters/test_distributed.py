"""Two processes under DistributedDataParallel, one of them without a single truth."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dfine_plugin import wrap_decoder

from .hosts import HOSTS, Host, build, images, labels, randomise_fdr

TRUTHS = {0: (0, 0), 1: (2, 3)}


def _worker(rank: int, row: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    host = HOSTS[row]
    model = wrap_decoder(build(host), host.config())
    randomise_fdr(model)
    # what the bare host itself leaves without a gradient would make any DDP wait
    for parameter in _idle(host, model):
        parameter.requires_grad_(False)
    parallel = DistributedDataParallel(model.train(), find_unused_parameters=False)
    for step in range(2):  # a second step fails where the first left a parameter without a gradient
        parallel.zero_grad()
        loss = parallel(images(seed=step), labels=labels(TRUTHS[rank], seed=step)).loss
        loss.backward()
        assert torch.isfinite(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    torch.save(gradients, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _idle(host: Host, model: torch.nn.Module) -> list[torch.nn.Parameter]:
    bare = build(host).train()
    bare(images(), labels=labels()).loss.backward()
    names = {name for name, p in bare.named_parameters() if p.grad is None}
    return [p for name, p in model.named_parameters() if name in names]


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 2], ids=[str(HOSTS[0]), str(HOSTS[2])])
def test_a_rank_without_truths_does_not_hang_and_all_gradients_agree(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a spawned process has to find this module; at the end, lest the checkout hide the installed package
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    mp.start_processes(_worker, args=(row, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
