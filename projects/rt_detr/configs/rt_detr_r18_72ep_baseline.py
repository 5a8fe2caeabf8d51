"""RT-DETR with R18, 72 epochs."""

from dfine_plugin.projects.common import PARTS
from dfine_plugin.projects.rt_detr.recipe import recipe

_config = recipe(18, "./output/rt_detr_r18_72ep_baseline", backbone_factor=0.1)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
