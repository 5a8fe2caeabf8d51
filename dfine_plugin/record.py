"""What one forward of a wrapped model hands from its decoder to its loss.

A scope is opened when the model's forward begins and closed when it ends, by return or by exception. Between the two
the decoder leaves its record there and the loss picks it up. Scopes are per thread and nest, nothing is kept on a
module, so copies, pickles and state dicts never see a record.

An interrupt (Ctrl-C) is no ``Exception``: torch calls no hook at the end of a forward that it ends. The loss, which
holds the record with its graph, closes the scope itself (:func:`closes_on_interrupt`); elsewhere a scope is known to be
abandoned as soon as something asks from a frame so far out that the one which opened it must have ended.
"""

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .uncertainty import edge_deviations

if TYPE_CHECKING:
    from .head import Refinement
    from .teaching import Lesson


@dataclass
class FDRRecord:
    """All predictions of one forward, over the whole query axis (denoising queries included).

    Attributes:
        weights: ``(K,)``, the bins' offsets W.
        initial_boxes: ``(B, Q, 4)`` cxcywh, b0 with its gradient.
        corner_logits: for each layer ``(B, Q, 4, K)``.
        boxes: for each layer ``(B, Q, 4)`` cxcywh, before any cast to the host's dtype.
        head_logits: for each layer its corner logits with a gradient that ends in the head; empty where FGL and DDF
            train the host, too.
        reference_logits: for each layer ``(B, Q, 4)``, the logits of the reference that it attended from, as the host
            adds them to its box head's output.
        quality_logits: for each layer ``(B, Q, 1)``, what LQE adds to the class logits; empty without LQE.
        initial_logits: ``(B, Q, classes)``, layer 1's class logits before LQE.
        lesson: what a teacher says of the same images; None without one.
    """

    weights: Tensor
    initial_boxes: Tensor
    corner_logits: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    head_logits: list[Tensor] = field(default_factory=list)
    reference_logits: list[Tensor] = field(default_factory=list)
    quality_logits: list[Tensor] = field(default_factory=list)
    initial_logits: Tensor | None = None
    lesson: "Lesson | None" = None

    def add(self, refined: "Refinement", quality_logits: Tensor | None = None) -> None:
        """Take in the next layer: its distributions and boxes, and what LQE adds to its class logits, if it is to be
        looked up."""
        assert refined.corner_logits is not None
        self.corner_logits.append(refined.corner_logits)
        if refined.head_logits is not None:
            self.head_logits.append(refined.head_logits)
        self.boxes.append(refined.boxes)
        if quality_logits is not None:
            self.quality_logits.append(quality_logits)

    def queries(self, part: slice) -> "FDRRecord":
        """The record of a part of the queries, such as the denoising ones, as the loss reads it."""
        return FDRRecord(
            weights=self.weights,
            initial_boxes=self.initial_boxes[:, part],
            corner_logits=[logits[:, part] for logits in self.corner_logits],
            boxes=[boxes[:, part] for boxes in self.boxes],
            head_logits=[logits[:, part] for logits in self.head_logits],
            initial_logits=None if self.initial_logits is None else self.initial_logits[:, part],
            lesson=self.lesson,
        )

    def edge_deviations(self, layer: int = -1) -> Tensor:
        """``(B, Q, 4)``, the standard deviations of the edges left, top, right, bottom after a layer, in image sides.

        See :func:`~dfine_plugin.edge_deviations`. The initial boxes are detached, as they are in the boxes.
        """
        return edge_deviations(self.corner_logits[layer], self.weights, self.initial_boxes.detach())

    def last(self, count: int) -> "FDRRecord":
        """The record of the last ``count`` layers."""
        return replace(
            self,
            corner_logits=self.corner_logits[-count:],
            boxes=self.boxes[-count:],
            head_logits=self.head_logits[-count:],
        )

    def supervised_logits(self) -> list[Tensor]:
        """For each layer ``(B, Q, 4, K)``, what FGL and DDF are computed from."""
        return self.head_logits or self.corner_logits


class Scope:
    """One running forward of one wrapped model.

    Attributes:
        record: what the decoder has left for the loss.
        progress: what the modules of a decoder at work hand to one another, for the adapter to define.
        lesson: what a teacher has said of the batch, for the record that the loss asks for.
        idle: parameters that this batch leaves without a gradient, and DistributedDataParallel waiting for one; the
            loss takes them in with weight zero.
        depth: of the frame that the forward runs in, on its thread's stack.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.record: FDRRecord | None = None
        self.progress: Any = None
        self.lesson: Lesson | None = None
        self.idle: list[Tensor] = []


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Scope] = []


_scopes = _Scopes()


Function = TypeVar("Function", bound=Callable[..., Any])


def _depth(frame: FrameType | None) -> int:
    depth = 0
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def _drop_abandoned(deepest: int) -> None:
    """Drop the innermost scopes that frames deeper than this one have opened, for these have ended."""
    while _scopes.stack and _scopes.stack[-1].depth > deepest:
        _scopes.stack.pop()


def open_scope(frames_up: int = 0) -> Scope:
    """Begin a forward on this thread, in the frame of the caller or that of a caller so many frames up."""
    depth = 0  # where torch.compile looks on, there are no frames to be seen: never taken for abandoned
    if not torch.compiler.is_compiling():
        depth = _depth(sys._getframe(1 + frames_up))
        _drop_abandoned(depth - 1)
    scope = Scope(depth)
    _scopes.stack.append(scope)
    return scope


def close_scope() -> None:
    """End this thread's innermost forward, and with it drop its record."""
    _scopes.stack.pop()


def closes_on_interrupt(function: Function) -> Function:
    """Decorator of a part of a forward: what is no ``Exception`` and ends it closes the innermost scope."""

    @functools.wraps(function)
    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            raise
        except BaseException:
            if _scopes.stack:
                close_scope()
            raise

    return closing  # type: ignore[return-value]


def in_scope() -> bool:
    """Whether a wrapped model's forward is running on this thread."""
    if _scopes.stack and not torch.compiler.is_compiling():
        _drop_abandoned(_depth(sys._getframe(1)))
    return len(_scopes.stack) > 0  # bool of a list is beyond torch 2.6 in a graph


def current_scope() -> Scope:
    """This thread's innermost running forward.

    Raises:
        RuntimeError: outside of a wrapped model's forward.
    """
    if not in_scope():
        raise RuntimeError(
            "the loss of a wrapped model runs within that model's forward only, and so do the heads that look up its "
            "record: call the model itself, model(...), for model.forward(...) runs no hooks"
        )
    return _scopes.stack[-1]


def leave_record(record: FDRRecord) -> None:
    """Give the record to the running forward; where only a part of the model runs, nobody asks for it."""
    if in_scope():
        current_scope().record = record


def current_record() -> FDRRecord:
    """The record of this thread's innermost running forward.

    Raises:
        RuntimeError: outside of a wrapped model's forward, or before its decoder ran.
    """
    scope = current_scope()
    if scope.record is None:
        raise RuntimeError("no FDR record: the loss of a wrapped model needs its decoder to have run")
    scope.record.lesson = scope.lesson
    return scope.record
