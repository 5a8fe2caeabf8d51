"""Folders of wrapped transformers models: what tells them from a host's, and how they are read.

A host's ``from_pretrained`` would drop the FDR head of such a folder, initialise the retired box heads anew, and give
boxes that look right. So its ``config.json`` names a file of weights that does not exist, which is where every loader
but :func:`load_pretrained` stops: the host's class, the Auto classes, pipelines, with the plugin imported or without.
The weights themselves keep the name that transformers gives them, for its Trainer resumes from them.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCardData
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from dfine_plugin import __version__
from dfine_plugin.config import FDRConfig
from dfine_plugin.tools.writing import written_whole
from dfine_plugin.wrapping import binding_of, deploy, wrap_decoder

from ..host_parts import Host

SETTINGS = "dfine_plugin"
"""The attribute of a wrapped model's transformers config that carries the FDRConfig into config.json and back."""

DEPLOYED = "deployed"
"""The key beside the FDRConfig's settings that says that a model was deployed before it was saved, and with how many
decoder layers. The rest of ``config.json`` is the host's, and says how many there were before."""

NO_FILE = "load_this_with_dfine_plugin.load_pretrained.safetensors"
"""The weights that ``config.json`` names: nobody finds the file, and the error shows its name."""

_WEIGHTS = "transformers_weights"
"""transformers' key of ``config.json`` for a file of weights of another name than its own."""

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where files are, on a hub or on a disk."""


class WrappedConfig:
    """Mixin before a host's config class: a view of the host's config, whose values it shares, for a wrapped model.

    What either is given the other has, so that a config which a user holds, or several models share, keeps its effect;
    but only the view has settings, and writes a ``config.json`` for :func:`load_pretrained` alone.
    """

    __slots__ = (SETTINGS, "host")

    def to_dict(self) -> dict[str, Any]:
        """The host's, the settings, and what stops other loaders."""
        if not hasattr(self, SETTINGS):  # transformers makes one by its class, to see what the defaults are
            return super().to_dict()  # type: ignore[misc]
        return {**super().to_dict(), SETTINGS: getattr(self, SETTINGS), _WEIGHTS: NO_FILE}  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The host's, and a model card where the folder has none: only this package opens it."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        card = Path(save_directory) / "README.md"
        if not card.exists():
            with written_whole(card) as part:
                part.write_text(_model_card(getattr(self, SETTINGS), self.host))  # type: ignore[attr-defined]

    def __copy__(self) -> PretrainedConfig:
        return _view(copy.copy(self.host), dict(getattr(self, SETTINGS)))  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return _view, (self.host, getattr(self, SETTINGS))  # type: ignore[attr-defined]


def _task(host: PretrainedConfig) -> str:
    """The name of what a pipeline does with a host."""
    return "zero-shot-object-detection" if hasattr(host, "text_config") else "object-detection"


def _model_card(settings: dict[str, Any], host: PretrainedConfig) -> str:
    """What a folder's ``README.md`` says of a wrapped model, with the metadata that a hub reads."""
    name = (host.architectures or [type(host).__name__])[0]
    base = str(host.name_or_path)
    on_a_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    data = ModelCardData(
        library_name="dfine-plugin",
        pipeline_tag=_task(host),
        tags=["dfine-plugin", host.model_type],
        base_model=base if on_a_hub else None,
    )
    deployed = settings.get(DEPLOYED)
    of = f", deployed with {deployed} decoder layers" if deployed else ""
    return f"""---
{data.to_yaml()}
---

# {name} with D-FINE's box regression

A `{name}` of transformers{of}, wrapped by [dfine-plugin](https://arxiv.org/abs/2410.13842) {__version__}: each edge of
a box is a distribution that the decoder layers refine (FDR). Only this package opens the folder, for others would
drop the FDR head:

```python
from dfine_plugin import load_pretrained

model = load_pretrained("path/or/name")  # this folder, or the repository's name; then a {name} like any other
```

Settings of the FDR head:

```json
{json.dumps(settings, indent=2)}
```

The package is under Apache-2.0; the weights are under the licence of their host and of the data that they were
trained on.
"""


_view_classes: dict[type, Any] = {}


def _view(host: PretrainedConfig, settings: dict[str, Any]) -> PretrainedConfig:
    """A :class:`WrappedConfig` of a host's config."""
    cls = type(host)
    if cls not in _view_classes:
        _view_classes[cls] = type(cls.__name__, (WrappedConfig, cls), {"__module__": cls.__module__})
    view = _view_classes[cls].__new__(_view_classes[cls])
    object.__setattr__(view, "__dict__", host.__dict__)
    view.host = host
    setattr(view, SETTINGS, settings)
    return view


