"""One run of the ablation: a host, wrapped or not, trained by transformers' Trainer and evaluated by COCO's rules.

Baseline and wrapped twin of one seed share the weights of all that they share, the order of the images, their flips,
the random numbers of the denoising queries, the optimizer, the schedule and the number of steps.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from dfine_plugin import FDRConfig, calibrate, learn_from, load_pretrained, make_mosaics, wrap_criterion, wrap_decoder
from dfine_plugin.benchmarks.data.coco_data import read_split
from dfine_plugin.benchmarks.data.detection_data import DetectionData, TrainingView, collate, normalise
from dfine_plugin.benchmarks.data.shapes import make_shapes
from dfine_plugin.benchmarks.gain.diagnosis import diagnose
from dfine_plugin.benchmarks.gain.ema import make_ema
from dfine_plugin.benchmarks.gain.evaluation import coco_metrics, detect
from dfine_plugin.benchmarks.gain.runs import RetrofitSettings, RunSettings, code_digest, save_model
from dfine_plugin.benchmarks.gain.variants import TWICE, fdr_settings, is_calibrated
from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls
from dfine_plugin.benchmarks.models.hosts import HOSTS, build_host
from dfine_plugin.benchmarks.models.look_forward import look_forward_twice
from dfine_plugin.benchmarks.models.matchability import learn_classes_by_mal
from dfine_plugin.benchmarks.reporting import Result
from dfine_plugin.benchmarks.trained_hosts import load_trained, take_benchmarks_images

# Seeds of the embedded data: the same images for every run, and none of them in both splits.
SHAPES_SEEDS = {"train": 0, "val": 1}

CALIBRATION_IMAGES = 256

# Called with the number of steps done, and with the metrics where an evaluation has just been made.
Report = Callable[[int, dict[str, Any] | None], None]


@lru_cache(maxsize=4)
def load_data(data: str, split: str, image_size: int, images: int) -> DetectionData:
    """The split of "shapes" (of `images` images) or of a COCO folder, kept for the next run in this process."""
    if data == "shapes":
        return make_shapes(images, image_size, SHAPES_SEEDS[split])
    return read_split(Path(data), split, image_size, image_size)


def build_model(settings: RunSettings, data: DetectionData) -> nn.Module:
    """The host with the seed's weights, or a trained one; then wrapped, and calibrated, if the variant asks for it."""
    set_seed(settings.seed)
    if isinstance(settings, RetrofitSettings):
        model = load_trained(settings.trained, data.class_names)
    else:
        model = build_host(settings.host, data.class_names, settings.num_queries, settings.width)
    fdr = fdr_settings(settings.variant)
    if fdr is not None:
        detector = wrap_decoder(
            getattr(model, "detector", model), FDRConfig(**{"class_loss": settings.class_loss, **fdr})
        )
        criterion = getattr(model, "criterion", None)
        if isinstance(criterion, nn.Module):  # apart from the detector
            wrap_criterion(criterion, detector)
    elif settings.class_loss == "mal":
        learn_classes_by_mal(model)
    if settings.variant == TWICE:
        look_forward_twice(model)
    # Convolutions on a CPU are some 10 % faster so.
    model = model.to(settings.device).to(memory_format=torch.channels_last)
    if isinstance(settings, RetrofitSettings) and is_calibrated(settings.variant):
        images = data.images[:CALIBRATION_IMAGES].split(settings.batch_size)
        calibrate(model, (normalise(batch) for batch in images), progress=False)
    if settings.teacher:
        teacher = load_pretrained(settings.teacher, dtype=torch.float32)
        take_benchmarks_images(teacher, Path(settings.teacher))
        learn_from(model, teacher)
    return model


