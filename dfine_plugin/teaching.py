"""Localisation distillation (arXiv 2102.12252): an external teacher's distributions are part of FGL's targets."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .boxes import aligned_iou, at_least_float32, to_corners, two_bins
from .errors import UnsupportedModelError, WrapStateError
from .record import FDRRecord
from .registry import AdapterOfLearners, Arguments
from .wrapping import keep_records, wrapped_binding

Model = TypeVar("Model", bound=nn.Module)


def learn_from(model: Model, teacher: nn.Module | None, share: float = 0.5) -> Model:
    """Let a teacher's distributions be part of what FGL teaches a wrapped model, in place.

    In training the teacher sees the same images. For each truth its query is taken whose box overlaps the truth most;
    its distributions, seen from the learner's initial boxes and in the learner's bins, have this share, times that
    overlap, of FGL's targets, and the true edge's two bins have the rest: of every layer, and of denoising queries.
    What the true edge alone does not say is how sure one can be of it. The teacher may be of any host, and of other
    bins, that takes what this one takes: larger, trained for longer, or both. It sees what the model is called with:
    what hooks of yours make of that before the model's forward, it does not.

    The model holds no more of its teacher than a reference: its parameters and its state dict have nothing of it, and
    copies and pickles have no teacher. After loading, give it one again.

    Args:
        model: wrapped, not deployed.
        teacher: wrapped, trained, not deployed. It is put into evaluation mode, follows the model to its device, and is
            not changed otherwise. None: no teacher any more.
        share: of the teacher in the targets where its box is the truth, in ``[0, 1]``.

    Returns:
        The same model.

    Raises:
        WrapStateError: model or teacher are not wrapped, or deployed.
        UnsupportedModelError: the model's adapter comes from elsewhere and does not say what a teacher would see.
        ValueError: the share is out of its range, the model is to be its own teacher, or FGL has no weight.

    Example:
        >>> teacher = load_pretrained("large-and-trained")
        >>> model = learn_from(wrap_decoder(small), teacher)
    """
    binding = wrapped_binding(model, "learn_from", ": model = wrap_decoder(model) first")
    if binding.deployed:
        raise WrapStateError("a deployed model is for inference only: it learns no more")
    if teacher is None:
        binding.teacher = None
        return model
    of_teacher = wrapped_binding(teacher, "learn_from", ": its boxes come from no distributions to learn from")
    if of_teacher.deployed:
        raise WrapStateError("a deployed teacher keeps no record of its distributions; take it as it was before deploy")
    if not isinstance(binding.adapter, AdapterOfLearners):
        raise UnsupportedModelError(
            f"the adapter of this {type(model).__name__} has no without_truths, which says what a teacher sees"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    if teacher is model:
        raise ValueError("a model cannot be its own teacher: GO-LSD (ddf) is for that")
    if binding.config.fgl_weight == 0:
        raise ValueError("fgl_weight is 0, and FGL is what a teacher would take part in")
    binding.teacher = Teacher(teacher.eval(), share)
    return model


@torch.no_grad()
def project_distributions(probabilities: Tensor, edges: Tensor, initial_boxes: Tensor, weights: Tensor) -> Tensor:
    """Distributions over places of edges as distributions over the bins of other boxes.

    Each place lies between two bins, as a true edge does (:func:`~dfine_plugin.encode_boxes`), and they share its
    probability: the expectation stays, but for places beyond the range of W, which go to the end bin.

    Args:
        probabilities: ``(M, 4, J)``, of the places of each edge.
        edges: ``(M, 4, J)``, these places: x of left and right, y of top and bottom, in image sides.
        initial_boxes: ``(M, 4)`` cxcywh.
        weights: ``(K,)`` increasing, the bins' offsets in initial-box sides.

    Returns:
        ``(M, 4, K)``; no gradient.
    """
    initial_boxes = at_least_float32(initial_boxes)
    sides = initial_boxes[:, 2:].repeat(1, 2).clamp(min=1e-12)
    moved = edges.to(initial_boxes.dtype) - to_corners(initial_boxes)[..., None]
    outwards = torch.cat([-moved[:, :2], moved[:, 2:]], dim=1)
    left_bin, left_weight, right_weight = two_bins(outwards / sides[..., None], weights)
    probabilities = probabilities.to(left_weight.dtype)
    projected = probabilities.new_zeros(*probabilities.shape[:2], len(weights))
    projected.scatter_add_(-1, left_bin, probabilities * left_weight)
    return projected.scatter_add_(-1, left_bin + 1, probabilities * right_weight)


class Lesson:
    """What a teacher says of a batch, and its share in FGL's targets; it is asked when somebody first wants to know.

    Args:
        ask: gives the record of the teacher's forward.
        share: in ``[0, 1]``.
    """

    def __init__(self, ask: Callable[[], FDRRecord], share: float) -> None:
        self._ask = ask
        self.share = share

    @cached_property
    def record(self) -> FDRRecord:
        """Of the teacher's forward: its last layer's boxes and distributions."""
        return self._ask().last(1)

    @torch.no_grad()
    def of_pairs(self, images: Tensor, truths: Tensor, initial_boxes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What M pairs of queries and truths learn of the teacher: of its query whose box overlaps the truth most.

        Args:
            images: ``(M,)`` indices.
            truths: ``(M, 4)`` cxcywh.
            initial_boxes: ``(M, 4)`` cxcywh, the frames of the learner's distributions.
            weights: ``(K,)``, the learner's W.

        Returns:
            The distributions ``(M, 4, K)`` in the learner's frames and bins, and their weights ``(M,)`` in the targets:
            the teacher's share times the IoU of its box with the truth.
        """
        teacher = self.record
        boxes = at_least_float32(teacher.boxes[-1])[images]
        overlap, best = aligned_iou(boxes, truths[:, None].to(boxes.dtype).expand_as(boxes)).max(-1)
        frames = at_least_float32(teacher.initial_boxes)[images, best]
        offsets = frames[:, 2:].repeat(1, 2)[..., None] * teacher.weights.to(frames.dtype)
        edges = to_corners(frames)[..., None] + torch.cat([-offsets[:, :2], offsets[:, 2:]], dim=1)
        probabilities = at_least_float32(teacher.corner_logits[-1])[images, best].softmax(-1)
        return project_distributions(probabilities, edges, initial_boxes, weights), self.share * overlap


