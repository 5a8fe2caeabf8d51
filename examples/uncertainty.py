"""Three uses of the deviations of edges, with figures: a threshold, fusion of boxes, bands with a stated coverage.

    python examples/uncertainty.py FOLDER  # a wrapped model as save_pretrained wrote it, on the embedded data
    python examples/uncertainty.py FOLDER --data COCO  # on a COCO-format folder with a val and a test split

Figures are of the test split; the conformal factors of the bands come from the val split.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from torch import Tensor, nn
from torchvision.ops import box_iou

from dfine_plugin import ConformalScale
from dfine_plugin.benchmarks.data.detection_data import DetectionData, normalised
from dfine_plugin.benchmarks.gain.diagnosis import without_duplicates
from dfine_plugin.benchmarks.gain.edge_errors import edge_errors, match
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, read_out
from dfine_plugin.benchmarks.options import check_data
from dfine_plugin.benchmarks.uncertainty import FIT, MEASURE, load_split
from dfine_plugin.boxes import to_corners
from dfine_plugin.checkpoints import input_size, open_checkpoint
from dfine_plugin.wrapping import predict_distributions

LEAST_SCORE = 0.3
SHARES = (0.95, 0.9, 0.8)
"""Of the truths that detections of the least score find: the recalls at which precision is compared."""
NEAR_IOU, SPREAD = 0.7, 0.025
"""Boxes that overlap so much are fused, with weights that fall with ``(1 - IoU)^2 / spread`` (He et al., 2019)."""


@torch.no_grad()
def predict(model: nn.Module, data: DetectionData, normalisation: dict) -> tuple[Tensor, Tensor, Tensor]:
    """For all images class logits (B, Q, C), boxes (B, Q, 4) cxcywh and deviations (B, Q, 4), in image sides."""
    parts = []
    for images in data.images.split(50):
        logits, boxes, record = predict_distributions(model, normalised(images, normalisation))
        parts.append((logits, boxes, record.edge_deviations()))
    logits, boxes, deviations = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, boxes, deviations


def precision_at(ranks: Tensor, right: Tensor, truths: int, recall: float) -> float:
    """The precision of the best-ranked detections, (n,), that find this share of the truths."""
    found = right[ranks.argsort(descending=True)].cumsum(0)
    count = int((found >= recall * truths).nonzero()[0]) + 1
    return float(found[count - 1]) / count


def ranked(rank: Tensor, logits: Tensor, boxes: Tensor, data: DetectionData, least_iou: float) -> tuple[Tensor, Tensor]:
    """Of all detections of the least score their ranks, and whether they are right, 1 or 0; (n,) each.

    They are matched in the order of their ranks: what a threshold on the rank leaves is matched as if it were all.
    """
    scores, classes = logits.sigmoid().max(-1)
    ranks, right = [], []
    for image, kept in enumerate(scores >= LEAST_SCORE):
        known = classes[image][kept], boxes[image][kept], data.boxes[image], data.labels[image]
        found, _ = match(rank[image][kept], *known, threshold=-torch.inf, least_iou=least_iou)
        ranks.append(rank[image][kept])
        right.append(torch.zeros(int(kept.sum())).index_fill(0, found, 1))
    return torch.cat(ranks), torch.cat(right)


def compare_thresholds(logits: Tensor, boxes: Tensor, deviations: Tensor, data: DetectionData) -> None:
    """Print the precision at equal recall: of a threshold on the score; on the deviation, in sides of the box; and on
    the deviation, the higher the score the laxer."""
    scores, truths = logits.sigmoid().amax(-1), sum(map(len, data.boxes))
    if not (scores >= LEAST_SCORE).any():
        raise SystemExit(
            f"no detection has a score of {LEAST_SCORE}: is it the model's data, and its processor beside it?"
        )
    relative = (deviations / boxes[..., 2:].repeat(1, 1, 2)).mean(-1)
    ranks = {"score": scores, "deviation": -relative, "deviation by score": -relative / scores}
    for least_iou in (0.5, 0.75, 0.9):
        results = {name: ranked(rank, logits, boxes, data, least_iou) for name, rank in ranks.items()}
        most = min(float(right.sum()) / truths for _, right in results.values())
        for recall in (share * most for share in SHARES):
            found = {name: 100 * precision_at(*result, truths, recall) for name, result in results.items()}
            precisions = ", ".join(f"{precision:.1f} % by {name}" for name, precision in found.items())
            print(f"IoU {least_iou}, recall {100 * recall:.1f} %: precision {precisions}")


def fuse(logits: Tensor, boxes: Tensor, deviations: Tensor | None) -> Tensor:
    """Each box of an image, (Q, 4) cxcywh, as the mean of the near ones of its class, weighted by their scores and, if
    given, by one over their edges' variances."""
    scores, classes = logits.sigmoid().max(-1)
    corners = to_corners(boxes)
    iou = box_iou(corners, corners)
    near = (iou >= NEAR_IOU) & (classes[:, None] == classes)
    weights = (near * scores * torch.exp(-(1 - iou).square() / SPREAD))[..., None]
    if deviations is not None:
        weights = weights / deviations.square()
    x0, y0, x1, y1 = ((weights * corners).sum(1) / weights.sum(1)).unbind(-1)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)


