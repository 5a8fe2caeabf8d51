"""How long an inference takes: host against wrapped, or any models, graphs and engines, under one protocol.

    pip install ".[bench,export]"
    python -m dfine_plugin.benchmarks.latency --host rt-detr-r18
    python -m dfine_plugin.benchmarks.latency --model baseline=DIR --model fdr=DIR --images FOLDER --ap ablation.json
    python -m dfine_plugin.benchmarks.latency --host rt-detr-r50 --backend tensorrt-rtx --backend torch-cudagraph
    python -m dfine_plugin.benchmarks.latency --device cpu --backend onnxruntime --backend openvino --backend torch
    python -m dfine_plugin.benchmarks.latency --engine theirs=dfine_l.engine --engine ours=wrapped.engine
    python -m dfine_plugin.benchmarks.latency --model baseline=DIR --model fdr=DIR --num-layers 3 --num-layers 2 \\
        --data shapes --image-size 96

All rows run in turn, round after round, with a pause before each run; median and 95th percentile are those of all runs.
Inputs and outputs stay on the device, and a run ends when the device has done it: no preprocessing, no copies, no
selection of detections unless the graph contains it. Wrapped models are deployed.

Beside each row stands its parity: confident detections of the very object that was timed, matched with those of the
model in float32 on the CPU. The weights of `--host` are fresh, and made to tell places apart
(:func:`~dfine_plugin.benchmarks.models.settled_hosts.settled_pair`). Their queries still score more alike than a
trained model's, and in half precision others are selected at the selection's edge, whatever the decoder makes of them.
So there parity is how many of the best detections are found again, and no verdict.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.benchmarks.options import check_data, check_device_name, check_host_takes, find_device
from dfine_plugin.benchmarks.reporting import Result, write_json, write_text
from dfine_plugin.benchmarks.speed.backends import BACKENDS, LOWERED, PRECISIONS
from dfine_plugin.errors import DFinePluginError
from dfine_plugin.tools.targets import BACKENDS as ENGINE_BACKENDS

if TYPE_CHECKING:
    import torch

    from dfine_plugin.benchmarks.speed.machine import GPUProbe


def main(
    host: Annotated[
        list[str] | None, typer.Option(help=f"fresh, and its wrapped twin; one of {', '.join(HOSTS)}")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="[NAME=]FOLDER that save_pretrained wrote")] = None,
    onnx: Annotated[list[str] | None, typer.Option(help="[NAME=]FILE; under a model's name: its graph")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="[NAME=]FILE; under a model's name: its engine")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"of {', '.join(BACKENDS)}; default: the TensorRT at hand, onnxruntime without a GPU"),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default: fp16, fp32 on a CPU")] = None,
    image_size: Annotated[int, typer.Option(min=32)] = 640,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    runs: Annotated[int, typer.Option(min=1, help="timed runs of each row")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="runs of each row before that")] = 10,
    pause: Annotated[float, typer.Option(min=0, help="milliseconds before each timed run")] = 200,
    images: Annotated[
        Path | None, typer.Option(help="folder with images for the models' parity", exists=True, file_okay=False)
    ] = None,
    num_layers: Annotated[
        list[int] | None,
        typer.Option(min=1, help="a row of each model for each of these depths: the first decoder layers alone"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="shapes, or a COCO-format folder: measure the models' AP on its val split")
    ] = None,
    ap: Annotated[
        list[str] | None, typer.Option(help="NAME=AP, or an ablation.json: AP that was measured elsewhere")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where there is one", callback=check_device_name)
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for table, figures and plots", file_okay=False)] = Path(
        "latency"
    ),
) -> None:
    """Time inferences of several models on several backends in turn."""
    for option, values, known in (
        ("--host", host or [], [*HOSTS]),
        ("--backend", backend or [], [*BACKENDS]),
        ("--precision", [precision] if precision else [], [*PRECISIONS]),
    ):
        for value in values:
            if value not in known:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    given = [name for name in backend or [] if name in LOWERED]
    if given and precision not in (None, "fp32"):
        raise typer.BadParameter(f"{', '.join(given)}: for graphs in fp32 alone", param_hint="--precision")
    if not (host or model or onnx or engine):
        host = ["rt-detr-r18"]
    for name in host or []:
        check_host_takes(name, image_size)
    if data is not None:
        check_data(data, ["val"])
    # from here on torch is needed, which takes seconds to import
    from dfine_plugin.benchmarks.speed.interleaving import interleave, paired_ratio, summarise
    from dfine_plugin.benchmarks.speed.latency_rows import build_rows
    from dfine_plugin.benchmarks.speed.machine import GPUProbe, environment
    from dfine_plugin.benchmarks.speed.subjects import NUM_SCENES, find_subjects, read_data

    console = Console()
    where, chosen, precision, notes = _choose(device, backend, precision)
    for note in notes:
        console.print(note, soft_wrap=True)
    try:
        subjects = find_subjects(host or [], model or [], onnx or [], engine or [], image_size, images)
        if num_layers:
            subjects = [subject.with_layers(count) for subject in subjects for count in dict.fromkeys(num_layers)]
        split, pictures = read_data(data, image_size) if data else (None, [])
    except (ValueError, OSError, DFinePluginError) as error:
        raise typer.BadParameter(str(error)) from error
    for subject in subjects:
        if not any(subject.runs_on(name) for name in chosen):
            raise typer.BadParameter(f"nothing of {subject.name!r} runs on {', '.join(chosen)}", param_hint="--backend")
    try:
        known_ap = read_ap(ap or [], [subject.name for subject in subjects])
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--ap") from error
    if split is not None:
        console.print(f"measuring AP on {len(pictures)} images ...")
        measured = {subject.name: subject.average_precision(split, pictures) for subject in subjects}
        known_ap = {name: value for name, value in measured.items() if value is not None} | known_ap
        notes.append(f"AP: of the models in PyTorch, float32, on the validation split of {data}.")
    if host:
        notes.append(f"{' and '.join(host)}: fresh weights, which have a latency, and parity, but no AP.")

    result: Result = {
        "command": shlex.join(["python", "-m", "dfine_plugin.benchmarks.latency", *sys.argv[1:]]),
        "environment": environment(where),
        "settings": {
            "precision": precision,
            "image_size": image_size,
            "batch_size": batch_size,
            "runs": runs,
            "warmup": warmup,
            "pause_ms": pause,
            "parity_images": f"{NUM_SCENES} drawn scenes" + (f" (models: the images of {images})" if images else ""),
        },
        "notes": notes,
    }
    flops = {subject.name: subject.flops() for subject in subjects}
    with TemporaryDirectory() as folder:
        rows, runners, failures = build_rows(subjects, chosen, precision, batch_size, where, Path(folder), console)
        probe = GPUProbe(where) if where.type == "cuda" else None
        read = probe.read if probe else lambda: None
        console.print(f"{runs} rounds of {len(rows)} rows ...")
        times = interleave([runner.run for runner in runners], runs, warmup, pause / 1000, after_round=read)
    for row, own in zip(rows, times, strict=True):
        row |= {"seconds": {**summarise(own), "all": own}, "ratio": paired_ratio(own, times[0])}
        row["AP"] = known_ap.get(row["model"])
        row["flops"] = flops[row["model"]]
    own_times = {(row["model"], row["backend"]): row["seconds"]["all"] for row in rows}
    for row in rows:
        host_times = own_times.get((row["host"], row["backend"]))
        row["over_host"] = None if host_times is None else paired_ratio(row["seconds"]["all"], host_times)
    result |= {"rows": rows, "failures": failures, "gpu": None if probe is None else _gpu(probe)}
    write_report(result, output, console)
    if failures:
        raise typer.Exit(1)


def _choose(
    device: str | None, backends: list[str] | None, precision: str | None
) -> tuple[torch.device, list[str], str, list[str]]:
    """Device, backends and precision, and what to say about those that were not asked for."""
    import torch

    from dfine_plugin.benchmarks.speed.runners import check_backend

    has_gpu = torch.cuda.is_available()
    where = find_device(device or ("cuda" if has_gpu else "cpu"))
    notes = []
    if where.type == "cpu" and not has_gpu:
        notes.append("There is no GPU here: these are the CPU's times.")
    if not backends:
        usual = [name for name, module in ENGINE_BACKENDS.items() if find_spec(module) is not None]
        backends = [(usual or ["torch-cudagraph"])[0] if where.type == "cuda" else "onnxruntime"]
        notes.append(f"No backend is asked for: {backends[0]}.")
    backends = list(dict.fromkeys(backends))
    for name in backends:
        try:
            check_backend(name, where)
        except (ValueError, ImportError) as error:
            raise typer.BadParameter(str(error), param_hint="--backend") from error
    if precision is None:
        precision = "fp16" if where.type == "cuda" else "fp32"
        if where.type == "cpu":
            notes.append("No precision is asked for: fp32, for a CPU has no fast half precision.")
    return where, backends, precision, notes


def read_ap(specs: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """AP by the names of rows, from ``NAME=AP`` and from an ablation's JSON, whose variants are the names.

    Raises:
        ValueError: no number, or no row of that name.
    """
    found: dict[str, float] = {}
    for spec in specs:
        if Path(spec).is_file():
            summary = json.loads(Path(spec).read_text())["summary"]
            seeds = {name: summary[name]["metrics"]["AP"].values() for name in names if name in summary}
            given = {name: fmean(values) for name, values in seeds.items()}
        else:
            name, _, value = spec.rpartition("=")
            try:
                given = {name: float(value)} if name in names else {}
            except ValueError as error:
                raise ValueError(f"{spec!r} is neither NAME=AP nor a file") from error
        if not given:
            raise ValueError(f"{spec} gives the AP of none of the rows: {', '.join(names)}")
        found |= given
    return found


def _gpu(probe: GPUProbe) -> Mapping[str, Any]:
    from dfine_plugin.benchmarks.speed.machine import describe_readings

    summary = describe_readings(probe.readings) if probe.readings else f"clocks not known: {probe.failure}"
    return {"summary": summary, "readings": [asdict(reading) for reading in probe.readings]}


def write_report(result: Result, output: Path, console: Console) -> None:
    """Write table, figures and plots to `output`, and print the table."""
    from dfine_plugin.benchmarks.speed.latency_report import latency_markdown
    from dfine_plugin.benchmarks.speed.plots import plot_ap_over_latency, plot_runs

    table = latency_markdown(result)
    write_json(output / "latency.json", result)
    write_text(output / "latency.md", table)
    plot_runs(result, output / "latency.png")
    written = ["latency.json", "latency.md", "latency.png"]
    if any(row["AP"] is not None for row in result["rows"]):
        plot_ap_over_latency(result, output / "ap_over_latency.png")
        written.append("ap_over_latency.png")
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"written to {output}: {', '.join(written)}")


if __name__ == "__main__":
    typer.run(main)
