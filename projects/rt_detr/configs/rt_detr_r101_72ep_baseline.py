"""RT-DETR with R101, 72 epochs."""

from dfine_plugin.projects.common import PARTS
from dfine_plugin.projects.rt_detr.recipe import recipe

_config = recipe(101, "./output/rt_detr_r101_72ep_baseline", backbone_factor=0.1)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
