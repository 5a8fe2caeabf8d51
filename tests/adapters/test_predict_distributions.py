"""The distributions of a forward for inference: those of its boxes, and nothing of them stays with the model."""

import pytest
import torch

from dfine_plugin import WrapStateError, decode_boxes, deploy
from dfine_plugin.record import in_scope
from dfine_plugin.wrapping import predict_distributions

from .hosts import NUM_LAYERS, Host, build, images, wrapped


def test_boxes_are_those_of_the_distributions(transformers_host: Host) -> None:
    model = wrapped(transformers_host)
    hooks = list(model._forward_hooks)
    with torch.no_grad():
        expected = model(images())
    outputs, record = predict_distributions(model, pixel_values=images())
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.pred_boxes, expected.pred_boxes)
    assert len(record.corner_logits) == NUM_LAYERS
    assert not record.corner_logits[-1].requires_grad
    boxes = decode_boxes(record.initial_boxes, record.corner_logits[-1], record.weights)
    torch.testing.assert_close(boxes.clamp(1e-5, 1 - 1e-5), expected.pred_boxes.clamp(1e-5, 1 - 1e-5))
    assert list(model._forward_hooks) == hooks
    assert not in_scope()


def test_a_failed_forward_leaves_nothing(transformers_host: Host) -> None:
    model = wrapped(transformers_host)
    hooks = list(model._forward_hooks)
    with pytest.raises(TypeError):
        predict_distributions(model, images(), nonsense=object(), pixel_values=images())
    assert list(model._forward_hooks) == hooks
    assert not in_scope()


def test_it_refuses_models_that_have_no_distributions_to_give(transformers_host: Host) -> None:
    with pytest.raises(WrapStateError, match="is not wrapped: its boxes come from no distributions"):
        predict_distributions(build(transformers_host), images())
    model = wrapped(transformers_host)
    with pytest.raises(WrapStateError, match="evaluation mode"):
        predict_distributions(model.train(), images())
    with pytest.raises(WrapStateError, match="deployed model keeps no record"):
        predict_distributions(deploy(model.eval()), images())
