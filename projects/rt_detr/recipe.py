"""RT-DETR's training recipe as detrex's trainer takes it: 72 epochs on COCO at 640x640, averaged weights."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detrex.config import get_config
from omegaconf import DictConfig, OmegaConf

from dfine_plugin.projects.common import into

from .modeling import RTDETR, rt_detr


def recipe(depth: int, output_dir: str, backbone_factor: float) -> DictConfig:
    """The whole config for a ResNet of this depth.

    Weights come from ``model.detector.pretrained``, a folder with a transformers checkpoint. The augmentation is
    detectron2's flips, colours and resizing; the authors' zoom-out, IoU crops and many scales are not in it.

    Args:
        depth: 18, 34, 50 or 101.
        output_dir: for checkpoints and logs.
        backbone_factor: the backbone's learning rate over that of the rest.
    """
    config = OmegaConf.create(flags={"allow_objects": True})
    config.dataloader = get_config("common/data/coco_detr.py").dataloader
    config.optimizer = get_config("common/optim.py").AdamW
    config.lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_6x
    config.train = get_config("common/train.py").train
    config.model = L(RTDETR)(detector=L(rt_detr)(depth=depth, num_classes=80, pretrained=""), device="cuda")

    square = L(T.Resize)(shape=(640, 640))
    colours = [L(change)(intensity_min=0.6, intensity_max=1.4) for change in _COLOURS]
    config.dataloader.train.mapper.augmentation = [L(T.RandomFlip)(), *colours, square]
    config.dataloader.train.mapper.augmentation_with_crop = None
    config.dataloader.test.mapper.augmentation = [square]

    config.optimizer.lr, config.optimizer.weight_decay = 1e-4, 1e-4
    config.optimizer.params.lr_factor_func = lambda name: backbone_factor if "backbone" in name else 1
    train = config.train
    train.max_iter = 540000
    train.clip_grad.enabled, train.clip_grad.params.max_norm, train.clip_grad.params.norm_type = True, 0.1, 2
    train.model_ema.enabled, train.model_ema.decay = True, 0.9999
    return into(config, output_dir)


_COLOURS = (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
