"""AP of detections on a COCO-format data set: what parity is worth in the end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..tools.installing import install_hint
from .parity import Detections


@dataclass(frozen=True)
class CocoSplit:
    """A folder's ``instances_val.json``, whose images lie in ``images/``.

    Labels are the positions of its categories in the order of their ids, as the ablation trains.
    """

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
            missing = [part for part in ("images", "annotations", "categories") if part not in coco]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if missing:
            raise ValueError(f"{path} is not in COCO's format: it has no {' and no '.join(missing)}")
        return cls(folder, coco)

    def image_paths(self) -> list[Path]:
        return [self.folder / "images" / image["file_name"] for image in self.coco["images"]]

    def average_precision(self, detections: Sequence[Detections], image_size: tuple[int, int]) -> float:
        """AP in percent, by pycocotools.

        Args:
            detections: of all images in order, boxes in pixels of the model's input.
            image_size: H and W of that input.
        """
        from dfine_plugin.benchmarks.gain.evaluation import coco_metrics

        categories = np.array(sorted(category["id"] for category in self.coco["categories"]))
        rows = []
        for image, found in zip(self.coco["images"], detections, strict=True):
            scale = np.array([image["width"] / image_size[1], image["height"] / image_size[0]] * 2)
            near, far = np.split(found.boxes * scale, 2, axis=-1)
            columns = (near, far - near, found.scores[:, None], categories[found.labels][:, None])
            rows.append(np.concatenate([np.full((len(near), 1), image["id"]), *columns], axis=-1))
        return coco_metrics(np.concatenate(rows).astype(float), self.coco)["AP"]
