"""What the wrap costs a training step: host and wrapped twin in turn, in one process.

    python -m dfine_plugin.benchmarks.overhead --host rt-detr-r18 --image-size 640 --batch-size 2
    python -m dfine_plugin.benchmarks.overhead --host detrex/dino --device cuda --image-size 800

A step is forward with losses and backward; within it the criterion is timed apart. The ratios are medians over pairs of
steps that follow one another. Memory is what the backward pass keeps (on any device) and, on a GPU, the peak. Inference
is the host's against that of its deployed twin, with its FLOPs.

On a CPU, DINO and DN-DETR of detrex run with their calls of `.cuda()` left out; the figures say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfine_plugin import deploy, wrap_decoder
from dfine_plugin.benchmarks.detrex_hosts import CALL_CUDA, without_cuda_calls
from dfine_plugin.benchmarks.full_size_hosts import HOSTS, NUM_CLASSES
from dfine_plugin.benchmarks.runs import write_json
from dfine_plugin.benchmarks.timing import device_name, now

PARTS = ("forward", "criterion", "backward", "step")


class Steps:
    """Training steps of one model on one batch, timed in parts."""

    def __init__(self, model: nn.Module, pixels: Tensor, labels: list[dict[str, Tensor]]) -> None:
        self.model, self.pixels, self.labels = model.train(), pixels, labels
        self.spent = 0.0
        inner: Any = getattr(model, "detector", model)
        if isinstance(getattr(inner, "criterion", None), nn.Module):
            inner.criterion.register_forward_pre_hook(lambda *_: self._begin())
            inner.criterion.register_forward_hook(lambda *_: self._end())
        else:
            criterion = inner.loss_function
            inner.loss_function = lambda *args, **kwargs: self._timed(criterion, *args, **kwargs)

    def now(self) -> float:
        return now(self.pixels.device)

    def _begin(self) -> None:
        self.started = self.now()

    def _end(self) -> None:
        self.spent += self.now() - self.started

    def _timed(self, criterion: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin()
        result = criterion(*args, **kwargs)
        self._end()
        return result

    def run(self) -> dict[str, float]:
        """Seconds of each of PARTS: the forward without the criterion, the criterion, the backward, and all."""
        self.model.zero_grad()
        torch.manual_seed(0)  # the same denoising queries for both
        self.spent = 0.0
        start = self.now()
        loss = self.model(pixel_values=self.pixels, labels=self.labels).loss
        middle = self.now()
        loss.backward()
        end = self.now()
        times = (middle - start - self.spent, self.spent, end - middle, end - start)
        return dict(zip(PARTS, times, strict=True))

    def memory(self) -> dict[str, int]:
        """Bytes that a forward keeps for the backward pass, each storage once; on a GPU the peak of a step, too."""
        kept: dict[int, tuple[Tensor, int]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = tensor, storage.nbytes()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(pixel_values=self.pixels, labels=self.labels).loss
        held = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found = {"kept_for_backward": sum(size for key, (_, size) in kept.items() if key not in held)}
        del loss
        kept.clear()
        if self.pixels.is_cuda:
            self.model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            found["peak"] = torch.cuda.max_memory_allocated()
        return found

    def predict(self) -> float:
        """Seconds of a prediction."""
        start = self.now()
        with torch.no_grad():
            self.model(pixel_values=self.pixels)
        return self.now() - start

    def flops(self) -> int:
        """Floating-point operations of a prediction, as PyTorch counts them."""
        with FlopCounterMode(display=False) as counter:
            self.predict()
        return counter.get_total_flops()


def compare(host: str, pixels: Tensor, labels: list[dict[str, Tensor]], repeats: int) -> dict[str, Any]:
    """Time, memory, parameters and FLOPs of the host and of its wrapped twin, and their ratios."""
    torch.manual_seed(0)
    bare = HOSTS[host]()
    wrapped = copy.deepcopy(bare)
    wrap_decoder(getattr(wrapped, "detector", wrapped))
    models = {"host": bare, "wrapped": wrapped}
    steps = {name: Steps(model.to(pixels.device), pixels, labels) for name, model in models.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        # whoever comes second finds warmer caches: in turn
        for name in sorted(steps, reverse=bool(repeat % 2)):
            measured = steps[name].run()
            if repeat:
                times[name].append(measured)
    result: dict[str, Any] = {"name": host, "times": times}
    result["ratios"] = {
        part: median(w[part] / h[part] for h, w in zip(times["host"], times["wrapped"], strict=True)) for part in PARTS
    }
    for name, one in steps.items():
        result[name] = {
            "seconds": {part: median(time[part] for time in times[name]) for part in PARTS},
            "parameters": sum(p.numel() for p in one.model.parameters()),
            "memory": one.memory(),
        }

    bare.eval()
    deploy(getattr(wrapped.eval(), "detector", wrapped))
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name in sorted(steps, reverse=bool(repeat % 2)):
            seconds = steps[name].predict()
            if repeat:
                spent[name].append(seconds)
    for name, one in steps.items():
        result[name]["seconds"]["inference"] = median(spent[name])
        result[name]["flops"] = one.flops()
    result["ratios"]["inference"] = median(w / h for h, w in zip(spent["host"], spent["wrapped"], strict=True))
    return result


def main(
    host: Annotated[str, typer.Option(help=f"one of {', '.join(HOSTS)}")] = "rt-detr-r18",
    image_size: Annotated[int, typer.Option(min=64)] = 640,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    truths: Annotated[int, typer.Option(min=1, help="in each image")] = 7,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of steps")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path, typer.Option(help="folder for the figures")] = Path("overhead"),
) -> None:
    """Compare a training step of a host with that of its wrapped twin."""
    if host not in HOSTS:
        raise typer.BadParameter(f"{host!r} is not one of {', '.join(HOSTS)}", param_hint="--host")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch_size, 3, image_size, image_size, generator=generator).to(device)
    labels = []
    for _ in range(batch_size):
        centres, sides = (torch.rand(truths, 2, generator=generator) for _ in range(2))
        classes = torch.randint(0, NUM_CLASSES, (truths,), generator=generator)
        boxes = torch.cat([0.3 + 0.4 * centres, 0.05 + 0.4 * sides], dim=1)
        labels.append({"class_labels": classes.to(device), "boxes": boxes.to(device)})
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
