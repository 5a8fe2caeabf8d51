"""The rows of detrex: its own configs at debug size. Nothing here imports detrex before a row is built."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dfine_plugin.benchmarks.models import detrex_configs
from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls

from .hosts import NUM_CLASSES, NUM_LAYERS, Host


def missing() -> str | None:
    """Why detrex cannot be tested here; None if it can."""
    for package in ("detectron2", "detrex", "projects.dino.modeling"):
        try:
            if find_spec(package) is None:
                raise ModuleNotFoundError
        except ModuleNotFoundError:
            return f"{package} is not installed (detrex's checkout has to be on PYTHONPATH)"
    return None


def batched_inputs(images: Tensor, labels: list[dict[str, Tensor]] | None = None) -> list[dict[str, Any]]:
    """What detectron2's data loaders give a model."""
    from detectron2.structures import Boxes, Instances

    height, width = images.shape[-2:]
    inputs: list[dict[str, Any]] = [{"image": image * 255, "height": height, "width": width} for image in images]
    for entry, target in zip(inputs, labels or [], strict=bool(labels)):
        centre, size = target["boxes"].split(2, dim=-1)
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners)
        # Boxes casts to float32
        instances.gt_boxes.tensor = corners * corners.new_tensor([width, height, width, height])
        instances.gt_classes = target["class_labels"].clone()
        entry["instances"] = instances
    return inputs


class DetrexHost(Host):
    """A model that takes detectron2's dicts, and returns weighted losses in training, Instances else."""

    decoder = "transformer.decoder"

    def matcher(self, model: nn.Module) -> nn.Module:
        return model.criterion.matcher

    def losses(self, model: nn.Module, images: Tensor, labels: list[dict[str, Tensor]]) -> tuple[Tensor, dict]:
        losses = model(batched_inputs(images, labels))
        return sum(losses.values()), losses  # as detrex's trainer adds them up

    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        instances = [result["instances"] for result in model(batched_inputs(images))]
        return torch.stack([i.scores for i in instances]), torch.stack([i.pred_boxes.tensor for i in instances])

    def predict_layers(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []

        def keep(logits: Tensor, boxes: Tensor) -> None:
            if not found:  # H-Deformable-DETR's second call is for the one-to-many queries
                found.extend(zip(logits, boxes, strict=True))

        model._set_aux_loss = keep
        self.predict(model, images)
        del model._set_aux_loss
        return found

    def pixels(self, images: Tensor) -> Tensor:
        return images * 255

    def without_auxiliary_losses(self, model: nn.Module) -> None:
        model.aux_loss = False

    def to_gpu(self, model: nn.Module) -> None:
        # the hosts move what they make to a device of their own, and normalise by tensors that do not follow them
        mean, std = (
            torch.tensor(x, device="cuda").view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.4, 57.1, 57.4))
        )
        model.device, model.normalizer = "cuda", lambda x: (x - mean) / std
        model.pixel_mean, model.pixel_std = mean, std  # as DINO with EVA keeps them
        model.cuda()


def build_config(path: str, queries: int = 12, layers: int = NUM_LAYERS, heads: int = 4, levels: int = 3) -> nn.Module:
    """The host of a config of detrex's projects, small."""
    from detectron2.config import instantiate

    from dfine_plugin.projects.common import detrex_config
    from dfine_plugin.projects.debug import shrink

    sizes = {"num_classes": NUM_CLASSES, "num_queries": queries, "num_layers": layers, "num_levels": levels}
    model = shrink(detrex_config(path).model, **sizes)
    for part in ("encoder", "decoder"):
        model.transformer[part].num_heads = heads
    return instantiate(model)


COPIES = (2, 3, 2, 1)
"""Queries that Align-DETR matches a truth with: in the encoder's set, then layer by layer."""


def build_align_detr(path: str, layers: int = NUM_LAYERS, **sizes: Any) -> nn.Module:
    """Align-DETR, small, with as many queries a truth as :data:`COPIES` says; one in layers beyond."""
    model = build_config(path, layers=layers, **sizes)
    model.criterion.match_number = [*COPIES, *[1] * (layers - NUM_LAYERS)]
    model.criterion.initialize_weight_table(model.criterion.match_number, TAU)
    return model


