"""The distributions of a forward for inference: those of its boxes, and nothing of them stays with the model."""

import pytest
import torch

from dfine_plugin import WrapStateError, decode_boxes, deploy
from dfine_plugin.record import in_scope
from dfine_plugin.registry import find_adapter
from dfine_plugin.wrapping import predict_distributions

from .hosts import NUM_LAYERS, Host, build, images, wrapped


def test_boxes_are_those_of_the_distributions(host: Host) -> None:
    model = wrapped(host)
    inputs = host.pixels(images())
    hooks = list(model._forward_hooks)
    with torch.no_grad():
        expected_logits, expected_boxes = find_adapter(model).detector(model)(inputs)
    logits, boxes, record = predict_distributions(model, inputs)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(boxes, expected_boxes)
    assert len(record.corner_logits) == NUM_LAYERS
    assert not record.corner_logits[-1].requires_grad
    refined = decode_boxes(record.initial_boxes, record.corner_logits[-1], record.weights)
    torch.testing.assert_close(refined.clamp(1e-5, 1 - 1e-5), boxes.clamp(1e-5, 1 - 1e-5))
    assert list(model._forward_hooks) == hooks
    assert not in_scope()


def test_a_failed_forward_leaves_nothing(host: Host) -> None:
    model = wrapped(host)
    hooks = list(model._forward_hooks)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        predict_distributions(model, None)
    assert list(model._forward_hooks) == hooks
    assert not in_scope()


def test_it_refuses_models_that_have_no_distributions_to_give(host: Host) -> None:
    with pytest.raises(WrapStateError, match="is not wrapped: its boxes come from no distributions"):
        predict_distributions(build(host), images())
    model = wrapped(host)
    with pytest.raises(WrapStateError, match="evaluation mode"):
        predict_distributions(model.train(), images())
    with pytest.raises(WrapStateError, match="deployed model keeps no record"):
        predict_distributions(deploy(model.eval()), images())
