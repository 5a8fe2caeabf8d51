"""RT-DETR with R34, 72 epochs."""

from dfine_plugin.projects.common import PARTS
from dfine_plugin.projects.rt_detr.recipe import recipe

_config = recipe(34, "./output/rt_detr_r34_72ep_baseline", backbone_factor=0.1)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
