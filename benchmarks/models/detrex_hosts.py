"""detrex's hosts for the ablation, at debug size, as models that take pixels and labels like those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from dfine_plugin.benchmarks.models.detrex_configs import CONFIGS

MAX_DETECTIONS = 100
ONE_LEVEL = {"res2": (32, 1), "res3": (64, 2)}
"""Stages of hosts that look at one level: of stride 8, for small images, as those of transformers have it."""
NUM_GROUPS = 3
"""Of Group-DETR's queries."""
FOCUS_LEVELS, FOCUS_TOKENS = 4, 16
"""Of Focus-DETR: its code has no other number of levels, and lets more tokens attend to one another than there are."""


@contextmanager
def without_cuda_calls() -> Iterator[None]:
    """Let `.cuda()` and `.to("cuda")` leave a tensor where it is, so that the hosts of `CALL_CUDA` train on a CPU.

    What they then compute is what a model on a GPU would; the copies that they ask for are not made. It holds for the
    whole process, and for whoever calls.
    """
    cuda: Any = Tensor.cuda
    to: Any = Tensor.to

    def to_elsewhere(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args), **kwargs)

    Tensor.cuda, Tensor.to = (lambda tensor, *_, **__: tensor), to_elsewhere  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.cuda, Tensor.to = cuda, to  # type: ignore[method-assign]


def build_detrex_host(name: str, class_names: list[str], num_queries: int, width: int) -> nn.Module:
    """The host of `CONFIGS` with fresh weights, and a transformer of this width.

    Raises:
        ImportError: where detrex is not installed or its checkout not on the path.
    """
    try:
        from detectron2.config import instantiate

        from dfine_plugin.projects.common import detrex_config
        from dfine_plugin.projects.debug import STAGES, WIDTH, looks_at_one_level, shrink

        config = detrex_config(CONFIGS[name]).model
    except (ImportError, FileNotFoundError) as error:
        raise ImportError(
            "the hosts of detrex need detrex and detectron2 (see detrex's installation instructions) and detrex's "
            f"checkout on PYTHONPATH: {error}"
        ) from error
    levels = FOCUS_LEVELS if name == "focus-detr" else 3
    stages = ONE_LEVEL if looks_at_one_level(config) else STAGES
    shrink(config, len(class_names), num_queries, num_levels=levels, stages=stages, width=width)
    if "group_nums" in config:
        config.group_nums = NUM_GROUPS
    config.select_box_nums_for_evaluation = min(num_queries * len(class_names), MAX_DETECTIONS)
    model = instantiate(config)
    if name == "focus-detr":
        for layer in model.transformer.encoder.layers:
            layer.topk_sa = FOCUS_TOKENS
    if width != WIDTH:
        _embed_positions_for(width, model)
    return PixelsAndLabels(model)


def _embed_positions_for(width: int, detector: Any) -> None:
    """Have the queries' positions embedded for a transformer of this width whenever the detector runs.

    detrex's code leaves the number of their features to the functions' default, which is right for a width of 256. The
    functions are those of all detrex's models, and have their own default again in between.
    """
    from detrex.layers.position_embedding import get_sine_pos_embed

    of_proposals = getattr(type(detector.transformer), "get_proposal_pos_embed", None)
    functions: list[Any] = [get_sine_pos_embed, *([of_proposals] if of_proposals else [])]
    own = [function.__defaults__ for function in functions]
    narrow = [(width // 2, *defaults[1:]) for defaults in own]
    detector.register_forward_pre_hook(partial(_set_defaults, functions, narrow))
    detector.register_forward_hook(partial(_set_defaults, functions, own), always_call=True)


def _set_defaults(functions: list[Any], defaults: list[tuple[Any, ...]], *_: Any) -> None:
    for function, values in zip(functions, defaults, strict=True):
        function.__defaults__ = values


def _as_they_are(pixels: Tensor) -> Tensor:
    return pixels


class PixelsAndLabels(nn.Module):
    """A detrex model behind the arguments and outputs of transformers' detectors.

    `detector` is the model itself, to be wrapped.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector
        # the ablation normalises its images
        self.detector.normalizer = _as_they_are

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> SimpleNamespace:
        """`loss` and `loss_dict` in training; `logits` (B, k, C) and `pred_boxes` (B, k, 4) in evaluation.

        In evaluation each of an image's k detections is a query that knows of its own class only.
        """
        height, width = pixel_values.shape[-2:]
        # the hosts move to this device whatever they make
        self.detector.device = pixel_values.device
        if hasattr(self.detector, "pixel_mean"):  # which one of them uses in the place of its normalizer
            self.detector.pixel_mean, self.detector.pixel_std = pixel_values.new_zeros(()), pixel_values.new_ones(())
        inputs: list[dict[str, Any]] = [{"image": image, "height": height, "width": width} for image in pixel_values]
        if self.detector.training:
            assert labels is not None
            for entry, target in zip(inputs, labels, strict=True):
                entry["instances"] = _instances(target, height, width)
            losses = self.detector(inputs)
            total: Any = sum(losses.values())  # Align-DETR's has shape (1,)
            return SimpleNamespace(loss=total.squeeze(), loss_dict=losses)
        results = [result["instances"] for result in self.detector(inputs)]
        most = max(len(result) for result in results)
        logits = pixel_values.new_full((len(results), most, self.detector.num_classes), -torch.inf)
        boxes = pixel_values.new_zeros(len(results), most, 4)
        sides = pixel_values.new_tensor([width, height, width, height])
        for image, result in enumerate(results):
            rows = torch.arange(len(result))
            logits[image, rows, result.pred_classes] = torch.logit(result.scores.to(logits.dtype))
            boxes[image, rows] = box_convert(result.pred_boxes.tensor / sides, "xyxy", "cxcywh").to(boxes.dtype)
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


def _instances(target: dict[str, Tensor], height: int, width: int) -> Any:
    """A truth of transformers' as detectron2's Instances, boxes in pixels."""
    from detectron2.structures import Boxes, Instances

    corners = box_convert(target["boxes"], "cxcywh", "xyxy")
    corners = corners * corners.new_tensor([width, height, width, height])
    return Instances((height, width), gt_boxes=Boxes(corners), gt_classes=target["class_labels"])
