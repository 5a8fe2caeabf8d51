"""The FDR head: residual logits over layers, the boxes they decode to, the quality estimate."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from dfine_plugin import FDRConfig, FDRHead, SettingsMismatchError, WrapStateError

from . import reference
from .drawing import random, random_boxes

LAYERS, IMAGES, QUERIES, HIDDEN, BINS = 4, 2, 3, 16, 8


def make_head(seed: int | None = 0, **config: Any) -> FDRHead:
    """A small head; with a seed all its parameters are random, else it is fresh."""
    torch.manual_seed(0)
    head = FDRHead(HIDDEN, LAYERS, FDRConfig.paper(**{"num_bins": BINS, **config}))
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.2)
    return head


def hidden_states(seed: int = 0) -> list[Tensor]:
    """One float32 leaf a layer."""
    return [random(seed + i, IMAGES, QUERIES, HIDDEN).float().requires_grad_() for i in range(LAYERS)]


def run(head: FDRHead, hidden: list[Tensor], boxes: Tensor) -> list[Any]:
    """The states of all layers."""
    state, states = head.start(boxes), []
    for layer, h in enumerate(hidden):
        state = head(layer, h, state)
        states.append(state)
    return states


def slow_logits(head: FDRHead, hidden: list[Tensor]) -> list[Tensor]:
    """z_l = z_{l-1} + MLP_l(h_l + stopgrad(h_{l-1})), unrolled: z_l is the sum of all its residuals."""
    logits = []
    for last in range(len(hidden)):
        total = torch.zeros(IMAGES, QUERIES, 4, BINS + 1)
        for layer in range(last + 1):
            before = hidden[layer - 1].detach() if layer else torch.zeros_like(hidden[0])
            total = total + head.refine[layer](hidden[layer] + before).reshape(IMAGES, QUERIES, 4, BINS + 1)
        logits.append(total)
    return logits


def plain_boxes(boxes: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    """Differentiable boxes without the clamp, from the edges' formula."""
    left, top, right, bottom = (logits.softmax(-1) * weights).sum(-1).unbind(-1)
    cx, cy, w, h = boxes.unbind(-1)
    x0, y0, x1, y1 = cx - (0.5 + left) * w, cy - (0.5 + top) * h, cx + (0.5 + right) * w, cy + (0.5 + bottom) * h
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)


def test_fresh_head_changes_nothing() -> None:
    """Zero logits and the initial boxes in every layer, for the head of every configuration."""
    boxes = random_boxes(0, IMAGES, QUERIES).float()
    for config in ({}, {"weighting": "uniform"}, {"lqe": True}, {"num_bins": 4}):
        for state in run(make_head(seed=None, **config), hidden_states(), boxes):
            assert not state.corner_logits.any()
            torch.testing.assert_close(state.boxes, boxes, rtol=0, atol=1e-6)


def test_default_config() -> None:
    """Without a config the head has the paper's bins: 33 values of W."""
    head = FDRHead(HIDDEN, 2)
    assert torch.equal(head.weights, FDRConfig().bin_values())
    state = head(0, torch.zeros(1, 2, HIDDEN), head.start(random_boxes(0, 1, 2).float()))
    assert state.corner_logits.shape == (1, 2, 4, 33)


