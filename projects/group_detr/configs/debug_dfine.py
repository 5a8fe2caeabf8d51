"""Group-DETR, small, with FDR and GO-LSD."""

from detectron2.config import LazyCall as L

from dfine_plugin import FDRConfig, wrap_decoder

from .debug_baseline import dataloader, lr_multiplier, model, optimizer, train

model = L(wrap_decoder)(model=model, config=L(FDRConfig.paper)())
train.output_dir = dataloader.evaluator.output_dir = "./output/group_detr_debug_dfine"
