"""RT-DETR of transformers as a detectron2 model."""

from .rt_detr import RTDETR, rt_detr

__all__ = ["RTDETR", "rt_detr"]