def compare_fusion(logits: Tensor, boxes: Tensor, deviations: Tensor, data: DetectionData) -> None:
    """Print AP of the boxes as they are, after NMS, and fused before NMS by scores alone or by deviations as well."""
    by_score = torch.stack([fuse(*image, None) for image in zip(logits, boxes, strict=True)])
    by_deviation = torch.stack([fuse(*image) for image in zip(logits, boxes, deviations, strict=True)])
    whole = slice(0, len(data))
    rows = {"as predicted": read_out(logits, boxes, data, whole)}
    rows[f"NMS at {NEAR_IOU}"] = without_duplicates(rows["as predicted"])
    rows["fused by score, NMS"] = without_duplicates(read_out(logits, by_score, data, whole))
    rows["fused by score and deviation, NMS"] = without_duplicates(read_out(logits, by_deviation, data, whole))
    for name, detections in rows.items():
        found = coco_metrics(detections, data.coco, data.sides)
        print(f"{name}: " + ", ".join(f"{key} {found[key]:.2f}" for key in ("AP", "AP50", "AP75", "AP90")))


def draw_band(axes: Axes, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    """Where the four edges lie: between the outermost and the innermost box, if there is one."""
    x0, y0, x1, y1 = np.concatenate([low[:2], high[2:]])
    x2, y2, x3, y3 = np.concatenate([high[:2], low[2:]])
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    if x2 < x3 and y2 < y3:
        corners += [(x2, y2), (x2, y3), (x3, y3), (x3, y2), (x2, y2)]
    codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * (len(corners) // 5)
    axes.add_patch(PathPatch(Outline(corners, codes), facecolor=colour, alpha=0.25, linewidth=0))


def draw_bands(
    logits: Tensor, boxes: Tensor, deviations: Tensor, data: DetectionData, scale: ConformalScale, path: Path
) -> None:
    """Of the first six images: boxes with bands that hold all four true edges with the stated coverage."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    for image, axes in enumerate(figure.subplots(2, 3).flat[: len(data)]):
        axes.imshow(data.images[image].permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0), aspect="auto")
        kept = logits[image].sigmoid().amax(-1) >= LEAST_SCORE
        low, high = scale.intervals(to_corners(boxes[image][kept]), deviations[image][kept], whole_box=True)
        for bounds in zip(low.numpy(), high.numpy(), strict=True):
            draw_band(axes, *bounds, "#0072B2")
        for x0, y0, x1, y1 in to_corners(data.boxes[image]).tolist():
            axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="white", linewidth=1)
        axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    figure.suptitle(f"bands: {100 * scale.coverage:g} % of the boxes found lie in theirs; white: the truths")
    figure.savefig(path, dpi=100)


def main(
    folder: Annotated[Path, typer.Argument(help="of a wrapped model", exists=True)],
    data: Annotated[str, typer.Option(help="'shapes', or a COCO-format folder with a val and a test split")] = "shapes",
    images: Annotated[int, typer.Option(min=6, help="of the shapes, for each split")] = 500,
    output: Annotated[Path, typer.Option(help="the picture to write")] = Path("bands.png"),
) -> None:
    """Put the deviations of a model's edges to use."""
    check_data(data, (FIT, MEASURE))
    checkpoint = open_checkpoint(folder)
    model, normalisation = checkpoint.load(), dict(checkpoint.normalisation())
    known, new = (load_split(data, split, max(input_size(checkpoint)), images) for split in (FIT, MEASURE))
    predicted = predict(model, new, normalisation)
    compare_thresholds(*predicted, new)
    compare_fusion(*predicted, new)
    fitted = edge_errors(model, known, normalisation, LEAST_SCORE, 50, torch.device("cpu"))
    scale = ConformalScale.fit(fitted.errors, fitted.deviations, coverage=0.9)
    print(f"bands: {scale.box:.2f} deviations to either side, from {scale.count} detections")
    draw_bands(*predicted, new, scale, output)


if __name__ == "__main__":
    typer.run(main)
