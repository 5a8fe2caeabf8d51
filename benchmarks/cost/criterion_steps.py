"""A step's criterion, ours and the D-FINE authors', on the same tensors."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfine_plugin import FDRConfig, decode_boxes
from dfine_plugin.benchmarks.timing import now
from dfine_plugin.record import FDRRecord, close_scope, leave_record, open_scope

Losses = dict[str, Tensor]

# A kind of loss of the one is the other's if they agree this far. Where a query met several truths equally often, the
# authors' union takes the one that an unstable sort brings up: the more truths, the more such queries.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Sizes:
    """What a step's tensors measure: images, truths in each, queries, classes, decoder layers."""

    batch: int
    truths: int
    queries: int = 300
    classes: int = 80
    layers: int = 6


@dataclass
class Step:
    """What one step of a decoder hands to its criterion. All tensors are leaves.

    logits and boxes: for each layer (B, Q, C) and (B, Q, 4). corners: for each layer (B, Q, 4, K). The initial boxes
    and the encoder's set are one more of each. truths: for each image labels (n,) and boxes (n, 4).
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    corners: list[Tensor]
    initial: tuple[Tensor, Tensor]
    encoder: tuple[Tensor, Tensor]
    truths: list[tuple[Tensor, Tensor]]

    def leaves(self) -> list[Tensor]:
        return [*self.logits, *self.boxes, *self.corners, *self.initial, *self.encoder]


def make_step(sizes: Sizes, device: torch.device, seed: int = 0) -> Step:
    """A step of a half-trained decoder: for each truth some queries are near, and each layer comes nearer."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    b, n, q = sizes.batch, sizes.truths, sizes.queries
    truths = [
        (
            torch.randint(0, sizes.classes, (n,), generator=generator),
            torch.cat([rand(n, 2), 0.05 + 0.3 * rand(n, 2)], 1),
        )
        for _ in range(b)
    ]
    near = torch.stack([boxes[torch.arange(q) % n] if n else rand(q, 4) for _, boxes in truths])
    initial = (near + 0.02 * (rand(b, q, 4) - 0.5)).clamp(0.01, 0.99)
    weights = FDRConfig().bin_values()
    logits, boxes, corners = [], [], []
    corner, logit = torch.zeros(b, q, 4, len(weights)), torch.randn(b, q, sizes.classes, generator=generator) - 3
    for _ in range(sizes.layers):
        corner = corner + 0.1 * torch.randn(corner.shape, generator=generator)
        logit = logit + 0.1 * torch.randn(logit.shape, generator=generator)
        corners.append(corner)
        logits.append(logit)
        boxes.append(decode_boxes(initial, corner, weights))

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().to(device).requires_grad_()

    return Step(
        [leaf(x) for x in logits],
        [leaf(x) for x in boxes],
        [leaf(x) for x in corners],
        (leaf(logits[0]), leaf(initial)),
        (leaf(logits[0]), leaf(initial)),
        [(labels.to(device), boxes.to(device)) for labels, boxes in truths],
    )


def make_ours(sizes: Sizes, device: torch.device) -> Callable[[Step], Losses]:
    """The criterion of a wrapped RT-DETR, as `step -> weighted losses`."""
    from transformers import RTDetrConfig, RTDetrResNetConfig

    from dfine_plugin.adapters.transformers.rt_detr import RTDetrGOLSDLoss

    settings: dict[str, Any] = {"num_labels": sizes.classes}
    config = RTDetrConfig(backbone_config=RTDetrResNetConfig(), **settings)
    golsd = RTDetrGOLSDLoss(FDRConfig.paper())
    weights = FDRConfig().bin_values().to(device)

    def losses(step: Step) -> Losses:
        labels = [{"class_labels": labels, "boxes": boxes} for labels, boxes in step.truths]
        open_scope()
        try:
            leave_record(FDRRecord(weights, step.initial[1], step.corners, step.boxes, initial_logits=step.initial[0]))
            logits, boxes = torch.stack(step.logits, 1), torch.stack(step.boxes, 1)
            return golsd(logits[:, -1], labels, device, boxes[:, -1], config, logits, boxes, *step.encoder)[1]
        finally:
            close_scope()

    return losses


