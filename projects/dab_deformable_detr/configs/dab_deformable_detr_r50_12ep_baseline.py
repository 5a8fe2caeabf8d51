"""DAB-Deformable-DETR with R50: detrex's own config, on a 12-epoch schedule."""

from dfine_plugin.projects.common import PARTS, detrex_config, twelve_epochs

_config = twelve_epochs(
    detrex_config("dab_deformable_detr/configs/dab_deformable_detr_r50_50ep.py"),
    "./output/dab_deformable_detr_r50_12ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
