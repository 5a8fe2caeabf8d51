"""The pictures of "How it works", drawn from what the package computes: `python docs/draw_pictures.py`."""

from pathlib import Path

import matplotlib
import torch

from dfine_plugin import decode_boxes, union_matching, weighting_function
from dfine_plugin.boxes import to_corners
from dfine_plugin.weighting import uniform_bins

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "pictures"
SETS = ("layer 1", "layer 2", "layer 3", "initial boxes")


def draw_weighting() -> None:
    """W(n) of the default bins beside evenly spaced ones."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    bins = {"W, non-uniform": weighting_function(32, 0.5, 0.25), "evenly spaced": uniform_bins(32, 0.5)}
    for (name, values), style in zip(bins.items(), ("o-", ".--"), strict=True):
        axes.plot(values, style, markersize=4, label=name)
    axes.set(xlabel="bin n", ylabel="offset of the edge, in sides of the initial box")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "weighting.png", dpi=150)
    plt.close(figure)


def draw_refinement() -> None:
    """One box whose four distributions sharpen over three layers: the formulas on made-up logits."""
    weights = weighting_function(32, 0.5, 0.25)
    initial = torch.tensor([[0.5, 0.5, 0.4, 0.3]])
    aims, widths = torch.tensor([0.15, -0.1, 0.05, 0.2]), (0.3, 0.12, 0.04)
    figure, (picture, *rows) = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
    colours = [f"C{i}" for i in range(3)]
    for layer, (width, axes) in enumerate(zip(widths, rows, strict=True)):
        share = (0.5, 0.9, 1.0)[layer]
        logits = -((weights - share * aims[:, None]).abs() / width)
        (left, top, right, bottom) = to_corners(decode_boxes(initial, logits[None], weights))[0].tolist()
        picture.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color=colours[layer]))
        axes.bar(weights, logits.softmax(-1)[0], width=0.02, color=colours[layer])
        axes.set(title=f"layer {layer + 1}: left edge", xlabel="offset, sides of b0", ylim=(0, 0.45))
        axes.axvline(aims[0], color="black", linewidth=1, linestyle=":")
    cx, cy, w, h = initial[0].tolist()
    picture.add_patch(plt.Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, color="black", linestyle="--"))
    picture.set(xlim=(0.15, 0.85), ylim=(0.8, 0.2), xticks=[], yticks=[], title="b0 dashed; the three layers")
    figure.savefig(FOLDER / "refinement.png", dpi=150)
    plt.close(figure)


def draw_union() -> None:
    """Which queries four sets match with two truths, and what their union is."""
    votes = [[(0, 0), (1, 1)], [(2, 0), (1, 1)], [(1, 0), (3, 1)], [(0, 0), (1, 1)]]  # (query, truth) of each set
    matches = [tuple(torch.tensor(pairs).T) for pairs in votes]
    ((queries, truths),) = union_matching([[match] for match in matches])
    figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
    for row, pairs in enumerate([*votes, list(zip(queries.tolist(), truths.tolist(), strict=True))]):
        for query, truth in pairs:
            axes.scatter(query, row, s=800, color=f"C{truth}", marker="s")
            axes.annotate(f"truth {truth + 1}", (query, row), ha="center", va="center", fontsize=8, color="white")
    axes.axhline(len(votes) - 0.5, color="black", linewidth=1)
    axes.set(xlim=(-0.6, 3.6), ylim=(len(votes) + 0.6, -0.6), xticks=range(4), yticks=range(len(votes) + 1))
    axes.set_xticklabels([f"query {i + 1}" for i in range(4)])
    axes.set_yticklabels([*SETS, "union"])
    figure.savefig(FOLDER / "union.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    draw_weighting()
    draw_refinement()
    draw_union()
