"""LoRA on a wrapped host, by peft: the new FDR head trains, adapters come back, and are merged before deployment."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dfine_plugin import FDRHead, WrapStateError, deploy, is_wrapped, wrap_decoder

from .hosts import Host, build, images, labels, predict, randomise_fdr

ON_ATTENTION = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ON_THE_HEAD = {"r": 2, "target_modules": r".*\.fdr\.refine\.\d+\.[024]"}


@pytest.fixture
def host(transformers_host: Host) -> Host:
    try:
        get_peft_model(build(transformers_host), LoraConfig(**ON_ATTENTION))
    except NotImplementedError as error:
        pytest.skip(f"the bare host cannot be given adapters: {error}")
    return transformers_host


def wrapped(host: Host) -> nn.Module:
    return wrap_decoder(build(host), host.config(residual_scale=8.0))


def train(host: Host, model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # adapters do not hold its averages
    for _ in range(steps):
        torch.manual_seed(0)
        loss = host.loss(model, images(), labels())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def test_a_frozen_new_head_is_said(host: Host) -> None:
    model = get_peft_model(wrapped(host), LoraConfig(**ON_ATTENTION)).train()
    with pytest.warns(UserWarning, match=r"\(model\.decoder\.fdr\) is new and frozen.*modules_to_save=\['fdr'\]"):
        host.loss(model, images(), labels())


@pytest.mark.parametrize("settings", [{**ON_ATTENTION, "modules_to_save": ["fdr"]}, ON_THE_HEAD], ids=["whole", "lora"])
def test_nothing_is_said_of_a_head_that_trains(host: Host, settings: dict) -> None:
    model = get_peft_model(wrapped(host), LoraConfig(**settings)).train()
    trained = wrapped(host)
    randomise_fdr(host, trained)
    for p in host.fdr(trained).parameters():
        p.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.loss(model, images(), labels())
        host.loss(trained.train(), images(), labels())  # frozen, yet not new
        host.loss(wrapped(host).requires_grad_(False).train(), images(), labels())


def test_the_whole_head_trains_saves_and_merges(host: Host, tmp_path: Path) -> None:
    base = wrapped(host)
    start = copy.deepcopy(base)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**ON_ATTENTION, modules_to_save=["fdr"]))
    train(host, model)
    head = host.fdr(model.get_base_model()).modules_to_save["default"]
    assert isinstance(head, FDRHead)
    moved = dict(host.fdr(start).named_parameters())
    assert all(
        not torch.equal(p, moved[name]) for name, p in head.named_parameters() if name.startswith(("refine", "gates"))
    )

    model.save_pretrained(tmp_path)
    expected = predict(host, model)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    merged = model.merge_and_unload()
    assert is_wrapped(merged)
    for outputs in (predict(host, loaded), predict(host, merged), predict(host, deploy(merged))):
        for found, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [ON_THE_HEAD, {**ON_ATTENTION, "modules_to_save": ["fdr"]}], ids=["lora", "whole"])
def test_adapters_are_merged_before_deployment(host: Host, settings: dict) -> None:
    base = wrapped(host)
    randomise_fdr(host, base, scale=0.05)
    model = get_peft_model(base, LoraConfig(**settings, init_lora_weights=False)).eval()
    expected = predict(host, model)
    with pytest.raises(WrapStateError, match=r"has adapters \(LoRA or the like\).*merge_and_unload\(\)"):
        deploy(model.get_base_model())
    assert all(torch.equal(a, b) for a, b in zip(predict(host, model), expected, strict=True))
    for found, wanted in zip(predict(host, deploy(model.merge_and_unload())), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
