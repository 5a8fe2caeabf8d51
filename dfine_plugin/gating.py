"""Target gating (D-FINE, section 4.1): what a query keeps of itself, and what it takes of the image, is learnt.

After cross-attention a decoder layer adds what it found to what the query held: ``norm(x + d)``. A query that moves
from one object to the next would better forget the first. D-FINE's gates decide: ``norm(g x + g' d)``, with
``(g, g') = sigmoid(Linear([x, d]))``.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class TargetGate(nn.Module):
    """The gates of one decoder layer; fresh ones change nothing.

    Gives ``s + tanh(u / 2) x + tanh(u' / 2) d``, which is ``2 (sigmoid(u) x + sigmoid(u') d)``, with ``(u, u') =
    Linear([x, d])``, which starts at zero. A LayerNorm behind it makes no difference of the factor 2.

    Args:
        hidden_dim: C, the width of the decoder.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * hidden_dim, 2 * hidden_dim)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, held: Tensor, total: Tensor) -> Tensor:
        """From x, ``(..., C)``, what queries held before cross-attention, and s = x + d, after it: ``(..., C)``."""
        found = total - held
        keep, take = (self.linear(torch.cat([held, found], dim=-1)) / 2).tanh().chunk(2, dim=-1)
        return total + keep * held + take * found


class _Held(threading.local):
    """What the norm before cross-attention has put out, on this thread; gone when it has been used."""

    latest: Tensor | None = None


_held = _Held()


def forget_held() -> None:
    """Drop what a forward that was cut short has left."""
    _held.latest = None


class NormBeforeCrossAttention(nn.LayerNorm):
    """A layer's norm before its cross-attention, whose output its gates will ask for."""

    def forward(self, input: Tensor) -> Tensor:
        _held.latest = held = super().forward(input)
        return held


class DecoderOf:
    """Where a norm finds its decoder, which holds it: a weak reference, so that models are freed when they are let go.

    A copy of the whole decoder is found by the copied norm; of a copied norm alone the decoder stays the one it was.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.reference = weakref.ref(decoder)

    def __call__(self) -> Any:
        return self.reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderOf:
        decoder = self()
        return DecoderOf(memo.get(id(decoder), decoder))

    def __reduce__(self) -> tuple[type[DecoderOf], tuple[nn.Module]]:
        return DecoderOf, (self(),)


class GatedNorm(nn.LayerNorm):
    """A layer's norm behind its cross-attention, of what its gates let through.

    The gates lie with the FDR head, by whose name state dicts have them, and are looked up there: what stands in for
    the head, as peft's does, brings gates of its own.
    """

    decoder_of: DecoderOf
    layer: int

    def tie(self, decoder: nn.Module, layer: int) -> None:
        """Say whose gates these are: of the decoder's FDR head, for this layer, from 0."""
        self.__dict__.update(decoder_of=DecoderOf(decoder), layer=layer)

    def untie(self) -> None:
        """Take that back."""
        del self.__dict__["decoder_of"], self.__dict__["layer"]

    def forward(self, input: Tensor) -> Tensor:
        held, _held.latest = _held.latest, None
        assert held is not None
        return super().forward(self.decoder_of().fdr.gates[self.layer](held, input))
