"""Latency: the protocol against a clock that is told what to show, what is made of times, and the command on a CPU."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin.benchmarks import latency
from dfine_plugin.benchmarks.latency import read_ap
from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.benchmarks.reporting import Result
from dfine_plugin.benchmarks.speed import runners, subjects
from dfine_plugin.benchmarks.speed.backends import BACKENDS, CPU_BACKENDS, LOWERED, PRECISIONS
from dfine_plugin.benchmarks.speed.interleaving import interleave, paired_ratio, summarise
from dfine_plugin.benchmarks.speed.latency_report import PUBLISHED_T4, latency_markdown, parity_cell
from dfine_plugin.benchmarks.speed.latency_rows import count_near, measure_row
from dfine_plugin.benchmarks.speed.machine import describe_readings, parse_reading
from dfine_plugin.benchmarks.speed.runners import (
    DTYPES,
    OPENVINO_TYPES,
    TORCH_BACKENDS,
    OpenVINO,
    Runner,
    check_backend,
)
from dfine_plugin.benchmarks.speed.subjects import Subject, find_subjects
from dfine_plugin.benchmarks.trained_hosts import facts, find_trained
from dfine_plugin.checkpoints import open_checkpoint
from dfine_plugin.export.parity import Detections, torch_detections
from dfine_plugin.tools.targets import BACKENDS as ENGINE_BACKENDS

from ..adapters.hosts import IMAGE_SIZE, NUM_LAYERS, build, wrapped
from ..adapters.transformers_hosts import HOSTS as SMALL_HOSTS

RT_DETR = SMALL_HOSTS[0]
CPU = torch.device("cpu")


def invoke(*arguments: str, exit_code: int = 0) -> str:
    app = Typer()
    app.command()(latency.main)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == exit_code, result.output
    return result.output


class Stage:
    """A clock that only sleeping and running move, and a diary of both."""

    def __init__(self) -> None:
        self.time = 0.0
        self.diary: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.diary.append(f"pause {seconds:g}")

    def run(self, name: str, durations: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.time += next(durations)
            self.diary.append(name)

        return run


def test_rows_run_in_turn_after_a_pause_and_every_run_counts() -> None:
    stage = Stage()
    # the warm-up's, then one that nobody would like to see in a table
    runs = [stage.run("a", iter([9, 1, 2, 100])), stage.run("b", iter([9, 5, 4, 3]))]
    times = interleave(
        runs,
        rounds=3,
        warmup=1,
        pause=0.2,
        after_round=lambda: stage.diary.append("read"),
        clock=lambda: stage.time,
        sleep=stage.sleep,
    )
    p = "pause 0.2"
    assert stage.diary == [
        *("a", "b"),
        *(p, "a", p, "b", "read"),
        *(p, "b", p, "a", "read"),
        *(p, "a", p, "b", "read"),
    ]
    assert times == [pytest.approx([1, 2, 100]), pytest.approx([5, 4, 3])]


def test_percentiles_are_those_of_all_runs_and_ratios_those_of_rounds() -> None:
    times = np.random.default_rng(0).gamma(2, size=37).tolist()
    ordered = np.sort(times)
    found = summarise(times)
    assert found["median"] == ordered[18]
    # 0.95 of the way from the first of 37 to the last
    assert found["p95"] == pytest.approx(ordered[34] + 0.2 * (ordered[35] - ordered[34]))
    # the machine slows down by ten in the middle: the ratio of medians would be 10
    assert paired_ratio([2, 20, 20], [1, 1, 10]) == 2


def outcome(device: str = "Tesla T4", precision: str = "fp16", image_size: int = 640, batch_size: int = 1) -> Result:
    row = {"model": "ours", "backend": "tensorrt", "precision": precision, "ratio": 1.0, "AP": None, "flops": None}
    row |= {"over_host": None}
    row |= {"seconds": {"median": 0.008, "p95": 0.009, "all": [0.008, 0.009]}, "parity": "no model to compare with"}
    settings = {"precision": precision, "image_size": image_size, "batch_size": batch_size}
    settings |= {"runs": 2, "warmup": 1, "pause_ms": 200.0, "parity_images": "2 drawn scenes"}
    about = {"device": device, "cpu": "a CPU", "threads": 2, "versions": {"torch": "2"}}
    gpu = {"summary": "driver 1", "readings": []}
    return {"rows": [row], "settings": settings, "environment": about, "gpu": gpu, "notes": [], "failures": []}


def test_published_figures_stand_beside_those_of_a_t4_alone() -> None:
    for device in ("Tesla T4", "NVIDIA T4"):
        table = latency_markdown(outcome(device))
        assert all(f"| {name} | {ms:.2f} |" in table for name, ms in PUBLISHED_T4.items())
    others = (
        *(outcome(device) for device in ("NVIDIA A100", "NVIDIA T400", "NVIDIA T4G")),
        outcome(precision="fp32"),
        outcome(image_size=320),
        outcome(batch_size=8),
    )
    for other in others:
        assert "D-FINE-L" not in latency_markdown(other)
    assert PUBLISHED_T4["D-FINE-L"] == 8.07


def test_readings_of_nvidia_smi() -> None:
    first = parse_reading("550.54.15, 1590, 5000, 61, 68.13, 0x0000000000000004\n")
    second = parse_reading("550.54.15, 585, 5000, 84, [N/A], 0x0000000000000061\n")
    assert (first.sm_clock, first.memory_clock, first.power, first.throttling) == (1590, 5000, 68.13, ("power cap",))
    assert second.power is None
    assert describe_readings([first, second]) == (
        "driver 550.54.15, SM 585 to 1590 MHz, memory 5000 MHz, 61 to 84 °C, 68 W, throttled by power cap in 1, "
        "thermal slowdown (software) in 1, thermal slowdown (hardware) in 1 of 2 readings"
    )
    idle = parse_reading("550.54.15, 1590, 5000, 40, 30.00, 0x0000000000000001")
    assert describe_readings([idle]).endswith("no throttling seen")


def test_every_name_of_a_backend_and_a_precision_stands_for_one() -> None:
    assert set(BACKENDS) - {"onnxruntime", *LOWERED, *ENGINE_BACKENDS} == TORCH_BACKENDS.keys()
    assert LOWERED.keys() == {"onnxruntime-int8", *OPENVINO_TYPES}
    assert set(PRECISIONS) == DTYPES.keys()


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - set(CPU_BACKENDS)))
def test_what_needs_a_gpu_says_so(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend} runs on a GPU, and .*run torch, torch-compile, onnxruntime"):
        check_backend(backend, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "tensorrt-rtx"), "tensorrt-rtx runs on a GPU, and there is none here"),
        (("--device", "cuda"), "there is no GPU here"),
        (("--backend", "tflite"), "'tflite' is not one of torch,"),
        (("--backend", "openvino", "--precision", "bf16"), "openvino: for graphs in fp32 alone"),
        (("--precision", "int8"), "'int8' is not one of fp32"),
        (("--host", "yolo"), "'yolo' is not one of rt-detr-r18"),
        (("--model", "nowhere"), "nowhere holds no model"),
        (("--onnx", "nowhere.onnx"), "there is no file nowhere.onnx"),
        (("--onnx", "a=b=c.onnx"), "there is no file b=c.onnx"),
        (("--host", "rt-detr-r18", "--image-size", "161"), "this host cannot take images of 161 x 161"),
        (
            ("--host", "rt-detr-r18", "--image-size", "64"),
            "this host cannot take images of 64 x 64: they have 84 places",
        ),
        (("--data", "nowhere"), "there is no nowhere/instances_val.json"),
        (("--device", "gpu"), "'gpu' is neither cpu nor cuda"),
        (("--images", "nowhere"), "'nowhere' does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(arguments: tuple[str, ...], said: str) -> None:
    assert said in invoke("--image-size", "128", *arguments, exit_code=2)


def test_what_runs_where(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.bin" for name in ("graph", "engine")}
    for file in files.values():
        file.touch()
    graph, engine = find_subjects([], [], [f"g={files['graph']}"], [str(files["engine"])], 32, None)
    assert (graph.name, engine.name) == ("g", "engine")
    assert [name for name in BACKENDS if graph.runs_on(name)] == ["onnxruntime", *LOWERED, "tensorrt-rtx", "tensorrt"]
    assert [name for name in BACKENDS if engine.runs_on(name)] == ["tensorrt-rtx", "tensorrt"]
    (both,) = find_subjects([], [], [f"g={files['graph']}"], [f"g={files['engine']}"], 32, None)
    assert (both.graph, both.engine) == (files["graph"], files["engine"])
    with pytest.raises(ValueError, match="'g' has two files of one kind"):
        find_subjects([], [], [f"g={files['graph']}", f"g={files['engine']}"], [], 32, None)


def test_a_name_ends_at_the_first_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "lr=1" / "N=16.onnx"
    file.parent.mkdir()
    file.touch()
    (named,) = find_subjects([], [], [f"ours={file}"], [], 32, None)
    assert (named.name, named.graph) == ("ours", file)
    (unnamed,) = find_subjects([], [], [str(file)], [], 32, None)
    assert (unnamed.name, unnamed.graph) == ("N=16", file)


def test_what_a_model_cannot_take_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    wrapped(RT_DETR).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this host cannot take images of 161 x 161"):
        find_subjects([], [str(tmp_path)], [], [], 161, None)


def test_depths_are_a_models_own(tmp_path: Path) -> None:
    model, bare = wrapped(RT_DETR), build(RT_DETR)
    images = [torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)]
    for subject in (Subject("a", images, model), Subject("a", images, bare)):
        shallow = subject.with_layers(1)
        assert shallow.name == "a, 1 layer"
        assert len(shallow.model.model.decoder.layers) == 1
        assert len(subject.model.model.decoder.layers) == NUM_LAYERS
        with pytest.raises(ValueError, match=r"num_layers must be in \[1, 3\]"):
            subject.with_layers(4)
    graph = Subject("g", images, graph=tmp_path / "graph.onnx")
    assert graph.with_layers(1) is graph


def test_ap_comes_by_name_and_from_an_ablation(tmp_path: Path) -> None:
    file = tmp_path / "ablation.json"
    variants = {"baseline": {"0": 10.0, "1": 20.0}, "N=16": {"0": 30.0}}
    file.write_text(json.dumps({"summary": {name: {"metrics": {"AP": ap}} for name, ap in variants.items()}}))
    assert read_ap([str(file)], ["baseline", "N=16", "other"]) == {"baseline": 15.0, "N=16": 30.0}
    assert read_ap(["N=16=53.1"], ["N=16"]) == {"N=16": 53.1}
    with pytest.raises(ValueError, match="none of the rows: a"):
        read_ap(["b=1"], ["a"])
    with pytest.raises(ValueError, match="neither NAME=AP nor a file"):
        read_ap(["a=high"], ["a"])


def test_a_detection_is_near_one_of_its_label_only() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [5, 5, 9, 9]], dtype=np.float32)
    expected = Detections(np.ones(3), np.array([0, 1, 1]), boxes)
    moved = boxes + np.array([[0.4], [0.6], [0]], dtype=np.float32)
    found = Detections(np.ones(3), np.array([0, 1, 0]), moved)
    assert count_near(expected, expected) == 3
    assert count_near(expected, found) == 1


class Still(Runner):
    """Finds what it is told to, all at one place, in one image of 32 pixels."""

    def __init__(self, logits: torch.Tensor, place: float = 0.5) -> None:
        super().__init__(torch.zeros(1, 3, 32, 32))
        self.logits, self.place = logits, place

    def run(self) -> None:
        pass

    def outputs(self) -> dict[str, torch.Tensor]:
        boxes = torch.tensor([self.place, 0.5, 0.25, 0.25]).expand(1, len(self.logits), 4)
        return {"logits": self.logits[None], "boxes": boxes}


def test_where_there_is_no_parity_it_says_why() -> None:
    certain, unsure = torch.tensor([[3.0, -3.0]]), torch.tensor([[-3.0, -3.0]])
    subject = Subject("a", [torch.zeros(3, 32, 32)])
    found = {name: Still(logits).detect(subject.images) for name, logits in (("certain", certain), ("unsure", unsure))}
    assert measure_row(Still(certain), subject, None) == "no model to compare with"
    assert measure_row(Still(unsure), subject, found["unsure"]) == "no detection of score 0.3"
    assert measure_row(Still(certain * torch.nan), subject, found["certain"]) == "**failed**: not finite"
    same = measure_row(Still(certain), subject, found["certain"])
    assert parity_cell(same) == "p99 0 px, max 0 px, 0 of 1 lost"
    apart = measure_row(Still(certain, place=0.75), subject, found["certain"])
    assert parity_cell(apart) == "**failed**: p99 8 px, max 8 px, 0 of 1 lost"
    fresh = measure_row(Still(unsure), replace(subject, fresh=True), found["unsure"])
    assert parity_cell(fresh) == "2 of 2 within 0.5 px"


def test_the_command_on_a_small_model(tmp_path: Path) -> None:
    wrapped(RT_DETR).save_pretrained(tmp_path / "wrapped")
    sources = ("--model", str(tmp_path / "wrapped"))
    protocol = ("--image-size", str(IMAGE_SIZE), "--batch-size", "2", "--runs", "2", "--warmup", "1", "--pause", "0")
    backends = ("--device", "cpu", "--backend", "torch", "--backend", "onnxruntime", "--precision", "fp32")
    output = tmp_path / "out"
    said = invoke(*sources, *protocol, *backends, "--ap", "wrapped=12.5", "--output", str(output))
    if not torch.cuda.is_available():
        assert "There is no GPU here" in said
    result = json.loads((output / "latency.json").read_text())
    rows = {(row["model"], row["backend"]): row for row in result["rows"]}
    assert list(rows) == [("wrapped", "torch"), ("wrapped", "onnxruntime")]
    for row in rows.values():
        assert len(row["seconds"]["all"]) == 2
        assert 0 < row["seconds"]["median"] <= row["seconds"]["p95"] <= max(row["seconds"]["all"])
    assert rows["wrapped", "torch"]["ratio"] == 1
    assert [row["AP"] for row in rows.values()] == [12.5, 12.5]
    for backend in ("torch", "onnxruntime"):
        parity = rows["wrapped", backend]["parity"]
        assert parity["num_detections"] > 0
        assert parity["passed"]
        assert parity["max_move"] < 1e-2
    assert "| wrapped | onnxruntime | fp32 |" in (output / "latency.md").read_text()
    for plot in ("latency.png", "ap_over_latency.png"):
        assert (output / plot).stat().st_size > 0


def test_models_are_measured_layer_by_layer(tmp_path: Path) -> None:
    """AP and floating point operations of each depth are the ablation's own and the module's sum."""
    output = tmp_path / "out"
    host = find_trained("deformable-detr")
    arguments = ("--device", "cpu", "--backend", "torch", "--runs", "1", "--warmup", "0", "--pause", "0")
    depths = ("--num-layers", "2", "--num-layers", "3")
    sources = ("--model", f"host={host}", "--data", "shapes", "--image-size", "96")
    invoke(*sources, *depths, *arguments, "--output", str(output))
    shallow, whole = json.loads((output / "latency.json").read_text())["rows"]
    assert (shallow["model"], whole["model"]) == ("host, 2 layers", "host, 3 layers")
    assert whole["AP"] == pytest.approx(facts()["deformable-detr"]["AP"]["AP"], abs=0.05)
    assert 0.5 * whole["AP"] < shallow["AP"] != whole["AP"]
    assert shallow["flops"] < whole["flops"]
    layer = open_checkpoint(host).load().model.decoder.layers[2]
    linear = sum(2 * m.in_features * m.out_features * 30 for m in layer.modules() if isinstance(m, nn.Linear))
    assert whole["flops"] - shallow["flops"] >= linear


def test_wrapped_hosts_stand_against_bare_ones_of_as_many_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same backend, round by round."""
    monkeypatch.setitem(HOSTS, "tiny", RT_DETR.build)
    protocol = ("--device", "cpu", "--image-size", "96", "--runs", "3", "--warmup", "0", "--pause", "0")
    depths = ("--num-layers", "2", "--num-layers", "1")
    invoke("--host", "tiny", *depths, "--backend", "torch", *protocol, "--output", str(tmp_path))
    rows = {row["model"]: row for row in json.loads((tmp_path / "latency.json").read_text())["rows"]}
    assert [*rows] == ["tiny, 2 layers", "tiny, 1 layer", "tiny wrapped, 2 layers", "tiny wrapped, 1 layer"]
    for depth in ("2 layers", "1 layer"):
        bare, twin = (rows[f"{name}, {depth}"] for name in ("tiny", "tiny wrapped"))
        assert bare["over_host"] is None
        assert twin["over_host"] == np.median(np.divide(twin["seconds"]["all"], bare["seconds"]["all"]))
        assert f"| {twin['over_host']:.3f} |" in (tmp_path / "latency.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, list[Detections], Path]:
    """The RT-DETR that comes with the package, what it detects, and a folder for its graphs."""
    (subject,) = find_subjects([], [str(find_trained("rt-detr"))], [], [], 96, None)
    assert subject.model is not None
    return subject, torch_detections(subject.model, subject.images), tmp_path_factory.mktemp("graphs")


def run_trained(trained: tuple[Subject, list[Detections], Path], backend: str) -> tuple[Runner, dict[str, Any]]:
    """A backend's runner of the trained host, and its parity."""
    subject, expected, folder = trained
    runner = subject.runner(backend, subject.images[0][None], "fp32", folder)
    parity = measure_row(runner, subject, expected)
    assert isinstance(parity, dict)
    assert parity["num_detections"] > 5
    return runner, parity


def test_openvino_detects_what_torch_does(trained: tuple[Subject, list[Detections], Path]) -> None:
    """In float32 and on as many threads, where its own choice would be bfloat16 on newer CPUs."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: the extra 'openvino'")
    check_backend("openvino", CPU)
    runner, parity = run_trained(trained, "openvino")
    assert parity["passed"]
    assert parity["max_move"] < 1e-2
    assert isinstance(runner, OpenVINO)
    assert runner.model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert runner.model.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    subject, _, folder = trained
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 3, 96, 96\), and is to run on \(2, 3, 96, 96\)"):
        subject.runner("openvino", torch.stack(list(subject.images)), "fp32", folder)


def test_openvino_that_is_not_here_or_would_round_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: the extra 'openvino'")
    with monkeypatch.context() as older:
        older.setattr(openvino.Core, "get_property", lambda core, device, name: ["FP32", "INT8"])
        check_backend("openvino", CPU)
        with pytest.raises(ValueError, match="openvino-bf16 wants a CPU with bf16, and OpenVINO finds FP32, INT8"):
            check_backend("openvino-bf16", CPU)
    monkeypatch.setattr(runners, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"openvino is not installed: pip install .*\[openvino\]"):
        check_backend("openvino", CPU)


def test_products_by_weights_are_of_eight_bits(trained: tuple[Subject, list[Detections], Path]) -> None:
    """And nothing else is; how far boxes move is measured, not bounded."""
    _, parity = run_trained(trained, "onnxruntime-int8")
    assert 0 < parity["max_move"] < 96
    exact, rounded = (onnx.load(trained[2] / name).graph for name in ("model.onnx", "int8.onnx"))
    weights = {tensor.name for tensor in exact.initializer}
    by_weights = [node for node in exact.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    kinds = Counter(node.op_type for node in rounded.node)
    assert kinds["MatMulInteger"] == len(by_weights) > 40
    assert kinds["ConvInteger"] == 0


def test_a_row_that_cannot_be_built_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other is measured all the same."""
    model = wrapped(RT_DETR)
    monkeypatch.setattr(
        subjects, "find_subjects", lambda *_: [Subject("a", images, model), Subject("b", images, model)]
    )
    images = [torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)]
    run = Subject.runner

    def runner(subject: Subject, *arguments: object) -> object:
        if subject.name == "a":
            raise RuntimeError("no such kernel")
        return run(subject, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Subject, "runner", runner)
    arguments = ("--device", "cpu", "--backend", "torch", "--runs", "1", "--warmup", "0", "--pause", "0")
    invoke("--model", "any", *arguments, "--output", str(tmp_path), exit_code=1)
    result = json.loads((tmp_path / "latency.json").read_text())
    assert [row["model"] for row in result["rows"]] == ["b"]
    assert result["failures"] == ["a on torch: RuntimeError: no such kernel"]
    assert "- a on torch: RuntimeError: no such kernel" in (tmp_path / "latency.md").read_text()


