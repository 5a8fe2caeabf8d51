"""What a table of :mod:`~tests.export.tensorrt_api` says of TensorRT, as a module that can be called.

Its classes have what the table lists and nothing else. A call binds to one of the listed signatures, types included, or
raises as the bindings do.
"""

import __future__

import inspect
import re
from collections import defaultdict
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

TYPES = {"int": int, "str": str, "bool": bool, "tuple": tuple, "list": list, "None": type(None), "Buffer": bytes}
"""Of Python; a buffer is what the plugin gives for one."""


class StandIn(ModuleType):
    """TensorRT of a version, which does nothing and answers as it is told to.

    Args:
        table: that :mod:`~tests.export.tensorrt_api` wrote.
        answers: by ``Class.member``, what a property holds or a method returns: a value, or a function of the object
            and the arguments. Methods that are not named return an object of their type, or True, or None.

    Attributes:
        members: methods and properties of the table, by ``Class.member``.
        used: those that have been called, read or set.
    """

    def __init__(self, table: Path, answers: Mapping[str, Any]) -> None:
        super().__init__(table.stem)
        self.answers = dict(answers)
        self.used: set[str] = set()
        first, *rest = table.read_text().splitlines()
        self.__version__ = first.split("'")[1]
        signatures: dict[str, list[inspect.Signature]] = defaultdict(list)
        bodies: dict[str, dict[str, Any]] = defaultdict(dict)
        enums: dict[str, dict[str, int]] = defaultdict(dict)
        # the one class that gives its memory to others (its type has a buffer procedure in 10, 11 and RTX 1)
        bases: dict[str, Any] = {"IHostMemory": bytes}
        for line in rest:
            if found := re.fullmatch(r"([\w.]+)\.(\w+) = (\d+)", line):
                enums[found[1]][found[2]] = int(found[3])
            elif found := re.fullmatch(r"class (\w+)\((\w+)\)", line):
                bases[found[1]] = found[2]
            elif found := re.fullmatch(r"(\w+)\.(\w+)(\(.*\) -> .*)", line):
                signatures[f"{found[1]}.{found[2]}"].append(_signature(found[3]))
                bodies[found[1]][found[2]] = self._method(f"{found[1]}.{found[2]}", signatures)
            else:
                owner, name, kind, settable = re.fullmatch(r"(\w+)\.(\w+): (\w+)( \(can be set\))?", line).groups()
                bodies[owner][name] = self._property(f"{owner}.{name}", kind, settable is not None)
        self.members = {f"{owner}.{member}" for owner, body in bodies.items() for member in body}
        for name, body in bodies.items():
            base = bases.get(name, object)
            base = getattr(self, base) if isinstance(base, str) else base
            setattr(self, name, type(name, (base,), {"__slots__": (), **body}))
        for name, members in enums.items():
            owner, _, last = name.rpartition(".")
            setattr(getattr(self, owner) if owner else self, last, IntEnum(last, members))

    def _method(self, name: str, signatures: Mapping[str, list[inspect.Signature]]) -> Any:
        def method(*arguments: Any, **named: Any) -> Any:
            for signature in signatures[name]:
                if self._binds(signature, arguments, named):
                    self.used.add(name)
                    return self._answer(name, signature.return_annotation, arguments, named)
            raise TypeError(f"{name}(): incompatible function arguments {arguments[1:]} {named}: {signatures[name]}")

        return method

    def _property(self, name: str, kind: str, settable: bool) -> property:
        def read(owner: Any) -> Any:
            self.used.add(name)
            return self._answer(name, kind, (owner,), {})

        def write(owner: Any, value: Any) -> None:
            self.used.add(name)
            if not self._is_a(value, kind):
                raise TypeError(f"{name} is a {kind}, not {value!r}")

        return property(read, write if settable else None)

    def _binds(self, signature: inspect.Signature, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
        try:
            bound = signature.bind(*arguments, **named).arguments
        except TypeError:
            return False
        del bound["self"]
        return all(self._is_a(value, signature.parameters[name].annotation) for name, value in bound.items())

    def _is_a(self, value: Any, kind: str) -> bool:
        if kind == "Dims":  # pybind11 makes them of sequences of integers
            return all(type(size) is int for size in value)
        return isinstance(value, self._type(kind)) and not (kind == "int" and isinstance(value, bool))

    def _type(self, kind: str) -> Any:
        found: Any = TYPES.get(kind, self)
        for part in kind.split(".") if found is self else ():
            found = getattr(found, part, None)
        return found or ()  # of what is not in the table nothing is an instance

    def _answer(self, name: str, kind: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name in self.answers:
            answer = self.answers[name]
            return answer(*arguments, **named) if callable(answer) else answer
        if kind in ("None", "bool"):
            return None if kind == "None" else True
        found = self._type(kind)
        return found.__new__(found)


def _signature(text: str) -> inspect.Signature:
    """Of ``(self, name: type) -> type``, with types as text."""
    names: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(f"def method{text}: ...", "table", "exec", flags, dont_inherit=True), names)
    return inspect.signature(names["method"])
