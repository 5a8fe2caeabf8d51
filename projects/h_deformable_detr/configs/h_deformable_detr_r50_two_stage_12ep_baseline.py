"""H-Deformable-DETR, two-stage with R50: detrex's own config, 12 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(
    detrex_config("h_deformable_detr/configs/h_deformable_detr_r50_two_stage_12ep.py"),
    "./output/h_deformable_detr_r50_two_stage_12ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
