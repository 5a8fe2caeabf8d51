"""The command that fills the paper's rows, on output folders as detectron2's trainer leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dfine_plugin.projects.paper_rows import FINISHED, KINDS, ROWS, Row, app

PROJECTS = Path(__file__).parents[2] / "projects"


def leave_run(folder: Path, ap: float, finished: bool = True) -> None:
    """A trainer's folder: losses, an early evaluation, and the last one."""
    folder.mkdir(parents=True)
    box = {f"bbox/{name}": ap for name in ("AP50", "AP75", "APs", "APm", "APl")}
    entries = [{"iteration": 19, "total_loss": 3.0}, {"bbox/AP": 1.0, **box}, {"bbox/AP": ap, **box}, {"iteration": 99}]
    (folder / "metrics.json").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    if finished:
        (folder / FINISHED).touch()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_its_configs(row: Row, kind: str) -> None:
    assert (PROJECTS / row.folder / "configs" / f"{row.config}_{kind}.py").is_file()


def test_ours_stand_beside_the_papers(tmp_path: Path) -> None:
    dino, dab = "dino_r50_4scale_12ep", "dab_detr_r50_12ep"
    leave_run(tmp_path / f"{dino}_baseline", 49.0)
    leave_run(tmp_path / f"{dino}_dfine", 51.25)
    leave_run(tmp_path / f"{dab}_baseline", 30.0, finished=False)
    (tmp_path / f"{dab}_dfine").mkdir()  # begun, not evaluated
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "| DINO, 4 scales | 49.0 | 49.0 | 49.0 | 51.2 | 51.2 | 51.2 | +2.2 | 49.0 to 51.6 (+2.6) |" in lines
    assert "| DAB-DETR | 30.0 | 30.0 | 30.0 | - | - | - | - | 44.2 to 49.5 (+5.3) |" in lines
    assert lines[-1] == f"Not at the end of their schedule: {dab}_baseline."


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(tmp_path)], env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert "holds no output folder" in result.output


def test_what_has_finished_is_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/train_net.py").touch()
    leave_run(tmp_path / "output/dino_r50_4scale_12ep_baseline", 49.0)
    arguments = ["train", "--detrex", str(tmp_path), "--gpus", "2", "--dry-run", "--override", "train.seed=1"]
    result = CliRunner().invoke(app, arguments)
    commands = result.output.splitlines()
    assert len(commands) == 2 * len(ROWS) - 1
    assert not any("dino_r50_4scale_12ep_baseline.py" in command for command in commands)
    assert all("--num-gpus 2 --resume" in command and command.endswith("train.seed=1") for command in commands)
    only = CliRunner().invoke(app, [*arguments, "--only", "dino_r50_4scale_12ep"]).output.splitlines()
    assert len(only) == 1
    assert "dino_r50_4scale_12ep_dfine.py" in only[0]
    assert CliRunner().invoke(app, [*arguments, "--only", "dino"]).exit_code == 2
    assert CliRunner().invoke(app, ["train", "--detrex", str(tmp_path / "nowhere")]).exit_code == 2
