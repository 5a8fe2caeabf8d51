"""Localisation distillation (arXiv 2102.12252): an external teacher's distributions are part of FGL's targets."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .boxes import aligned_iou, at_least_float32, edge_offsets, two_bins
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
def project_distributions(probabilities: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Distributions over offsets of edges as distributions over the bins of W.

    Each offset lies between two bins, as a true edge's does (:func:`~dfine_plugin.encode_boxes`), and they share its
    probability: the expectation stays, but for offsets beyond the range of W, which go to the end bin.

    Args:
        probabilities: ``(M, 4, J)``, of the offsets of each edge.
        offsets: ``(M, 4, J)``, outwards, in sides of the box whose edges they move.
        weights: ``(K,)`` increasing, the bins' offsets in the same unit.

    Returns:
        ``(M, 4, K)``; no gradient.
    """
    left_bin, left_weight, right_weight = two_bins(offsets, weights)
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
        return self._ask()

    @torch.no_grad()
    def targets(self, images: Tensor, truths: Tensor, initial_boxes: Tensor, weights: Tensor) -> Tensor:
        """What M pairs of queries and truths are to learn: the true edges, and what the teacher says of them.

        That is what its query says whose box overlaps the truth most, and it weighs its share times that overlap.

        Args:
            images: ``(M,)`` indices.
            truths: ``(M, 4)`` cxcywh.
            initial_boxes: ``(M, 4)`` cxcywh, the frames of the learner's distributions.
            weights: ``(K,)``, the learner's W.

        Returns:
            ``(M, 4, K)``, distributions in the learner's frames and bins.
        """
        teacher = self.record
        boxes = at_least_float32(teacher.boxes[-1])[images]
        overlap, best = aligned_iou(boxes, truths[:, None].to(boxes.dtype).expand_as(boxes)).max(-1)
        frames = teacher.initial_boxes[images, best]
        said = at_least_float32(teacher.corner_logits[-1])[images, best].softmax(-1)
        # outwards from the learner's edges, in its sides: to those of the teacher's frame, and from there to its bins
        sides = at_least_float32(frames)[:, 2:] / at_least_float32(initial_boxes)[:, 2:].clamp(min=1e-12)
        bins = sides.repeat(1, 2)[..., None] * teacher.weights.to(sides.dtype)
        places = edge_offsets(initial_boxes, frames)[..., None] + bins
        share = (self.share * overlap)[:, None, None]
        # the true edge is one place more
        probabilities = torch.cat([(1 - share).expand(-1, 4, 1), share * said], dim=-1)
        offsets = torch.cat([edge_offsets(initial_boxes, truths)[..., None], places], dim=-1)
        return project_distributions(probabilities, offsets, weights)


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
        last = [record.last(1) for record in records]
        if len(last) == 1:
            return last[0]
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
