"""DN-Deformable-DETR with R50: detrex's own config, 12 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(
    detrex_config("dn_deformable_detr/configs/dn_deformable_detr_r50_12ep.py"),
    "./output/dn_deformable_detr_r50_12ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