def test_a_settled_host_tells_places_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and twin have the same weights where they share them, confident detections, and queries that differ."""
    monkeypatch.setitem(HOSTS, "tiny", RT_DETR.build)
    bare, twin = find_subjects(["tiny"], [], [], [], 96, None)
    assert (bare.name, twin.name) == ("tiny", "tiny wrapped")
    assert bare.model is not None
    assert twin.model is not None
    shared = twin.model.state_dict()
    for name, value in bare.model.state_dict().items():
        assert name not in shared or torch.equal(value, shared[name])
    for subject in (bare, twin):
        assert subject.model is not None
        assert not any(module.training for module in subject.model.modules())
        with torch.no_grad():
            logits = subject.model(torch.stack(list(subject.images))).logits
        assert logits.std(1).min() > 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - set(LOWERED)))
def test_a_backend_on_a_gpu(backend: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    try:
        check_backend(backend, device)
    except ImportError as error:
        pytest.skip(str(error))
    images = list(torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)))
    subject = Subject("model", images, wrapped(RT_DETR))
    precision = "fp32" if backend in TORCH_BACKENDS or backend == "onnxruntime" else "fp16"
    runner = subject.runner(backend, images[0][None].to(device), precision, tmp_path)
    assert subject.model is not None
    parity = measure_row(runner, subject, torch_detections(subject.model, images))
    assert isinstance(parity, dict)
    assert parity["num_lost"] == 0
