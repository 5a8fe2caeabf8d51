"""One text for all images, where a host that asks for both is to be a function of images alone."""

from typing import Any

from torch import Tensor, nn

from dfine_plugin.errors import UnsupportedModelError

from ..host_parts import Host

_PROMPT = "_dfine_plugin_prompt"


def fix_prompt(model: Host, input_ids: Tensor, **inputs: Tensor) -> None:
    """Fix the text that a model is asked with where it is given images alone.

    That is by :func:`~dfine_plugin.calibrate` and :func:`~dfine_plugin.predict_distributions`. The model's own forward
    takes images and texts as before. Copies of the model keep the text, folders and state dicts do not.

    Args:
        model: a Grounding DINO or an MM Grounding DINO, bare, wrapped or deployed.
        input_ids: ``(1, T)`` tokens.
        inputs: what else the tokenizer gives, ``(1, T)`` each: ``attention_mask``, ``token_type_ids``.

    Raises:
        ValueError: these are no tensors of one text.

    Example:
        >>> fix_prompt(model, **processor.tokenizer("a cat. a dog.", return_tensors="pt"))
        >>> calibrate(model, (batch["pixel_values"] for batch in loader))
    """
    texts = {"input_ids": input_ids, **inputs}
    wrong = [name for name, x in texts.items() if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != 1]
    if wrong:
        raise ValueError(f"fix_prompt takes tensors (1, T) of one text; {', '.join(wrong)} is none")
    model.__dict__[_PROMPT] = texts


class PromptedDetector(nn.Module):
    """A model's logits, of the tokens of the text that :func:`fix_prompt` has fixed, and boxes, as a tuple.

    Raises:
        UnsupportedModelError: no text has been fixed.
    """

    exports = False
    """Whether :func:`~dfine_plugin.export.export_onnx` makes a graph of it."""

    def __init__(self, model: Host) -> None:
        super().__init__()
        if _PROMPT not in model.__dict__:
            raise UnsupportedModelError(
                f"this {type(model).__name__} is asked with images and a text, and here with images alone: fix one "
                "text for all images before, dfine_plugin.adapters.transformers.prompt.fix_prompt(model, "
                '**tokenizer("a cat. a dog.", return_tensors="pt"))'
            )
        self.model = model
        texts: dict[str, Any] = model.__dict__[_PROMPT]
        self.names = list(texts)
        for name, text in texts.items():
            self.register_buffer(name, text.to(model.device), persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        texts = {name: self.get_buffer(name).expand(len(pixel_values), -1) for name in self.names}
        outputs = self.model(pixel_values, **texts)
        return outputs.logits, outputs.pred_boxes
