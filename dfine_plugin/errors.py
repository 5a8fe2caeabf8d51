"""The plugin's own exceptions. Their texts are part of the interface and are tested."""


class DFinePluginError(Exception):
    """Base of every error that the plugin raises on its own account."""


class UnsupportedModelError(DFinePluginError, TypeError):
    """No adapter can wrap this model, or not as it is configured."""


class WrapStateError(DFinePluginError, RuntimeError):
    """The model is wrapped where it must not be, or not wrapped where it must be."""


class SettingsMismatchError(DFinePluginError, RuntimeError):
    """A state dict whose weights mean other boxes under the model's settings."""


class InvalidTargetError(DFinePluginError, ValueError):
    """A ground truth that no loss can use: a label out of range, a box in pixels, a box of no area."""


class NonFiniteError(DFinePluginError, FloatingPointError):
    """A tensor that training cannot go on with: NaN or infinity in logits, boxes or a loss."""


def first_line(error: Exception) -> str:
    """What an error says first, its type if nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
