"""detrex's DINO with EVA: a copy of its DINO that pads images to squares and hands their sizes on."""

from functools import partial
from typing import Any, ClassVar

from projects.dino_eva.modeling import DINOCriterion, DINOTransformerDecoder
from torch import Tensor, nn

from dfine_plugin.registry import register_adapter

from ..host_parts import Host
from .adapter import DetrexAdapter
from .criterion import DenoisingMetas
from .decoder import RefiningDecoder
from .detector import DetrexDetector


class FDRDINODecoder(RefiningDecoder, DINOTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDDINOCriterion(DenoisingMetas, DINOCriterion):
    """The host's criterion, fed with the union."""


class DINOEVADetector(DetrexDetector):
    """The same for a host that asks its preprocessing for the images' sizes as well. Images come padded."""

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        self.model.preprocess_image = partial(_with_sizes, self.model.preprocess_image)


def _with_sizes(preprocess: Any, exchange: list[Tensor]) -> tuple[Any, list[Any]]:
    return preprocess(exchange), [exchange[0].shape[-2:]] * len(exchange[0])


@register_adapter("projects.dino_eva.modeling.dino.DINO")
class DINOEVAAdapter(DetrexAdapter):
    """DINO with EVA."""

    decoder_classes: ClassVar = {DINOTransformerDecoder: FDRDINODecoder}
    criterion_classes: ClassVar = {DINOCriterion: GOLSDDINOCriterion}
    reported_norm = "norm"

    def detector(self, model: Host) -> nn.Module:
        return DINOEVADetector(model)
