"""The verbs: wrap a host, unwrap it, deploy it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from .config import FDRConfig
from .errors import UnsupportedModelError, WrapStateError
from .gating import forget_held
from .record import FDRRecord, close_scope, current_record, open_scope
from .registry import Adapter, AdapterWithCriterion, find_adapter
from .wrappable import check_is_model, check_wrappable, put_around

Model = TypeVar("Model", bound=nn.Module)
Criterion = TypeVar("Criterion", bound=nn.Module)

_BINDING = "_fdr_binding"

_ADAPTER_PARTS = {"base_layer", "original_module"}
"""What peft names the modules that its own ones stand in for."""


@dataclass
class Binding:
    """What ties a wrapped model to the plugin: kept on the model as a plain attribute, copied and pickled with it.

    `frozen` names the host's parameters that were trainable, where the head alone is to learn, and `stilled` its batch
    norms that training has been kept from; `teacher` is who teaches it (a :class:`~dfine_plugin.teaching.Teacher`);
    `looked_at_head` is whether training has been looked at for a frozen head.
    """

    adapter: Adapter
    config: FDRConfig
    retired: Any
    hooks: tuple[RemovableHandle, ...]
    frozen: list[str]
    stilled: set[str] = field(default_factory=set)
    teacher: Any = None
    deployed: bool = False
    looked_at_head: bool = False

    def remove_hooks(self) -> None:
        for handle in self.hooks:
            handle.remove()
        self.hooks = ()


def binding_of(model: nn.Module) -> Binding | None:
    """The model's :class:`Binding`, None if it is not wrapped."""
    return model.__dict__.get(_BINDING)


def wrapped_binding(model: nn.Module, asked: str, unwrapped: str = "") -> Binding:
    """The :class:`Binding` of a model that is to be wrapped.

    Args:
        model: what was given.
        asked: the function that takes it.
        unwrapped: what to say of a model that is not wrapped, behind that.

    Raises:
        UnsupportedModelError: it is no model.
        WrapStateError: it is not wrapped, or something around the model that is.
    """
    check_is_model(model, asked)
    binding = binding_of(model)
    if binding is None:
        name = type(model).__name__
        if made_by := put_around(model):
            raise WrapStateError(f"this model is a {name}: {asked} takes the model that {made_by} was given")
        raise WrapStateError(f"this {name} is not wrapped{unwrapped}")
    return binding


def is_wrapped(model: nn.Module) -> bool:
    """Whether :func:`wrap_decoder` has wrapped this very model, deployed since or not."""
    return binding_of(model) is not None


def wrap_decoder(model: Model, config: FDRConfig | None = None) -> Model:
    """Give a DETR FDR's box regression and GO-LSD's training, in place.

    The host keeps its forward, its inputs, its outputs and the names of its parameters; its box heads after the first
    give way to the FDR head, whose parameters lie under one prefix ``…decoder.fdr.``. In training its loss dict gains
    ``loss_fgl*`` and the losses of the initial boxes (``*_pre``); with GO-LSD (``union``, ``ddf``) also ``loss_ddf*``,
    and its box losses are taken over the union of all layers' matches. A baseline checkpoint loads into the wrapped
    model and seeds it.

    Args:
        model: a host that an adapter knows; see :func:`supported_hosts`.
        config: settings; by default ``FDRConfig()``, the best recipe known. ``FDRConfig.paper()`` is the paper's.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: no adapter knows the model, it has FDR already, or it is configured in a way that cannot
            be wrapped; it is no model, or one within another (compiled, DDP, PEFT). The model is untouched.
        WrapStateError: the model is wrapped already. It is untouched.
        TypeError: the config is no FDRConfig.

    Example:
        >>> model = wrap_decoder(RTDetrForObjectDetection.from_pretrained("PekingU/rtdetr_r50vd"))
    """
    check_wrappable(model, config)
    if binding_of(model) is not None:
        raise WrapStateError(f"this {type(model).__name__} is wrapped already; unwrap_decoder(model) undoes that")
    config = config or FDRConfig()
    adapter = find_adapter(model)
    adapter.check(model, config)
    config = _with_initial_layer(model, adapter, config)
    retired = adapter.attach(model, config)
    frozen = _freeze_host(model, adapter) if config.trainable == "head" else []
    hooks = (
        model.register_forward_pre_hook(_begin_forward, prepend=True, with_kwargs=True),
        model.register_forward_hook(_end_forward, always_call=True),
    )
    model.__dict__[_BINDING] = Binding(adapter, config, retired, hooks, frozen)
    return model


