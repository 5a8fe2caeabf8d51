"""Focus-DETR with R50: detrex's own config, 12 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(
    detrex_config("focus_detr/configs/focus_detr_resnet/focus_detr_r50_4scale_12ep.py"),
    "./output/focus_detr_r50_12ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
