"""Deformable-DETR, two-stage with R50: detrex's own config, on a 12-epoch schedule."""

from dfine_plugin.projects.common import PARTS, detrex_config, twelve_epochs

_config = twelve_epochs(
    detrex_config("deformable_detr/configs/deformable_detr_r50_two_stage_50ep.py"),
    "./output/deformable_detr_r50_two_stage_12ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
