"""A graph on a full disk."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from dfine_plugin.export import export_onnx, graph

from ..faults import on_a_full_disk


def test_a_full_disk_leaves_the_graph_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exported_model(*_: object) -> ir.Model:
        """What a trace would give."""
        kept = ir.Value(name="kept", const_value=ir.tensor(np.zeros(100_000, np.float32), name="kept"))
        same = ir.node("Identity", [kept])
        return ir.Model(
            ir.Graph([], same.outputs, nodes=[same], initializers=[kept], opset_imports={"": 18}), ir_version=10
        )

    monkeypatch.setattr(graph, "exported_model", exported_model)
    model, path = nn.Identity(), tmp_path / "model.onnx"
    export_onnx(model, path, metadata={"number": 1})
    whole = path.read_bytes()
    for size in (0, 1000, len(whole) // 2, len(whole) - 1):
        assert not on_a_full_disk(size, lambda: export_onnx(model, path, metadata={"number": 2}))
        assert path.read_bytes() == whole
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert on_a_full_disk(len(whole), lambda: export_onnx(model, path, metadata={"number": 2}))
    assert ir.load(path).metadata_props["number"] == "2"
