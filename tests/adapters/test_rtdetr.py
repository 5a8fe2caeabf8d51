"""What only RT-DETR of its own repository has: a criterion apart, ``eval_idx``, its EMA, postprocessor and fusing."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfine_plugin import (
    FDRConfig,
    InvalidTargetError,
    UnsupportedModelError,
    WrapStateError,
    deploy,
    is_wrapped,
    unwrap_decoder,
    wrap_criterion,
    wrap_decoder,
)
from dfine_plugin.registry import find_adapter

from .hosts import NUM_LAYERS, assert_equal, build, images, labels, predict, randomise_fdr, train_step, wrapped
from .rtdetr_hosts import RTDETRHost, build_criterion, row, targets_of, zoo
from .test_bad_input import WRONG_TARGETS
from .transformers_hosts import HOSTS as TRANSFORMERS_HOSTS


@pytest.fixture
def host(rtdetr_host: RTDETRHost) -> RTDETRHost:
    return rtdetr_host


def assert_same_losses(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_wrapping_a_criterion_is_in_place_and_unwrapping_the_model_undoes_it(host: RTDETRHost) -> None:
    model, criteria = wrap_decoder(build(host), host.config()), [build_criterion(host.version) for _ in range(2)]
    bare = build_criterion(host.version)
    for criterion in criteria:
        assert wrap_criterion(criterion, model) is criterion
        assert isinstance(criterion, type(bare))
        assert type(criterion) is not type(bare)
        assert list(criterion.state_dict()) == list(bare.state_dict())
    unwrap_decoder(model)
    for criterion in criteria:
        assert type(criterion) is type(bare)
        assert vars(criterion).keys() == vars(bare).keys()
        assert criterion.weight_dict == bare.weight_dict


def test_the_settings_are_those_of_the_model(host: RTDETRHost) -> None:
    criterion = build_criterion(host.version)
    found = []
    for settings in ({"ddf": False, "fgl_weight": 0.3}, {"ddf": True, "fgl_weight": 0.6}):
        model = wrap_decoder(build(host), host.config(**settings))
        randomise_fdr(host, model)
        wrap_criterion(criterion, model)
        torch.manual_seed(0)
        found.append(criterion(model.train()(images(), targets_of(labels())), targets_of(labels())))
        unwrap_decoder(model)
    assert not any("ddf" in name for name in found[0])
    assert any("ddf" in name for name in found[1])
    torch.testing.assert_close(2 * found[0]["loss_fgl"], found[1]["loss_fgl"])


def test_losses_in_evaluation_and_of_a_bare_model_are_the_hosts(host: RTDETRHost) -> None:
    """A wrapped criterion on outputs without a record is the host's own; so is the host's own on a wrapped model's."""
    model = wrapped(host)
    criterion, bare = host.criterion(model), build_criterion(host.version)
    targets = targets_of(labels())
    with torch.no_grad():
        outputs = model(images())
    assert outputs.keys() == {"pred_logits", "pred_boxes"}
    assert_same_losses(criterion(outputs, targets), bare(outputs, targets))
    outputs = build(host).train()(images(), targets)
    assert any("aux" in name for name in outputs)
    assert_same_losses(criterion(outputs, targets), bare(outputs, targets))


def test_training_without_a_wrapped_criterion_is_refused(host: RTDETRHost) -> None:
    model = wrap_decoder(build(host), host.config()).train()
    with pytest.raises(WrapStateError, match=r"criterion = wrap_criterion\(criterion, model\) first"):
        model(images(), targets_of(labels()))
    with torch.no_grad():  # statistics of batch norms, for instance
        model(images(), targets_of(labels()))
    with pytest.raises(WrapStateError, match="wrap_criterion"):
        copy.deepcopy(model)(images(), targets_of(labels()))
    wrap_criterion(build_criterion(host.version), model)
    model(images(), targets_of(labels()))
    copy.deepcopy(model)(images(), targets_of(labels()))


