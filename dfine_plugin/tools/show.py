"""Pictures of detections with the distributions of their edges, as in the paper's figures, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle
from torch import Tensor

from ..distributions import EdgeDistributions, edge_distributions
from ..record import FDRRecord

EDGES = ("left", "top", "right", "bottom")
# Okabe and Ito's: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
OUTWARDS = (-1, -1, 1, 1)
"""The direction of the edges' axes in which a box grows."""
INK = "#222222"
BAND_ALPHA = 0.35
HEADING = {"x": 0.02, "ha": "left", "fontsize": 10}
HALO = [patheffects.withStroke(linewidth=3, foreground="white", alpha=0.85)]
SHADOW = [patheffects.withStroke(linewidth=2.4, foreground="black", alpha=0.6)]
INITIAL_LINE: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": "--"}
OTHERS: dict[str, Any] = {"color": "white", "linewidth": 0.9, "path_effects": SHADOW}
IMAGE_SIDE, GRID_WIDTH, LAYER_HEIGHT, HEADING_HEIGHT, LEGEND_HEIGHT = 6.5, 7.9, 1.75, 0.5, 0.9
"""Inches: the whole image's longer side, the grid of one detection's distributions, each of its layers, a heading, and
the legend."""
LABEL_HEIGHT, CHARACTER_WIDTH = 0.17, 0.09
"""Inches, of a label in the image; the width is that of a wide character."""
CROP_MARGIN = 0.12
"""How much of the image is seen around a box, in its larger side."""


@dataclass(frozen=True)
class Detection:
    """One detection in one image.

    Attributes:
        name: of its class.
        score: of its class, 0 to 1.
        layers: for each decoder layer its edges, ``(4, …)``.
    """

    name: str
    score: float
    layers: list[EdgeDistributions]

    def __str__(self) -> str:
        """Class and score, and where each edge of the last layer's box lies, with its standard deviation."""
        last = self.layers[-1]
        lines = zip(EDGES, last.edges.tolist(), last.deviations.tolist(), strict=True)
        edges = ", ".join(f"{name} {edge:.1f} ± {deviation:.1f}" for name, edge, deviation in lines)
        return f"{self.name} {self.score:.2f}: {edges} px"


def read_detections(
    logits: Tensor, record: FDRRecord, names: Mapping[int, str], image_size: tuple[int, int]
) -> list[Detection]:
    """The detections of one image, one a query with its best class, best first.

    Args:
        logits: ``(1, Q, classes)``, the last layer's, as sigmoids take them.
        record: of the same forward.
        names: from class to name; a class without one goes by its number.
        image_size: width and height in pixels.
    """
    scores, classes = logits[0].float().sigmoid().max(-1)
    layers = [
        edge_distributions(record.initial_boxes[0], corner_logits[0], record.weights, image_size)
        for corner_logits in record.corner_logits
    ]
    return [
        Detection(
            name=names.get(int(classes[query]), f"class {int(classes[query])}"),
            score=float(scores[query]),
            layers=[layer.of(query) for layer in layers],
        )
        for query in scores.argsort(descending=True).tolist()
    ]


def draw_detections(
    image: np.ndarray, detections: Sequence[Detection], detailed: int = 3, all_layers: bool = False
) -> Figure:
    """The image with all detections, and the distributions of some.

    On the left the image: every refined box, and around the edges of the detailed ones a band of one standard deviation
    on each side; of flat distributions, up to the band of the opposite edge. On the right for each detailed detection
    and decoder layer: the box so far, its bands and the initial box (dashed); and for each edge Pr(n) over the bins n,
    which is before W, and over W(n) in pixels, which is after.

    Args:
        image: ``(H, W, 3)`` uint8.
        detections: at least one, best first.
        detailed: how many of the first get their distributions drawn.
        all_layers: every decoder layer, and not the last alone.
    """
    chosen = detections[:detailed]
    rows = len(chosen[0].layers) if all_layers else 1
    block = rows * LAYER_HEIGHT + HEADING_HEIGHT
    height, width = image.shape[:2]
    scale = IMAGE_SIDE / max(height, width)
    # however narrow the image, the legend stands below it
    image_width, image_height = max(width * scale, 0.6 * IMAGE_SIDE), height * scale + HEADING_HEIGHT
    figure_height = max(image_height + LEGEND_HEIGHT, block * len(chosen))
    figure = Figure(figsize=(image_width + GRID_WIDTH, figure_height), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(image_width, GRID_WIDTH))[0]
    heights = [image_height, figure_height - image_height]
    above, below = left.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_image(above, image, detections, len(chosen), scale)
    _draw_legend(below, others=len(detections) > len(chosen))
    rest = figure_height - block * len(chosen)
    heights = [block] * len(chosen) + ([rest] if rest > 0 else [])
    blocks = right.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for number, (subfigure, detection) in enumerate(zip(blocks, chosen, strict=False), start=1):
        first = 0 if all_layers else len(detection.layers) - 1
        _draw_distributions(subfigure, image, detection, number, first)
    return figure


