"""A trained DINO with R50, detrex's own of 12 epochs, goes on with FDR for one epoch more.

At the host's own rate, which falls over the epoch (docs/trained-models.md: a gentle rate brings little). Fetch the
checkpoint from detrex's model zoo; another place: ``model.checkpoint=...`` on the command line.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from dfine_plugin.projects.trained import wrap_trained

from .dino_r50_4scale_12ep_baseline import dataloader, model, optimizer, train

STEPS = 7500  # of 16 images: an epoch of COCO

model = L(wrap_trained)(
    model=model, checkpoint="dino_r50_4scale_12ep.pth", dataloader=dataloader.train, device=train.device
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=100 / STEPS,
    warmup_factor=0.01,
)
train.max_iter = STEPS
train.init_checkpoint = ""
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_r50_4scale_retrofit"
