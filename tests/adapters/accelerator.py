"""An accelerator that is not there: what would lie on it, and where the CPU would wait for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfine_plugin
import dfine_plugin.adapters
from dfine_plugin.benchmarks.models import detrex_hosts

OURS = [Path(str(package.__file__)).parent for package in (dfine_plugin, dfine_plugin.adapters)]
# detrex_hosts stands in for hosts' calls of .cuda()
NOBODYS = [Path(torch.__file__).parent, Path(__file__), Path(detrex_hosts.__file__)]

aten = torch.ops.aten
# The sizes of these operations' results, or the results themselves, depend on values.
READING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.unique_dim_consecutive,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Wait(NamedTuple):
    """Where the CPU waits: the innermost function that is not PyTorch's, and those of the plugin that led there.

    A wait in the backward pass is where that was asked for; what is waited for tells it apart.
    """

    file: str
    function: str
    ours: tuple[str, ...]
    what: str

    def is_ours(self) -> bool:
        return bool(self.ours) and self.ours[-1] == self.function

    def __str__(self) -> str:
        return f"{self.file}: {self.function}: {self.what}"


def waiting_here(what: str) -> Wait:
    """The wait that the running code is in."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not any(path.is_relative_to(folder) for folder in NOBODYS):
            frames.append((path, frame.f_code.co_name))
        frame = frame.f_back
    ours = [name for path, name in frames if any(path.is_relative_to(folder) for folder in OURS)]
    return Wait(frames[0][0].stem, frames[0][1], tuple(reversed(ours)), what)


class _Copies(TorchFunctionMode):
    """What is no operation on a CPU, and a copy between CPU and accelerator where there is one."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        holds, waits = self.accelerator.holds, self.accelerator.waits
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist) and holds(args[0]):
            waits.append(waiting_here(func.__name__))
            array = args[0].detach().numpy().copy()  # a clone would lie where its original does
            return {Tensor.cpu: torch.from_numpy, Tensor.numpy: np.asarray, Tensor.tolist: np.ndarray.tolist}[func](
                array
            )
        if func is Tensor.to and not holds(args[0]) and any(map(self._is_place, [*args[1:], *kwargs.values()])):
            if not kwargs.get("non_blocking"):
                waits.append(waiting_here(func.__name__))
            copy = func(*args, **kwargs).clone()
            self.accelerator.put([copy])
            return copy
        return func(*args, **kwargs)

    def _is_place(self, argument: Any) -> bool:
        if isinstance(argument, Tensor):
            return self.accelerator.holds(argument)
        return isinstance(argument, (torch.device, str))


class Accelerator(TorchDispatchMode):
    """While entered, notes every wait for what was put on it and for all that is computed from that.

    It knows of copies that are asked for (``.cpu()``, ``.to(device)``), of values that are read, of shapes that depend
    on values, and of indices on the CPU; not of tensors that are made on the device out of Python numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        # a weak reference keeps the address of a storage from being used again
        self._held: set[StorageWeakRef] = set()
        self._copies = _Copies(self)

    def __enter__(self) -> Accelerator:
        super().__enter__()
        self._copies.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._copies.__exit__(*error)
        super().__exit__(*error)

    def put(self, tensors: Iterable[Tensor]) -> None:
        self._held.update(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    def holds(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = any(self.holds(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        operation = func.overloadpacket
        if here and (operation in READING or (operation in INDEXING and self._indices_wait(*args))):
            self.waits.append(waiting_here(str(operation)))
        result = func(*args, **kwargs)
        if here:
            self.put(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def _indices_wait(self, tensor: Tensor, indices: list[Tensor | None], value: Tensor | None = None, *_: Any) -> bool:
        given = [index for index in indices if index is not None]
        if not self.holds(tensor):
            return False
        if any(index.dtype == torch.bool for index in given):
            return value is None or value.numel() > 1  # one number is filled in where the mask says
        return not all(map(self.holds, given)) or (value is not None and not self.holds(value))
