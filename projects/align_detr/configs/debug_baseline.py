"""Align-DETR, small, for some steps on a CPU."""

from dfine_plugin.projects.common import PARTS, detrex_config, into
from dfine_plugin.projects.debug import debug

_config = into(
    debug(detrex_config("align_detr/configs/aligndetr_k=2_r50_4scale_12ep.py")), "./output/align_detr_debug_baseline"
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
