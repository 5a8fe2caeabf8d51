"""H-Deformable-DETR, two-stage, small, for some steps on a CPU."""

from dfine_plugin.projects.common import PARTS, detrex_config, into
from dfine_plugin.projects.debug import debug

_config = into(
    debug(detrex_config("h_deformable_detr/configs/h_deformable_detr_r50_two_stage_12ep.py")),
    "./output/h_deformable_detr_debug_baseline",
)
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
