"""Long training of small models, with all that goes on beside it: nothing grows with the number of steps.

``DFINE_SOAK_STEPS=10000`` trains each host so long; ``-s`` shows what was measured. Memory tells most in a process of
its own for each host (``-k``), whose heap no other test has widened.
"""

import copy
import gc
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfine_plugin import FDRConfig, load_pretrained, wrap_decoder
from dfine_plugin.benchmarks.gain.ema import make_ema
from dfine_plugin.record import FDRRecord, Scope, in_scope

from .hosts import Host, assert_equal, build, images, labels, predict
from .transformers_hosts import HOSTS

STEPS = int(os.environ.get("DFINE_SOAK_STEPS", "40"))
ROUNDS = max(8, STEPS // 250)
"""So often in between, the model is evaluated, copied, saved and loaded."""
QUARTER = ROUNDS // 4
MEMORY = 8.0
"""MiB by which resident memory may grow from the first quarter to the last one, whatever the number of steps."""
TUNED = {"rt-detr": 4e-3, "deformable-detr-refine": 2e-3, "lw-detr": 1e-3}
"""The ablation's learning rates."""

SOAKED = [pytest.param(host, id=str(host)) for host in HOSTS if host.name in TUNED]


@dataclass
class Footprint:
    """What a process holds between two steps."""

    tensors: int
    of_forwards: int
    """Records and scopes."""
    hooks: int
    files: int
    memory: float
    """Resident, in MiB."""


def footprint(model: nn.Module) -> Footprint:
    gc.collect()
    kinds = Counter(type(thing) for thing in gc.get_objects())
    hooks = (len(held) for m in model.modules() for name, held in vars(m).items() if name.endswith("_hooks"))
    process = psutil.Process()
    return Footprint(
        tensors=sum(count for kind, count in kinds.items() if issubclass(kind, Tensor)),
        of_forwards=kinds[FDRRecord] + kinds[Scope],
        hooks=sum(hooks),
        files=process.num_fds(),
        memory=process.memory_info().rss / 2**20,
    )


def train(host: Host, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[Tensor]:
    """Losses of steps on images of their own, with none to five truths, clipped as the ablation clips."""
    model.train()
    for step in steps:
        torch.manual_seed(step)
        loss = host.loss(model, images(seed=step), labels((step % 6, step % 4), seed=step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def live_beside_training(
    host: Host, model: nn.Module, optimizer: torch.optim.Optimizer, ema: AveragedModel, folder: Path
) -> None:
    """Evaluate the average, save and load it, resume from a checkpoint, and train a copy."""
    ema.module.eval().save_pretrained(folder / "model")
    assert_equal(host, load_pretrained(folder / "model"), ema.module)
    torch.save((model.state_dict(), optimizer.state_dict()), folder / "checkpoint.pt")
    weights, moments = torch.load(folder / "checkpoint.pt")
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    twin = copy.deepcopy(model)
    host.loss(twin, images(), labels()).backward()
    assert all(tensor.isfinite().all() for tensor in predict(host, twin.eval()))


@pytest.mark.slow
@pytest.mark.parametrize("host", SOAKED)
def test_nothing_grows_with_the_steps(host: Host, tmp_path: Path) -> None:
    """After every round but the first as many tensors, hooks and open files, no record of a forward, and memory that
    stays."""
    model = wrap_decoder(build(host), host.config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ema = make_ema(model, 0.99, 100)
    found = []
    for start in range(0, STEPS, STEPS // ROUNDS):
        for loss in train(host, model, optimizer, range(start, start + STEPS // ROUNDS)):
            ema.update_parameters(model)
            assert loss.isfinite()
            assert not in_scope()
        live_beside_training(host, model, optimizer, ema, tmp_path)
        del loss
        found.append(footprint(model))
        print(f"{host}, {start + STEPS // ROUNDS} steps: {found[-1]}", flush=True)
    counted = [asdict(one) | {"memory": None} for one in found[1:]]
    assert counted == [counted[0]] * len(counted)
    assert counted[0]["of_forwards"] == 0
    first, last = (median(one.memory for one in part) for part in (found[1 : QUARTER + 1], found[-QUARTER:]))
    assert last - first <= MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("host", SOAKED)
def test_losses_stay_finite_at_ten_times_the_tuned_learning_rate(host: Host) -> None:
    """Under the ablation's optimizer and clipping, with the plugin's whole loss."""
    model = wrap_decoder(build(host), host.config(residual_scale=FDRConfig().residual_scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=10 * TUNED[host.name], weight_decay=1e-4)
    losses = torch.stack([*train(host, model, optimizer, range(min(STEPS, 300)))])
    print(f"{host}, {len(losses)} steps: losses of {losses.min():.1f} to {losses.max():.1f}")
    assert losses.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
