"""DINO with R50: detrex's own config, 12 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(
    detrex_config("dino/configs/dino-resnet/dino_r50_4scale_12ep.py"), "./output/dino_r50_4scale_12ep_baseline"
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
