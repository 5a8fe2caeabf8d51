"""What can be chosen about FDR and GO-LSD."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bounds import check_bins, check_number

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1

WEIGHTINGS = ("nonuniform", "uniform")
"""The choices for W."""

CLASS_LOSSES = ("host", "mal")
"""The choices for the loss of classes."""

PARTS = ("all", "head")
"""The choices for what is trained: the whole model, or its FDR head alone."""


@dataclass(frozen=True)
class FDRConfig:
    """Settings of the FDR head and of GO-LSD.

    The defaults are the best recipe measured so far (``benchmarks/results``): FDR and FGL, without GO-LSD and LQE.
    :meth:`paper` is the paper's recipe, exactly.

    Attributes:
        num_bins: N, even; each edge has N + 1 bins.
        a: range of the weighting function W, in units of the initial box's side.
        c: its curvature, in the same units.
        weighting: ``"nonuniform"`` (the paper's W) or ``"uniform"`` (evenly spaced from -2a to 2a, as in GFocal).
        temperature: T of the DDF distillation.
        fgl_weight: weight of FGL.
        ddf_weight: weight of DDF.
        union: GO matching: box losses, FGL and DDF of all layers share the union of all layers' matches.
        ddf: distil the last layer's distributions into the layers before it. ``union=False, ddf=False`` is FDR alone.
        residual_scale: multiplies what each layer's MLP adds to the logits. A head of scale 1 and larger weights
            computes the same; but from weights of zero, under Adam, the distributions move that many times faster.
            1 is the paper's; schedules too short for the paper's head to leave the initial boxes need more.
        lqe: add a quality estimated from the shape of the distributions to the class logits, as the paper does. Off: no
            difference was measured that would pay for its parameters.
        class_loss: ``"host"``, the host's own, or ``"mal"``: DEIM's matchability-aware loss
            (:func:`~dfine_plugin.losses.matchability_aware_loss`) in its place, under its name and with its weight.
        distribution_losses_train: what the gradients of FGL and DDF reach: ``"all"``, the paper's, or ``"head"``: the
            FDR head alone, and the host learns from its own losses on the refined boxes. The head then runs twice in
            training.
        trainable: ``"all"``, or ``"head"``: the FDR head alone learns, and the host stays as it is, its BatchNorms'
            statistics included.
        initial_layer: the decoder layer, from 1, that the initial boxes, and so the frame of all distributions, come
            of. The paper's is the first. A later one is for hosts whose layers all predict from one reference that
            stays where it is (Conditional-, Group-, LW- and RF-DETR): there no layer waits for another one's boxes.
            None is the best one known for the host: the second for Conditional- and Group-DETR, the first for others.
        box_refinement: consent to wrap a host that does not refine its reference points from layer to layer. FDR
            does, so wrapping such a host changes what its decoder layers attend to.
        target_gating: let each decoder layer learn what a query keeps of itself, and what it takes of the image, as
            D-FINE's own decoder does (:class:`~dfine_plugin.gating.TargetGate`); at first the host, to the last bit. It
            is a part of the host's layers, and adds ``4 C^2`` parameters to each, of width C.

    Raises:
        ValueError: at construction, with the bound that was broken.
    """

    num_bins: int = 32
    a: float = 0.5
    c: float = 0.25
    weighting: str = "nonuniform"
    temperature: float = 5.0
    fgl_weight: float = 0.15
    ddf_weight: float = 1.5
    union: bool = False
    ddf: bool = False
    residual_scale: float = 2.0
    lqe: bool = False
    class_loss: str = "host"
    distribution_losses_train: str = "all"
    trainable: str = "all"
    initial_layer: int | None = None
    box_refinement: bool = False
    target_gating: bool = False

    def __post_init__(self) -> None:
        check_bins(self.num_bins, self.a, self.c)
        choices = {
            "weighting": WEIGHTINGS,
            "class_loss": CLASS_LOSSES,
            "distribution_losses_train": PARTS,
            "trainable": PARTS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")
        check_number("temperature", self.temperature, above=0)
        check_number("residual_scale", self.residual_scale, above=0)
        check_number("fgl_weight", self.fgl_weight, least=0)
        check_number("ddf_weight", self.ddf_weight, least=0)
        layer = self.initial_layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            raise ValueError(f"initial_layer must be an integer of at least 1, got {layer!r}")
        for name in ("union", "ddf", "lqe", "target_gating", "box_refinement"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.target_gating and self.trainable == "head":
            raise ValueError("target_gating changes the host's layers, which trainable='head' is to leave as they are")

    @classmethod
    def paper(cls, **changes: Any) -> FDRConfig:
        """The paper's recipe, exactly: FDR with GO-LSD and LQE, residuals unscaled, initial boxes of the first layer.

        Args:
            changes: settings to choose otherwise.
        """
        return cls(**{"union": True, "ddf": True, "lqe": True, "residual_scale": 1.0, "initial_layer": 1, **changes})

    def bin_values(self) -> Tensor:
        """The offset of each bin, in units of the initial box's side: ``(num_bins + 1,)`` float32."""
        from .weighting import uniform_bins, weighting_function

        if self.weighting == "uniform":
            return uniform_bins(self.num_bins, self.a)
        return weighting_function(self.num_bins, self.a, self.c)

    def to_dict(self) -> dict[str, Any]:
        """All settings and the version of their format, as JSON can hold them."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> FDRConfig:
        """The inverse of :meth:`to_dict`. Raises ``ValueError`` on an unknown version or setting."""
        if not isinstance(settings, dict):
            raise ValueError(f"settings of an FDRConfig are a dict, got {settings!r}")
        written, settings = settings, dict(settings)
        version = settings.pop("version", VERSION)
        if version != VERSION:
            raise ValueError(f"FDRConfig of version {version!r}; this dfine-plugin reads version {VERSION}")
        if len(written) > len(settings):  # by to_dict, and before there was a choice
            settings.setdefault("initial_layer", 1)
        unknown = sorted(settings.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"FDRConfig has no setting {', '.join(map(repr, unknown))}")
        return cls(**settings)

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> FDRConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))
