"""DINO, small, trained by ``debug_baseline.py``, goes on with FDR."""

from detectron2.config import LazyCall as L

from dfine_plugin.projects.trained import wrap_trained

from .debug_baseline import dataloader, lr_multiplier, model, optimizer, train

model = L(wrap_trained)(
    model=model,
    checkpoint="./output/dino_debug_baseline/model_final.pth",
    dataloader=dataloader.train,
    num_images=16,
    device=train.device,
)
train.init_checkpoint = ""
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_debug_retrofit"
