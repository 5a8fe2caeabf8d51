"""How often a training step waits for its device: once for the matching of all sets, and no more than the host."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from dfine_plugin import NonFiniteError
from dfine_plugin.adapters.union_criterion import check_losses

from .accelerator import Accelerator, Wait, waiting_here
from .hosts import Host, build, images, labels, wrapped


def plugins(waits: Iterable[Wait]) -> Counter[str]:
    """The plugin's waits in head and criterion, by function, without the check of the losses, which is for CPUs."""
    elsewhere = {"_begin_forward", "check_losses"}
    return Counter(wait.function for wait in waits if wait.is_ours() and not elsewhere & {*wait.ours})


def hosts(waits: Iterable[Wait]) -> Counter[str]:
    """The host's own waits, by file, function and what was waited for."""
    return Counter(str(wait) for wait in waits if not wait.is_ours())


def criterion_calls(host: Host) -> int:
    """Each call of a criterion matches all that it is given."""
    return 2 if host.name == "detrex-h-deformable-detr" else 1


def waits_of_a_step(host: Host, model: nn.Module) -> list[Wait]:
    model.train()
    pixels, truths = images(), labels()
    accelerator = Accelerator()
    accelerator.put([*model.parameters(), *model.buffers(), pixels, *(x for truth in truths for x in truth.values())])
    torch.manual_seed(0)
    with accelerator:
        host.loss(model, pixels, truths).backward()
    return accelerator.waits


def test_a_step_waits_for_the_matching_of_all_sets_and_for_nothing_else(host: Host) -> None:
    if host.own_pairs:
        pytest.skip("the host is asked for its pairs, set by set")
    bare, ours = waits_of_a_step(host, build(host)), waits_of_a_step(host, wrapped(host))
    assert plugins(ours) == {"match_sets": criterion_calls(host)}
    assert Counter(wait.function for wait in ours if "_begin_forward" in wait.ours) == {"check_targets": 1}
    if host.name.startswith("mmdet"):
        # the host's own losses wait set by set, and the initial boxes are one set more; its matching waited oftener
        assert hosts(ours).total() < hosts(bare).total()
    else:
        assert hosts(ours) <= hosts(bare)


@contextmanager
def _synchronisations() -> Iterator[list[Wait]]:
    """Where PyTorch says that it synchronises with a GPU."""
    waits: list[Wait] = []

    def note(message: Warning | str, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits.append(waiting_here("a GPU"))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_as_seldom(host: Host) -> None:
    if host.own_pairs:
        pytest.skip("the host is asked for its pairs, set by set")
    found = []
    for model in (build(host), wrapped(host)):
        host.to_gpu(model.train())
        pixels = images().cuda()
        truths = [{key: value.cuda() for key, value in truth.items()} for truth in labels()]
        host.loss(model, pixels, truths).backward()  # what is set up once
        with _synchronisations() as waits:
            host.loss(model, pixels, truths).backward()
        found.append(waits)
    bare, ours = found
    assert plugins(ours) == {"match_sets": criterion_calls(host)}
    assert hosts(ours).total() <= hosts(bare).total()


def test_losses_are_read_on_a_cpu_only() -> None:
    with pytest.raises(NonFiniteError, match=r"not finite: loss_fgl \(1 of 1 values\)"):
        check_losses({"loss_fgl": torch.tensor(float("nan")), "loss_ddf": torch.tensor(1.0)})
    check_losses({"loss_fgl": torch.empty((), device="meta")})  # whose value cannot be read
