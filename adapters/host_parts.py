"""What of a host gives way when it is wrapped, and comes back: box heads, classes of modules, weights of a baseline."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError, WrapStateError
from dfine_plugin.gating import GatedNorm, NormBeforeCrossAttention
from dfine_plugin.head import locate_initial_boxes
from dfine_plugin.wrapping import binding_of

Host = Any
"""A host model whose parts are found by their names, which differ from host to host: beyond a type checker."""


@dataclass
class Retired:
    """What wrapping took out of a host, for :meth:`~dfine_plugin.registry.Adapter.detach` to put back.

    Attributes:
        modules: the box heads that the FDR head replaces, by their dotted names in the model.
        attributes: what was replaced as a whole (such as a ModuleList, or None where there was none), by dotted name.
        classes: the host's classes of modules that became another class, by their dotted names.
        load_hook: what prepares a state dict, a baseline's for example, for being loaded.
        outdated: whether the rest of the model has been loaded from a state dict without such heads, as a wrapped
            model's is, so that these belong to other weights.
        box_heads: what the host's layers after the first one reported boxes by; none where it does not refine.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, type[nn.Module]] = field(default_factory=dict)
    load_hook: Any = None
    outdated: bool = False
    box_heads: list[nn.Module] = field(default_factory=list)

    def replace(self, model: Host, name: str, value: Any) -> None:
        """Set the model's attribute of this dotted name, and keep what it was."""
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        self.attributes[name] = getattr(owner, attribute)
        setattr(owner, attribute, value)

    def recast(self, model: Host, name: str, twin: type[nn.Module]) -> None:
        """:func:`recast` the model's module of this dotted name, and keep the class it was of."""
        self.classes[name] = recast(model.get_submodule(name), twin)

    def foreign(self, model: Host) -> list[str]:
        """The names of the retired heads that share no parameters with what the model has kept."""
        kept = {id(parameter) for parameter in model.parameters()}
        return [name for name, head in self.modules.items() if any(id(p) not in kept for p in head.parameters())]

    def restore(self, model: Host, like: Tensor) -> None:
        """Put everything back. The retired heads follow a move of the model, to the device and dtype of ``like``."""
        foreign = self.foreign(model)
        if self.outdated and foreign:
            warnings.warn(
                f"the box heads that come back ({', '.join(foreign)}) do not belong to the checkpoint that was "
                "loaded, which holds none: this host's boxes are of no use before these heads are trained, or loaded "
                "from a baseline's state dict",
                stacklevel=4,
            )
        for module in self.modules.values():
            module.to(like).train(model.training)
        for name, value in self.attributes.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, value)
        for name, host_class in self.classes.items():
            module = model.get_submodule(name)
            if isinstance(module, GatedNorm):
                module.untie()
            recast(module, host_class)


def retire(model: Host, names: Iterable[str], retired: Retired) -> None:
    """Take the named elements of ModuleLists out, an Identity in their place so that the others keep their names."""
    # all of them first: some hosts give one list two names
    originals = {name: model.get_submodule(name) for name in names}
    for name in originals:
        retired.replace(model, name, nn.Identity())
    retired.modules.update(originals)
    retired.attributes.update(originals)


