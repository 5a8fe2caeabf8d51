"""A bare RT-DETR that looks forward twice: the boxes it had, and gradients as its authors' code has them."""

import copy
from dataclasses import replace

import pytest
import torch

from dfine_plugin import is_wrapped, wrap_decoder
from dfine_plugin.benchmarks.data.detection_data import normalise
from dfine_plugin.benchmarks.gain.runs import RetrofitSettings, RunSettings
from dfine_plugin.benchmarks.gain.training import build_model, load_data
from dfine_plugin.benchmarks.models.hosts import HOSTS, build_host
from dfine_plugin.benchmarks.models.look_forward import look_forward_twice

from ..adapters.slow_loop import isig


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if host.bare_looks_twice])
def test_boxes_stay_and_losses_reach_the_layer_before(name: str) -> None:
    torch.manual_seed(0)
    once = build_host(name, ["a", "b"], num_queries=10).double().eval()
    heads = once.model.decoder.bbox_embed
    with torch.no_grad():  # boxes that move from layer to layer, and hold nothing at a border
        for head in heads:
            for p in head.parameters():
                p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    twice = copy.deepcopy(once)
    look_forward_twice(twice)
    pixels = torch.randn(2, 3, 96, 96, dtype=torch.double)
    weights = torch.randn(2, 3, 10, 4, dtype=torch.double)  # images, layers, queries

    # RT-DETR's authors' loop, on the states that the host's layers give
    outputs = once(pixel_values=pixels)
    states = outputs.intermediate_hidden_states.unbind(1)
    reference = outputs.init_reference_points.sigmoid().detach()
    boxes, before = [], reference
    for head, hidden in zip(heads, states, strict=True):
        moved = head(hidden)
        boxes.append((moved + isig(before)).sigmoid())
        before = (moved + isig(reference)).sigmoid()
        reference = before.detach()
    (torch.stack(boxes, 1) * weights).sum().backward()
    expected = {key: p.grad for key, p in once.named_parameters() if p.grad is not None}

    for _ in range(2):  # nothing is left from one forward to the next
        twice.zero_grad()
        predicted = twice(pixel_values=pixels).intermediate_reference_points
        torch.testing.assert_close(predicted, outputs.intermediate_reference_points, rtol=0, atol=0)
        (predicted * weights).sum().backward()
        actual = {key: p.grad for key, p in twice.named_parameters() if p.grad is not None}
        torch.testing.assert_close(actual, expected)
        copy.deepcopy(twice)  # as its average is

    # and it is not what the bare host learns from
    once.zero_grad()
    (once(pixel_values=pixels).intermediate_reference_points * weights).sum().backward()
    assert not torch.allclose(heads[0].layers[-1].weight.grad, expected["model.decoder.bbox_embed.0.layers.2.weight"])


def test_the_row_is_the_trained_or_fresh_host_that_looks_forward_twice() -> None:
    data = load_data("shapes", "train", 96, 4)
    settings = {"data": "shapes", "image_size": 96, "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    trained = RetrofitSettings("rt_detr", "twice", 0, **settings, trained="rt-detr")
    for twice in (RunSettings("rt-detr-v2", "twice", 0, **settings), trained):
        model, bare = (build_model(row, data) for row in (twice, replace(twice, variant="baseline")))
        assert not is_wrapped(model)
        for key, value in bare.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
        learnt = []
        for host in (model.eval(), bare.eval()):
            boxes = host(pixel_values=normalise(data.images[:2])).intermediate_reference_points
            boxes[:, -1].sum().backward()
            learnt.append([bool(head.layers[-1].bias.grad.any()) for head in host.model.decoder.bbox_embed])
        assert learnt == [[False, True, True], [False, False, True]]


def test_others_are_refused() -> None:
    with pytest.raises(ValueError, match="DeformableDetrForObjectDetection is no bare RT-DETR"):
        look_forward_twice(build_host("deformable-detr", ["a"], num_queries=10))
    with pytest.raises(ValueError, match="RTDetrForObjectDetection is no bare RT-DETR"):
        look_forward_twice(wrap_decoder(build_host("rt-detr", ["a"], num_queries=10)))
