"""DINO with EVA-02, small and with a ResNet instead, for some steps on a CPU."""

from dfine_plugin.projects.common import PARTS, detrex_config, into
from dfine_plugin.projects.debug import debug

_config = into(
    debug(detrex_config("dino_eva/configs/dino-eva-02/dino_eva_02_vitdet_b_4attn_1024_lrd0p7_4scale_12ep.py")),
    "./output/dino_eva_debug_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
