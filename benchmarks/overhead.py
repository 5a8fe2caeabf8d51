"""What the wrap costs a training step: host and wrapped twin in turn, in one process.

    python -m dfine_plugin.benchmarks.overhead --host rt-detr-r18 --image-size 640 --batch-size 2
    python -m dfine_plugin.benchmarks.overhead --host detrex/dino --device cuda --image-size 800

A step is forward with losses and backward; within it the criterion is timed apart. The ratios are medians over pairs of
steps that follow one another. Memory is what the backward pass keeps (on any device) and, on a GPU, the peak. Inference
is the host's against that of its deployed twin, with its FLOPs.

On a CPU, DINO and DN-DETR of detrex run with their calls of `.cuda()` left out; the figures say so.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dfine_plugin.benchmarks.models.detrex_configs import CALL_CUDA
from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS, NUM_CLASSES
from dfine_plugin.benchmarks.options import check_device_name, check_host_takes, find_device
from dfine_plugin.benchmarks.reporting import write_json


def main(
    host: Annotated[str, typer.Option(help=f"one of {', '.join(HOSTS)}")] = "rt-detr-r18",
    image_size: Annotated[int, typer.Option(min=64)] = 640,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    truths: Annotated[int, typer.Option(min=1, help="in each image")] = 7,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of steps")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda", callback=check_device_name)] = "cpu",
    output: Annotated[Path, typer.Option(help="folder for the figures", file_okay=False)] = Path("overhead"),
) -> None:
    """Compare a training step of a host with that of its wrapped twin."""
    if host not in HOSTS:
        raise typer.BadParameter(f"{host!r} is not one of {', '.join(HOSTS)}", param_hint="--host")
    check_host_takes(host, image_size)
    # from here on torch is needed, which takes seconds to import
    import torch

    from dfine_plugin.benchmarks.cost.step_costs import compare
    from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls
    from dfine_plugin.benchmarks.timing import device_name

    where = find_device(device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch_size, 3, image_size, image_size, generator=generator).to(where)
    labels = []
    for _ in range(batch_size):
        centres, sides = (torch.rand(truths, 2, generator=generator) for _ in range(2))
        classes = torch.randint(0, NUM_CLASSES, (truths,), generator=generator)
        boxes = torch.cat([0.3 + 0.4 * centres, 0.05 + 0.4 * sides], dim=1)
        labels.append({"class_labels": classes.to(where), "boxes": boxes.to(where)})
    left_out = pixels.device.type == "cpu" and host in [f"detrex/{name}" for name in CALL_CUDA]
    with without_cuda_calls() if left_out else nullcontext():
        result = compare(host, pixels, labels, repeats)
    result["without_cuda_calls"] = left_out
    result |= {"image_size": image_size, "batch_size": batch_size, "truths": truths, "torch": torch.__version__}
    result["device"] = device_name(pixels.device)
    result["threads"] = torch.get_num_threads()
    write_json(output / f"{host.replace('/', '-')}.json", result)
    _show(result)


def _show(result: dict[str, Any]) -> None:
    from dfine_plugin.benchmarks.cost.step_costs import PARTS

    console, table = Console(), Table("", "host", "wrapped", "ratio")
    pair = result["host"], result["wrapped"]
    for part in (*PARTS, "inference"):
        seconds = [1000 * one["seconds"][part] for one in pair]
        table.add_row(f"{part}, ms", *(f"{value:.1f}" for value in seconds), f"{result['ratios'][part]:.3f}")
    for name in pair[0]["memory"]:
        values = [one["memory"][name] / 2**20 for one in pair]
        table.add_row(f"{name}, MiB", *(f"{value:.1f}" for value in values), f"{values[1] / values[0]:.4f}")
    for name in ("parameters", "flops"):
        values = [one[name] for one in pair]
        table.add_row(name, *(f"{value:,}" for value in values), f"{values[1] / values[0]:.4f}")
    console.print(f"{result['name']}, {result['batch_size']} images of {result['image_size']} px, {result['device']}")
    if result["without_cuda_calls"]:
        console.print("without the host's calls of .cuda()")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
