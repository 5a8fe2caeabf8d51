"""The FDR head: refines, layer by layer, a distribution for each edge of the initial boxes."""

from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import at_least_float32, inverse_sigmoid, move_edges
from .config import WEIGHTINGS, FDRConfig
from .errors import SettingsMismatchError, WrapStateError
from .gating import TargetGate

QUALITY_TOP_K = 4
"""How many of an edge's highest probabilities, besides their mean, the location quality is estimated from."""


STORED_SETTINGS = ("num_bins", "a", "c", "weighting", "residual_scale", "lqe", "initial_layer")
"""The settings that change what the weights of a head mean, in the order in which its state dict holds them.

Without the last one where it is 1, as in state dicts of before it.
"""


def locate_initial_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """b0 = sigmoid(delta + isig(reference)), the boxes whose edges FDR refines (D-FINE, section 4.1).

    Args:
        delta: ``(..., 4)``, the host's first box head on its first layer's output.
        reference: ``(..., 4)`` boxes or ``(..., 2)`` centres in ``[0, 1]``; a centre moves the centre only.

    Returns:
        ``(..., 4)`` cxcywh, float32 or float64, with the gradient of both inputs.
    """
    shift = inverse_sigmoid(at_least_float32(reference))
    if reference.shape[-1] == 2:
        shift = F.pad(shift, (0, 2))
    return (at_least_float32(delta) + shift).sigmoid()


class DistributionMLP(nn.Sequential):
    """Three Linear layers from hidden states to residual logits; the last starts at zero, so that boxes start at b0."""

    def __init__(self, hidden_dim: int, num_logits: int) -> None:
        super().__init__(
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            zero_linear(hidden_dim, num_logits),
        )