class DetectionTrainer(Trainer):
    """Trainer for models that return their own loss; with mosaics for a share of the images in the first half.

    Their random numbers come from a generator of its own, so that two models which draw different amounts of random
    numbers still see the same images.
    """

    def __init__(self, *args: Any, mosaics: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mosaics = mosaics
        self.random = torch.Generator().manual_seed(self.args.seed + self.args.process_index)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        if self.mosaics and self.state.global_step < self.state.max_steps // 2:
            pixels, labels = make_mosaics(pixels, labels, self.mosaics, self.random)
        outputs = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last), labels=labels)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Recorder(TrainerCallback):
    """Averages the weights, evaluates the average at its steps, and times the steps without the evaluations."""

    def __init__(self, model: nn.Module, settings: RunSettings, data: DetectionData, report: Report | None) -> None:
        self.settings, self.data, self.report = settings, data, report
        # A ramp as long as the average's own memory.
        self.ema = make_ema(model, settings.ema_decay, 1 / (1 - settings.ema_decay))
        self.curve: list[dict[str, Any]] = []
        self.diagnosis: dict[str, Any] | None = None
        self.step_seconds: list[float] = []
        self.due = set(settings.evaluation_steps())

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.ema.to(args.device)
        if 0 in self.due and state.is_world_process_zero:
            self._evaluate(0, args.device)
        # The wrap has drawn random numbers for its own weights: start the two twins from the same state again.
        set_seed(self.settings.seed)
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.ema.update_parameters(kwargs["model"])
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        # From the end of the last step to the end of this one: loading the images and averaging are part of a step.
        self.step_seconds.append(time.perf_counter() - self.started)
        metrics = None
        if state.global_step in self.due and state.is_world_process_zero:
            metrics = self._evaluate(state.global_step, args.device)
        if self.report and state.is_world_process_zero:
            self.report(state.global_step, metrics)
        self.started = time.perf_counter()

    def _evaluate(self, step: int, device: torch.device) -> dict[str, Any]:
        detections = detect(self.ema.module, self.data, 50, device)
        metrics = coco_metrics(detections, self.data.coco, self.data.sides)
        self.curve.append({"step": step, "seconds": sum(self.step_seconds), **metrics})
        return metrics

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.diagnosis = diagnose(self.ema.module, self.data, 50, args.device)


def train_run(settings: RunSettings, report: Report | None = None, models: Path | None = None) -> Result:
    """Train and evaluate; the result holds settings, the AP curve, the loss curve, times and the final metrics.

    With `models`, the averaged weights, which are the ones that were evaluated, are kept in that folder.
    """
    train = load_data(settings.data, "train", settings.image_size, settings.train_images)
    val = load_data(settings.data, "val", settings.image_size, settings.val_images)
    model = build_model(settings, train)
    recorder = Recorder(model, settings, val, report)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DetectionTrainer(
            model=model,
            args=_training_arguments(settings, scratch),
            train_dataset=TrainingView(train, settings.flip, settings.seed),
            data_collator=collate,
            callbacks=[recorder],
            mosaics=settings.mosaics,
        )
        trainer.remove_callback(PrinterCallback)
        calls_cuda = settings.host in HOSTS and HOSTS[settings.host].calls_cuda
        with without_cuda_calls() if calls_cuda and settings.device == "cpu" else nullcontext():
            trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(entry["loss"]) for entry in losses):
        raise RuntimeError(f"{settings.key()}: the loss is not finite")
    if models is not None and trainer.is_world_process_zero():
        save_model(models, settings, recorder.ema.module)
    return {
        "settings": asdict(settings),
        "fdr": fdr_settings(settings.variant),
        "final": recorder.curve[-1] if recorder.curve else None,
        "diagnosis": recorder.diagnosis,
        "curve": recorder.curve,
        "losses": [{key: entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate")} for entry in losses],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": sorted(recorder.step_seconds)[len(recorder.step_seconds) // 2],
        "seconds": sum(recorder.step_seconds),
        "code": code_digest(),
    }


def _training_arguments(settings: RunSettings, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=min(settings.warmup_steps, settings.steps // 5),
        lr_scheduler_type="cosine",
        max_grad_norm=settings.clip_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, settings.steps // 50),
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
        optim="adamw_torch_fused",
    )
