"""Conditional-DETR with R50: detrex's own config, 50 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(
    detrex_config("conditional_detr/configs/conditional_detr_r50_50ep.py"),
    "./output/conditional_detr_r50_50ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