TAU = 1.5
"""Of Align-DETR's ranks of queries."""


def build_deta(path: str, **sizes: Any) -> nn.Module:
    """DETA, small: it selects proposals and detections by scores, for NMS would take more of them than there are."""
    model = build_config(path, **sizes)
    model.transformer.assign_first_stage = False
    model.__class__ = _without_nms(type(model))
    return model


@cache
def _without_nms(host: type[Any]) -> type[nn.Module]:
    return type(host.__name__, (host,), {"nms_inference": host.inference})


def build_focus_detr(path: str, **sizes: Any) -> nn.Module:
    """Focus-DETR, small, whose code fixes the number of levels, and of tokens that attend to one another."""
    model = build_config(path, levels=4, **sizes)
    for layer in model.transformer.encoder.layers:
        layer.topk_sa = 8
    return model


def _row(
    name: str,
    path: str,
    build: Callable[..., nn.Module] = build_config,
    settings: dict[str, Any] | None = None,
    **traits: bool,
) -> DetrexHost:
    BUILDERS[f"detrex-{name}"] = builder = partial(build, path)
    return DetrexHost(f"detrex-{name}", builder, True, settings=settings or {}, **traits)


BUILDERS: dict[str, Callable[..., nn.Module]] = {}
"""From a host's name to what builds it, of other sizes as well."""

EVA = "dino_eva/configs/dino-eva-02"

HOSTS = [
    _row("deformable-detr-two-stage", "deformable_detr/configs/deformable_detr_r50_two_stage_50ep.py"),
    _row("deformable-detr-refine", "deformable_detr/configs/deformable_detr_r50_with_box_refinement_50ep.py"),
    _row(
        "deformable-detr-plain",
        "deformable_detr/configs/deformable_detr_r50_50ep.py",
        settings={"box_refinement": True},
    ),
    _row("h-deformable-detr", "h_deformable_detr/configs/h_deformable_detr_r50_two_stage_12ep.py"),
    _row("dab-deformable-detr", "dab_deformable_detr/configs/dab_deformable_detr_r50_50ep.py"),
    _row("dab-deformable-detr-two-stage", "dab_deformable_detr/configs/dab_deformable_detr_r50_two_stage_50ep.py"),
    _row("dn-deformable-detr", "dn_deformable_detr/configs/dn_deformable_detr_r50_12ep.py"),
    _row("dino", "dino/configs/dino-resnet/dino_r50_4scale_12ep.py", dino=True),
    _row("dino-eva", f"{EVA}/dino_eva_02_vitdet_b_4attn_1024_lrd0p7_4scale_12ep.py", dino=True),
    _row(
        "align-detr",
        "align_detr/configs/aligndetr_k=2_r50_4scale_12ep.py",
        build=build_align_detr,
        own_pairs=True,
        dino=True,
    ),
    _row("deta", "deta/configs/deta_r50_5scale_12ep.py", build=build_deta, own_pairs=True),
    _row("deta-matched", "deta/configs/improved_deformable_detr_baseline_50ep.py"),
    _row(
        "focus-detr",
        "focus_detr/configs/focus_detr_resnet/focus_detr_r50_4scale_12ep.py",
        build=build_focus_detr,
        dino=True,
    ),
    _row("dab-detr", "dab_detr/configs/dab_detr_r50_50ep.py", one_box_head=True),
    _row("dn-detr", "dn_detr/configs/dn_detr_r50_50ep.py", one_box_head=True),
    _row(
        "conditional-detr",
        "conditional_detr/configs/conditional_detr_r50_50ep.py",
        one_box_head=True,
        fixed_references=True,
    ),
    _row(
        "group-detr",
        "group_detr/configs/group_detr_r50_50ep.py",
        one_box_head=True,
        fixed_references=True,
    ),
]

CALL_CUDA = {host.name for host in HOSTS if host.dino} | {f"detrex-{name}" for name in detrex_configs.CALL_CUDA}
"""Hosts whose training calls ``.cuda()``, whatever the device."""


def on_a_cpu(host: Host) -> AbstractContextManager[None]:
    """Where a host can be trained on a CPU."""
    return without_cuda_calls() if host.name in CALL_CUDA else nullcontext()
