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

from . import detrex_hosts, transformers_hosts
from .hosts import Host, build, idle_parameters, images, labels, randomise_fdr

TRUTHS = {0: (0, 0), 1: (2, 3)}


def row(name: str) -> Host:
    return next(host for host in (*transformers_hosts.HOSTS, *detrex_hosts.HOSTS) if host.name == name)


def wrapped(host: Host) -> torch.nn.Module:
    model = wrap_decoder(build(host), host.config())
    randomise_fdr(host, model)
    # what the bare host itself leaves without a gradient would make any DDP wait
    idle = idle_parameters(host)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in idle)
    for module in model.modules():
        # statistics of half a batch are not those of the whole
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
            module.train = lambda mode=True, module=module: module
            module.eval()
    return model.train()


def _worker(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    host = row(name)
    with detrex_hosts.on_a_cpu(host):
        model = wrapped(host)
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        for step in range(2):  # a second step fails where the first left a parameter without a gradient
            parallel.zero_grad()
            loss = host.loss(parallel, images(seed=10 + step + rank), labels(TRUTHS[rank], seed=step))
            loss.backward()
            assert torch.isfinite(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    torch.save((float(loss), gradients), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def in_two_processes(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict]]:
    # a spawned process has to find this module; at the end, lest the checkout hide the installed package
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    mp.start_processes(_worker, args=(name, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_a_rank_without_truths_does_not_hang_and_all_gradients_agree(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host.name in ("rt-detr-v2", "deformable-detr-refine", "deformable-detr-plain"):
        pytest.skip("one host of a family is enough where they share criterion and collectives")
    (_, first), (_, second) = in_two_processes(host.name, tmp_path, monkeypatch)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


@pytest.mark.slow
def test_the_loss_is_that_of_one_process_with_the_whole_batch(
    detrex_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = detrex_host
    if "-dn-" in host.name or "dino" in host.name:
        pytest.skip(f"{host} draws denoising queries for each process, by the truths it has")
    (first, gradients), (second, _) = in_two_processes(host.name, tmp_path, monkeypatch)
    model = wrapped(host)
    whole = host.loss(
        model,
        torch.cat([images(seed=11), images(seed=12)]),
        [*labels(TRUTHS[0], seed=1), *labels(TRUTHS[1], seed=1)],
    )
    whole.backward()
    assert (first + second) / 2 == pytest.approx(float(whole), rel=1e-5)
    largest = max(float(g.norm()) for g in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            difference = float((gradients[name] - parameter.grad).norm())
            assert difference <= 1e-3 * max(float(parameter.grad.norm()), 1e-3 * largest), name