def _draw_image(
    figure: SubFigure, image: np.ndarray, detections: Sequence[Detection], detailed: int, scale: float
) -> None:
    axes = figure.subplots()
    axes.imshow(image)
    axes.set(xticks=[], yticks=[], autoscale_on=False)
    for detection in detections[detailed:]:
        _draw_box(axes, detection.layers[-1].edges, **OTHERS)
    for number, detection in enumerate(detections[:detailed], start=1):
        _draw_edges(axes, detection.layers[-1])
        label = f"{number} {detection.name} {detection.score:.2f}"
        x, y = _label_place(detection.layers[-1].edges, label, image.shape[1], scale)
        axes.text(x, y, label, fontsize=8, weight="bold", color=INK, va="bottom", path_effects=HALO, clip_on=True)
    figure.suptitle("1 detection" if len(detections) == 1 else f"{len(detections)} detections", **HEADING)


def _label_place(edges: Tensor, label: str, width: int, scale: float) -> tuple[float, float]:
    """Where a label begins, at its lower left: at the box's upper left corner, or as near as it lies in the image.

    Args:
        edges: ``(4,)``, the box's.
        label: the text.
        width: of the image in pixels.
        scale: inches a pixel.
    """
    x0, y0, *_ = edges.tolist()
    return max(0.0, min(x0, width - CHARACTER_WIDTH * len(label) / scale)), max(y0, LABEL_HEIGHT / scale)


def _draw_legend(figure: SubFigure, others: bool) -> None:
    samples: dict[str, Any] = {
        "initial box: where an edge lies at offset 0": Line2D([], [], **INITIAL_LINE),
        f"refined edges ({', '.join(EDGES)}): the means": tuple(
            Line2D([], [], color=colour, linewidth=1.8) for colour in COLOURS
        ),
        "one standard deviation to either side": tuple(
            Patch(color=colour, alpha=BAND_ALPHA, linewidth=0) for colour in COLOURS
        ),
    }
    if others:
        samples["other detections"] = Line2D([], [], **OTHERS)
    figure.legend(
        handles=[*samples.values()],
        labels=[*samples],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.3)},
        handlelength=4.5,
        loc="upper left",
        frameon=False,
        fontsize=8,
    )


def _draw_box(axes: Axes, edges: Tensor, **style: Any) -> None:
    x0, y0, x1, y1 = edges.tolist()
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))


def _draw_edges(axes: Axes, layer: EdgeDistributions) -> None:
    """The four refined edges, and their bands, each in its colour."""
    x0, y0, x1, y1 = layer.edges.tolist()
    ends = [((x0, x0), (y0, y1)), ((x0, x1), (y0, y0)), ((x1, x1), (y0, y1)), ((x0, x1), (y1, y1))]
    for band, (xs, ys), colour in zip(_bands(layer), ends, COLOURS, strict=True):
        axes.add_patch(Polygon(band, closed=True, color=colour, alpha=BAND_ALPHA, linewidth=0))
        axes.plot(xs, ys, color=colour, linewidth=1.2, solid_capstyle="round")


def _bands(layer: EdgeDistributions) -> list[list[tuple[float, float]]]:
    """The corners of the four edges' bands, one standard deviation to either side.

    Together they are a picture frame, mitred at its corners. Where opposite bands are so wide that they would meet
    within the box, they end where they do.
    """
    edges, deviations = layer.edges.tolist(), layer.deviations.tolist()
    outer = [edge + sign * deviation for edge, sign, deviation in zip(edges, OUTWARDS, deviations, strict=True)]
    inner = [edge - sign * deviation for edge, sign, deviation in zip(edges, OUTWARDS, deviations, strict=True)]
    for low, high in ((0, 2), (1, 3)):
        if inner[low] > inner[high]:
            share = deviations[low] / (deviations[low] + deviations[high])
            inner[low] = inner[high] = edges[low] + share * (edges[high] - edges[low])
    (a, b, c, d), (e, f, g, h) = outer, inner
    return [
        [(a, b), (e, f), (e, h), (a, d)],
        [(a, b), (c, b), (g, f), (e, f)],
        [(c, b), (c, d), (g, h), (g, f)],
        [(a, d), (e, h), (g, h), (c, d)],
    ]


