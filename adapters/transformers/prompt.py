"""One text for all images, where a host that asks for both is to be a function of images alone."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS, build_label_maps

from dfine_plugin.errors import UnsupportedModelError

from ..host_parts import Host

LEAST_PROBABILITY = 1e-7
"""Of a class and of its absence: what half precision still holds."""

_PROMPT = "_dfine_plugin_prompt"
_MASKS = "generate_masks_with_special_tokens_and_transfer_map"
"""What the hosts' modules call their function from tokens to attention masks and positions."""


def fix_prompt(model: Host, input_ids: Tensor, **inputs: Tensor) -> None:
    """Fix the text that a model is asked with where it is given images alone.

    That is by :func:`~dfine_plugin.calibrate` and :func:`~dfine_plugin.predict_distributions`. The model's own forward
    takes images and texts as before. Copies of the model keep the text, folders and state dicts do not.

    Args:
        model: a Grounding DINO or an MM Grounding DINO, bare, wrapped or deployed.
        input_ids: ``(1, T)`` tokens.
        inputs: what else the tokenizer gives, ``(1, T)`` each: ``attention_mask``, ``token_type_ids``.

    Raises:
        ValueError: these are no tensors of one text, it names no class, or has more tokens than the model takes.

    Example:
        >>> fix_prompt(model, **processor.tokenizer("a cat. a dog.", return_tensors="pt"))
        >>> calibrate(model, (batch["pixel_values"] for batch in loader))
    """
    texts = {"input_ids": input_ids, **inputs}
    wrong = [name for name, x in texts.items() if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != 1]
    if wrong:
        raise ValueError(f"fix_prompt takes tensors (1, T) of one text; {', '.join(wrong)} is none")
    if not count_phrases(input_ids):
        raise ValueError("the text names no class, as 'a cat. a dog.' names two")
    if input_ids.shape[1] > model.config.max_text_len:
        raise ValueError(f"the text has {input_ids.shape[1]} tokens, and the model takes {model.config.max_text_len}")
    model.__dict__[_PROMPT] = texts


def count_phrases(input_ids: Tensor) -> Tensor:
    """How many classes each text names, ``(B,)``: runs of tokens between those that the host takes for delimiters.

    Args:
        input_ids: ``(B, T)``.
    """
    delimiters = torch.tensor([*SPECIAL_TOKENS, 0], device=input_ids.device)  # 0 pads
    is_delimiter = torch.isin(input_ids, delimiters)
    return (is_delimiter[:, :-1] & ~is_delimiter[:, 1:]).sum(1)


def phrases(input_ids: Tensor) -> Tensor:
    """Which tokens each class of a text has, ``(K, T)`` bool, as the host counts them.

    Args:
        input_ids: ``(T,)``.
    """
    texts: Any = input_ids[None]
    (label_map,) = build_label_maps(torch.empty(1, len(input_ids)), texts)
    return label_map.bool()


def token_shares(label_maps: Sequence[Tensor]) -> Tensor:
    """What each token contributes to each class: ``(B, T, K)``, of a class that an image's text has adding up to 1.

    Args:
        label_maps: for each image ``(K_i, T)``, 1 for the tokens of a class and 0 for all others.
    """
    maps = pad_sequence(list(label_maps), batch_first=True)
    return (maps / maps.sum(-1, keepdim=True).clamp(min=1)).transpose(1, 2)


def class_logits(logits: Tensor, shares: Tensor) -> Tensor:
    """Logits ``(B, Q, K)`` of classes whose probability is the mean of their tokens', as the authors evaluate on COCO.

    Args:
        logits: ``(B, Q, T)`` of tokens, or of more, which fill the host's logits up; minus infinity where masked.
        shares: ``(T, K)``: :func:`token_shares` of one text.
    """
    logits, shares = logits[..., : len(shares)], shares.to(logits.dtype)
    # sigmoid(x), whose small values runtimes of graphs give to some 1e-8 alone
    present, absent = (F.softplus(-x).neg().exp() @ shares for x in (logits, -logits))
    return present.clamp(min=LEAST_PROBABILITY).log() - absent.clamp(min=LEAST_PROBABILITY).log()


class FixedText(nn.Module):
    """Stands in for a text encoder: what it has put out for one text, for a batch of any size."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states: Tensor
        self.register_buffer("states", states, persistent=False)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.states.expand(len(input_ids), -1, -1))


class PromptedDetector(nn.Module):
    """A model's logits ``(B, Q, K)`` of the K classes that the text of :func:`fix_prompt` names, and boxes, as a tuple.

    Raises:
        UnsupportedModelError: no text has been fixed.
    """

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
        self.shares: Tensor
        (shares,) = token_shares([phrases(*texts["input_ids"].to(model.device))])
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        texts = {name: self.get_buffer(name).expand(len(pixel_values), -1) for name in self.names}
        outputs = self.model(pixel_values, **texts)
        return class_logits(outputs.logits, self.shares), outputs.pred_boxes

    @contextmanager
    def in_graph(self, images: Tensor) -> Iterator[None]:
        """While a graph is made: what is of the text alone is a constant in it. The model loses its text encoder.

        Args:
            images: ``(1, 3, H, W)``, as the graph will take them.
        """
        inner = self.model.model
        code = inspect.unwrap(type(inner).forward).__globals__
        fixed = code[_MASKS](self.get_buffer("input_ids"), special_tokens=inner.special_tokens)
        states: list[Tensor] = []
        hook = inner.text_backbone.register_forward_hook(lambda _, __, outputs: states.append(outputs[0]))
        with hook, torch.no_grad():
            self(images)
        inner.text_backbone = FixedText(*states)

        def masks(input_ids: Tensor, special_tokens: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.expand(len(input_ids), *x.shape[1:]) for x in fixed)

        with patch.dict(code, {_MASKS: masks}):
            yield