def load_authors(checkout: Path) -> tuple[ModuleType, ModuleType]:
    """The authors' criterion and matcher modules, without the rest of their package, which needs more than they do."""
    package = "dfine_authors"

    def module(name: str, **content: Any) -> None:
        sys.modules[f"{package}{name}"] = ModuleType(f"{package}{name}")
        sys.modules[f"{package}{name}"].__dict__.update(content, __path__=[])

    for name in ("", ".zoo", ".zoo.dfine", ".misc"):
        module(name)
    module(".core", register=lambda *_, **__: lambda cls: cls)
    module(".misc.dist_utils", get_world_size=lambda: 1, is_dist_available_and_initialized=lambda: False)
    loaded = {}
    for name in ("box_ops", "dfine_utils", "matcher", "dfine_criterion"):
        path = checkout / "src/zoo/dfine" / f"{name}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{checkout} is no checkout of the D-FINE authors' repository: it lacks {path}")
        spec = importlib.util.spec_from_file_location(f"{package}.zoo.dfine.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded[name]
        spec.loader.exec_module(loaded[name])
    return loaded["dfine_criterion"], loaded["matcher"]


def make_theirs(checkout: Path, sizes: Sizes, device: torch.device) -> Callable[[Step], Losses]:
    """The authors' criterion with their settings, as `step -> weighted losses`."""
    criteria, matchers = load_authors(checkout)
    matcher = matchers.HungarianMatcher({"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}, use_focal_loss=True)
    weights = {"loss_vfl": 1, "loss_bbox": 5, "loss_giou": 2, "loss_fgl": 0.15, "loss_ddf": 1.5}
    criterion = criteria.DFINECriterion(
        matcher, weights, ["vfl", "boxes", "local"], alpha=0.75, num_classes=sizes.classes
    ).to(device)
    up, scale = torch.tensor([0.5], device=device), torch.tensor([4.0], device=device)

    def losses(step: Step) -> Losses:
        frame = {"ref_points": step.initial[1], "up": up, "reg_scale": scale}
        teacher = {"teacher_corners": step.corners[-1].flatten(2), "teacher_logits": step.logits[-1]}
        layers = [
            {"pred_logits": x, "pred_boxes": b, "pred_corners": z.flatten(2), **frame}
            for x, b, z in zip(step.logits, step.boxes, step.corners, strict=True)
        ]
        outputs = {
            **layers[-1],
            "aux_outputs": [{**layer, **teacher} for layer in layers[:-1]],
            "pre_outputs": {"pred_logits": step.initial[0], "pred_boxes": step.initial[1]},
            "enc_aux_outputs": [{"pred_logits": step.encoder[0], "pred_boxes": step.encoder[1]}],
            "enc_meta": {"class_agnostic": False},
        }
        return criterion(outputs, [{"labels": labels, "boxes": boxes} for labels, boxes in step.truths])

    return losses


def by_kind(losses: Losses) -> dict[str, float]:
    """The sums of the losses of one kind over layers and sets: the two name these differently."""
    sums: dict[str, float] = {}
    for name, value in losses.items():
        kind = "_".join(name.split("_")[:2])
        sums[kind] = sums.get(kind, 0.0) + float(value.detach())
    return sums


def check_agreement(ours: Losses, theirs: Losses) -> None:
    """Raise where a kind of loss differs by more than the tolerance."""
    first, second = by_kind(ours), by_kind(theirs)
    wrong = {
        kind: (first.get(kind), value)
        for kind, value in second.items()
        if abs(first.get(kind, 0.0) - value) > TOLERANCE * max(1.0, abs(value))
    }
    if wrong:
        raise RuntimeError(f"ours and theirs disagree: {wrong}")


def seconds(run: Callable[[Step], Losses], step: Step, device: torch.device) -> float:
    """One forward and backward."""
    for leaf in step.leaves():
        leaf.grad = None
    start = now(device)
    torch.stack([*run(step).values()]).sum().backward()
    return now(device) - start
