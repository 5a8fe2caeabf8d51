"""Bare hosts that learn their classes by MAL, so that a wrapped one with ``class_loss="mal"`` has a fair twin."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

from torch import nn

from dfine_plugin.adapters.class_losses import ClassLosses


def learn_classes_by_mal(model: nn.Module) -> None:
    """Put MAL in the place of a bare host's loss of classes, as ``FDRConfig(class_loss="mal")`` does, in place.

    Raises:
        ValueError: the host's loss is none that MAL is known to fit.
    """
    detector: Any = getattr(model, "detector", model)
    if isinstance(getattr(detector, "criterion", None), nn.Module):
        from dfine_plugin.adapters.detrex.criterion import GOLSDCriterion

        detector.criterion.__class__ = _by_mal(type(detector.criterion), GOLSDCriterion)
        return
    function = getattr(detector, "loss_function", None)
    if function is None:
        raise ValueError(f"{type(detector).__name__} has no loss function that MAL is known to fit")
    module = sys.modules[function.__module__]
    for ours in _criteria_of_transformers():
        for host_class in ours.__mro__:
            if host_class.__module__ == module.__name__:
                # which the loss function makes one of at each call
                stand_in = patch.object(module, host_class.__name__, _by_mal(host_class, ours))
                detector.loss_function = stand_in(function)
                return
    raise ValueError(f"{type(detector).__name__} has a loss that MAL is not known to fit: {function.__name__}")


def _criteria_of_transformers() -> list[type[ClassLosses]]:
    from dfine_plugin.adapters.transformers.deformable_detr import UnionDeformableDetrLoss
    from dfine_plugin.adapters.transformers.lw_detr import UnionLwDetrLoss
    from dfine_plugin.adapters.transformers.rt_detr import UnionRTDetrLoss

    return [UnionDeformableDetrLoss, UnionLwDetrLoss, UnionRTDetrLoss]


def _by_mal(host_class: type[nn.Module], ours: type[ClassLosses]) -> type[nn.Module]:
    """A host's criterion with MAL for its classes, under the names that the plugin's criterion for it knows."""
    names = {name: getattr(ours, name) for name in ("logits_key", "labels_key", "class_losses")}
    return type(f"{host_class.__name__}ByMAL", (ClassLosses, host_class), {**names, "class_loss": "mal"})
