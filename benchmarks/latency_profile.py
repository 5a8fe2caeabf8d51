"""Where an inference's time goes, module by module: a host beside its wrapped twin, on onnxruntime and the CPU.

    python -m dfine_plugin.benchmarks.latency_profile --host rt-detr-r18

The graphs are those that the latency benchmark runs, fresh weights and all, and the two run in turn. A module's time is
that of its nodes in one run, the median over runs. Nodes that onnxruntime makes of several (most convolutions) belong
to no module any more, and stand under the name of their operation.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.benchmarks.options import check_host_takes
from dfine_plugin.benchmarks.reporting import table_header, table_row, write_text

MADE = "(onnxruntime's own) "


def main(
    host: Annotated[str, typer.Option(help=f"one of {', '.join(HOSTS)}")] = "rt-detr-r18",
    image_size: Annotated[int, typer.Option(min=32)] = 640,
    runs: Annotated[int, typer.Option(min=1)] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="runs before that")] = 3,
    output: Annotated[Path, typer.Option(help="folder for the table", file_okay=False)] = Path("latency"),
) -> None:
    """Tell where a wrapped host's time goes, and where the bare one's."""
    if host not in HOSTS:
        raise typer.BadParameter(f"{host!r} is not one of {', '.join(HOSTS)}", param_hint="--host")
    check_host_takes(host, image_size)
    # from here on torch is needed, which takes seconds to import
    import torch

    from dfine_plugin.benchmarks.speed.latency_report import describe_machine
    from dfine_plugin.benchmarks.speed.machine import environment
    from dfine_plugin.benchmarks.speed.subjects import find_subjects
    from dfine_plugin.export import export_onnx

    graphs = {}
    with TemporaryDirectory() as folder:
        for name, subject in zip(("host", "wrapped"), find_subjects([host], [], [], [], image_size, None), strict=True):
            assert subject.model is not None
            graphs[name] = export_onnx(subject.model, Path(folder) / f"{name}.onnx", (image_size, image_size))
        table = profile_markdown(profile(graphs, image_size, runs, warmup))
    machine = describe_machine({"environment": environment(torch.device("cpu")), "gpu": None})
    table += f"\n{host}, {image_size}x{image_size}, batch 1, {runs} runs after {warmup} of warm-up. {machine}.\n"
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "profile.md", table)
    Console().print(table, markup=False, soft_wrap=True)


def profile(graphs: Mapping[str, Path], image_size: int, runs: int, warmup: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each module in one inference, by the graph's name; graphs run in turn, on PyTorch's threads."""
    import numpy as np
    import onnxruntime
    import torch

    sessions = {}
    with TemporaryDirectory() as folder:
        for name, graph in graphs.items():
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / name)
            sessions[name] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).standard_normal((1, 3, image_size, image_size), dtype=np.float32)
        for _ in range(warmup + runs):
            for session in sessions.values():
                session.run(None, {"images": images})
        traces = {name: json.loads(Path(session.end_profiling()).read_text()) for name, session in sessions.items()}
    return {name: by_module(trace, modules_of(graphs[name]), warmup) for name, trace in traces.items()}


def modules_of(graph: Path) -> dict[str, str]:
    """The module of each node, to the depth that a table can hold: decoders in parts, all else whole."""
    import onnx_ir as ir

    from dfine_plugin.export.precision import module_of

    modules = {}
    for node in ir.load(graph).graph:
        parts = [part for part in module_of(node).split(".") if not part.isdigit()]
        modules[str(node.name)] = ".".join(parts[: 4 if "decoder" in parts else 3]) or "(no module)"
    return modules


def by_module(trace: list[dict[str, Any]], modules: Mapping[str, str], warmup: int) -> dict[str, float]:
    """Milliseconds of each module: the sum over its nodes, the median over the runs after the warm-up.

    Args:
        trace: the events that onnxruntime's profiler writes, run after run.
        modules: of the graph's nodes, by name.
        warmup: runs that do not count.
    """
    totals: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    seen: dict[str, int] = defaultdict(int)
    for event in trace:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        node = event["name"].removesuffix("_kernel_time")
        # a fusion may keep the first node's name before a stroke of its own
        module = modules.get(node, modules.get(node.split("/")[0], MADE + event["args"]["op_name"]))
        totals[module][seen[node]] += event["dur"] / 1000
        seen[node] += 1
    return {
        module: median(time for run, time in sorted(times.items()) if run >= warmup) for module, times in totals.items()
    }


def profile_markdown(times: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the modules, that with the largest difference first."""
    host, wrapped = times["host"], times["wrapped"]
    rows = [(name, host.get(name, 0.0), wrapped.get(name, 0.0)) for name in host.keys() | wrapped.keys()]
    rows.sort(key=lambda row: (-abs(row[2] - row[1]), row[0]))
    rows.append(("all", sum(host.values()), sum(wrapped.values())))
    lines = table_header(["module", "host, ms", "wrapped, ms", "difference, ms"])
    lines += [table_row([name, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]) for name, a, b in rows]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