def host_box(model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> Tensor:
    """What the retired box head of a decoder layer, not the first, makes of ``(B, Q, C)`` states and references."""
    binding = binding_of(model)
    assert binding is not None
    head = binding.retired.box_heads[layer - 1].to(reference.device)
    return locate_initial_boxes(head(hidden_states.to(next(head.parameters()).dtype)), reference)


def recast(module: nn.Module, twin: type[nn.Module]) -> type[nn.Module]:
    """Turn a module into an instance of a class with another forward, in place, and return the class it had.

    Its parameters, hooks and place in the model stay; and copies and pickles behave, for a class is no closure.
    """
    former = type(module)
    module.__class__ = twin
    return former


def check_gates(model: Host, decoder: str, norms: tuple[str, str], config: FDRConfig) -> None:
    """Raise :class:`UnsupportedModelError` where target gating is asked for, and norms around cross-attention are none.

    Args:
        model: the host.
        decoder: the dotted name of its decoder.
        norms: of a layer, by their dotted names in it: the last one before its cross-attention, and the one behind it.
        config: whether there is target gating.
    """
    for index, layer in enumerate(model.get_submodule(decoder).layers if config.target_gating else ()):
        for name in norms:
            norm = layer.get_submodule(name)
            if type(norm) is not nn.LayerNorm:
                raise UnsupportedModelError(
                    f"target_gating is for layers with LayerNorms around cross-attention, and {decoder}.layers.{index}."
                    f"{name} of this {type(model).__name__} is a {type(norm).__name__}"
                )


def gate_layers(model: Host, decoder: str, norms: tuple[str, str], retired: Retired) -> None:
    """Let the layers of a decoder have the gates of its FDR head, which has none without target gating."""
    module = model.get_submodule(decoder)
    for index in range(len(module.fdr.gates)):
        before, behind = (f"{decoder}.layers.{index}.{name}" for name in norms)
        retired.recast(model, before, NormBeforeCrossAttention)
        retired.recast(model, behind, GatedNorm)
        norm = model.get_submodule(behind)
        assert isinstance(norm, GatedNorm)
        norm.tie(module, index)


def keep_first_layers(
    model: Host, decoder: str, num_layers: int, heads: Sequence[str] = ("bbox_embed", "class_embed")
) -> None:
    """Leave a decoder its first layers, and the lists of heads theirs; with what follows all layers' heads in a list.

    That is the encoder's proposal head, which hosts look up behind those of as many layers as the decoder has.

    Args:
        model: wrapped or not.
        decoder: the dotted name of its decoder.
        num_layers: how many layers to keep.
        heads: what the lists of heads are called, in the model, in the decoder or in what holds it.

    Raises:
        ValueError: the decoder does not have so many layers, or the initial boxes come of a later one. Nothing changes.
    """
    module = model.get_submodule(decoder)
    total = len(module.layers)
    if not isinstance(num_layers, int) or not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must be in [1, {total}], the decoder's layers; got {num_layers!r}")
    if hasattr(module, "fdr"):
        module.fdr.keep_layers(num_layers)
    module.layers = module.layers[:num_layers]
    for owner in (model, model.get_submodule(decoder.rpartition(".")[0]), module):
        for name in heads:
            of_layers = getattr(owner, name, None)
            if isinstance(of_layers, nn.ModuleList):  # not one head for all layers
                setattr(owner, name, nn.ModuleList([*of_layers[:num_layers], *of_layers[total:]]))


def sharing_copy(module: nn.Module) -> Any:
    """A second module of the same class with the same submodules and parameters."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def complete_ties(state_dict: dict[str, Any], prefix: str, ties: Iterable[tuple[str, str]]) -> None:
    """Before a state dict is loaded: where it has one of two names of one parameter, give it the other, in place."""
    for first, second in ties:
        for missing, present in ((first, second), (second, first)):
            if prefix + present in state_dict:
                state_dict.setdefault(prefix + missing, state_dict[prefix + present])


def seed_from_baseline(
    state_dict: dict[str, Any], prefix: str, model: Host, retired: Retired | None, head: str
) -> None:
    """Before a state dict is loaded: if it is a baseline's, hand over what a strict load would stumble on.

    A baseline has no FDR parameters, which stay as they are, and box heads that the wrapped model has retired, which
    go to where they are kept for unwrapping. All else, the first box head too, loads under its own name.

    Args:
        state_dict: what is about to be loaded, changed in place.
        prefix: of all its keys.
        model: the wrapped model.
        retired: its retired heads, None if it is deployed and takes no baseline.
        head: the dotted name of the FDR head in the model.
    """
    if retired is None:
        return
    marker = f"{prefix}{head}."
    own = model.state_dict(prefix=prefix)
    # the first box head tells other weights from a copy of these
    shared = [key for key in own.keys() & state_dict.keys() if "bbox" in key]
    differs = any(_differ(own[key], state_dict[key]) for key in shared)
    if any(key.startswith(marker) for key in state_dict):
        retired.outdated |= differs
        return
    if any(weight.is_meta for key, weight in own.items() if key.startswith(marker)):
        raise WrapStateError(
            "this wrapped model is on the meta device, and a baseline's state dict has no weights for its FDR head: "
            "load it before the wrap"
        )
    retired.outdated |= differs and bool(retired.foreign(model))
    for name, module in retired.modules.items():
        start = f"{prefix}{name}."
        given = {key: state_dict.pop(f"{start}{key}") for key in module.state_dict() if f"{start}{key}" in state_dict}
        if given:
            on_meta = any(parameter.is_meta for parameter in module.parameters())
            module.load_state_dict(given, strict=False, assign=on_meta)
            retired.outdated = False
    state_dict.update({key: value for key, value in own.items() if key.startswith(marker)})


def _differ(own: Tensor, other: Tensor) -> bool:
    """Whether two weights are not the same; of those on meta nothing is known."""
    return own.is_meta or other.is_meta or not torch.equal(own, other.to(own))


def warn_of_frozen_head(model: Host, head: str) -> None:
    """Say that the FDR head would stay as it is for the whole training, as peft leaves what it is not told of."""
    binding = binding_of(model)
    assert binding is not None
    if binding.looked_at_head:  # once, for it may wait for the device
        return
    binding.looked_at_head = True
    if any(p.requires_grad for p in model.parameters()) and model.get_submodule(head).is_frozen_at_start():
        warnings.warn(
            f"the FDR head ({head}) is new and frozen: boxes would stay the first layer's. With peft, train it whole "
            "by LoraConfig(..., modules_to_save=['fdr'])",
            stacklevel=2,
        )
