"""DINO with EVA-02 of base size, with FDR and GO-LSD: the baseline and the paper's recipe."""

from detectron2.config import LazyCall as L

from dfine_plugin import FDRConfig, wrap_decoder

from .dino_eva_02_b_1024_12ep_baseline import dataloader, lr_multiplier, model, optimizer, train

model = L(wrap_decoder)(model=model, config=L(FDRConfig.paper)())
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_eva_02_b_1024_12ep_dfine"
