"""What a training step costs: host and wrapped twin in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfine_plugin import deploy, wrap_decoder
from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.benchmarks.timing import now

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
