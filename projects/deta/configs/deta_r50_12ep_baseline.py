"""DETA with R50: detrex's own config, 12 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(detrex_config("deta/configs/deta_r50_5scale_12ep.py"), "./output/deta_r50_12ep_baseline")
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
