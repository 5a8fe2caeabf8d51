"""dfine-plugin: D-FINE's box regression (FDR) and self-distillation (GO-LSD) for the DETR you already have.

``model = wrap_decoder(model)``, train as before, get tighter boxes. Importing this package imports no host library, and
torch with the first name that needs it: commands answer at once.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boxes import decode_boxes, encode_boxes
    from .calibration import calibrate
    from .checkpoints import load_pretrained
    from .config import FDRConfig
    from .errors import (
        DFinePluginError,
        InvalidTargetError,
        NonFiniteError,
        SettingsMismatchError,
        UnsupportedModelError,
        WrapStateError,
    )
    from .head import FDRHead
    from .losses import ddf_loss, fgl_loss
    from .matching import GOLSDMatcher, union_matching
    from .mosaics import make_mosaics
    from .registry import register_adapter, supported_hosts
    from .teaching import learn_from
    from .uncertainty import ConformalScale, edge_deviations
    from .weighting import weighting_function
    from .wrapping import deploy, is_wrapped, unwrap_decoder, wrap_criterion, wrap_decoder

__version__ = "0.2.0.dev0"

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():
    # ``python -m`` in the root of a checkout imports this folder, installed or not: its subpackages lie beside it
    __path__.append(str(_checkout))

__all__ = [
    "ConformalScale",
    "DFinePluginError",
    "FDRConfig",
    "FDRHead",
    "GOLSDMatcher",
    "InvalidTargetError",
    "NonFiniteError",
    "SettingsMismatchError",
    "UnsupportedModelError",
    "WrapStateError",
    "calibrate",
    "ddf_loss",
    "decode_boxes",
    "deploy",
    "edge_deviations",
    "encode_boxes",
    "fgl_loss",
    "is_wrapped",
    "learn_from",
    "load_pretrained",
    "make_mosaics",
    "register_adapter",
    "supported_hosts",
    "union_matching",
    "unwrap_decoder",
    "weighting_function",
    "wrap_criterion",
    "wrap_decoder",
]

# where the names are, those that need no torch first
_MODULES = (
    "errors",
    "config",
    "boxes",
    "checkpoints",
    "head",
    "losses",
    "matching",
    "mosaics",
    "registry",
    "weighting",
    "uncertainty",
    "wrapping",
    "calibration",
    "teaching",
)


if not TYPE_CHECKING:  # a type checker would take any name for one of the package's

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name in __all__:
            for module in map(__getattr__, _MODULES):
                if name in vars(module):
                    globals()[name] = value = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
