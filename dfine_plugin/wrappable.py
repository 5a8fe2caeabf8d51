"""What ``wrap_decoder`` is given: a model as its host's library makes it, and settings."""

from typing import Any

from torch import nn

from .config import FDRConfig
from .errors import UnsupportedModelError

_AROUND = {
    "torch._dynamo.eval_frame.OptimizedModule": "torch.compile(model)",
    "torch.nn.parallel.distributed.DistributedDataParallel": "DistributedDataParallel(model)",
    "torch.nn.parallel.data_parallel.DataParallel": "DataParallel(model)",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "FullyShardedDataParallel(model)",
    "torch.distributed.fsdp.FSDPModule": "fully_shard(model)",
    "peft.peft_model.PeftModel": "get_peft_model(model, ...)",
}
"""Classes of what is put around a model, and how."""


def check_is_model(model: Any, asked: str) -> None:
    """Refuse what is no model.

    Args:
        model: what was given.
        asked: the function that takes a model.

    Raises:
        UnsupportedModelError: says what it is instead.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{asked} takes a model, got {_describe(model)}")


def put_around(model: nn.Module) -> str | None:
    """How this model was made of another one, such as ``"DataParallel(model)"``; None if it was not."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    return next((_AROUND[name] for name in names if name in _AROUND), None)


def check_wrappable(model: Any, config: Any) -> None:
    """Refuse what is no model, what has been put around or into one, and settings that are none.

    Raises:
        UnsupportedModelError: says what to wrap, and when.
        TypeError: the config is no FDRConfig.
    """
    check_is_model(model, "wrap_decoder")
    if made_by := put_around(model):
        raise UnsupportedModelError(
            f"this model is a {type(model).__name__}: wrap before {made_by}, model = wrap_decoder(model) first"
        )
    if model._compiled_call_impl is not None:
        raise UnsupportedModelError(f"this {type(model).__name__} is compiled: wrap before model.compile()")
    if any(type(module).__module__.startswith("peft.tuners.") for module in model.modules()):
        raise UnsupportedModelError(
            f"this {type(model).__name__} has adapters of PEFT in it: wrap before model.add_adapter(...)"
        )
    if config is not None and not isinstance(config, FDRConfig):
        hint = ": FDRConfig.from_dict(config) makes one of it" if isinstance(config, dict) else ""
        raise TypeError(f"config must be an FDRConfig, got a {type(config).__name__}{hint}")


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the name {value!r}: load the model first, with from_pretrained or as its library does"
    if isinstance(value, type):
        return f"the class {value.__name__}: make a model of it first"
    return "None" if value is None else f"a {type(value).__name__}"