def note_settings(model: Host, config: FDRConfig) -> None:
    """Note the settings in the model's config, in a view of it, for hosts can share one config."""
    _replace_config(model, _view(model.config, config.to_dict()))


def note_deployment(model: Host) -> None:
    """Note that the model is a deployed one, with as many decoder layers as it has now."""
    layers = len(model.model.decoder.layers)
    setattr(model.config, SETTINGS, {**getattr(model.config, SETTINGS), DEPLOYED: layers})


def forget_settings(model: Host) -> None:
    """Undo :func:`note_settings`."""
    _replace_config(model, model.config.host)


def _replace_config(model: Host, new: PretrainedConfig) -> None:
    former = model.config
    for module in model.modules():
        if getattr(module, "config", None) is former:
            module.config = new


def rename_saved(model: Host, state_dict: dict[str, Any], prefix: str) -> None:
    """Give what ``save_pretrained`` wrote the names of the model's own state dict, in place.

    transformers writes some weights under the names that they had in earlier releases, and takes them back in
    ``from_pretrained`` only: ``load_state_dict``, and with it the Trainer's resuming, would leave them as they are.
    """
    own = model.state_dict(prefix=prefix).keys()
    strange = [key for key in state_dict if key.startswith(prefix) and key not in own]
    if not strange:
        return
    rules = get_model_conversion_mapping(model)
    converters: dict[str, WeightConverter] = {}
    for key in strange:
        tensor, name = state_dict.pop(key), key.removeprefix(prefix)
        for rule in rules:
            renamed, pattern = rule.rename_source_key(name)
            if isinstance(rule, WeightConverter) and pattern is not None:  # such as three projections in one matrix
                converter = converters.setdefault(renamed, copy.deepcopy(rule))
                converter.add_tensor(renamed, key, pattern, tensor)
                break
            name = renamed
        else:
            # also where the model has no such key: a frozen batch norm takes out what a live one has counted
            state_dict.setdefault(prefix + name, tensor)
    for renamed, converter in converters.items():
        for name, converted in converter.convert(renamed, model=model, config=model.config).items():
            state_dict.setdefault(prefix + name, converted[0] if isinstance(converted, list) else converted)


def load_pretrained(path: str | Path, **kwargs: Any) -> Host:
    """See :func:`dfine_plugin.load_pretrained`."""
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    config = AutoConfig.from_pretrained(path, **hub)
    settings = getattr(config, SETTINGS, None)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no wrapped model: its config.json has no {SETTINGS!r} of one")
    host_class = _host_class(config.architectures[0], path)
    deployed = settings.pop(DEPLOYED, None)
    delattr(config, SETTINGS)
    config.__dict__.pop(_WEIGHTS, None)  # folders of version 0.1.0 lack it
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn of the FDR head's weights, which come next
    try:
        model = host_class.from_pretrained(path, config=config, **kwargs)
    finally:
        transformers.logging.set_verbosity(verbosity)
    wrap_decoder(model, FDRConfig.from_dict(settings))
    binding = binding_of(model)
    assert binding is not None
    binding.retired.outdated = True  # from_pretrained has drawn them at random
    if deployed is not None:
        deploy(model, None if deployed is True else deployed)  # true: the first ones written had all layers
    found = model.load_state_dict(_read_weights(path, kwargs.get("variant"), hub), strict=False)
    if found.missing_keys or found.unexpected_keys:
        wrong = {
            "lacks weights of the wrapped model": found.missing_keys,
            "has weights that the wrapped model has not": found.unexpected_keys,
        }
        raise ValueError(f"{path} " + "; ".join(f"{what}: {', '.join(keys)}" for what, keys in wrong.items() if keys))
    return model.eval()


def _host_class(name: str, path: str | Path) -> type[PreTrainedModel]:
    """transformers' class of this name, or the latest of that name which the user's own code has defined."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    waiting: list[type[PreTrainedModel]] = [PreTrainedModel]  # the latest of a class's own at the end
    found = []
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        found += [cls] if cls.__name__ == name else []
    if not found:
        raise ValueError(f"{path} holds a {name}, which is no class of transformers': import its module first")
    return found[0]


def _read_weights(path: str | Path, variant: str | None, hub: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a folder or of a repository on the hub, from one file or from shards, under the names there."""

    def locate(name: str) -> str | None:
        if variant is not None:
            stem, _, suffix = name.rpartition(".")
            name = f"{stem}.{variant}.{suffix}"
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)

    single = locate(SAFE_WEIGHTS_NAME)
    if single is not None:
        return load_file(single)
    index = locate(SAFE_WEIGHTS_INDEX_NAME)
    shards, _ = get_checkpoint_shard_files(path, index, **hub)
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
