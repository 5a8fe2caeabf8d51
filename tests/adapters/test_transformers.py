"""What only the hosts of transformers have: outputs, ties, configs; and their numerics."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.models.lw_detr.modeling_lw_detr import refine_bboxes

from dfine_plugin import UnsupportedModelError, unwrap_decoder, wrap_decoder

from .hosts import Host, assert_equal, build, images, labels, predict, randomise_fdr, wrapped
from .transformers_hosts import HOSTS, TransformersHost


@pytest.fixture
def host(transformers_host: TransformersHost) -> TransformersHost:
    return transformers_host


def test_a_fresh_wrap_reports_the_hosts_first_boxes(host: Host) -> None:
    baseline = build(host)
    model = wrap_decoder(copy.deepcopy(baseline), host.config())
    first = wrap_decoder(copy.deepcopy(baseline), host.config())
    randomise_fdr(host, first)
    boxes = predict(host, model)[1]
    assert not torch.allclose(boxes, predict(host, first)[1])  # the head does act once it is off its zeros
    given = {}
    baseline.model.decoder.layers[0].register_forward_hook(
        lambda m, a, out: given.update(hidden=out[0] if isinstance(out, tuple) else out)
    )
    baseline.model.decoder.register_forward_pre_hook(lambda m, a, kwargs: given.update(kwargs), with_kwargs=True)
    predict(host, baseline)
    if host.name in ("lw-detr", "rf-detr"):
        moved = baseline.bbox_embed(baseline.model.decoder.layernorm(given["hidden"]))
        expected = refine_bboxes(given["reference_points"], moved)
        torch.testing.assert_close(boxes, expected, atol=1e-5, rtol=0)
        return
    if host.name == "conditional-detr":
        decoder = baseline.model.decoder
        given["hidden"] = decoder.layernorm(given["hidden"])
        head = baseline.bbox_predictor
        reference = decoder.ref_point_head(given["object_queries_position_embeddings"])
    elif host.one_box_head:
        head, reference = baseline.bbox_predictor, given["query_position_embeddings"]
    else:
        heads = baseline.model.decoder.bbox_embed
        head, reference = (baseline.bbox_embed if heads is None else heads)[0], given["reference_points"]
        reference = reference if host.name.startswith("rt-detr") else torch.logit(reference, eps=1e-5)
    delta = head(given["hidden"])
    delta[..., : reference.shape[-1]] += reference
    torch.testing.assert_close(boxes, delta.sigmoid(), atol=1e-5, rtol=0)


def test_outputs_have_the_hosts_fields_and_shapes(host: TransformersHost) -> None:
    baseline, model, inputs = build(host), wrapped(host), host.inputs(images())
    for arguments in ({}, {"labels": labels()}, {"output_hidden_states": True, "output_attentions": True}):
        with torch.no_grad():
            theirs, ours = baseline(**inputs, **arguments), model(**inputs, **arguments)
        assert list(theirs.keys()) == list(ours.keys())
        for key, value in theirs.items():
            if host.name == "deformable-detr-plain" and key == "intermediate_reference_points":
                continue  # refining, it has boxes where the bare host repeats its 2-d references
            if isinstance(value, Tensor):
                assert ours[key].shape == value.shape, key
                assert ours[key].dtype == value.dtype, key
            elif isinstance(value, tuple):
                assert tree_map(_shape, ours[key]) == tree_map(_shape, value), key
    assert isinstance(model(**inputs, return_dict=False), tuple)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def test_ties_survive_wrapping(host: Host) -> None:
    model = wrapped(host)
    expected = predict(host, model)
    model.tie_weights()
    assert all(torch.equal(a, b) for a, b in zip(predict(host, model), expected, strict=True))


def test_a_config_keeps_its_effect_after_wrapping(host: Host) -> None:
    model = build(host)
    config = model.config
    wrap_decoder(model, host.config()).train()
    assert any("ddf" in name for name in host.losses(model, images(), labels())[1])
    config.auxiliary_loss = False
    assert not any("ddf" in name for name in host.losses(model, images(), labels())[1])
    model.config.num_labels = 2
    assert config.num_labels == 2
    twin = copy.deepcopy(model)
    config.num_labels = 5
    assert (model.config.num_labels, model.model.config.num_labels, twin.config.num_labels) == (5, 5, 2)
    assert unwrap_decoder(model).config is config


def test_hosts_of_one_config_object_are_wrapped_one_by_one(host: Host) -> None:
    config = build(host).config
    first, second = type(build(host))(config), type(build(host))(config)
    wrap_decoder(first, host.config())
    assert not hasattr(config, "dfine_plugin")
    wrap_decoder(second, host.config(num_bins=16))
    assert first.config.dfine_plugin["num_bins"] == 32
    assert second.config.dfine_plugin["num_bins"] == 16
    first.config.num_labels = 7  # as bare hosts of one config do
    assert first.model.config.num_labels == second.config.num_labels == 7


def test_bf16_autocast_keeps_boxes_in_float32(host: TransformersHost) -> None:
    model = wrapped(host).train()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**host.inputs(images()), labels=labels())
    assert outputs.pred_boxes.dtype == torch.float32
    assert torch.isfinite(outputs.loss)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # boxes off the bfloat16 grid: nothing rounded them on the way
    assert not torch.equal(outputs.pred_boxes, outputs.pred_boxes.bfloat16().float())


def test_a_model_in_half_precision_keeps_its_bins(host: TransformersHost) -> None:
    try:
        with torch.no_grad():
            build(host).bfloat16()(**host.inputs(images().bfloat16()))
    except RuntimeError as error:
        pytest.skip(f"the bare host cannot do it with this torch: {error}")
    model = wrapped(host)
    expected = predict(host, model)
    model.bfloat16()
    assert model.model.decoder.fdr.weights.dtype == torch.float32
    with torch.no_grad():
        outputs = model(**host.inputs(images().bfloat16()))
    assert outputs.pred_boxes.dtype == torch.float32
    assert outputs.pred_boxes.isfinite().all()
    assert outputs.pred_boxes.shape == expected[1].shape


def test_gradient_checkpointing_changes_nothing(host: Host) -> None:
    if not host.checkpointing:
        pytest.skip(f"{host} has no gradient checkpointing")
    model = wrapped(host).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        loss = host.loss(model, images(), labels())
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_layers_that_are_left_out_at_random_are_refused() -> None:
    host = next(row for row in HOSTS if row.name == "conditional-detr")
    model = build(host)
    model.config.decoder_layerdrop = 0.1
    with pytest.raises(UnsupportedModelError, match=r"leaves out whole decoder layers .*decoder_layerdrop=0.1"):
        wrap_decoder(model)
    assert_equal(host, model, build(host))
