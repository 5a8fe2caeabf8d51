"""DETA, small, for some steps on a CPU."""

from dfine_plugin.projects.common import PARTS, detrex_config, into
from dfine_plugin.projects.debug import debug

_config = into(debug(detrex_config("deta/configs/deta_r50_5scale_12ep.py")), "./output/deta_debug_baseline")
# fewer proposals and detections than DETA's NMS would take
_config.model.transformer.assign_first_stage = _config.model.criterion.assign_second_stage = False
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