def test_what_wrap_criterion_refuses(host: RTDETRHost, monkeypatch: pytest.MonkeyPatch) -> None:
    model, criterion = wrap_decoder(build(host), host.config()), build_criterion(host.version)
    with pytest.raises(WrapStateError, match=r"this RTDETR is not wrapped: model = wrap_decoder\(model\) first"):
        wrap_criterion(criterion, build(host))
    with pytest.raises(UnsupportedModelError, match="got None"):
        wrap_criterion(criterion, None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"Criterion.* for this model, got CrossEntropyLoss$"):
        wrap_criterion(nn.CrossEntropyLoss(), model)
    with pytest.raises(UnsupportedModelError, match=r"has no losses of boxes: \['vfl'\]"):
        wrap_criterion(build_criterion(host.version, losses=("vfl",)), model)
    with pytest.raises(WrapStateError, match="for inference only"):
        wrap_criterion(criterion, deploy(copy.deepcopy(model)))
    within = TRANSFORMERS_HOSTS[0]
    with pytest.raises(UnsupportedModelError, match=r"holds its criterion, which wrap_decoder\(model\) has wrapped"):
        wrap_criterion(criterion, wrap_decoder(build(within), within.config()))
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, module: nn.Module.__init__(self))
    with pytest.raises(WrapStateError, match="this model is a DistributedDataParallel: wrap_criterion takes the"):
        wrap_criterion(criterion, DistributedDataParallel(model))
    assert type(criterion) is type(build_criterion(host.version))
    wrap_criterion(criterion, model)
    with pytest.raises(WrapStateError, match="is wrapped already"):
        wrap_criterion(criterion, model)


def test_a_criterion_that_weighs_by_own_pairs_is_refused_by_name(host: RTDETRHost) -> None:
    if host.version == 1:
        pytest.skip("version 1's criterion has no such weights")
    model = wrap_decoder(build(host), host.config())
    with pytest.raises(UnsupportedModelError, match="boxes_weight_format='iou'"):
        wrap_criterion(build_criterion(2, boxes_weight_format="iou"), model)


def test_a_decoder_of_another_class_is_named(host: RTDETRHost) -> None:
    class Own(type(build(host).decoder)):  # type: ignore[misc]
        pass

    model = build(host)
    model.decoder.__class__ = Own
    with pytest.raises(UnsupportedModelError, match="this RTDETR has a Own where RTDETRTransformer"):
        wrap_decoder(model)
    model = build(host)
    model.decoder = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="this RTDETR has a Identity where"):
        wrap_decoder(model)
    assert not is_wrapped(model)


def test_wrong_targets_are_named_by_image_and_value(host: RTDETRHost) -> None:
    model = wrapped(host).train()
    for spoil, message in WRONG_TARGETS:
        targets = labels()
        spoil(targets[1])
        with pytest.raises(InvalidTargetError, match=message):
            host.loss(model, images(), targets)
    with pytest.raises(InvalidTargetError, match=r"^labels of 1 images for a batch of 2$"):
        host.loss(model, images(), labels()[:1])
    assert torch.isfinite(host.loss(model, images(), labels()))


def evaluated_at(index: int) -> Iterator[Any]:
    for name in ("authors-rt-detr", "authors-rt-detr-v2"):
        yield pytest.param(row(name, eval_idx=index), id=f"{name}-{index}")


@pytest.mark.rtdetr
@pytest.mark.parametrize("early", [*evaluated_at(0), *evaluated_at(1)])
@torch.no_grad()
def test_a_host_that_evaluates_an_earlier_layer_goes_on_so(early: RTDETRHost) -> None:
    if early.missing:
        pytest.skip(early.missing)
    index = build(early).decoder.decoder.eval_idx
    model = wrapped(early)
    wanted = early.predict_layers(model, images())[index]
    found = predict(early, model)
    assert not torch.equal(found[1], early.predict_layers(model, images())[-1][1])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    whole, deployed = copy.deepcopy(model), deploy(model)
    assert len(deployed.decoder.decoder.layers) == index + 1
    assert_equal(early, deployed, whole)
    # asked for more layers than the host evaluates, a deployed model has them
    last = early.predict_layers(whole, images())[-1]
    for one, other in zip(predict(early, deploy(whole, NUM_LAYERS)), last, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "theirs-first"])