def _draw_distributions(
    figure: SubFigure, image: np.ndarray, detection: Detection, number: int, first_layer: int
) -> None:
    shown = detection.layers[first_layer:]
    figure.suptitle(f"{number}  {detection.name} {detection.score:.2f}", weight="bold", **HEADING)
    grid = figure.add_gridspec(2 * len(shown), 5, width_ratios=(1.25, 1, 1, 1, 1))
    view = _view(detection)
    highest = 1.3 * max(float(layer.probabilities.max()) for layer in shown)
    for row, layer in enumerate(shown):
        crop = figure.add_subplot(grid[2 * row : 2 * row + 2, 0])
        _draw_crop(crop, image, layer, view)
        crop.set_ylabel(f"layer {first_layer + row + 1}", fontsize=9, weight="bold")
        for edge, (name, colour) in enumerate(zip(EDGES, COLOURS, strict=True)):
            before = figure.add_subplot(grid[2 * row, edge + 1])
            after = figure.add_subplot(grid[2 * row + 1, edge + 1])
            _draw_before_weighting(before, layer, edge)
            _draw_after_weighting(after, layer, edge, _offset_range(shown, edge))
            for axes in (before, after):
                axes.set_ylim(0, highest)
                axes.tick_params(labelsize=7, length=2, labelleft=edge == 0)
                axes.spines[["top", "right"]].set_visible(False)
            if edge == 0:
                before.set_ylabel("before W", fontsize=8)
                after.set_ylabel("after W", fontsize=8)
            if row == 0:
                before.set_title(name, color=colour, fontsize=9, weight="bold")
            if row == len(shown) - 1:
                after.set_xlabel("offset, pixels", fontsize=8)


def _view(detection: Detection) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what the crops show: initial and refined boxes, bands and some margin; square."""
    edges = torch.stack([e for layer in detection.layers for e in (layer.initial_edges, layer.edges)])
    x0, y0 = edges[:, :2].min(0).values.tolist()
    x1, y1 = edges[:, 2:].max(0).values.tolist()
    half = (0.5 + CROP_MARGIN) * max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half, y - half, x + half, y + half


def _draw_crop(axes: Axes, image: np.ndarray, layer: EdgeDistributions, view: tuple[float, ...]) -> None:
    axes.imshow(image)
    _draw_edges(axes, layer)
    _draw_box(axes, layer.initial_edges, **INITIAL_LINE)
    axes.set(xlim=(view[0], view[2]), ylim=(view[3], view[1]), xticks=[], yticks=[], facecolor="#EEEEEE")


def _draw_before_weighting(axes: Axes, layer: EdgeDistributions, edge: int) -> None:
    probabilities = layer.probabilities[edge].numpy()
    last = len(probabilities) - 1
    axes.bar(np.arange(last + 1), probabilities, width=0.85, color=COLOURS[edge], linewidth=0)
    axes.axvline(last / 2, ymax=0.8, **INITIAL_LINE, zorder=0)
    axes.set(xlim=(-1, last + 1), xticks=[0, last // 2, last])
    axes.set_xticklabels(["bin 0", str(last // 2), str(last)])


def _draw_after_weighting(axes: Axes, layer: EdgeDistributions, edge: int, limits: tuple[float, float]) -> None:
    mean, deviation = float(layer.means[edge]), float(layer.deviations[edge])
    offsets, probabilities = layer.offsets[edge].numpy(), layer.probabilities[edge].numpy()
    axes.axvspan(mean - deviation, mean + deviation, ymax=0.8, color=COLOURS[edge], alpha=BAND_ALPHA, linewidth=0)
    axes.axvline(0, ymax=0.8, **INITIAL_LINE)
    axes.axvline(mean, ymax=0.8, color=COLOURS[edge], linewidth=1.8)
    axes.vlines(offsets, 0, probabilities, color=COLOURS[edge], linewidth=0.8)
    axes.plot(offsets, probabilities, linestyle="none", marker="o", markersize=1.8, color=COLOURS[edge])
    axes.set_xlim(*limits)
    text = f"{round(mean, 1) + 0.0:+.1f} ± {deviation:.1f}"  # never -0.0
    axes.text(0.5, 1, text, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, color=COLOURS[edge])


def _offset_range(layers: Sequence[EdgeDistributions], edge: int) -> tuple[float, float]:
    """What to show of the edge's offsets: three standard deviations about each layer's mean, and zero."""
    low = min(0.0, *(float(layer.means[edge] - 3 * layer.deviations[edge]) for layer in layers))
    high = max(0.0, *(float(layer.means[edge] + 3 * layer.deviations[edge]) for layer in layers))
    offsets = layers[0].offsets[edge]
    margin = 0.05 * (high - low)
    return max(low, float(offsets[0])) - margin, min(high, float(offsets[-1])) + margin
