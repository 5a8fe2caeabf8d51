"""The outcome of a latency run: a Markdown table with all that one needs to judge it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dfine_plugin.benchmarks.reporting import NONE, Result, table_header, table_row
from dfine_plugin.export.parity import LARGEST_MOVE

PUBLISHED_T4 = {
    "D-FINE-N": 2.12,
    "D-FINE-S": 3.49,
    "D-FINE-M": 5.62,
    "D-FINE-L": 8.07,
    "D-FINE-X": 12.89,
    "RT-DETR-HGNetv2-L": 9.25,
}
"""Milliseconds that the D-FINE authors give for a T4: TensorRT, FP16, one image of 640x640."""


def comparable_with_published(result: Result) -> bool:
    """Whether the published figures were taken as these were: the same GPU, precision, image and batch size."""
    settings = result["settings"]
    same = (settings["precision"], settings["image_size"], settings["batch_size"]) == ("fp16", 640, 1)
    return same and re.search(r"\bT4\b", result["environment"]["device"]) is not None


def latency_markdown(result: Result) -> str:
    """Table and caption of what ``latency.json`` holds."""
    rows, settings = result["rows"], result["settings"]
    with_ap = any(row["AP"] is not None for row in rows)
    names = ["model", "backend", "precision", "median, ms", "p95, ms", "ratio", "over host", "GFLOPs", "parity"]
    names += ["AP"] if with_ap else []
    lines = table_header(names)
    for row in rows:
        cells = [
            row["model"],
            row["backend"],
            row["precision"] or "as built",
            f"{1000 * row['seconds']['median']:.2f}",
            f"{1000 * row['seconds']['p95']:.2f}",
            f"{row['ratio']:.3f}",
            NONE if row["over_host"] is None else f"{row['over_host']:.3f}",
            NONE if row["flops"] is None else f"{row['flops'] / 1e9:.3g}",
            parity_cell(row["parity"]),
        ]
        if with_ap:
            cells.append(NONE if row["AP"] is None else f"{row['AP']:.1f}")
        lines.append(table_row(cells))
    if comparable_with_published(result):
        lines += ["", "Published for the T4 (TensorRT, FP16, 640x640, batch 1):", ""]
        lines += table_header(["model", "ms"])
        lines += [table_row([name, f"{ms:.2f}"]) for name, ms in PUBLISHED_T4.items()]
    size = settings["image_size"]
    lines += [
        "",
        f"{describe_machine(result)}.",
        "",
        f"Batch {settings['batch_size']}, {size}x{size}, inputs and outputs on the device; {settings['warmup']} rounds "
        f"of warm-up, then {settings['runs']} in which every row runs once, in turn, {settings['pause_ms']:g} ms "
        "before each run; median and p95 of all runs; ratio: to the first row in the same round, median; over host: "
        "likewise, of a wrapped host to the bare one of as many layers on the same backend; GFLOPs: of one image, as "
        "torch counts them. Parity: confident detections (with fresh weights the best ones) against float32 PyTorch "
        f"on the CPU, same weights, on {settings['parity_images']}.",
    ]
    lines += ["", *result["notes"]] if result["notes"] else []
    if result["failures"]:
        lines += ["", "Failed:", "", *(f"- {failure}" for failure in result["failures"])]
    return "\n".join([*lines, ""])


def describe_machine(result: Mapping[str, Any]) -> str:
    """Device, threads and versions, of the ``environment`` and the ``gpu`` of a result."""
    environment, gpu = result["environment"], result["gpu"]
    device = environment["device"] + ("" if gpu is None else f", {gpu['summary']}; {environment['cpu']}")
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{device}, {threads}; {versions}"


def parity_cell(parity: Mapping[str, Any] | str) -> str:
    """What moved, and whether that is too far; or why it is not known."""
    if isinstance(parity, str):
        return parity
    if "num_near" in parity:
        return f"{parity['num_near']} of {parity['num_detections']} within {LARGEST_MOVE} px"
    moved = f"p99 {parity['p99_move']:.2g} px, max {parity['max_move']:.2g} px"
    lost = f"{parity['num_lost']} of {parity['num_detections']} lost"
    return f"{'' if parity['passed'] else '**failed**: '}{moved}, {lost}"
