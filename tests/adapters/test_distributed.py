"""Several processes under DistributedDataParallel or FSDP2, with batches of different sizes, one without a truth.

The processes of a host check all laws in one go: they are what takes the time. ``DFINE_COMPILE=inductor`` has them
compile hosts of transformers, too, with this backend.
"""

import copy
import multiprocessing
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dfine_plugin import wrap_decoder

from . import detrex_hosts, mmdet_hosts, rtdetr_hosts, transformers_hosts
from .hosts import Host, build, idle_parameters, images, labels, randomise_fdr

Batch = tuple[Tensor, list[dict[str, Tensor]]]
Gradients = dict[str, Tensor]

TRUTHS = {
    2: [[(0, 0), (2, 3, 1)], [(4,), (1, 0, 2)]],
    4: [[(0, 0), (2, 3, 1), (4,), (1, 0)], [(3, 2), (1,), (2, 2), (5,)]],
}
"""For so many processes: for each step and process the images' truths."""

PARALLEL: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused parameters looked for": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}
COMPILER = os.environ.get("DFINE_COMPILE")
RATE = 1e-3
CHECKPOINTING = {"reentrant checkpointing": True, "checkpointing": False}
PRELOADED = ["accelerate", *(f"dfine_plugin.adapters.transformers.{host}" for host in ("rt_detr", "lw_detr"))]


def row(name: str) -> Host:
    rows = *transformers_hosts.HOSTS, *detrex_hosts.HOSTS, *rtdetr_hosts.HOSTS, *mmdet_hosts.HOSTS
    return next(host for host in rows if host.name == name)


def wrapped(host: Host) -> nn.Module:
    model = wrap_decoder(build(host), host.config())
    randomise_fdr(host, model)
    # what the bare host itself leaves without a gradient would make any DDP wait
    idle = idle_parameters(host)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in idle)
    for module in model.modules():
        # statistics of a part of the batch are not those of the whole
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
            module.train = lambda mode=True, module=module: module
            module.eval()
    return model.train()


def batches(num_processes: int) -> list[list[Batch]]:
    """For each step and process its images and labels."""
    return [
        [(images(len(counts), 10 * step + rank), labels(counts, 10 * step + rank)) for rank, counts in enumerate(ranks)]
        for step, ranks in enumerate(TRUTHS[num_processes])
    ]


def losses(host: Host, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # of denoising queries
    return host.losses(model, *batch)


def gradients(model: nn.Module) -> Gradients:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(host: Host, model: nn.Module, mine: list[Batch], parallel: Any, accumulate: bool = False) -> dict[str, Any]:
    """The losses of all steps, and the gradients of each or, accumulated, of all of them, which change no weight."""
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step, batch in enumerate(mine):
        together = accumulate and step < len(mine) - 1
        with parallel.no_sync() if together else nullcontext():
            loss = losses(host, parallel, batch)[0]
            loss.backward()
        found["losses"].append(loss.item())
        if not together:
            found["gradients"].append(gradients(model))
            parallel.zero_grad()
    return found


def run_distributed(
    host: Host, model: nn.Module, mine: list[Batch], accumulate: bool = False, **settings: Any
) -> dict[str, Any]:
    model = copy.deepcopy(model)
    return run(host, model, mine, DistributedDataParallel(model, **settings), accumulate)


def run_compiled(host: Host, model: nn.Module, mine: list[Batch], backend: str) -> dict[str, Any]:
    model = copy.deepcopy(model)
    parallel = torch.compile(DistributedDataParallel(model), backend=backend)
    # machine code draws denoising queries from other random numbers, unless told
    with torch._inductor.config.patch(fallback_random=True):
        return run(host, model, mine, parallel)


def run_sharded(host: Host, model: nn.Module, mine: list[Batch]) -> dict[str, Any]:
    """With the weights after another step of descent on the first batch, gathered from all processes."""
    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.get_submodule(host.decoder).layers, model):
        fully_shard(module, mesh=mesh)
    found = run(host, model, mine, model)
    losses(host, model, mine[0])[0].backward()
    torch.optim.SGD(model.parameters(), RATE).step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the first process has it then
    return {**found, "weights": get_model_state_dict(model, options=options)}


