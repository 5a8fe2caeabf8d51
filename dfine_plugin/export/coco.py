"""AP of detections on a COCO-format data set: what parity is worth in the end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..tools.installing import install_hint
from .parity import Detections


@dataclass(frozen=True)
class CocoSplit:
    """A folder's ``instances_val.json``, whose images lie in ``images/``."""

    folder: Path
    coco: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "CocoSplit":
        """The split in a folder.

        Raises:
            ValueError: it cannot be read, or lacks a part.
            ImportError: pycocotools is not installed; names the extra.
        """
        if find_spec("pycocotools") is None:
            raise ImportError(f"AP needs pycocotools: {install_hint('export,bench')}")
        path = folder / "instances_val.json"
        try:
            coco = json.loads(path.read_text())
            missing = [part for part in ("images", "annotations", "categories") if not coco.get(part)]
        except (AttributeError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if missing:
            raise ValueError(f"{path} is not in COCO's format: it has no {' and no '.join(missing)}")
        return cls(folder, coco)

    def image_paths(self) -> list[Path]:
        return [self.folder / "images" / image["file_name"] for image in self.coco["images"]]

    def categories(self, class_names: Mapping[int, str]) -> dict[int, int]:
        """From a model's labels to the ids of the categories.

        By their names, if the model knows all of them; else by their order, that of the ids, as the ablation trains.

        Args:
            class_names: the model's, as far as they are known.

        Raises:
            ValueError: the model has other classes.
        """
        ids = sorted(category["id"] for category in self.coco["categories"])
        named = {category.get("name"): category["id"] for category in self.coco["categories"]}
        by_name = {label: named[name] for label, name in class_names.items() if name in named}
        if sorted({*by_name.values()}) == ids:
            return by_name
        if class_names and len(class_names) != len(ids):
            raise ValueError(
                f"the model has {len(class_names)} classes, and {self.folder} {len(ids)} categories, which are not all "
                "among them by name"
            )
        return dict(enumerate(ids))

    def average_precision(
        self,
        detections: Sequence[Detections],
        image_size: tuple[int, int],
        class_names: Mapping[int, str] | None = None,
    ) -> float:
        """AP in percent, by pycocotools.

        Args:
            detections: of all images in order, boxes in pixels of the model's input. What is of a class that the data
                set has not does not count.
            image_size: H and W of that input.
            class_names: see :meth:`categories`.

        Raises:
            ValueError: the model has other classes.
        """
        from dfine_plugin.benchmarks.gain.evaluation import coco_metrics

        categories = self.categories(class_names or {})
        largest = max((int(found.labels.max(initial=-1)) for found in detections), default=-1)
        if not class_names and largest >= len(categories):
            raise ValueError(f"the model has a class {largest}, and {self.folder} {len(categories)} categories")
        rows = []
        for image, found in zip(self.coco["images"], detections, strict=True):
            scale = np.array([image["width"] / image_size[1], image["height"] / image_size[0]] * 2)
            known = np.isin(found.labels, list(categories))
            near, far = np.split(found.boxes[known] * scale, 2, axis=-1)
            ids = np.array([categories[label] for label in found.labels[known].tolist()], dtype=int)
            columns = (near, far - near, found.scores[known, None], ids[:, None])
            rows.append(np.concatenate([np.full((len(near), 1), image["id"]), *columns], axis=-1))
        return coco_metrics(np.concatenate(rows).astype(float), self.coco)["AP"]
