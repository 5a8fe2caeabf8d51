"""Where the LazyConfigs of all projects get detrex's own configs and schedules from."""

from pathlib import Path

from detectron2.config import LazyConfig
from detrex.config import get_config
from omegaconf import DictConfig

PARTS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
"""What detrex's trainer reads from a config."""


def detrex_config(path: str) -> DictConfig:
    """A config of detrex's own projects, read anew.

    Args:
        path: of the file below detrex's ``projects``, such as ``"dino/configs/dino-resnet/dino_r50_4scale_12ep.py"``.

    Returns:
        All that the file defines: ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier``, ``train``.

    Raises:
        FileNotFoundError: where detrex's checkout is not on the path; its ``tools/train_net.py`` puts it there.
    """
    import projects

    for root in projects.__path__:
        file = Path(root) / path
        if file.is_file():
            return LazyConfig.load(str(file))
    raise FileNotFoundError(
        f"detrex's projects/{path} is in none of {list(projects.__path__)}: detrex's checkout must be on the path"
    )


def twelve_epochs(config: DictConfig, output_dir: str) -> DictConfig:
    """The config on detrex's 12-epoch schedule, with a folder of its own for the output; in place."""
    config.lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_12ep
    config.train.max_iter = 90000
    return into(config, output_dir)


def into(config: DictConfig, output_dir: str) -> DictConfig:
    """The config with another folder for checkpoints, logs and detections; in place.

    And with the averaged weights' device said: detrex would look for it on ``model``, which may become a wrapped one.
    """
    config.train.model_ema.device = config.train.device
    config.train.output_dir = output_dir
    config.dataloader.evaluator.output_dir = output_dir
    return config