def _with_initial_layer(model: nn.Module, adapter: Adapter, config: FDRConfig) -> FDRConfig:
    """The settings with the layer that the host's initial boxes come of."""
    best = getattr(adapter, "initial_layer", 1)
    name, layer = type(model).__name__, config.initial_layer or best
    if layer == 1:
        return config
    if not getattr(adapter, "fixed_references", False):
        raise UnsupportedModelError(
            f"the decoder layers of this {name} attend by the boxes that the layers before have refined, so that its "
            f"initial boxes have to come of the first layer, and not of layer {layer} (initial_layer)"
        )
    num_layers = len(model.get_submodule(adapter.decoder).layers)  # type: ignore[arg-type]
    if config.initial_layer is None:
        return replace(config, initial_layer=min(best, num_layers))
    if layer > num_layers:
        raise UnsupportedModelError(
            f"this {name} has {num_layers} decoder layers, and no layer {layer} (initial_layer)"
        )
    return config


def wrap_criterion(criterion: Criterion, model: nn.Module) -> Criterion:
    """Let a criterion train a wrapped model, in place, for hosts whose criterion is no part of the model.

    That is RT-DETR of its authors' own repository. The criterion takes the settings from the model's outputs, and gives
    what it has always given, with the terms that :func:`wrap_decoder` tells of. Outputs of a model in evaluation, and
    those of one that is not wrapped, have the host's own losses. :func:`unwrap_decoder` gives the criterion back, too.

    Args:
        criterion: of the host.
        model: wrapped; in training it refuses to run before a criterion of its has been wrapped.

    Returns:
        The same criterion.

    Raises:
        UnsupportedModelError: the model's host holds its criterion, or the criterion is of another class or configured
            in a way that cannot be wrapped; the model is none, or within another. Both are untouched.
        WrapStateError: the model is not wrapped, or deployed; or the criterion is wrapped already. Both are untouched.

    Example:
        >>> model = wrap_decoder(model)
        >>> criterion = wrap_criterion(criterion, model)
        >>> losses = criterion(model(samples, targets), targets)
    """
    binding = wrapped_binding(model, "wrap_criterion", ": model = wrap_decoder(model) first")
    if not isinstance(binding.adapter, AdapterWithCriterion):
        name = type(model).__name__
        raise UnsupportedModelError(f"this {name} holds its criterion, which wrap_decoder(model) has wrapped with it")
    if binding.deployed:
        raise WrapStateError("a deployed model is for inference only: it has no use for a criterion")
    binding.adapter.attach_criterion(model, binding.retired, criterion)
    return criterion


def unwrap_decoder(model: Model) -> Model:
    """Give the host back, in place: its own decoder loop, box heads and loss.

    Everything the two share keeps the weights it has now. The box heads that :func:`wrap_decoder` retired come back as
    they were, so a host that was not trained in between is bit for bit what it was; after training they are as old as
    the wrap, and the host's boxes are only its own again once they have been trained, too. Checkpoints of wrapped
    models do not hold them: after ``load_pretrained``, or a wrapped model's state dict, a warning says that they
    are to be trained or loaded from a baseline's state dict.

    Raises:
        WrapStateError: if the model is not wrapped, or has been deployed. It is untouched.
    """
    binding = wrapped_binding(model, "unwrap_decoder")
    if binding.deployed:
        raise WrapStateError("a deployed model cannot be unwrapped: the host's training parts are gone")
    binding.remove_hooks()
    parameters = dict(model.named_parameters())
    for name in binding.frozen:
        parameters[name].requires_grad = True
    for name in binding.stilled if model.training else ():
        model.get_submodule(name).train()
    binding.adapter.detach(model, binding.retired)
    del model.__dict__[_BINDING]
    return model