def test_recursion_values() -> None:
    """Logits, boxes and their shapes and dtypes in every layer are the slow loop's."""
    head, hidden, boxes = make_head(), hidden_states(), random_boxes(0, IMAGES, QUERIES).float()
    states = run(head, hidden, boxes)
    for state, logits in zip(states, slow_logits(head, hidden), strict=True):
        assert state.corner_logits.shape == (IMAGES, QUERIES, 4, BINS + 1)
        assert state.corner_logits.dtype == state.boxes.dtype == torch.float32
        torch.testing.assert_close(state.corner_logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(state.initial_boxes, boxes)
        for image in range(IMAGES):
            for query in range(QUERIES):
                slow = reference.decode(
                    boxes[image, query].tolist(), logits[image, query].tolist(), head.weights.tolist(), 1e-5
                )
                assert state.boxes[image, query].tolist() == pytest.approx(slow, abs=1e-5)


def test_recursion_gradients() -> None:
    """Every parameter and hidden state gets the slow loop's gradient from a loss on all layers."""
    head, boxes = make_head(), random_boxes(0, IMAGES, QUERIES).float()
    ours, slow = hidden_states(), hidden_states()
    probes = [random(50 + i, IMAGES, QUERIES, 4).float() for i in range(LAYERS)]
    parameters = list(head.refine.parameters())
    loss = sum((state.boxes * p).sum() for state, p in zip(run(head, ours, boxes), probes, strict=True))
    expected = sum(
        (plain_boxes(boxes, z, head.weights) * p).sum() for z, p in zip(slow_logits(head, slow), probes, strict=True)
    )
    actual_gradients = torch.autograd.grad(loss, [*ours, *parameters])
    expected_gradients = torch.autograd.grad(expected, [*slow, *parameters])
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_a_residual_scale_is_larger_weights_and_deploy_makes_it_so() -> None:
    scale = 8.0
    head, plain = make_head(residual_scale=scale), make_head()
    boxes = random_boxes(5, IMAGES, QUERIES).float()
    with torch.no_grad():
        for mlp in plain.refine:
            for parameter in mlp[-1].parameters():
                parameter.mul_(scale)
    scaled, wanted = run(head, hidden_states(), boxes), run(plain, hidden_states(), boxes)
    for one, other in zip(scaled, wanted, strict=True):
        torch.testing.assert_close(one.corner_logits, other.corner_logits)
        torch.testing.assert_close(one.boxes, other.boxes)
    # the gradient of a last layer's weights is that of the larger weights, times the scale
    for states in (scaled, wanted):
        sum((state.corner_logits**2).sum() for state in states).backward()
    for mlp, other in zip(head.refine, plain.refine, strict=True):
        torch.testing.assert_close(mlp[-1].weight.grad, scale * other[-1].weight.grad)
        torch.testing.assert_close(mlp[0].weight.grad, other[0].weight.grad)

    head.deploy()
    for mlp, other in zip(head.refine, plain.refine, strict=True):
        torch.testing.assert_close(mlp[-1].weight, other[-1].weight)
    for one, other in zip(run(head, hidden_states(), boxes), wanted, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes)


def test_no_gradient_through_the_previous_hidden_states() -> None:
    """With MLP 1 dead, h_1 enters layer 2 only behind the stop: it moves the logits, but gets no gradient."""
    head, boxes = make_head(), random_boxes(0, IMAGES, QUERIES).float()
    for parameter in head.refine[0].parameters():
        nn.init.zeros_(parameter)
    hidden = hidden_states()
    second = run(head, hidden, boxes)[1].corner_logits
    gradients = torch.autograd.grad(second.square().sum(), hidden[:2], allow_unused=True)
    assert gradients[0] is None or not gradients[0].any()
    assert gradients[1].any()
    moved = run(head, [hidden[0] + 1.0, *hidden[1:]], boxes)[1].corner_logits
    assert not torch.allclose(moved, second)


def test_no_gradient_into_the_initial_boxes() -> None:
    """The frame of all layers is detached."""
    head = make_head()
    boxes = random_boxes(0, IMAGES, QUERIES).float().requires_grad_()
    states = run(head, hidden_states(), boxes)
    sum(state.boxes.sum() for state in states).backward()
    assert boxes.grad is None
    for state in (head.start(boxes), *states):
        assert not state.initial_boxes.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_float32(dtype: torch.dtype) -> None:
    """A float32 head keeps its frame, logits and boxes in float32 when its inputs come in half precision."""
    head, boxes = make_head(), random_boxes(0, IMAGES, QUERIES).to(dtype)
    assert head.start(boxes).initial_boxes.dtype == torch.float32
    for state in run(head, hidden_states(), boxes):
        assert state.initial_boxes.dtype == state.corner_logits.dtype == state.boxes.dtype == torch.float32
        assert torch.equal(state.initial_boxes, boxes.float())


def test_loss_on_the_last_boxes_reaches_every_layer() -> None:
    """All parameters of all layers learn from the last layer's boxes."""
    head = make_head()
    last = run(head, hidden_states(), random_boxes(0, IMAGES, QUERIES).float())[-1]
    (last.boxes * random(9, IMAGES, QUERIES, 4).float()).sum().backward()
    for layer in range(LAYERS):
        for name, parameter in head.refine[layer].named_parameters():
            assert parameter.grad is not None, (layer, name)
            assert parameter.grad.abs().sum() > 0, (layer, name)


def test_fresh_head_learns() -> None:
    """The zero start does not stop learning: the last Linear of every layer gets a gradient at once."""
    head = make_head(seed=None)
    last = run(head, hidden_states(), random_boxes(0, IMAGES, QUERIES).float())[-1]
    (last.boxes * random(9, IMAGES, QUERIES, 4).float()).sum().backward()
    for layer in range(LAYERS):
        assert any(p.grad is not None and p.grad.any() for p in head.refine[layer].parameters()), layer


@pytest.mark.parametrize("weighting", ["nonuniform", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_survive_half_precision(dtype: torch.dtype, weighting: str) -> None:
    """W stays exact in float32 while the MLPs go half; logits and boxes stay float32 and close."""
    config = FDRConfig(num_bins=BINS, weighting=weighting)
    head, boxes = make_head(weighting=weighting), random_boxes(0, IMAGES, QUERIES).float()
    full = run(head, hidden_states(), boxes)[-1]
    half = copy.deepcopy(head).half() if dtype == torch.float16 else copy.deepcopy(head).bfloat16()
    assert next(half.refine.parameters()).dtype == dtype
    for candidate in (half, copy.deepcopy(half), copy.deepcopy(head).to(dtype), copy.deepcopy(half).float()):
        assert candidate.weights.dtype == torch.float32
        assert torch.equal(candidate.weights, config.bin_values())
    last = run(half, [h.to(dtype) for h in hidden_states()], boxes.to(dtype))[-1]
    assert last.corner_logits.dtype == last.boxes.dtype == last.initial_boxes.dtype == torch.float32
    torch.testing.assert_close(last.boxes, full.boxes, rtol=0.1, atol=0.05)


def test_autocast_keeps_logits_and_boxes_in_float32() -> None:
    """Under a bfloat16 autocast only the MLPs run in half precision."""
    head, boxes = make_head(), random_boxes(0, IMAGES, QUERIES).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = run(head, hidden_states(), boxes)
    for state in states:
        assert state.corner_logits.dtype == state.boxes.dtype == torch.float32
        expected = plain_boxes(boxes, state.corner_logits, head.weights)
        torch.testing.assert_close(state.boxes[..., :2], expected[..., :2], rtol=0, atol=1e-6)


def test_weights_are_a_buffer_outside_the_checkpoint() -> None:
    """W follows the module's device but not its state dict."""
    head = make_head()
    assert "weights" in dict(head.named_buffers())
    assert head.state_dict().keys() == dict(head.named_parameters()).keys() | {"_extra_state"}


STORED = torch.tensor([8, 0.3, 0.2, 1, 8.1, 1], dtype=torch.float64)


def stored_head(seed: int = 0) -> FDRHead:
    return make_head(seed, a=0.3, c=0.2, weighting="uniform", residual_scale=8.1)


CHANGES = [FDRHead.half, FDRHead.double, lambda head: head.to("meta"), copy.deepcopy]


@pytest.mark.parametrize("change", CHANGES, ids=["half", "double", "meta", "copy"])
def test_settings_in_the_state_dict_survive_what_befalls_a_head(change: Any) -> None:
    """Casts, moves and copies leave them as they are, and every copy loads into the head it came from."""
    weights = change(stored_head()).state_dict()
    assert torch.equal(weights["_extra_state"], STORED)
    if not weights["refine.0.0.weight"].is_meta:
        stored_head().load_state_dict(weights)


@pytest.mark.parametrize(
    ("position", "value", "said"),
    [
        (0, float("nan"), "num_bins nan"),
        (0, float("inf"), "num_bins inf"),
        (3, float("nan"), "weighting number nan"),
        (3, 2.0, "weighting number 2"),
    ],
)
def test_settings_that_no_head_has_are_named(position: int, value: float, said: str) -> None:
    state = STORED.clone()
    state[position] = value
    with pytest.raises(SettingsMismatchError, match=rf"{said} \(this model: "):
        stored_head().set_extra_state(state)


def test_state_dicts_of_before_initial_layer_have_the_first() -> None:
    """Which is what a head writes that has it; and a head whose initial boxes come of a layer it has not is refused."""
    later = FDRHead(8, 2, FDRConfig(initial_layer=2))
    assert len(make_head().state_dict()["_extra_state"]) == len(STORED) == len(later.state_dict()["_extra_state"]) - 1
    FDRHead(8, 2, FDRConfig(initial_layer=2)).load_state_dict(later.state_dict())
    for one, other, said in ((later, FDRHead(8, 2), "1 .this model: 2"), (FDRHead(8, 2), later, "2 .this model: 1")):
        with pytest.raises(SettingsMismatchError, match=rf"initial_layer {said}"):
            one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"decoder layer 3 \(initial_layer\), which is not among the first 2"):
        FDRHead(8, 2, FDRConfig(initial_layer=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_settings_survive_a_cast_state_dict(dtype: torch.dtype) -> None:
    """Rounding is no other setting, but for another setting that a dtype can tell."""
    weights = {name: tensor.to(dtype) for name, tensor in stored_head().state_dict().items()}
    stored_head().load_state_dict(weights)
    with pytest.raises(SettingsMismatchError, match=r"a 0\.3\d* \(this model: 0\.31\)"):
        make_head(a=0.31, c=0.2, weighting="uniform", residual_scale=8.1).load_state_dict(weights)


def test_settings_survive_an_average_of_state_dicts() -> None:
    """As training scripts average them by hand, over many steps."""
    average = stored_head().state_dict()
    latest = stored_head(seed=1).state_dict()
    for _ in range(1000):
        for name, tensor in average.items():
            tensor.mul_(0.999).add_(0.001 * latest[name])
    stored_head(seed=2).load_state_dict(average)


def test_settings_survive_safetensors(tmp_path: Path) -> None:
    """Which holds nothing but tensors."""
    save_file(stored_head().state_dict(), tmp_path / "head.safetensors")
    stored_head(seed=1).load_state_dict(load_file(tmp_path / "head.safetensors"))
    with pytest.raises(SettingsMismatchError, match=r"residual_scale 8\.1 \(this model: 1\.0\)"):
        make_head(a=0.3, c=0.2, weighting="uniform").load_state_dict(load_file(tmp_path / "head.safetensors"))


def test_settings_survive_distributed_checkpoints() -> None:
    """torch.distributed.checkpoint, which FSDP saves with, walks the model for every key."""
    weights = get_model_state_dict(stored_head())
    assert torch.equal(weights["_extra_state"], STORED)
    other = stored_head(seed=1)
    set_model_state_dict(other, weights)
    assert torch.equal(other.refine[0][0].weight, stored_head().refine[0][0].weight)
    with pytest.raises(SettingsMismatchError):
        set_model_state_dict(make_head(), weights)


def test_state_dict_round_trip() -> None:
    """A saved and loaded head gives the same boxes, bit for bit."""
    head, boxes = make_head(lqe=True), random_boxes(0, IMAGES, QUERIES).float()
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = make_head(seed=5, lqe=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(run(head, hidden_states(), boxes), run(other, hidden_states(), boxes), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(head.quality_logits(1, ours.probabilities), other.quality_logits(1, theirs.probabilities))


def test_a_quantized_head_is_not_scaled() -> None:
    """Its weights could not take the scale over; a scale of one leaves nothing to take over."""
    head = torch.ao.quantization.quantize_dynamic(make_head(residual_scale=8.0), {nn.Linear})
    with pytest.raises(WrapStateError, match="deploy the model first, then quantize"):
        head.deploy()
    assert head.residual_scale == 8
    torch.ao.quantization.quantize_dynamic(make_head(residual_scale=1.0), {nn.Linear}).deploy()


def test_deepcopy_is_its_own_head() -> None:
    """A copy gives the same boxes and shares no parameter."""
    head, boxes = make_head(lqe=True), random_boxes(0, IMAGES, QUERIES).float()
    twin = copy.deepcopy(head)
    before = run(head, hidden_states(), boxes)[-1].boxes
    assert torch.equal(run(twin, hidden_states(), boxes)[-1].boxes, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(run(head, hidden_states(), boxes)[-1].boxes, before)