def test_the_hosts_deploy_goes_with_ours(host: RTDETRHost, ours_first: bool) -> None:
    model = wrapped(host)
    expected = predict(host, model)
    for fuse in (deploy, type(model).deploy)[:: 1 if ours_first else -1]:
        assert fuse(model) is model
    fused = [module for module in model.encoder.modules() if hasattr(module, "convert_to_deploy")]
    assert fused
    assert all(hasattr(module, "conv") for module in fused)
    for found, wanted in zip(predict(host, model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_hosts_postprocessor_takes_the_outputs(host: RTDETRHost) -> None:
    model = wrapped(host)
    postprocessor = zoo("rtdetr_postprocessor").RTDETRPostProcessor(num_classes=3, num_top_queries=5)
    with torch.no_grad():
        outputs = model(images())
        results = postprocessor(outputs, torch.tensor([[64, 32], [128, 64]]))
    logits, boxes = find_adapter(model).detector(model)(images())
    for image, (result, size) in enumerate(zip(results, [[64, 32], [128, 64]], strict=True)):
        scores, chosen = logits[image].sigmoid().flatten().topk(5)
        x, y, w, h = (boxes[image][chosen // 3] * torch.tensor(size * 2)).unbind(-1)
        torch.testing.assert_close(result["scores"], scores)
        torch.testing.assert_close(result["boxes"], torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1))


@torch.no_grad()
def test_images_of_another_size_than_the_hosts_are_named(host: RTDETRHost) -> None:
    model = wrapped(host)
    other = torch.rand(1, 3, 96, 64)
    if model.decoder.eval_spatial_size is None:
        assert all(tensor.isfinite().all() for tensor in find_adapter(model).detector(model)(other))
        return
    with pytest.raises(ValueError, match=r"takes 64x64 images \(eval_spatial_size\), not 96x64"):
        find_adapter(model).detector(model)(other)


def test_the_hosts_ema_follows_and_evaluates(host: RTDETRHost) -> None:
    from src.optim import ModelEMA

    model = wrapped(host)
    host.criterion(model)
    ema = ModelEMA(model, decay=0.5, warmups=1)
    average = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
    for _ in range(2):
        train_step(host, model, rate=1e-2)
        ema.update(model)
        keep = ema.decay_fn(ema.updates)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                average[name] = keep * average[name] + (1 - keep) * tensor
    for name, tensor in ema.module.state_dict().items():
        torch.testing.assert_close(tensor, average[name] if tensor.is_floating_point() else tensor, msg=name)
    evaluated = wrapped(host).requires_grad_(False)  # which torch computes otherwise
    evaluated.load_state_dict(ema.state_dict()["module"])
    assert_equal(host, ema.module, evaluated)
    assert not torch.equal(predict(host, ema.module)[1], predict(host, model)[1])


def test_bf16_autocast_trains_with_boxes_in_float32(host: RTDETRHost) -> None:
    model = wrapped(host).train()
    criterion, targets = host.criterion(model), targets_of(labels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images(), targets)
    assert outputs["pred_boxes"].dtype == torch.float32
    # off the bfloat16 grid: nothing rounded them on the way
    assert not torch.equal(outputs["pred_boxes"], outputs["pred_boxes"].bfloat16().float())
    losses = criterion(outputs, targets)  # outside of autocast, as in the host's engine
    torch.stack([*losses.values()]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_compiled_model_trains_with_the_same_losses(host: RTDETRHost) -> None:
    model = wrapped(host).train()
    criterion, targets = host.criterion(model), targets_of(labels())
    found = []
    for trained in (torch.compile(copy.deepcopy(model), backend="eager"), model):
        torch.manual_seed(5)
        found.append(criterion(trained(images(), targets), targets))
    assert found[0].keys() == found[1].keys()
    for name, term in found[0].items():
        torch.testing.assert_close(term, found[1][name], msg=name)


def test_the_default_recipe_trains(host: RTDETRHost) -> None:
    model = wrap_decoder(build(host), FDRConfig())
    assert train_step(host, model) > train_step(host, model)
