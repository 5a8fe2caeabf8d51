"""What only the hosts of detrex have: detectron2's checkpoints, detrex's EMA, LazyConfigs, autocast, evaluation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dfine_plugin import FDRConfig, deploy, unwrap_decoder, wrap_decoder

from .detrex_hosts import CALL_CUDA, HOSTS, batched_inputs, missing
from .hosts import Host, assert_equal, build, images, labels, predict, randomise_fdr, train_step, wrapped


@pytest.fixture
def host(detrex_host: Host) -> Host:
    return detrex_host


def checkpointer(model: nn.Module, folder: Path) -> Any:
    from detectron2.checkpoint import DetectionCheckpointer

    return DetectionCheckpointer(model, str(folder))


def test_a_baseline_checkpoint_loads_into_a_wrapped_model_and_seeds_it(host: Host, tmp_path: Path) -> None:
    baseline = build(host)
    checkpointer(baseline, tmp_path).save("baseline")
    # the layout of the model zoo: the state dict under "model", nothing else
    torch.save({"model": baseline.state_dict()}, tmp_path / "zoo.pth")
    expected = wrap_decoder(build(host), host.config())
    for file in ("baseline.pth", "zoo.pth"):
        model = wrap_decoder(build(host, seed=9), host.config())
        parameters = dict(model.named_parameters())
        checkpointer(model, tmp_path).load(str(tmp_path / file))
        assert all(parameters[name] is p for name, p in model.named_parameters())  # the optimizer has them already
        # a fresh FDR head draws its hidden layers at random, which its last layer's zeros hide
        assert_equal(host, model, expected)
        assert_equal(host, unwrap_decoder(model), baseline)


def test_a_wrapped_checkpoint_resumes(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    train_step(host, model)
    checkpointer(model, tmp_path).save("wrapped")
    other = wrap_decoder(build(host, seed=9), host.config())
    assert checkpointer(other, tmp_path).resume_or_load("", resume=True) is not None
    assert_equal(host, model, other)
    assert train_step(host, model) == train_step(host, other)


def test_detrexs_ema_follows_and_evaluates(host: Host) -> None:
    from detrex.modeling import ema

    model = wrapped(host)
    settings = SimpleNamespace(enabled=True, decay=0.5, device="cpu", use_ema_weights_for_eval_only=False)
    ema.may_build_model_ema(SimpleNamespace(train=SimpleNamespace(model_ema=settings)), model)
    hook = ema.EMAHook(SimpleNamespace(train=SimpleNamespace(model_ema=settings)), model)
    hook.trainer = SimpleNamespace(model=model, iter=0)
    hook.before_train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(host, model, rate=1e-2)
    hook.after_step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ema.apply_model_ema_and_restore(model):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, (start[name] + trained[name]) / 2, atol=1e-6, rtol=1e-5)
        predict(host, model)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    copied = ema.EMAState.FromModel(model).get_ema_model(model)
    assert_equal(host, model, copied)


def test_lazy_config(host: Host) -> None:
    from detectron2.config import LazyCall as L
    from detectron2.config import instantiate

    bare = {name: value for name, value in vars(build(host)).items() if not name.startswith("_")}
    config = L(wrap_decoder)(model=L(build)(host=host), config=L(FDRConfig)(num_bins=16, **host.settings))
    model = instantiate(config)
    assert host.fdr(model).config.num_bins == 16
    assert bare.keys() == {name for name in vars(model) if not name.startswith("_")}


def test_evaluation_scales_boxes_to_the_size_asked_for(host: Host) -> None:
    model = wrapped(host)
    own, other = batched_inputs(images()), batched_inputs(images())
    for entry in other:
        entry.update(height=2 * entry["height"], width=3 * entry["width"])
    with torch.no_grad():
        results = [[result["instances"] for result in model(inputs)] for inputs in (own, other)]
    for first, second in zip(*results, strict=True):
        assert set(first.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert torch.equal(first.scores, second.scores)
        assert torch.equal(first.pred_classes, second.pred_classes)
        wanted = first.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0])
        torch.testing.assert_close(second.pred_boxes.tensor, wanted, atol=1e-3, rtol=1e-5)


def test_bf16_autocast_trains_with_boxes_in_float32(host: Host) -> None:
    inputs = batched_inputs(images(), labels())
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            build(host).train()(inputs)
    except RuntimeError as error:
        pytest.skip(f"the bare host cannot do it on a CPU: {error}")
    model = wrapped(host).train()
    given: list[Any] = []
    model.criterion.register_forward_pre_hook(lambda module, args: given.append(args[0]["pred_boxes"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = host.loss(model, images(), labels())
    assert given[0].dtype == torch.float32
    # off the bfloat16 grid: nothing rounded them on the way
    assert not torch.equal(given[0], given[0].bfloat16().float())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_decoder_runs_outside_of_a_forward_of_the_model(host: Host) -> None:
    model = wrapped(host)
    given: dict[str, Any] = {}
    model.transformer.decoder.register_forward_pre_hook(lambda m, a, kwargs: given.update(kwargs), with_kwargs=True)
    predict(host, model)
    with torch.no_grad():
        first, second = (model.transformer.decoder(**given)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "amp"])
def test_training_on_a_gpu(host: Host, autocast: bool) -> None:
    model = wrap_decoder(build(host), host.config()).train()
    host.to_gpu(model)
    randomise_fdr(host, model)
    with torch.autocast("cuda", enabled=autocast):
        loss = host.loss(model, images(), labels())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.detrex
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@torch.no_grad()
def test_deta_selects_by_nms_wrapped_and_deployed() -> None:
    """Of a size whose 1,000 proposals and 10,000 detections NMS can take."""
    from detectron2.config import instantiate

    from dfine_plugin.projects.common import detrex_config
    from dfine_plugin.projects.debug import shrink

    torch.manual_seed(0)
    config = detrex_config("deta/configs/deta_r50_5scale_12ep.py").model
    model = wrap_decoder(instantiate(shrink(config, num_classes=40, num_queries=260, num_levels=5)), FDRConfig.paper())
    pixels = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    losses = model.train()(batched_inputs(pixels, labels()))
    assert {"loss_fgl", "loss_ddf_0", "loss_bbox_pre", "loss_bbox_enc"} <= losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
    expected = model.eval()(batched_inputs(pixels))
    for found, wanted in zip(deploy(model)(batched_inputs(pixels)), expected, strict=True):
        assert 0 < len(wanted["instances"]) <= 100
        one, other = found["instances"], wanted["instances"]
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=1e-2, rtol=1e-5)
        assert torch.equal(one.pred_classes, other.pred_classes)


def test_some_hosts_train_on_a_cpu_only_here() -> None:
    """The redirection of ``.cuda()`` is the tests' own: the day detrex drops those calls, this says so."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if missing():
        pytest.skip(str(missing()))
    for host in HOSTS:
        if host.name in CALL_CUDA:
            with pytest.raises((RuntimeError, AssertionError)):
                host.loss(build(host).train(), images(), labels())
