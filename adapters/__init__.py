"""Adapters: how each host DETR is tied to the FDR head."""
