"""The notebook for a T4, executed without one, and as it is committed."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "latency_t4.ipynb"
SMALL = """
GPU, BACKENDS, PRECISION = False, ["torch"], "fp32"
HOSTS, IMAGE_SIZE = {"rt-detr-r18": 2}, 128
RUNS, WARMUP, PAUSE, CALIBRATION_IMAGES = 2, 1, 0, 16
"""
"""In place of the parameters: on a CPU, whatever there is, without graphs, at depths of two layers and one."""


@pytest.mark.slow
def test_it_runs_and_writes_every_row(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += SMALL
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()

    results = json.loads((tmp_path / "latency_t4.json").read_text())
    assert not any(result["failures"] for result in results.values())
    rows = {row["model"]: row for row in results["rt-detr-r18"]["rows"]}
    depths = ("2 layers", "1 layer")
    assert rows.keys() == {f"{name}, {depth}" for name in ("rt-detr-r18", "rt-detr-r18 wrapped") for depth in depths}
    assert all(rows[f"rt-detr-r18 wrapped, {depth}"]["over_host"] > 0 for depth in depths)
    trained = {row["model"]: row["AP"] for row in results["trained"]["rows"]}
    assert trained.keys() == {f"{name}, {depth}" for name in ("bare", "wrapped") for depth in ("3 layers", "2 layers")}
    assert trained["wrapped, 3 layers"] > 0.9 * trained["bare, 3 layers"] > 50
    for result in results.values():
        assert all((row["backend"], row["precision"]) == ("torch", "fp32") for row in result["rows"])


def test_as_committed_it_says_what_wants_a_t4() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert "every latency in milliseconds" in notebook.cells[0].source
    outputs = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            outputs += cell.outputs
    # progress bars and warnings tell of the machine, not of latency
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    shown = "\n".join(
        output.data.get("text/markdown", "") for output in outputs if output.output_type == "display_data"
    )
    assert "**No latency above can be compared with the published ones**" in shown
    for name in ("rt-detr-r18", "rt-detr-r50", "deformable-detr-r50"):
        assert f"### {name}\n" in shown
        assert f"| {name} wrapped, " in shown
