"""Target gating, over every host: at first the host, then D-FINE's gates. All shared behaviours run with gates, too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin import UnsupportedModelError, unwrap_decoder, wrap_decoder
from dfine_plugin.gating import GatedNorm, NormBeforeCrossAttention, _held

from .hosts import NUM_LAYERS, Host, assert_equal, build, images, labels, predict, randomise_fdr, wrapped


def norms_of(host: Host, model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    """A decoder's norms of a class, layer by layer."""
    decoder = model.get_submodule(host.decoder)
    return [(name, module) for name, module in decoder.named_modules() if type(module) is kind]


def test_fresh_gates_change_nothing_to_the_last_bit(host: Host) -> None:
    gated = wrap_decoder(build(host), host.config())
    bare = wrap_decoder(build(host), host.config(target_gating=False))
    assert_equal(host, gated, bare)
    names = {name for name, _ in gated.named_parameters()} - {name for name, _ in bare.named_parameters()}
    assert len(names) == 2 * NUM_LAYERS
    assert all(name.startswith(f"{host.decoder}.fdr.gates.") for name in names)


def test_the_gates_are_d_fines_in_every_layer(host: Host) -> None:
    model = wrapped(host)
    seen: dict[str, list[Tensor]] = {}
    for kind in (NormBeforeCrossAttention, GatedNorm):
        for name, norm in norms_of(host, model, kind):
            norm.register_forward_hook(
                lambda module, args, output, name=name: seen.setdefault(name, []).extend([args[0], output])
            )
    predict(host, model)
    before, behind = (norms_of(host, model, kind) for kind in (NormBeforeCrossAttention, GatedNorm))
    assert len(before) == len(behind) == NUM_LAYERS
    fdr: Any = host.fdr(model)
    for (first, _), (second, norm), gate in zip(before, behind, fdr.gates, strict=True):
        (_, held), (total, output) = seen[first], seen[second]
        both = torch.cat([held, total - held], -1)
        keep, take = (both @ gate.linear.weight.T + gate.linear.bias).sigmoid().chunk(2, -1)
        mixed = 2 * (keep * held + take * (total - held))
        centred = mixed - mixed.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(output, normed, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(mixed, total, atol=1e-2)
    assert _held.latest is None


def test_gates_learn_and_go_with_the_wrap(host: Host) -> None:
    model = wrap_decoder(build(host), host.config()).train()
    host.loss(model, images(), labels()).backward()
    fdr: Any = host.fdr(model)
    assert all(p.grad is not None and p.grad.any() for p in fdr.gates.parameters())
    model = unwrap_decoder(wrapped(host))
    assert_equal(host, model, build(host))
    assert not norms_of(host, model, GatedNorm)
    assert not any(type(module) is nn.LayerNorm and "layer" in vars(module) for module in model.modules())


def test_a_forward_that_fails_between_the_norms_leaves_nothing(host: Host) -> None:
    model = wrapped(host)
    (_, norm), *_ = norms_of(host, model, GatedNorm)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a layer")

    hook = norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        predict(host, model)
    assert _held.latest is None
    hook.remove()
    predict(host, model)


def test_layers_with_other_norms_are_refused_and_untouched(host: Host) -> None:
    model = build(host)
    gated = wrap_decoder(build(host), host.config())
    (name, _), *_ = norms_of(host, gated, GatedNorm)
    parent, _, own = f"{host.decoder}.{name}".rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Identity())
    with pytest.raises(UnsupportedModelError, match=rf"{own} of this .* is a Identity"):
        wrap_decoder(model, host.config())
    assert not hasattr(model.get_submodule(host.decoder), "fdr")
    wrap_decoder(model, host.config(target_gating=False))
    randomise_fdr(host, model)
    predict(host, model)