class LocationQuality(nn.Sequential):
    """LQE: a correction of the class logit from the peaks of the four distributions; starts at zero."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(nn.Linear(4 * (QUALITY_TOP_K + 1), width), nn.ReLU(), zero_linear(width, 1))


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear whose weight and bias start at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass
class Refinement:
    """Where the refinement of a batch's boxes stands after some layers.

    Attributes:
        initial_boxes: ``(B, Q, 4)`` cxcywh, detached: the frame of all layers.
        boxes: ``(B, Q, 4)`` cxcywh after the latest layer.
        corner_logits: ``(B, Q, 4, K)`` after the latest layer, None before the first.
        probabilities: ``(B, Q, 4, K)``, the softmax of the corner logits, shared by boxes and location quality; None
            before the first.
        hidden_states: ``(B, Q, C)``, the latest layer's, detached; None before the first.
        head_logits: the corner logits once more, whose gradient ends in the head; None where nothing asks for them.
    """

    initial_boxes: Tensor
    boxes: Tensor
    corner_logits: Tensor | None = None
    probabilities: Tensor | None = None
    hidden_states: Tensor | None = None
    head_logits: Tensor | None = None


class FDRHead(nn.Module):
    """Fine-grained Distribution Refinement (D-FINE, section 4.1), one residual MLP a decoder layer.

    ``z_l = z_{l-1} + s MLP_l(h_l + stopgrad(h_{l-1}))`` with z_0 = 0, h_0 = 0 and s the ``residual_scale``; ``box_l`` =
    the initial box with its edges moved by the expectations of ``softmax(z_l)`` under W (:func:`decode_boxes`). A fresh
    head predicts zero logits, hence the initial boxes.

    Its state dict carries, as a small tensor, the settings that its weights mean nothing without; loading one of other
    settings raises :class:`SettingsMismatchError`. State dicts of version 0.1.0 have none and load unchecked.

    With ``target_gating`` it holds the gates of the host's layers, too, which the adapters tie to these.

    Args:
        hidden_dim: C, the width of the decoder.
        num_layers: L.
        config: bins, W and whether to estimate the location quality.

    Example:
        >>> head = FDRHead(hidden_dim=256, num_layers=6)
        >>> state = head.start(initial_boxes)                    # (B, Q, 4)
        >>> for layer, hidden in enumerate(decoder_states):      # (B, Q, 256)
        ...     state = head(layer, hidden, state)               # state.boxes, state.corner_logits
    """

    weights: Tensor

    def __init__(self, hidden_dim: int, num_layers: int, config: FDRConfig | None = None) -> None:
        super().__init__()
        self.config = config or FDRConfig()
        self.num_layers = num_layers
        self.initial_layer = self.config.initial_layer or 1
        self._check_num_layers(num_layers)
        self.residual_scale = self.config.residual_scale
        num_values = self.config.num_bins + 1
        self.refine = nn.ModuleList(DistributionMLP(hidden_dim, 4 * num_values) for _ in range(num_layers))
        self.quality = nn.ModuleList(LocationQuality() for _ in range(num_layers if self.config.lqe else 0))
        num_gates = num_layers if self.config.target_gating else 0
        self.gates = nn.ModuleList(TargetGate(hidden_dim) for _ in range(num_gates))
        self.register_buffer("weights", self.config.bin_values(), persistent=False)

    def start(self, initial_boxes: Tensor) -> Refinement:
        """The state before the first layer, from ``(B, Q, 4)`` initial boxes, which it detaches."""
        frame = at_least_float32(initial_boxes).detach()
        return Refinement(initial_boxes=frame, boxes=frame)

    def forward(self, layer: int, hidden_states: Tensor, state: Refinement) -> Refinement:
        """Refine by decoder layer ``layer`` (from 0), whose output ``(B, Q, C)`` the hidden states are."""
        inputs = hidden_states if state.hidden_states is None else hidden_states + state.hidden_states
        corner_logits = self._add_residual(layer, inputs, state.corner_logits)
        head_logits = None
        if self.training and self.config.distribution_losses_train == "head":
            head_logits = self._add_residual(layer, inputs.detach(), state.head_logits)
        probabilities = corner_logits.softmax(-1)
        return Refinement(
            initial_boxes=state.initial_boxes,
            boxes=move_edges(state.initial_boxes, probabilities, self.weights),
            corner_logits=corner_logits,
            probabilities=probabilities,
            hidden_states=hidden_states.detach(),
            head_logits=head_logits,
        )

    def _add_residual(self, layer: int, inputs: Tensor, corner_logits: Tensor | None) -> Tensor:
        residual = at_least_float32(self.refine[layer](inputs)).unflatten(-1, (4, len(self.weights)))
        if self.residual_scale != 1:
            residual = self.residual_scale * residual
        return residual if corner_logits is None else corner_logits + residual

    def quality_logits(self, layer: int, probabilities: Tensor) -> Tensor | None:
        """What LQE adds to the layer's class logits: ``(B, Q, 4, K)`` distributions to ``(B, Q, 1)``; None without."""
        mlp = self.quality[layer] if len(self.quality) else None
        if not isinstance(mlp, LocationQuality):
            return None
        peaks = probabilities.topk(QUALITY_TOP_K, dim=-1).values
        shape = torch.cat([peaks, peaks.mean(-1, keepdim=True)], dim=-1).flatten(-2)
        dtypes = [parameter.dtype for parameter in mlp.parameters()]  # none where it is quantized
        return mlp(shape.to(dtypes[0]) if dtypes else shape)

    def _check_num_layers(self, num_layers: int) -> None:
        """Raise ``ValueError`` where the layer that the initial boxes come of is not among the first ``num_layers``."""
        if self.initial_layer > num_layers:
            raise ValueError(
                f"the initial boxes come of decoder layer {self.initial_layer} (initial_layer), which is not "
                f"among the first {num_layers}"
            )

    def keep_layers(self, num_layers: int) -> None:
        """Drop all layers but the first ``num_layers``, whose boxes stay as they are.

        Raises:
            ValueError: the initial boxes come of a later one. Nothing is changed.
        """
        self._check_num_layers(num_layers)
        self.refine = self.refine[:num_layers]
        self.quality = self.quality[:num_layers]
        self.gates = self.gates[:num_layers]
        self.num_layers = num_layers

    def check_deployable(self) -> None:
        """Raise :class:`WrapStateError` if :meth:`deploy` cannot scale the weights, for they are quantized."""
        if self.residual_scale != 1 and not all(type(layer) is nn.Linear for layer in self._last_layers()):
            raise WrapStateError("deploy scales weights that are quantized here: deploy the model first, then quantize")

    def deploy(self) -> None:
        """Drop what only training uses: the quality estimates of all layers but the last, and the residuals' scale,
        which the weights take over.

        Raises:
            WrapStateError: the weights cannot take it over, for they are quantized. Nothing is changed.
        """
        self.check_deployable()
        for layer in range(len(self.quality) - 1):
            self.quality[layer] = nn.Identity()
        with torch.no_grad():
            for last in self._last_layers():
                for parameter in last.parameters():
                    parameter.mul_(self.residual_scale)
        self.residual_scale = 1.0

    def get_extra_state(self) -> Tensor:
        """What the weights have to be read with: the values of :data:`STORED_SETTINGS`, float64.

        A tensor, for safetensors holds nothing else; of its own, no buffer, for no average over models and no cast to
        half precision may touch it.
        """
        values = {**self.config.to_dict(), "residual_scale": self.residual_scale, "initial_layer": self.initial_layer}
        values["weighting"] = WEIGHTINGS.index(self.config.weighting)
        stored = STORED_SETTINGS if self.initial_layer > 1 else STORED_SETTINGS[:-1]
        return torch.tensor([float(values[name]) for name in stored], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Compare with the settings in a state dict.

        Raises:
            SettingsMismatchError: names those that differ.
        """
        known = [(len(STORED_SETTINGS) - 1,), (len(STORED_SETTINGS),)]
        if not isinstance(state, Tensor) or not state.is_floating_point() or state.shape not in known:
            raise SettingsMismatchError("what the state dict has for the settings of its FDR head is not that")
        # state dicts get cast and averaged in many ways
        rounding = max(torch.finfo(state.dtype).eps, 1e-6)
        differing = [
            f"{name} {_said(name, there)} (this model: {_said(name, here)})"
            for name, there, here in zip(STORED_SETTINGS, *map(_whole, (state, self.get_extra_state())), strict=True)
            if not abs(there - here) <= rounding * abs(here)  # nor is NaN
        ]
        if differing:
            raise SettingsMismatchError(
                f"the state dict's weights come from an FDR head with {', '.join(differing)}, and would give other "
                "boxes here; wrap the model with those settings"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # absent in version 0.1.0, whose state dicts load strictly, too
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        # nothing to tell the other way round: a part of a state dict has no gates either, and fresh ones change nothing
        if not len(self.gates) and any(key.startswith(f"{prefix}gates.") for key in state_dict):
            raise SettingsMismatchError(
                "the state dict's weights come from a model with target_gating True (this model: False), whose decoder "
                "layers compute something else; wrap the model with that setting"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.weights.is_meta:  # no state dict holds it
            given = (x for key, x in state_dict.items() if key.startswith(f"{prefix}refine.") and not x.is_meta)
            self.weights = self.config.bin_values().to(next(given, self.weights).device)

    def is_frozen_at_start(self) -> bool:
        """Whether no parameter is to be trained, and the last layers still hold the zeros that they start from."""
        return not any(p.requires_grad for p in self.parameters()) and not any(
            p.any() for last in self._last_layers() for p in last.parameters()
        )

    def _last_layers(self) -> list[nn.Module]:
        return [[*mlp.children()][-1] for mlp in self.refine]

    def _apply(self, fn, recurse=True):
        # W decides where boxes lie to a fraction of a pixel: it follows the device, never a cast to half precision
        super()._apply(fn, recurse)
        if self.weights.device.type != "meta":
            self.weights = self.config.bin_values().to(self.weights.device)
        return self


def _whole(state: Tensor) -> list[float]:
    """The value of every stored setting."""
    return [*state.tolist(), 1.0][: len(STORED_SETTINGS)]


def _said(name: str, value: float) -> str:
    """A stored setting as :class:`FDRConfig` takes it."""
    kind = type(getattr(FDRConfig.paper(), name))
    if kind is not str:
        return repr(kind(value) if isfinite(value) else value)
    return repr(WEIGHTINGS[int(value)]) if value in range(len(WEIGHTINGS)) else f"number {value:g}"
