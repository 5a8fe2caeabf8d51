"""DAB-DETR with R50 on the 12-epoch schedule that the paper trains it on."""

from dfine_plugin.projects.common import PARTS, detrex_config, twelve_epochs

_config = twelve_epochs(detrex_config("dab_detr/configs/dab_detr_r50_50ep.py"), "./output/dab_detr_r50_12ep_baseline")
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
