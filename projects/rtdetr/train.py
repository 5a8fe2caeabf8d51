"""The ``tools/train.py`` of RT-DETR's own repository, with its model and criterion wrapped.

In the repository's folder ``rtdetrv2_pytorch``, this in place of ``tools/train.py``, with the same arguments::

    python -m dfine_plugin.projects.rtdetr.train -c configs/rtdetrv2/rtdetrv2_r18vd_120e_coco.yml --use-amp

Settings are those of :class:`~dfine_plugin.FDRConfig`, under that name in the YAML file or behind ``-u``:
``-u FDRConfig.union=True FDRConfig.ddf=True``. Optimizer groups, averaged weights, checkpoints and their resuming are
the repository's. ``-t`` takes checkpoints of bare hosts, and wrapped ones.
"""

import runpy
from pathlib import Path
from typing import Any

import dfine_plugin

try:
    import src.core
except ImportError as error:
    raise ImportError(
        "this trains RT-DETR of its own repository: run it in that folder, or put the folder on PYTHONPATH "
        f"(where importing its package src fails: {error})"
    ) from error


class WrappedConfig(src.core.YAMLConfig):
    """A config of the repository's, whose model and criterion are wrapped as soon as they are made."""

    @property
    def model(self) -> Any:
        fresh = self._model is None
        model = super().model
        if fresh:
            settings = dfine_plugin.FDRConfig.from_dict(self.yaml_cfg.get("FDRConfig", {}))
            dfine_plugin.wrap_decoder(model, settings)
        return model

    @property
    def criterion(self) -> Any:
        fresh = self._criterion is None
        criterion = super().criterion
        if fresh:
            dfine_plugin.wrap_criterion(criterion, self.model)
        return criterion


def main() -> None:
    """Run the repository's trainer on the command line's arguments."""
    src.core.YAMLConfig = WrappedConfig
    runpy.run_path(str(Path(src.core.__file__).parents[2] / "tools/train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
