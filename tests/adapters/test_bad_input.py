"""What comes in wrong is named, and leaves nothing behind."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeformableDetrForObjectDetection, DFineConfig, DFineForObjectDetection, ResNetConfig

from dfine_plugin import (
    InvalidTargetError,
    NonFiniteError,
    UnsupportedModelError,
    record,
    register_adapter,
    wrap_decoder,
)
from dfine_plugin.adapters import common
from dfine_plugin.record import current_scope

from .hosts import Host, build, images, labels

# What is wrong with the second image's truths, and what says so.
WRONG_TARGETS = [
    (lambda t: t["class_labels"].fill_(7), r"image 1, truth 0: label 7 is out of range for 3 classes"),
    (lambda t: t["class_labels"].fill_(-1), r"image 1, truth 0: label -1 is out of range"),
    (lambda t: t["boxes"].mul_(640), r"image 1, truth 0: box \[.*\] looks like pixels"),
    (lambda t: t["boxes"][2, 3].zero_(), r"image 1, truth 2: box \[.*\] .* has no area"),
    (lambda t: t["boxes"][1, 0].fill_(float("nan")), r"image 1, truth 1: box \[nan.*\] is not finite"),
]


def wrapped(host: Host) -> nn.Module:
    return wrap_decoder(build(host), host.config())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_targets_are_named_by_image_and_value(transformers_host: Host, training: bool) -> None:
    host = transformers_host
    model = wrapped(host).train(training)
    for spoil, message in WRONG_TARGETS:
        targets = labels()
        spoil(targets[1])
        with pytest.raises(InvalidTargetError, match=message):
            model(images(), labels=targets)
    ragged = labels()
    ragged[0]["boxes"] = ragged[0]["boxes"][:1]
    with pytest.raises(InvalidTargetError, match=r"image 0: boxes must be \(n, 4\) and class_labels \(n,\)"):
        model(images(), labels=ragged)
    assert torch.isfinite(model(images(), labels=labels()).loss)


def test_wrong_instances_are_named_by_image_and_value(detrex_host: Host) -> None:
    model = wrapped(detrex_host).train()
    for spoil, message in WRONG_TARGETS:
        targets = labels()
        spoil(targets[1])
        with pytest.raises(InvalidTargetError, match=message):
            detrex_host.loss(model, images(), targets)
    assert torch.isfinite(detrex_host.loss(model, images(), labels()))


def test_positional_labels_are_checked_too(transformers_host: Host) -> None:
    model = wrapped(transformers_host)
    targets = labels()
    targets[0]["class_labels"].fill_(9)
    count = 7 if isinstance(model, DeformableDetrForObjectDetection) else 5
    with pytest.raises(InvalidTargetError, match="label 9"):
        model(images(), *[None] * (count - 2), targets)


def test_empty_boxes_of_any_shape_are_no_boxes(transformers_host: Host) -> None:
    host = transformers_host
    model = wrapped(host).train()
    losses = []
    for empty in (torch.zeros(0, 4), torch.zeros(0)):
        targets = labels((0, 3))
        targets[0]["boxes"] = empty
        given = dict(targets[0])
        torch.manual_seed(0)
        losses.append(host.losses(model, images(), targets)[1])
        assert targets[0].keys() == given.keys()
        assert targets[0]["boxes"] is given["boxes"]
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_forward_called_directly_says_to_call_the_model(transformers_host: Host) -> None:
    model = wrapped(transformers_host)
    with pytest.raises(RuntimeError, match=r"call the model itself, model\(\.\.\.\)"):
        model.forward(images(), labels=labels())


@pytest.mark.parametrize("part", ["boxes", "logits"])
def test_non_finite_predictions_are_named_by_layer(host: Host, part: str) -> None:
    model = wrapped(host).train()
    denoises = any("_dn" in name for name in host.losses(model, images(), labels())[1])
    with torch.no_grad():
        if part == "boxes":
            host.fdr(model).refine[1][-1].bias[5] = float("nan")
        else:
            heads = model.model.decoder.class_embed if host.name.startswith("rt-detr") else model.class_embed
            (heads[1] if isinstance(heads, nn.ModuleList) else heads).bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match=f"not finite: .*{part} of decoder layer [12]") as error:
        host.loss(model, images(), labels())
    assert (f"{part} of the denoising queries in decoder layer 2" in str(error.value)) == denoises


def test_nothing_is_left_after_an_exception(host: Host) -> None:
    model = wrapped(host).train()
    with pytest.raises(InvalidTargetError):
        host.loss(model, images(), [{"class_labels": torch.tensor([9]), "boxes": torch.rand(1, 4)}] * 2)
    with pytest.raises((ValueError, RuntimeError, TypeError)):  # the host's own
        host.loss(model, images()[:, :2], labels())
    with pytest.raises(RuntimeError, match="within that model's forward"):
        current_scope()
    host.loss(model, images(), labels())
    with pytest.raises(RuntimeError, match="within that model's forward"):
        current_scope()


@pytest.mark.parametrize("part", ["encoder", "decoder", "class head", "loss"])
def test_nothing_is_left_after_an_interrupt(host: Host, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(host).train()
    decoder = model.get_submodule(host.decoder)
    heads = (decoder if host.name.startswith("rt-detr") else model).class_embed
    records: list[weakref.ref] = []

    def interrupt(*_: Any, **__: Any) -> None:
        if part == "loss":
            records.append(weakref.ref(record.current_record()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if part == "loss":
            patch.setattr(common.UnionCriterion, "match", interrupt)
        else:
            interrupted = {
                "encoder": model.get_submodule(host.decoder.replace("decoder", "encoder")),
                "decoder": decoder.layers[1],
                "class head": heads[1] if isinstance(heads, nn.ModuleList) else heads,
            }
            patch.setattr(interrupted[part], "forward", interrupt)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                host.loss(model, images(), labels())
            assert len(record._scopes.stack) <= 1
    gc.collect()
    if part == "loss":
        assert [left() for left in records] == [None] * 3
    with pytest.raises(RuntimeError, match="within that model's forward"):
        current_scope()
    assert not record._scopes.stack
    assert torch.isfinite(host.loss(model, images(), labels()))


def test_a_forward_within_a_forward_keeps_its_own_record(host: Host) -> None:
    outer, inner = wrapped(host), build(host, seed=5)
    wrap_decoder(inner, host.config())
    seen: list[bool] = []

    def look_twice(*_: Any) -> None:
        before = record.current_scope()
        with torch.no_grad():
            host.predict(inner, images())
        seen.append(record.current_scope() is before)

    outer.get_submodule(host.decoder).layers[1].register_forward_hook(look_twice)
    with torch.no_grad():
        host.predict(outer, images())
    assert seen == [True]


def test_a_model_nobody_knows() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        wrap_decoder(nn.Linear(2, 2))
    message = str(error.value)
    assert "torch.nn.modules.linear.Linear" in message
    assert "RTDetrForObjectDetection" in message
    assert "register_adapter" in message


def test_d_fine_has_fdr_already() -> None:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_hidden_dim=32,
        decoder_layers=2,
        encoder_in_channels=[8, 8, 8],
        decoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    with torch.device("meta"):
        model = DFineForObjectDetection(config)
    with pytest.raises(UnsupportedModelError, match="FDR model already"):
        wrap_decoder(model)


def test_a_host_without_box_refinement_needs_consent(host: Host) -> None:
    model = build(host)
    if not host.settings:
        wrap_decoder(model)
        return
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="box_refinement=True"):
        wrap_decoder(model)
    assert list(model.state_dict()) == before


def test_a_criterion_of_the_users_own_is_not_silently_dropped(detrex_host: Host) -> None:
    model = build(detrex_host)
    model.criterion.__class__ = type("Mine", (type(model.criterion),), {})
    with pytest.raises(UnsupportedModelError, match=r"has a Mine where .*Criterion is expected"):
        wrap_decoder(model, detrex_host.config())


def test_a_loss_function_of_the_users_own_is_not_silently_dropped(transformers_host: Host) -> None:
    host = transformers_host
    model = build(host)
    model.loss_function = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedModelError, match="loss_function of its own"):
        wrap_decoder(model, host.config())


def test_subclasses_of_a_host_find_its_adapter(host: Host) -> None:
    model = build(host)
    model.__class__ = type("Mine", (type(model),), {})
    wrap_decoder(model, host.config())
    assert torch.isfinite(host.loss(model.train(), images(), labels()))


def test_another_packages_adapter_is_found() -> None:
    class Toy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    @register_adapter(f"{Toy.__module__}.{Toy.__qualname__}")
    class ToyAdapter:
        def check(self, model, config) -> None: ...

        def attach(self, model, config) -> str:
            return "kept"

        def detach(self, model, retired) -> None:
            assert retired == "kept"

        def deploy(self, model) -> None: ...

        def begin(self, model, args, kwargs) -> None:
            model.seen = args

    model = wrap_decoder(Toy())
    model(torch.ones(1))
    assert model.seen == (torch.ones(1),)
