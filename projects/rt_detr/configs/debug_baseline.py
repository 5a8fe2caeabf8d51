"""RT-DETR, small, for some steps on a CPU."""

from dfine_plugin.projects.common import PARTS
from dfine_plugin.projects.debug import briefly
from dfine_plugin.projects.rt_detr.recipe import recipe

_config = briefly(recipe(18, "./output/rt_detr_debug_baseline", backbone_factor=1.0))
dataloader, lr_multiplier, model, optimizer, train = (_config[part] for part in PARTS)
model.device = "cpu"
model.detector.update(
    num_classes=3,
    backbone={"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
    encoder_in_channels=[32, 64, 128],
    encoder_hidden_dim=64,
    encoder_ffn_dim=128,
    d_model=64,
    decoder_in_channels=[64, 64, 64],
    decoder_ffn_dim=128,
    num_queries=30,
    num_denoising=20,
    freeze_backbone_batch_norms=False,
)
