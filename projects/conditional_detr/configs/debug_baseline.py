"""Conditional-DETR, small, for some steps on a CPU."""

from dfine_plugin.projects.common import PARTS, detrex_config, into
from dfine_plugin.projects.debug import debug

_config = into(
    debug(detrex_config("conditional_detr/configs/conditional_detr_r50_50ep.py")),
    "./output/conditional_detr_debug_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
