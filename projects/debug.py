"""Small hosts on images of 160 px: to train a config for some steps, or a detector from scratch, on a CPU."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from omegaconf import DictConfig
from torch import nn

WIDTH = 256
"""detrex's hosts embed the queries' positions for this width, whatever their configs say."""
STAGES: Mapping[str, tuple[int, int]] = {"res2": (16, 1), "res3": (32, 1), "res4": (64, 1), "res5": (128, 1)}
"""Channels and basic blocks of the backbone's stages."""


def tiny_backbone(out_features: list[str], norm: str, stages: Mapping[str, tuple[int, int]] = STAGES) -> nn.Module:
    """A ResNet of these stages, whose stem is as wide as the first."""
    before = width = next(iter(stages.values()))[0]
    built = []
    for name, (channels, blocks) in stages.items():
        strides = [1 if name == "res2" else 2, *[1] * (blocks - 1)]
        built.append(
            ResNet.make_stage(
                BasicBlock, blocks, in_channels=before, out_channels=channels, norm=norm, stride_per_block=strides
            )
        )
        before = channels
    stem = BasicStem(in_channels=3, out_channels=width, norm=norm)
    return ResNet(stem, built, out_features=list(out_features), freeze_at=0)


def looks_at_one_level(model: DictConfig) -> bool:
    """Whether the host of this config attends to one of the backbone's features, and has no neck for several."""
    return "in_features" in model


def shrink(
    model: DictConfig,
    num_classes: int = 3,
    num_queries: int = 30,
    num_layers: int = 3,
    num_levels: int = 3,
    stages: Mapping[str, tuple[int, int]] = STAGES,
    width: int = WIDTH,
) -> DictConfig:
    """detrex's config of a host with a tiny backbone, few layers and few queries, on the CPU; in place.

    It trains from scratch: batch norm in the backbone, nothing frozen, no dropout.

    Args:
        model: the LazyCall of a host.
        num_classes: of the data.
        num_queries: matched queries; a hybrid host gets as many again for its one-to-many branch.
        num_layers: of the decoder; the encoder has one.
        num_levels: of features, where the host has several: those of the backbone are three.
        stages: of the backbone, see :data:`STAGES`. A host of several levels takes the last three, one of one level the
            last: res5, of stride 32, is that of its full size.
        width: of the transformer. With another than :data:`WIDTH` the caller has to see to the queries' positions.
    """
    has_one_level = looks_at_one_level(model)
    features = list(stages)[-1 if has_one_level else -3 :]
    channels = {name: stages[name][0] for name in features}
    model.backbone = L(tiny_backbone)(out_features=features, norm="BN", stages=dict(stages))
    model.position_embedding.num_pos_feats = width // 2
    if has_one_level:
        model.in_features, model.in_channels = features, channels[features[0]]
    else:
        model.neck.input_shapes = {name: ShapeSpec(channels=channels[name]) for name in features}
        model.neck.in_features, model.neck.out_channels = features, width
        model.neck.num_outs = num_levels
        model.neck.norm_layer.num_groups, model.neck.norm_layer.num_channels = 8, width
        model.transformer.num_feature_levels = num_levels
    for part, layers in (("encoder", 1), ("decoder", num_layers)):
        transformer = model.transformer[part]
        transformer.embed_dim, transformer.num_heads, transformer.num_layers = width, 4, layers
        transformer.feedforward_dim, transformer.attn_dropout, transformer.ffn_dropout = width, 0.0, 0.0
    model.embed_dim = width
    model.num_classes = model.criterion.num_classes = num_classes
    if "num_queries_one2many" in model:
        model.num_queries_one2one, model.num_queries_one2many, model.k_one2many = num_queries, num_queries, 2
        model.transformer.two_stage_num_proposals = 2 * num_queries
    else:
        model.num_queries = num_queries
        if "two_stage_num_proposals" in model.transformer:
            model.transformer.two_stage_num_proposals = num_queries
    if "dn_number" in model:
        model.dn_number = 10
    if "match_num" in model.criterion:  # queries a truth, of the encoder and of each layer
        model.criterion.match_num = [*model.criterion.match_num[:num_layers], 1]
    model.select_box_nums_for_evaluation = num_queries
    model.device = "cpu"
    return model


def register_coco_folder(folder: str, split: str) -> str:
    """The name under which detectron2 knows the split of a COCO-format folder, registered at the first call.

    Args:
        folder: holds ``images`` and ``instances_<split>.json``.
        split: such as ``"train"``.
    """
    name = f"{Path(folder).name}_{split}"
    if name not in DatasetCatalog.list():
        annotations, images = str(Path(folder) / f"instances_{split}.json"), str(Path(folder) / "images")
        DatasetCatalog.register(name, lambda: load_coco_json(annotations, images, name))
        MetadataCatalog.get(name).set(json_file=annotations, image_root=images, evaluator_type="coco")
    return name


def debug_folder() -> str:
    """The COCO-format folder of the debug configs: ``bccd`` where detectron2 looks for data sets."""
    return str(Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "bccd")


def debug(config: DictConfig, **sizes: Any) -> DictConfig:
    """A host's config as a debug config: small, on :func:`debug_folder`, sixty steps on a CPU; in place.

    Args:
        config: of detrex.
        sizes: see :func:`shrink`.
    """
    shrink(config.model, **sizes)
    return briefly(config)


def briefly(config: DictConfig, image_size: int = 160) -> DictConfig:
    """A config's data, schedule and device for debugging, whatever its model; in place."""
    folder = debug_folder()
    resize = L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=2 * image_size)
    data = config.dataloader
    data.train.dataset.names = L(register_coco_folder)(folder=folder, split="train")
    data.test.dataset.names = L(register_coco_folder)(folder=folder, split="val")
    data.evaluator.dataset_name = L(register_coco_folder)(folder=folder, split="val")
    if "augmentations" in data.train.mapper:  # detectron2's mapper, not detrex's
        data.train.mapper.augmentations, data.test.mapper.augmentations = [L(T.RandomFlip)(), resize], [resize]
        data.train.mapper.use_instance_mask = data.train.mapper.recompute_boxes = False
    else:
        data.train.mapper.augmentation = [L(T.RandomFlip)(), resize]
        data.train.mapper.augmentation_with_crop = None
        data.test.mapper.augmentation = [resize]
    data.train.num_workers = data.test.num_workers = 0
    data.train.total_batch_size = 4
    config.optimizer.lr = 1e-3
    train = config.train
    train.device, train.init_checkpoint, train.seed = "cpu", "", 0
    train.max_iter, train.eval_period, train.checkpointer.period, train.log_period = 60, 60, 30, 10
    return config