class Teacher:
    """Who teaches a wrapped model, which holds it by no more than this: copies and pickles of the model have none."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model = model
        self.share = share

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nobody, ()

    def lesson(self, parts: Sequence[Arguments], device: torch.device) -> Lesson:
        """What it says of a batch, of these parts one after the other, on this device."""
        return Lesson(partial(self._answer, parts, device), self.share)

    @torch.compiler.disable
    @torch.no_grad()
    def _answer(self, parts: Sequence[Arguments], device: torch.device) -> FDRRecord:
        parameter = next(self.model.parameters())
        if parameter.device != device:
            self.model.to(device)
        if self.model.training:
            self.model.eval()
        with keep_records(self.model) as records:
            for args, kwargs in parts:
                given = {key: _in_dtype(value, parameter.dtype) for key, value in kwargs.items()}
                self.model(*(_in_dtype(value, parameter.dtype) for value in args), **given)
        if len(records) == 1:
            return records[0]
        last = [record.last(1) for record in records]
        return FDRRecord(
            weights=last[0].weights,
            initial_boxes=torch.cat([record.initial_boxes for record in last]),
            corner_logits=[torch.cat([record.corner_logits[0] for record in last])],
            boxes=[torch.cat([record.boxes[0] for record in last])],
        )


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Numbers as the teacher's weights are; all else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _nobody() -> None:
    return None
