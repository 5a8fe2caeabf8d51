"""The benchmarks of what the wrap costs, at the smallest size: that they run, and measure what they say."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from dfine_plugin.benchmarks import criterion, overhead
from dfine_plugin.benchmarks.cost.criterion_steps import (
    Sizes,
    by_kind,
    check_agreement,
    load_authors,
    make_ours,
    make_step,
)
from dfine_plugin.benchmarks.models.detrex_hosts import without_cuda_calls
from dfine_plugin.benchmarks.models.hosts import build_host

CPU = torch.device("cpu")


def invoke(command: object, *arguments: str) -> str:
    app = Typer()
    app.command()(command)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_criterion_command_measures_and_writes(tmp_path: Path) -> None:
    sizes = ("--truths", "1,3", "--batch", "1,2", "--queries", "20", "--classes", "3", "--layers", "2")
    invoke(criterion.main, *sizes, "--repeats", "2", "--output", str(tmp_path))
    figures = json.loads((tmp_path / "criterion.json").read_text())
    assert [(row["batch"], row["truths"]) for row in figures["rows"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert all(row["ours"]["median"] > 0 and len(row["ours"]["all"]) == 2 for row in figures["rows"])
    assert (tmp_path / "criterion.png").stat().st_size > 0


def test_a_step_reaches_every_term_and_every_leaf() -> None:
    sizes = Sizes(batch=2, truths=3, queries=20, classes=4, layers=3)
    step = make_step(sizes, CPU)
    losses = make_ours(sizes, CPU)(step)
    kinds = by_kind(losses)
    assert kinds.keys() == {"loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf"}
    assert sum(kinds.values()) == pytest.approx(float(sum(losses.values())), rel=1e-6)
    sum(losses.values()).backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in step.leaves())


def test_disagreement_is_an_error() -> None:
    ours = {"loss_fgl_aux_0": torch.tensor(1.0), "loss_fgl": torch.tensor(2.0)}
    check_agreement(ours, {"loss_fgl_dn": torch.tensor(3.0)})
    with pytest.raises(RuntimeError, match="loss_fgl"):
        check_agreement(ours, {"loss_fgl": torch.tensor(3.1)})
    with pytest.raises(RuntimeError, match="loss_ddf"):
        check_agreement(ours, {"loss_ddf": torch.tensor(0.5)})


def test_a_wrong_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkout of the D-FINE authors' repository"):
        load_authors(tmp_path)


def test_the_overhead_command_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(i) for i in range(overhead.NUM_CLASSES)]
    monkeypatch.setitem(overhead.HOSTS, "tiny", partial(build_host, "rt-detr", names))
    arguments = ("--host", "tiny", "--image-size", "64", "--repeats", "2", "--output", str(tmp_path))
    output = invoke(overhead.main, *arguments)
    assert "criterion, ms" in output
    figures = json.loads((tmp_path / "tiny.json").read_text())
    for name in ("host", "wrapped"):
        spent = figures[name]["seconds"]
        assert all(value > 0 for value in spent.values())
        for time in figures["times"][name]:
            assert time["step"] == pytest.approx(time["forward"] + time["criterion"] + time["backward"], rel=1e-6)
    assert figures["wrapped"]["parameters"] > figures["host"]["parameters"]
    assert figures["wrapped"]["flops"] > 0
    assert figures["ratios"].keys() == {"forward", "criterion", "backward", "step", "inference"}
    assert figures["wrapped"]["memory"]["kept_for_backward"] > figures["host"]["memory"]["kept_for_backward"] > 0
    assert not figures["without_cuda_calls"]


def test_calls_of_cuda_leave_tensors_where_they_are_for_a_while() -> None:
    tensor = torch.ones(2)
    methods = torch.Tensor.cuda, torch.Tensor.to
    with without_cuda_calls():
        assert tensor.cuda() is tensor
        assert tensor.to("cuda").device == CPU
        assert tensor.to("cuda", torch.float64).dtype == torch.float64
    assert (torch.Tensor.cuda, torch.Tensor.to) == methods
