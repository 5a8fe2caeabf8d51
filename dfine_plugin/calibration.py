"""A trained host teaches its fresh FDR head: the host's own boxes on images without labels."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .boxes import aligned_iou, edge_offsets
from .errors import WrapStateError
from .head import FDRHead, Refinement
from .wrapping import binding_of, wrapped_binding

QUERIES_PER_IMAGE = 100
"""How many queries of an image, the most confident ones, the head learns from."""

SPREAD = 0.05
"""How wide a distribution the head learns for an edge, as the mean deviation from the host's edge in initial-box sides:
about as far as a trained host's edges lie from the truth. Two bins, as FGL has them, would make the head sure of what
the host does not know: at the first step of training FGL's gradient would be ten times that of all other losses."""


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` reached: IoU of the last layer's boxes with the host's own, averaged over the queries with
    the host's confidences as weights.

    Attributes:
        before: with the FDR head as it was; of a fresh one, which predicts the initial boxes.
        after: with the calibrated head.
    """

    before: float
    after: float


@dataclass
class Rehearsal:
    """What the S most confident queries went through in the host's decoder of L layers.

    Attributes:
        hidden_states: ``(L, S, C)``.
        initial_boxes: ``(S, 4)`` cxcywh.
        boxes: ``(L, S, 4)`` cxcywh, the host's own after each layer.
        confidence: ``(S,)``, the highest of the host's class probabilities.
    """

    hidden_states: Tensor
    initial_boxes: Tensor
    boxes: Tensor
    confidence: Tensor

    def queries(self, part: Tensor) -> "Rehearsal":
        """Of a part of the queries, ``(n,)`` indices."""
        return Rehearsal(
            self.hidden_states[:, part], self.initial_boxes[part], self.boxes[:, part], self.confidence[part]
        )


def calibrate(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    steps: int = 500,
    batch_size: int = 1024,
    learning_rate: float = 2e-3,
    progress: bool = True,
) -> Calibration:
    """Teach the FDR head of a freshly wrapped trained host the host's own boxes, in place; nothing else changes.

    A fresh head answers every layer's box with the initial boxes, which are the host's first layer's: what the host's
    later layers had learnt is lost until the head has learnt it again. Here it learns it at once, from the box heads
    that :func:`~dfine_plugin.wrap_decoder` retired. The host runs once over the images, as if it had not been wrapped;
    then the head alone is trained on what its decoder layers put out: cross entropy with a Laplace distribution around
    each edge of the host's boxes, weighted by the host's confidence.

    Args:
        model: wrapped, not trained since; on any device, in either mode, which it keeps.
        images: batches ``(B, 3, H, W)`` as the host takes them (:meth:`~dfine_plugin.registry.Adapter.detector`), such
            as ``(batch["pixel_values"] for batch in loader)``. A hundred or two of the training images are enough.
        steps: of Adam, with a learning rate that falls to zero.
        batch_size: queries a step.
        learning_rate: of the first step.
        progress: show bars, of the images and of the steps.

    Returns:
        How well the boxes agree with the host's, before and after.

    Raises:
        WrapStateError: the model is not wrapped, has been deployed or loaded from a checkpoint without its host's box
            heads, such as a wrapped one, or its host does not refine boxes layer by layer.
        ValueError: there are no images.
        TypeError: a batch is something else, such as a dict with the images in it.

    Example:
        >>> model = wrap_decoder(model)
        >>> calibrate(model, (batch["pixel_values"] for batch in islice(loader, 20)))
        Calibration(before=0.89, after=0.98)
    """
    fdr = _fdr_head(model)
    rehearsal = rehearse(model, images, progress)
    before = agreement(fdr, rehearsal)
    with _trainable_in_float32(fdr), torch.enable_grad():
        _teach(fdr, rehearsal, steps, batch_size, learning_rate, progress)
    return Calibration(before, agreement(fdr, rehearsal))


@contextmanager
def _trainable_in_float32(fdr: FDRHead) -> Iterator[None]:
    dtype = next(fdr.parameters()).dtype
    trainable = [parameter.requires_grad for parameter in fdr.parameters()]
    fdr.float().requires_grad_(True)
    try:
        yield
    finally:
        for parameter, was in zip(fdr.parameters(), trainable, strict=True):
            parameter.requires_grad, parameter.grad = was, None
        fdr.to(dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every module of it as it was thereafter."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _fdr_head(model: nn.Module) -> FDRHead:
    right_after = "; calibrate takes a model right after wrap_decoder"
    binding = wrapped_binding(model, "calibrate", right_after)
    if binding.deployed:
        raise WrapStateError(f"this {type(model).__name__} is deployed{right_after}")
    if not getattr(binding.retired, "box_heads", None):
        raise WrapStateError(
            f"this {type(model).__name__} does not refine boxes from layer to layer: it has none to learn from"
        )
    if binding.retired.outdated:
        raise WrapStateError(
            f"this {type(model).__name__} has been loaded from a checkpoint that holds none of the box heads to learn "
            "from, as a wrapped one; calibrate comes right after wrap_decoder"
        )
    fdr = model.get_submodule(f"{binding.adapter.decoder}.fdr")
    assert isinstance(fdr, FDRHead)
    return fdr


@torch.no_grad()
def rehearse(model: nn.Module, images: Iterable[Tensor], progress: bool = False) -> Rehearsal:
    """Run the wrapped model's host over the images as if it had not been wrapped.

    The FDR head is asked as always, but what it answers gives way to what the host's retired box heads say, so that all
    layers see the references, and put out the hidden states, of the host itself.
    """
    binding = binding_of(model)
    assert binding is not None
    device = next(model.parameters()).device
    parts = []
    with _evaluating(model), _host_boxes(model) as (hidden, boxes):
        detector = binding.adapter.detector(model)
        for batch in tqdm(images, desc="running the host", disable=not progress):
            if not isinstance(batch, Tensor) or batch.ndim != 4:
                raise TypeError(
                    f"calibrate takes batches (B, 3, H, W) of images, one after another, got {_said(batch)}"
                )
            hidden.clear()
            boxes.clear()
            logits, _ = detector(batch.to(device))
            confidence = logits.float().sigmoid().amax(-1)
            confidence, chosen = confidence.topk(min(QUERIES_PER_IMAGE, confidence.shape[1]))
            rows = torch.arange(len(chosen), device=device)[:, None]
            layers = torch.stack([h[rows, chosen] for h in hidden]), torch.stack([b[rows, chosen] for b in boxes])
            parts.append((*(layer.flatten(1, 2) for layer in layers), confidence.flatten()))
    if not parts:
        raise ValueError("calibrate needs images: batches (B, 3, H, W), as the host takes them")
    hidden_states, all_boxes = (torch.cat(part, dim=1) for part in list(zip(*parts, strict=True))[:2])
    return Rehearsal(hidden_states, all_boxes[0], all_boxes, torch.cat([part[2] for part in parts]))


def _said(batch: Any) -> str:
    return f"a tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"


@contextmanager
def _host_boxes(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Let the host's own boxes stand for the refined ones, and keep each layer's hidden states and boxes."""
    binding = binding_of(model)
    assert binding is not None
    hidden: list[Tensor] = []
    boxes: list[Tensor] = []

    def answer(fdr: nn.Module, inputs: tuple[Any, ...], refined: Refinement) -> Refinement:
        layer, hidden_states, state = inputs
        # layer 1's are the initial ones, which the state holds before it
        following = reported = state.boxes
        if layer > 0:
            following, reported = binding.adapter.host_boxes(model, layer, hidden_states, state.boxes)
        hidden.append(hidden_states.float())
        boxes.append(reported.float())
        return replace(refined, boxes=following)

    hook = _fdr_head(model).register_forward_hook(answer)
    try:
        yield hidden, boxes
    finally:
        hook.remove()


def _refine(fdr: FDRHead, rehearsal: Rehearsal) -> list[Refinement]:
    """What the head makes of the hidden states, layer by layer, for a batch of one image."""
    states = [fdr.start(rehearsal.initial_boxes[None])]
    for layer, hidden_states in enumerate(rehearsal.hidden_states):
        states.append(fdr(layer, hidden_states[None], states[-1]))
    return states[1:]


@torch.no_grad()
def agreement(fdr: FDRHead, rehearsal: Rehearsal) -> float:
    """IoU of the last layer's boxes with the host's, averaged with the host's confidences as weights."""
    iou = 0.0
    for part in torch.arange(len(rehearsal.confidence)).split(4096):
        queries = rehearsal.queries(part)
        refined = _refine(fdr, replace(queries, hidden_states=queries.hidden_states.to(next(fdr.parameters()).dtype)))
        iou += float((aligned_iou(refined[-1].boxes[0], queries.boxes[-1]) * queries.confidence).sum())
    return iou / float(rehearsal.confidence.sum())


def spread_edges(initial_boxes: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """For each edge of ``(S, 4)`` boxes a Laplace distribution over the bins ``(K,)`` around it, :data:`SPREAD` wide:
    ``(S, 4, K)`` probabilities. A bin answers for the offsets nearer to it than to its neighbours.

    They decode to the boxes as far as bins lie closer together than the distribution is wide: for the default bins, to
    0.45 sides. Beyond, where trained hosts hardly ever go, they decode to somewhere between the next two.
    """
    offsets = edge_offsets(initial_boxes, boxes).clamp(weights[0], weights[-1])
    borders = torch.cat([weights[:1], (weights[1:] + weights[:-1]) / 2, weights[-1:]])
    density = torch.exp(-(weights - offsets[..., None]).abs() / SPREAD) * borders.diff()
    return density / density.sum(-1, keepdim=True)


def _teach(
    fdr: FDRHead, rehearsal: Rehearsal, steps: int, batch_size: int, learning_rate: float, progress: bool
) -> None:
    optimizer = torch.optim.Adam(fdr.refine.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="calibrating the FDR head", disable=not progress):
        chosen = torch.randint(len(rehearsal.confidence), (batch_size,), generator=generator)
        batch = rehearsal.queries(chosen.to(rehearsal.confidence.device))
        loss = torch.zeros((), device=rehearsal.confidence.device)
        for state, boxes in zip(_refine(fdr, batch), batch.boxes, strict=True):
            assert state.corner_logits is not None
            targets = spread_edges(batch.initial_boxes, boxes, fdr.weights)
            cross_entropy = -(targets * state.corner_logits[0].log_softmax(-1)).sum((1, 2))
            loss = loss + (cross_entropy * batch.confidence).sum() / batch.confidence.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