def _worker(rank: int, name: str, num_processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    # a process that waits in vain ends
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), rank=rank, world_size=num_processes)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_processes), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    PartialState(cpu=True)  # as in processes of transformers' Trainer: some hosts count truths by it
    host = row(name)
    mine = [step[rank] for step in batches(num_processes)]
    with detrex_hosts.on_a_cpu(host):
        model = wrapped(host)
        found = {variant: run_distributed(host, model, mine, **settings) for variant, settings in PARALLEL.items()}
        found["accumulated"] = run_distributed(host, model, mine, accumulate=True)
        if COMPILER and host in transformers_hosts.HOSTS:
            found["compiled"] = run_compiled(host, model, mine, COMPILER)
        if all(parameter.ndim for parameter in model.parameters()):  # FSDP2 takes no scalars
            found["sharded"] = run_sharded(host, model, mine)
        for variant, reentrant in CHECKPOINTING.items() if host.checkpointing else ():
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            found[variant] = run_distributed(host, model, mine)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def in_processes(name: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each process finds."""
    # a new process has to find this module; at the end, lest the checkout hide the installed package
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    multiprocessing.set_forkserver_preload(PRELOADED)  # imported once, and not in each process
    mp.start_processes(_worker, args=(name, number, str(folder)), nprocs=number, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(number)]


def mean_loss(host: Host, model: nn.Module, of_ranks: list[Batch]) -> Tensor:
    """The mean of the processes' losses, from those of single processes.

    It is the loss of one process with all images, but for the terms that RT-DETR takes over each process's own truths:
    classes, and denoising queries. FGL of the latter is over all processes' pairs.
    """
    everything = torch.cat([x for x, _ in of_ranks]), [truths for _, targets in of_ranks for truths in targets]
    loss, terms = losses(host, model, everything)
    if not host.name.startswith("rt-detr"):
        return loss
    total = torch.stack([term for name, term in terms.items() if "_dn_" not in name and "vfl" not in name]).sum()
    counts = [[len(truths["boxes"]) for truths in targets] for _, targets in of_ranks]
    known = [sum(own) * max(model.config.num_denoising // max(*own, 1), 1) for own in counts]
    for batch, pairs in zip(of_ranks, known, strict=True):
        for name, term in losses(host, model, batch)[1].items():
            if name.startswith("loss_fgl_dn_"):
                total = total + term * pairs / sum(known)
            elif "_dn_" in name or "vfl" in name:
                total = total + term / len(of_ranks)
    return total


def assert_close(found: Gradients, wanted: Gradients, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, gradient in wanted.items():
        difference = float((found[name] - gradient).norm())
        assert difference <= tolerance * max(float(gradient.norm()), 1e-3 * largest), name


def check_laws(host: Host, found: list[dict[str, Any]]) -> None:
    """Of what several processes found, in two steps.

    Gradients are the same in all processes, and those of the mean of their losses; they are the same whichever way
    parameters without a gradient are looked for, with checkpointing, compiled, and with parameters in shards; those of
    steps that are accumulated add up. Weights gathered from shards load into a model that has none.
    """
    first = found[0]
    for variant, of_variant in first.items():
        assert all(gradient.isfinite().all() for step in of_variant["gradients"] for gradient in step.values())
        for other in found[1:]:
            for ours, theirs in zip(of_variant["gradients"], other[variant]["gradients"], strict=True):
                assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], variant
    steps = first["plain"]["gradients"]
    for variant in first.keys() - {"plain", "accumulated"}:
        for ours, plain in zip(first[variant]["gradients"], steps, strict=True):
            assert_close(ours, plain, 1e-2 if variant == "compiled" else 1e-4)  # other kernels round otherwise
    sums = {name: sum(step[name] for step in steps) for name in steps[0]}
    assert_close(first["accumulated"]["gradients"][0], sums, 1e-4)
    model = wrapped(host)
    if "sharded" in first:
        trained, start = wrapped(host), dict(model.named_parameters())
        trained.load_state_dict(first["sharded"]["weights"])
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                wanted = start[name] - RATE * steps[0][name]
                torch.testing.assert_close(parameter, wanted, atol=1e-6, rtol=1e-5, msg=name)

    if host.dino or host.name == "detrex-deta" or any(part in host.name for part in ("-dn-", "dino", "authors")):
        return  # their denoising queries, or pairs, are drawn anew for a batch of another size
    for step, of_ranks in enumerate(batches(len(found))):
        model.zero_grad()
        wanted = mean_loss(host, model, of_ranks)
        wanted.backward()
        mean = sum(rank["plain"]["losses"][step] for rank in found) / len(found)
        assert mean == pytest.approx(float(wanted), rel=1e-5)
        assert_close(steps[step], gradients(model), 1e-3)


@pytest.mark.slow
def test_the_laws_of_two_processes(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_laws(host, in_processes(host.name, 2, tmp_path, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt-detr", "deformable-detr-two-stage"])
def test_the_laws_of_four_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_laws(row(name), in_processes(name, 4, tmp_path, monkeypatch))
