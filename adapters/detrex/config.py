"""The config of a run of detrex's trainer, read so that no code runs of whoever wrote it.

``config.yaml`` may name functions, and detectron2 reads it by a loader that would call them; beside it lies a pickle,
where the YAML names what cannot be imported again. Here the YAML alone is read, as data, and what a part of it names
is looked up, when that part is made, in libraries that hold models and nothing else.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from dfine_plugin.errors import first_line

TRUSTED = (
    r"detectron2\.(layers|modeling|data\.transforms)",
    r"detrex\.(layers|modeling)",
    r"projects\.\w+\.modeling",
    r"torch\.nn",
    r"dfine_plugin\.(config|wrapping|projects\.rt_detr|projects\.debug)",
)
"""Packages, as patterns, whose classes and functions a config may call."""
LIBRARIES = ("detectron2", "detrex", "projects", "torch", "dfine_plugin")
"""``projects`` is what detrex's checkout calls its hosts' package."""


def read_config(path: Path, trust: Sequence[str] = ()) -> DictConfig:
    """A run's ``config.yaml``. What it names is looked up where it is trusted, and stays a name where it is not.

    Args:
        path: of the file.
        trust: further packages whose classes its models may be given.

    Raises:
        ValueError: the file cannot be read, or holds what only running code would make.
    """
    try:
        loader = _PlainLoader(path.read_text())
        loader.trust = trust
        content = loader.get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds no config")
    return OmegaConf.create(content, flags={"allow_objects": True})


def make(config: Any, trust: Sequence[str] = ()) -> Any:
    """detectron2's ``instantiate`` of a part of a config, if all that it calls is trusted.

    Args:
        config: of the part.
        trust: further packages whose code may be run.

    Raises:
        ValueError: it names something else. Nothing has been called.
    """
    config = copy.deepcopy(config)
    for part in parts(config):
        if "_target_" in part:
            part._target_ = find_trusted(part._target_, trust)
    return instantiate(config)


def find_trusted(name: str, trust: Sequence[str] = ()) -> Any:
    """The class or function that a config names.

    Looking a name up imports the library that it begins with, so that is checked first; then where what is found there
    comes from, for ``detectron2.layers.os.system`` is not detectron2's.

    Raises:
        ValueError: it is not trusted, or not there.
    """
    if not isinstance(name, str):
        raise ValueError(f"the run's config calls {name}, which is no name")
    library = name.partition(".")[0]
    if library not in (*LIBRARIES, *(package.partition(".")[0] for package in trust)):
        raise ValueError(
            f"the run's config calls {name}, and code that is neither detectron2's nor detrex's is not run unasked: "
            f"if you know it, trust it (--trust {library})"
        )
    try:
        found = locate(name)
    except Exception as error:  # whatever a module raises at its import
        advice = ": detrex's checkout must be on PYTHONPATH" if library == "projects" else ""
        reason = f"{first_line(error)}{advice}"
        raise ValueError(f"the run's config calls {name}, which cannot be imported: {reason}") from error
    packages = [*TRUSTED, *(re.escape(package) for package in trust)]
    origin = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', type(found).__qualname__)}"
    if not any(re.match(rf"{package}\.", origin) for package in packages):
        raise ValueError(f"the run's config calls {name}, which is {origin}: no part of a model, and not run unasked")
    return found


def parts(config: Any) -> Iterator[DictConfig]:
    """A config and all configs in it, those in lists as well."""
    if isinstance(config, DictConfig):
        yield config
        for name in config:
            if not OmegaConf.is_missing(config, name):
                yield from parts(config[name])
    elif isinstance(config, ListConfig):
        for element in config:
            yield from parts(element)


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML as data, with the names, tuples and dataclasses that detectron2 writes into it."""

    trust: Sequence[str] = ()


def _construct_name(loader: _PlainLoader, name: str, node: yaml.Node) -> Any:
    try:
        return find_trusted(name, loader.trust)  # a class that a model takes as an argument
    except ValueError:
        return {"_target_": name}  # such as a config file's lambda: no more than a name, unless a model asks for it


def _construct_object(loader: _PlainLoader, name: str, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.MappingNode)
    state = loader.construct_mapping(node, deep=True)
    cls = _construct_name(loader, name, node)
    return cls(**state) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else {"_target_": name, **state}


def _construct_partial(loader: _PlainLoader, node: yaml.Node) -> Any:
    """A partial of what is trusted is data as well, and stays a name otherwise."""
    assert isinstance(node, yaml.MappingNode)
    match loader.construct_mapping(node, deep=True).get("state"):
        case [function, [*args], dict() as kwargs, _] if callable(function):
            return functools.partial(function, *args, **kwargs)
    return {"_target_": "functools.partial"}


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.Node) -> list[Any]:
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/name:", _construct_name)
_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/object:", _construct_object)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/object/apply:functools.partial", _construct_partial)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)
