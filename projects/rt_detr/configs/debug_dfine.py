"""RT-DETR, small, with FDR and GO-LSD."""

from detectron2.config import LazyCall as L

from dfine_plugin import FDRConfig, wrap_decoder

from .debug_baseline import dataloader, lr_multiplier, model, optimizer, train

model.detector = L(wrap_decoder)(model=model.detector, config=L(FDRConfig.paper)())
train.output_dir = dataloader.evaluator.output_dir = "./output/rt_detr_debug_dfine"
