"""RT-DETR with R101, with FDR and GO-LSD: the baseline and the paper's recipe."""

from detectron2.config import LazyCall as L

from dfine_plugin import FDRConfig, wrap_decoder

from .rt_detr_r101_72ep_baseline import dataloader, lr_multiplier, model, optimizer, train

model.detector = L(wrap_decoder)(model=model.detector, config=L(FDRConfig.paper)())
train.output_dir = dataloader.evaluator.output_dir = "./output/rt_detr_r101_72ep_dfine"
