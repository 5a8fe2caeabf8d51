"""MMDetection's detectors, wrapped, for its configs.

A config imports this module and gives its detector another type, with the settings of
:class:`~dfine_plugin.FDRConfig` as ``fdr``:

    _base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
    custom_imports = dict(imports=["dfine_plugin.projects.mmdet"])
    model = dict(type="FDRDINO", fdr=dict())
"""

from collections.abc import Mapping
from typing import Any

from mmdet.models.detectors import DINO, DeformableDETR
from mmdet.registry import MODELS

from dfine_plugin import FDRConfig, wrap_decoder


@MODELS.register_module()
def FDRDINO(fdr: Mapping[str, Any] | None = None, **settings: Any) -> DINO:
    """A wrapped DINO of further settings."""
    return wrap_decoder(DINO(**settings), FDRConfig(**(fdr or {})))


@MODELS.register_module()
def FDRDeformableDETR(fdr: Mapping[str, Any] | None = None, **settings: Any) -> DeformableDETR:
    """A wrapped Deformable-DETR of further settings."""
    return wrap_decoder(DeformableDETR(**settings), FDRConfig(**(fdr or {})))
