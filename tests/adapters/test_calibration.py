"""Calibration over every host: the rehearsal is the host itself, and the head alone learns, namely its boxes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfine_plugin import FDRConfig, WrapStateError, calibrate, deploy, unwrap_decoder, wrap_decoder
from dfine_plugin.boxes import aligned_iou
from dfine_plugin.calibration import QUERIES_PER_IMAGE, agreement, rehearse
from dfine_plugin.registry import find_adapter

from .hosts import Host, assert_equal, build, images, labels

BATCHES = [images(4, seed) for seed in (20, 21)]


def refines(host: Host) -> bool:
    return not host.settings


def wrap(host: Host, model: nn.Module, **settings: object) -> nn.Module:
    return wrap_decoder(model, FDRConfig(**{**host.settings, **settings}))


@torch.no_grad()
def most_confident(host: Host, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences and boxes of a model's predictions, the most confident first, of all images in a row."""
    logits, boxes = find_adapter(model).detector(model)(host.pixels(batch))
    confidence, order = logits.sigmoid().amax(-1).sort(descending=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return confidence[:, :QUERIES_PER_IMAGE].flatten(), boxes[:, :QUERIES_PER_IMAGE].flatten(0, 1)


@pytest.mark.parametrize("initial_layer", [1, 2])
def test_the_rehearsal_is_the_host_itself(host: Host, initial_layer: int) -> None:
    if not refines(host):
        pytest.skip("the host does not refine boxes: there is nothing to rehearse")
    if initial_layer > 1 and not host.fixed_references:
        pytest.skip("the host's initial boxes come of its first layer")
    model = build(host)
    expected = [most_confident(host, model, batch) for batch in BATCHES]
    rehearsal = rehearse(wrap(host, model, initial_layer=initial_layer), [host.pixels(batch) for batch in BATCHES])
    confidence, boxes = (torch.cat(parts) for parts in zip(*expected, strict=True))
    torch.testing.assert_close(rehearsal.confidence, confidence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rehearsal.boxes[-1], boxes, rtol=1e-4, atol=1e-4)
    assert rehearsal.boxes.shape[:2] == rehearsal.hidden_states.shape[:2]
    assert torch.equal(rehearsal.boxes[0], rehearsal.initial_boxes)


def test_the_head_learns_the_hosts_boxes_and_nothing_else_changes(host: Host) -> None:
    if not refines(host):
        pytest.skip("the host does not refine boxes: there is nothing to learn")
    bare = build(host)
    model = wrap(host, copy.deepcopy(bare)).train()
    host.fdr(model).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = [host.pixels(batch) for batch in BATCHES]
    result = calibrate(model, pixels, steps=150, batch_size=96, learning_rate=5e-3, progress=False)

    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in host.fdr(model).parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(f"{host.decoder}.fdr.refine.") for name in changed)
    # a random host's boxes jump from layer to layer, at times beyond the bins' range: trained ones come much nearer
    assert 1 - result.after < 0.9 * (1 - result.before)
    # the boxes that the wrapped model predicts have come as near to the bare host's
    fresh = wrap(host, copy.deepcopy(bare))
    iou = []
    for candidate in (fresh, model.eval()):
        pairs = [(most_confident(host, bare, batch), most_confident(host, candidate, batch)) for batch in BATCHES]
        iou.append(torch.cat([aligned_iou(ours[1], theirs[1]) for theirs, ours in pairs]).mean())
    assert iou[0] < iou[1]
    assert_equal(host, unwrap_decoder(model), bare)


def test_agreement_weighs_by_confidence(host: Host) -> None:
    if not refines(host):
        pytest.skip("the host does not refine boxes")
    model = wrap(host, build(host))
    rehearsal = rehearse(model, [host.pixels(BATCHES[0])])
    # a fresh head predicts the initial boxes
    iou = aligned_iou(rehearsal.initial_boxes, rehearsal.boxes[-1])
    expected = sum(w * x for w, x in zip(rehearsal.confidence.tolist(), iou.tolist(), strict=True))
    assert agreement(host.fdr(model), rehearsal) == pytest.approx(expected / sum(rehearsal.confidence.tolist()), 1e-5)


def test_a_model_in_double_precision_stays_in_it(transformers_host: Host) -> None:
    if not refines(transformers_host):
        pytest.skip("the host does not refine boxes")
    if transformers_host.name == "dab-detr":
        pytest.skip("the host's queries begin as zeros of the default precision")
    model = wrap(transformers_host, build(transformers_host)).double()
    result = calibrate(model, [BATCHES[0].double()], steps=20, learning_rate=5e-3, progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert result.before < result.after


def test_what_goes_wrong_leaves_the_model_as_it_was(transformers_host: Host) -> None:
    if not refines(transformers_host):
        pytest.skip("the host does not refine boxes")
    model = wrap(transformers_host, build(transformers_host)).train()
    model.model.backbone.eval()
    transformers_host.fdr(model).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    with pytest.raises(TypeError, match=r"\(B, 3, H, W\).* got a dict"):
        calibrate(model, [{"pixel_values": BATCHES[0]}])
    with pytest.raises(TypeError, match=r"got a tensor \(3, 64, 64\)"):
        calibrate(model, BATCHES[0])
    calibrate(model, [BATCHES[0]], steps=2, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(p.requires_grad for p in transformers_host.fdr(model).parameters())
    snapshot = copy.deepcopy(model.state_dict())
    model.load_state_dict(snapshot)  # the same weights: the retired heads belong to them still
    calibrate(model, [BATCHES[0]], steps=2, progress=False)


def test_it_refuses_what_it_cannot_calibrate(host: Host) -> None:
    with pytest.raises(WrapStateError, match="is not wrapped; calibrate takes a model right after wrap_decoder"):
        calibrate(build(host), BATCHES)
    model = wrap(host, build(host))
    if not refines(host):
        with pytest.raises(WrapStateError, match="does not refine boxes from layer to layer"):
            calibrate(model, BATCHES)
        return
    with pytest.raises(ValueError, match="calibrate needs images"):
        calibrate(model, [])
    model.load_state_dict(wrap(host, build(host, seed=5)).state_dict())
    with pytest.raises(WrapStateError, match="loaded from a checkpoint that holds none of the box heads"):
        calibrate(model, BATCHES)
    with pytest.raises(WrapStateError, match="is deployed; calibrate takes a model right after wrap_decoder"):
        calibrate(deploy(model.eval()), BATCHES)


def test_the_head_alone_is_trainable(host: Host) -> None:
    bare = build(host)
    model = wrap(host, copy.deepcopy(bare), trainable="head", union=True, ddf=True, lqe=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = dict(host.fdr(model).named_parameters(prefix=f"{host.decoder}.fdr"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in head.values()}
    norms = {name: module.training for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for _ in range(2):
        host.loss(model, images(), labels()).backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(head)  # no weight of the host, and none of its BatchNorms' statistics

    trainable = {name for name, p in bare.named_parameters() if p.requires_grad}
    model = unwrap_decoder(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert {name: model.get_submodule(name).training for name in norms} == norms
    assert_equal(host, model.eval(), bare.eval())
