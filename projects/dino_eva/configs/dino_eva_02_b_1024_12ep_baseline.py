"""DINO with EVA-02 of base size: detrex's own config, 12 epochs, as it is."""

from dfine_plugin.projects.common import PARTS, detrex_config, into

_config = into(
    detrex_config("dino_eva/configs/dino-eva-02/dino_eva_02_vitdet_b_4attn_1024_lrd0p7_4scale_12ep.py"),
    "./output/dino_eva_02_b_1024_12ep_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