def deploy(model: Model, num_layers: int | None = None) -> Model:
    """Leave only what inference needs, in place: no records, no losses, no parts that only training uses.

    Args:
        model: a wrapped model in evaluation mode.
        num_layers: how many decoder layers to keep, the first ones; by default all. The model then predicts, faster,
            what that layer predicts of the whole model: every layer has been trained to predict.

    Returns:
        The same model.

    Raises:
        WrapStateError: if the model is not wrapped, is deployed already, is in training mode, has adapters (LoRA) that
            are not merged, or is quantized. It is untouched.
        ValueError: the model does not have so many layers. It is untouched.
    """
    binding = wrapped_binding(model, "deploy", "; deploy takes a wrapped model")
    if binding.deployed:
        raise WrapStateError(f"this {type(model).__name__} is deployed already")
    if model.training:
        raise WrapStateError("deploy takes a model in evaluation mode; call model.eval() first")
    beside = [name for name, module in model.named_modules() if _ADAPTER_PARTS & {*module.__dict__, *module._modules}]
    if beside:
        raise WrapStateError(
            f"{beside[0]} has adapters (LoRA or the like) beside its weights, which deploy would rescale or replace "
            "one by one; merge them first: model = peft_model.merge_and_unload()"
        )
    head: Any = model.get_submodule(f"{binding.adapter.decoder}.fdr")
    head.check_deployable()
    if num_layers is not None:
        binding.adapter.keep_layers(model, num_layers)
    binding.adapter.deploy(model)
    binding.remove_hooks()
    binding.retired = binding.teacher = None
    binding.deployed = True
    return model


@torch.no_grad()
def predict_distributions(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, FDRRecord]:
    """What a wrapped model predicts, and the distributions that its boxes come from.

    Args:
        model: in evaluation mode.
        images: ``(B, 3, H, W)``, as the host takes them (:meth:`~dfine_plugin.registry.Adapter.detector`).

    Returns:
        Class logits ``(B, Q, classes)``, boxes ``(B, Q, 4)`` cxcywh in image sides, and the record of that forward:
        initial boxes, every layer's logits and boxes. Nothing of it stays with the model.

    Raises:
        WrapStateError: if the model is not wrapped, has been deployed, or is in training mode.
    """
    binding = wrapped_binding(model, "predict_distributions", ": its boxes come from no distributions")
    if binding.deployed:
        raise WrapStateError("a deployed model keeps no record of its distributions; take it as it was before deploy")
    if model.training:
        raise WrapStateError("predict_distributions takes a model in evaluation mode; call model.eval() first")
    with keep_records(model) as records:
        logits, boxes = binding.adapter.detector(model)(images)
    return logits, boxes, records[0]


@contextmanager
def keep_records(model: nn.Module) -> Iterator[list[FDRRecord]]:
    """The records of a wrapped model's forwards, as they end; nothing of them stays with the model."""
    records: list[FDRRecord] = []
    # before all other hooks of the forward's end, of which the model's own closes the scope
    hook = model.register_forward_hook(lambda *_: records.append(current_record()), prepend=True)
    try:
        yield records
    finally:
        hook.remove()


def _freeze_host(model: nn.Module, adapter: Adapter) -> list[str]:
    """Let the FDR head's parameters alone be trainable; the names of those that were and are no more."""
    head = f"{adapter.decoder}.fdr."
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(head)]
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    return frozen


def _begin_forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    # First of all hooks, and the scope before the checks: _end_forward runs, and closes it, whatever raises after this.
    forget_held()
    scope = open_scope(frames_up=1)
    binding = binding_of(model)
    assert binding is not None
    if binding.config.trainable == "head":
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                binding.stilled.add(name)
                module.eval()
    binding.adapter.begin(model, args, kwargs)
    if binding.teacher is not None and model.training:
        parts = binding.adapter.without_truths(model, args, kwargs)  # type: ignore[attr-defined]
        scope.lesson = binding.teacher.lesson(parts, next(model.parameters()).device)


def _end_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    close_scope()
    forget_held()
