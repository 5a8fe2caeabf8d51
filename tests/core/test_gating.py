"""Target gates against D-FINE's own, as transformers has them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from dfine_plugin import FDRConfig, FDRHead, SettingsMismatchError
from dfine_plugin.gating import GatedNorm, NormBeforeCrossAttention, TargetGate, forget_held

from .drawing import random


def test_gates_are_d_fines_and_so_are_their_gradients() -> None:
    host = pytest.importorskip("transformers.models.d_fine.modeling_d_fine")
    own = host.DFineGate(8).double()
    own.norm.eps = 0.0  # the only thing that tells a factor of 2
    gate, norm = TargetGate(8).double(), nn.LayerNorm(8, eps=0.0).double()
    with torch.no_grad():
        for seed, parameter in enumerate(own.parameters()):
            parameter.copy_(random(seed, *parameter.shape))
        gate.linear.load_state_dict(own.gate.state_dict())
        norm.load_state_dict(own.norm.state_dict())
    held, found = (random(seed, 2, 5, 8).requires_grad_() for seed in (10, 11))
    ours, theirs = norm(gate(held, held + found)), own(held, found)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    probe = random(12, 2, 5, 8)
    gradients = [
        torch.autograd.grad((out * probe).sum(), [held, found, linear.weight, linear.bias])
        for out, linear in ((ours, gate.linear), (theirs, own.gate))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_a_fresh_gate_changes_nothing_to_the_last_bit_and_learns() -> None:
    gate = TargetGate(8)
    held, total = random(0, 3, 8, dtype=torch.float32), random(1, 3, 8, dtype=torch.float32)
    found = gate(held, total)
    assert torch.equal(found, total)
    found.square().sum().backward()
    assert all(p.grad.any() for p in gate.parameters())


def layer() -> tuple[nn.Module, nn.Module]:
    """The two norms of a layer, tied by a gate that has left its zeros."""
    norms = nn.ModuleDict({"before": NormBeforeCrossAttention(8), "behind": GatedNorm(8)})
    norms.fdr = FDRHead(8, 1, FDRConfig(target_gating=True))
    norms["behind"].tie(norms, 0)
    nn.init.normal_(norms.fdr.gates[0].linear.weight)
    return norms, norms.fdr.gates[0]


def run(norms: nn.Module, seed: int = 0) -> torch.Tensor:
    held = norms["before"](random(seed, 2, 8, dtype=torch.float32))
    return norms["behind"](held + random(seed + 1, 2, 8, dtype=torch.float32))


def test_copies_have_gates_of_their_own_and_names_lie_with_the_gate_alone() -> None:
    norms, gate = layer()
    names = {"before.weight", "before.bias", "behind.weight", "behind.bias"}
    assert {name for name in norms.state_dict() if not name.startswith("fdr.")} == names
    for twin in (copy.deepcopy(norms), pickle.loads(pickle.dumps(norms))):
        assert twin["behind"].decoder_of() is twin
        assert twin.fdr.gates[0] is not gate
        assert torch.equal(run(twin), run(norms))


def test_a_copied_norm_alone_has_the_gates_that_it_had() -> None:
    norms, _ = layer()
    assert copy.deepcopy(norms["behind"]).decoder_of() is norms


def test_gates_keep_no_model_alive() -> None:
    norms, _ = layer()
    decoder = weakref.ref(norms)
    gc.disable()
    try:
        del norms
        assert decoder() is None
    finally:
        gc.enable()


def test_threads_do_not_see_each_others_queries() -> None:
    norms, _ = layer()
    expected = [run(norms, seed) for seed in range(8)]
    found: dict[int, list[torch.Tensor]] = {}
    together = threading.Barrier(4)

    def work(seed: int) -> None:
        together.wait()
        found[seed] = [run(norms, seed) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, outputs in found.items():
        assert all(torch.equal(output, expected[seed]) for output in outputs)


def test_what_a_forward_leaves_that_was_cut_short_is_dropped() -> None:
    norms, _ = layer()
    norms["before"](torch.ones(2, 8))
    forget_held()
    with pytest.raises(AssertionError):
        norms["behind"](torch.ones(2, 8))


def test_a_state_dict_with_gates_is_refused_without_and_fresh_gates_go_with_any() -> None:
    bare, gated = (FDRHead(8, 2, FDRConfig(target_gating=gating)) for gating in (False, True))
    assert len(gated.gates) == 2
    assert not len(bare.gates)
    gated.load_state_dict(FDRHead(8, 2, FDRConfig(target_gating=True)).state_dict())
    for strict in (True, False):
        with pytest.raises(SettingsMismatchError, match=r"target_gating True \(this model: False\)"):
            bare.load_state_dict(gated.state_dict(), strict=strict)
    missing, unexpected = gated.load_state_dict(bare.state_dict(), strict=False)
    assert all(name.startswith("gates.") for name in missing)
    assert not unexpected
    with pytest.raises(RuntimeError, match=r"Missing key.*gates\.0\.linear\.weight"):
        gated.load_state_dict(bare.state_dict())
    gated.keep_layers(1)
    assert len(gated.gates) == 1


def test_gates_change_what_the_head_alone_is_to_leave_as_it_is() -> None:
    with pytest.raises(ValueError, match="target_gating changes the host's layers"):
        FDRConfig(target_gating=True, trainable="head")
    with pytest.raises(ValueError, match="target_gating must be True or False, got 1"):
        FDRConfig(target_gating=1)  # type: ignore[arg-type]
