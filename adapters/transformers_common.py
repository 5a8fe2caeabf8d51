"""What the adapters for transformers share: configs, ties and checkpoints."""

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError, WrapStateError
from dfine_plugin.head import FDRHead
from dfine_plugin.validation import check_targets
from dfine_plugin.wrapping import binding_of, wrap_decoder

from . import common
from .common import Host

SETTINGS = "dfine_plugin"
"""The attribute of a wrapped model's transformers config that carries the FDRConfig into config.json and back."""


@dataclass
class Retired(common.Retired):
    """With the host's declarations of tied parameters, as declared and as expanded."""

    ties: tuple[dict[str, str] | None, dict[str, str]] = (None, {})


class TransformersAdapter:
    """Base of the adapters for transformers: everything but the host's own decoder and loss.

    A subclass says which decoder class takes over (:attr:`decoder_classes`), makes the loss (:meth:`make_loss`) and may
    change more of the model in :meth:`attach_heads`.
    """

    decoder = "model.decoder"
    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]]
    """From each host decoder class to its subclass that refines distributions."""

    def make_loss(self, config: FDRConfig) -> Callable[..., Any]:
        """A plain callable with the signature of the host's loss function."""
        raise NotImplementedError

    def attach_heads(self, model: Host, config: FDRConfig, retired: Retired) -> None:
        """Retire the host's box heads after the first one, and note in ``retired`` what was changed."""
        raise NotImplementedError

    def check(self, model: Host, config: FDRConfig) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        name = type(model).__name__
        if hasattr(model.config, SETTINGS):
            raise UnsupportedModelError(
                f"this {name}'s config comes from a wrapped model, whose FDR weights {name}.from_pretrained does not "
                "know. Load such a checkpoint with dfine_plugin.load_pretrained(path); "
                f"to wrap anew, delete config.{SETTINGS} first"
            )
        if "_loss_function" in model.__dict__:
            raise UnsupportedModelError(
                f"this {name} has a loss_function of its own, which the plugin cannot feed the union"
            )
        if type(model.model.decoder) not in self.decoder_classes:
            raise UnsupportedModelError(f"this {name} has a decoder of another class: {type(model.model.decoder)}")

    def attach(self, model: Host, config: FDRConfig) -> Retired:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        decoder = model.model.decoder
        parameter = next(decoder.parameters())
        retired = Retired(ties=(model._tied_weights_keys, dict(model.all_tied_weights_keys)))
        self.attach_heads(model, config, retired)
        twin = self.decoder_classes[type(decoder)]
        with torch.device("meta"):
            twin(decoder.config)  # transformers learns at construction which outputs a class can record
        retired.recast(model, "model.decoder", twin)
        decoder.fdr = FDRHead(model.config.d_model, len(decoder.layers), config).to(parameter)
        decoder.fdr.train(decoder.training)
        retie(model)
        _own_config(model, config)
        model.loss_function = self.make_loss(config)
        retired.load_hook = model.register_load_state_dict_pre_hook(_seed_from_baseline)
        return retired

    def detach(self, model: Host, retired: Retired) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        del model.model.decoder.fdr, model._loss_function
        retired.restore(model, like=next(model.model.decoder.parameters()))
        model._tied_weights_keys, model.all_tied_weights_keys = retired.ties
        _own_config(model, None)
        retired.load_hook.remove()

    def deploy(self, model: Host) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        model.model.decoder.fdr.deploy()
        model.loss_function = _refuse_loss

    def begin(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[dict[str, Tensor]] | None:
        """See :class:`~dfine_plugin.registry.Adapter`. Returns the labels among the arguments."""
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        labels, pixels = given.get("labels"), given.get("pixel_values")
        if labels is not None:
            count = None if pixels is None else len(pixels)
            check_targets(labels, model.config.num_labels, "class_labels", "boxes", num_images=count)
        return labels

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        box = common.host_box(model, layer, hidden_states, reference)
        return box, box

    def detector(self, model: Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        return TransformersDetector(model)


class TransformersDetector(nn.Module):
    """A model's logits and boxes, as a tuple."""

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values)
        return outputs.logits, outputs.pred_boxes


def retire(model: Host, names: Iterable[str], retired: Retired) -> None:
    """Take the named elements of ModuleLists out, an Identity in their place so that the others keep their names."""
    # all of them first: some hosts give one list two names
    originals = {name: model.get_submodule(name) for name in names}
    for name in originals:
        retired.replace(model, name, nn.Identity())
    retired.modules.update(originals)
    retired.attributes.update(originals)


def prediction_set(logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """One prediction set as the hosts' criteria take it: ``(B, Q, classes)`` and ``(B, Q, 4)``."""
    return {"logits": logits, "pred_boxes": boxes}


def _refuse_loss(*_: Any, **__: Any) -> None:
    raise WrapStateError("a deployed model is for inference only: call it without labels")


def _own_config(model: Host, config: FDRConfig | None) -> None:
    """Note the settings in the model's config (or take the note out), in a copy, for hosts can share one config."""
    shared = model.config
    own = copy.deepcopy(shared)
    if config is None:
        delattr(own, SETTINGS)
    else:
        setattr(own, SETTINGS, config.to_dict())
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def retie(model: Host) -> None:
    """Declare tied what is, so that saving writes each parameter once and re-tying finds all it looks for.

    Of several names a parameter keeps the one that the host saves it by.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    sources = set(model.all_tied_weights_keys.values())
    ties = {}
    for group in names.values():
        saved = next((name for name in group if name in sources), group[0])
        ties.update({name: saved for name in group if name != saved})
    if ties or model._tied_weights_keys:
        model._tied_weights_keys = ties
        model.all_tied_weights_keys = dict(ties)


def _seed_from_baseline(model: Host, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    binding = binding_of(model)
    assert binding is not None
    ties = model.all_tied_weights_keys.items()
    common.seed_from_baseline(state_dict, prefix, model, binding.retired, "model.decoder.fdr", ties)


def load_pretrained(path: str | Path, **kwargs: Any) -> Host:
    """Load what ``save_pretrained`` of a wrapped model wrote: the host, wrapped with the same settings, bit for bit.

    ``from_pretrained`` of the host's own class cannot: it drops the FDR head and initialises the retired heads anew.

    Args:
        path: the folder.
        kwargs: for the host's ``from_pretrained``, such as ``dtype``.

    Returns:
        The wrapped model, in evaluation mode, as ``from_pretrained`` gives it.

    Raises:
        ValueError: if the folder holds no wrapped model, or not all of its weights.
    """
    folder = Path(path)
    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, SETTINGS, None)
    if settings is None:
        raise ValueError(f"{folder} holds no wrapped model: its config.json has no {SETTINGS!r}")
    delattr(config, SETTINGS)
    host_class = getattr(transformers, config.architectures[0])
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn of the FDR head's weights, which come next
    try:
        model, found = host_class.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    finally:
        transformers.logging.set_verbosity(verbosity)
    wrap_decoder(model, FDRConfig.from_dict(settings))
    lost = set(found["missing_keys"]) & set(model.state_dict())
    if lost:
        raise ValueError(f"{folder} lacks weights of the wrapped model: {', '.join(sorted(lost))}")
    model.model.decoder.fdr.load_state_dict(_read_fdr_weights(folder))
    return model.eval()


def _read_fdr_weights(folder: Path) -> dict[str, Tensor]:
    """The FDR head's parameters in a folder that ``save_pretrained`` wrote, in one file or in shards."""
    prefix = "model.decoder.fdr."
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SAFE_WEIGHTS_NAME}
    weights = {}
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (no mapping: it has keys() and get_tensor() only)
                if key.startswith(prefix):
                    weights[key.removeprefix(prefix)] = tensors.get_tensor(key)
    return weights
