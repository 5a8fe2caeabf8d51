"""detrex's DINO. Its decoder refines on un-normed states and its model reports on normed ones, looking forward twice;
wrapped, both give the box that was refined on the un-normed states."""

from typing import Any, ClassVar

from projects.dino.modeling import DINOCriterion, DINOTransformerDecoder

from dfine_plugin.registry import register_adapter

from .adapter import DetrexAdapter
from .criterion import GOLSDCriterion
from .decoder import RefiningDecoder


class FDRDINODecoder(RefiningDecoder, DINOTransformerDecoder):
    """The host's decoder, refining distributions."""


class GOLSDDINOCriterion(GOLSDCriterion, DINOCriterion):
    """The host's criterion, fed with the union. Its denoising queries come in ``dn_metas``."""

    denoises = True
    encoder_is_decoded = True

    def denoising(self, outputs: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any] | None:
        return (args[0] or {}).get("output_known_lbs_bboxes") if args else None

    def with_denoising(
        self, outputs: dict[str, Any], args: tuple[Any, ...], known: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        return outputs, ({**args[0], "output_known_lbs_bboxes": known},)


@register_adapter("projects.dino.modeling.dino.DINO")
class DINOAdapter(DetrexAdapter):
    """DINO."""

    decoder_classes: ClassVar = {DINOTransformerDecoder: FDRDINODecoder}
    criterion_classes: ClassVar = {DINOCriterion: GOLSDDINOCriterion}
    reported_norm = "norm"
