"""Group-DETR with R50, with FDR and GO-LSD: the baseline and the paper's recipe."""

from detectron2.config import LazyCall as L

from dfine_plugin import FDRConfig, wrap_decoder

from .group_detr_r50_50ep_baseline import dataloader, lr_multiplier, model, optimizer, train

model = L(wrap_decoder)(model=model, config=L(FDRConfig.paper)())
train.output_dir = dataloader.evaluator.output_dir = "./output/group_detr_r50_50ep_dfine"
