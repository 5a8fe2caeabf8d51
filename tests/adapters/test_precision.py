"""Half precision over the hosts of transformers: errors of autocast are the host's own, and a step that overflows."""

from collections.abc import Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dfine_plugin import deploy, wrap_decoder

from .hosts import NUM_LAYERS, Host, build, images, labels, randomise_fdr, wrapped
from .transformers_hosts import TransformersHost

DTYPES = [pytest.param(torch.float16, id="float16"), pytest.param(torch.bfloat16, id="bfloat16")]
SEEDS = range(5)


@pytest.fixture
def host(transformers_host: TransformersHost) -> TransformersHost:
    return transformers_host


def lively(host: Host, seed: int) -> nn.Module:
    """A bare host whose boxes depend on its hidden states as much as a wrapped one's do."""
    model = build(host, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bbox_embed" in name or "bbox_predictor" in name:
                spread = 0.2 * min(1.0, (32 / parameter.shape[-1]) ** 0.5)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


@torch.no_grad()
def in_both(host: TransformersHost, model: nn.Module, seed: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Boxes and all terms of the loss, in float32 and under autocast; without counts, which jump."""
    for context in (nullcontext(), torch.autocast("cpu", dtype=dtype)):
        torch.manual_seed(5)  # of denoising queries
        with context:
            outputs = model.train()(**host.inputs(images(seed=seed)), labels=labels(seed=seed))
        terms = [term.float() for name, term in outputs.loss_dict.items() if not name.startswith("cardinality")]
        yield outputs.pred_boxes.float(), torch.stack(terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_autocast_are_the_hosts_own(host: Host, dtype: torch.dtype) -> None:
    """The median over weights and images of the mean error of boxes is at most twice the bare host's; that of all terms
    of the loss, over their sum, is at most twice the host's and eight of the precision's units."""
    errors: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for seed in SEEDS:
        for is_wrapped in errors:
            model = lively(host, seed)
            if is_wrapped:
                # without gates, random ones of which are layers that the bare host has not
                randomise_fdr(host, wrap_decoder(model, host.config(target_gating=False)))
            (boxes, terms), (half_boxes, half_terms) = in_both(host, model, seed, dtype)
            of_terms = (half_terms - terms).abs().sum() / terms.abs().sum()
            errors[is_wrapped].append((float((half_boxes - boxes).abs().mean()), float(of_terms)))
    (host_boxes, host_terms), (boxes, terms) = (map(median, zip(*errors[key], strict=True)) for key in errors)
    assert 0 < boxes <= 2 * host_boxes
    assert 0 < terms <= 2 * host_terms + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_no_distribution_loss_nor_box_loss(host: TransformersHost, dtype: torch.dtype) -> None:
    """On what a model predicts under autocast, these terms there are those of float32, to its rounding: DDF as well,
    which reads five times its value in the authors' code."""
    model = wrapped(host).train()
    loss = model.loss_function
    found: list[dict[str, Tensor]] = []

    def without_autocast(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda x: x.float() if is_floating(x) else x, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            found.append(loss(*args, **kwargs)[1])
        return loss(*args, **kwargs)

    model.loss_function = without_autocast
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        terms = model(**host.inputs(images()), labels=labels()).loss_dict
    (expected,) = found
    names = [name for name in terms if name.startswith(("loss_fgl", "loss_ddf", "loss_bbox", "loss_giou"))]
    assert any(name.startswith("loss_ddf") for name in names)
    for name in names:
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def locates_references(model: nn.Module) -> Tensor:
    """The parameter whose values, if large, carry all initial references to the border of the image."""
    names = [
        "model.query_refpoint_embeddings.weight",
        "model.encoder_output_bbox_embed.layers.2.bias",
        "model.reference_point_embed.weight",
        "model.reference_points.bias",
        "model.enc_bbox_head.layers.2.bias",
        f"model.decoder.bbox_embed.{NUM_LAYERS}.layers.2.bias",
        "model.decoder.ref_point_head.layers.1.bias",
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return next(parameters[name] for name in names if name in parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_initial_references_that_are_rounded_to_one(host: TransformersHost, dtype: torch.dtype) -> None:
    """Boxes are as exact as the host's, to eight of the precision's units; and losses, gradients and what is deployed
    finite."""
    errors = []
    for is_wrapped in (False, True):
        model = build(host)
        if is_wrapped:
            randomise_fdr(host, wrap_decoder(model, host.config()))
        nn.init.constant_(locates_references(model)[..., :2], 20.0)
        (boxes, _), (half_boxes, terms) = in_both(host, model, 0, dtype)
        errors.append(float((half_boxes - boxes).abs().mean()))
        assert terms.isfinite().all()
    assert errors[1] <= 2 * errors[0] + 8 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=dtype):
        host.loss(model, images(), labels()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        _, expected = host.predict(model.eval(), images())
        _, found = host.predict(deploy(model), images())
    torch.testing.assert_close(found.float(), expected.float(), atol=8 * torch.finfo(dtype).eps, rtol=0)


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def test_a_step_that_overflows_changes_nothing_and_the_next_goes_on(host: TransformersHost) -> None:
    """With gradients beyond float16 the scaler leaves out the step and lowers its scale, until three in a row fit:
    after the first of them gradients may grow beyond float16 once more."""
    model = wrapped(host).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-5)
    steps = []
    for _ in range(15):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        scale = scaler.get_scale()
        with torch.autocast("cpu", dtype=torch.float16):
            torch.manual_seed(5)
            loss = model(**host.inputs(images()), labels=labels()).loss
        assert loss.isfinite()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert changed is (scaler.get_scale() == scale)
        assert all(p.isfinite().all() for p in model.parameters())
        steps.append(changed)
        if steps[-3:] == [True] * 3:
            break
    assert not steps[0]
    assert steps[-3:] == [True] * 3
