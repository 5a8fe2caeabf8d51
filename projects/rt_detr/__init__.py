"""RT-DETR for detectron2."""
