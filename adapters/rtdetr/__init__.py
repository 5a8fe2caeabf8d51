"""Adapter for RT-DETR and RT-DETRv2 of their authors' own repository."""
