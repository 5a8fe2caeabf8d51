"""The profile of an inference: sums of a trace that is written out here, and of a graph of two modules."""

from pathlib import Path

import onnx
import pytest
from onnx import helper

from dfine_plugin.benchmarks.latency_profile import MADE, by_module, profile, profile_markdown


def test_a_modules_time_is_that_of_its_nodes_in_the_median_run() -> None:
    def event(name: str, microseconds: int, kind: str = "MatMul") -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": kind}}

    runs = [(90_000, 9_000, 500), (1000, 2000, 500), (4000, 1000, 700), (1000, 1000, 600)]
    trace: list[dict[str, object]] = []
    for first, second, fused in runs:
        trace += [{"cat": "Session", "name": "model_run", "dur": 10_000}, event("a", first)]
        trace += [event("b/Fused", second), event("c", fused, "Conv")]
    times = by_module(trace, {"a": "model.decoder.fdr", "b": "model.decoder.fdr"}, warmup=1)
    # of 3, 5 and 2 ms: the first run warms up
    assert times == {"model.decoder.fdr": pytest.approx(3.0), f"{MADE}Conv": pytest.approx(0.6)}
    table = profile_markdown({"host": {"a": 1.0, "b": 5.0}, "wrapped": {"b": 4.5, "c": 2.0}}).splitlines()
    assert table[2:] == [
        "| c | 0.00 | 2.00 | +2.00 |",
        "| a | 1.00 | 0.00 | -1.00 |",
        "| b | 5.00 | 4.50 | -0.50 |",
        "| all | 6.00 | 6.50 | +0.50 |",
    ]


def test_nodes_are_told_by_their_modules(tmp_path: Path) -> None:
    """Whole ones outside the decoder, parts of it within."""
    names = ("images", "middle", "logits")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 32, 32]) for name in names]
    nodes = [helper.make_node("Sin", names[:1], names[1:2], "n0"), helper.make_node("Cos", names[1:2], names[2:], "n1")]
    scopes = (["", "m", "m.enc", "m.enc.proj.0.conv", "sin"], ["", "m.model.decoder.fdr.layers.0.act", "cos"])
    for node, scope in zip(nodes, scopes, strict=True):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scope))
    graph = helper.make_graph(nodes, "two", values[:1], values[2:], value_info=values[1:2])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    times = profile({"host": path, "wrapped": path}, 32, runs=3, warmup=1)
    for name in ("host", "wrapped"):
        assert times[name].keys() == {"m.enc.proj", "m.model.decoder.fdr"}
        assert all(0 < time < 1000 for time in times[name].values())
