"""Hosts of random legal settings, on random images and truths, through the whole life of a wrapped model.

Few examples, and always the same ones; ``DFINE_EXAMPLES=100`` draws so many new ones for each test.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from dfine_plugin import FDRConfig, deploy, load_pretrained, unwrap_decoder, wrap_decoder
from dfine_plugin.record import in_scope
from dfine_plugin.registry import find_adapter

from . import detrex_hosts, mmdet_hosts, rtdetr_hosts
from .hosts import NUM_CLASSES, Host, build, randomise_fdr
from .transformers_hosts import _BACKBONE, _DEFORMABLE, _GROUPS, _RT_DETR, _VIT, TransformersHost, _dense_attention

LAW = settings(
    max_examples=int(os.environ.get("DFINE_EXAMPLES", "3")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would train models for minutes
)
RT_DETRS = {
    "rt-detr": (RTDetrConfig, RTDetrForObjectDetection),
    "rt-detr-v2": (RTDetrV2Config, RTDetrV2ForObjectDetection),
}
DENSE: dict[str, tuple[Any, Any, str]] = {
    "dab-detr": (DabDetrConfig, DabDetrForObjectDetection, "hidden_size"),
    "conditional-detr": (ConditionalDetrConfig, ConditionalDetrForObjectDetection, "d_model"),
}
DEFORMABLES = {"two-stage": (True, True), "refine": (False, True), "plain": (False, False)}
GROUPED = ["lw-detr", *(["rf-detr"] if hasattr(transformers, "RfDetrConfig") else [])]
# DETA draws its pairs, and how many queries a truth gets in Align-DETR hangs on the images before
DETREX = {host.name: host for host in detrex_hosts.HOSTS if not host.own_pairs}
RTDETR = {host.name: host for host in rtdetr_hosts.HOSTS}
MMDET = {host.name: host for host in mmdet_hosts.HOSTS}


def _of(rows: dict[str, Any], mark: pytest.MarkDecorator, missing: str | None = None) -> list[Any]:
    """A library's hosts, skipped where they, or all of it, are missing."""
    skips = {name: row.missing or missing for name, row in rows.items()}
    return [
        pytest.param(name, marks=[mark, pytest.mark.skipif(why is not None, reason=str(why))])
        for name, why in skips.items()
    ]


FAMILIES = [
    *RT_DETRS,
    *DEFORMABLES,
    *GROUPED,
    *DENSE,
    *_of(DETREX, pytest.mark.detrex, detrex_hosts.missing()),
    *_of(RTDETR, pytest.mark.rtdetr),
    *_of(MMDET, pytest.mark.mmdet),
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    with detrex_hosts.on_a_cpu(DETREX[name]) if name in DETREX else nullcontext():
        yield name


@dataclass(repr=False)
class Case:
    """A host's settings, the plugin's, and a batch."""

    host: Host
    config: FDRConfig
    images: Tensor
    labels: list[dict[str, Tensor]]


def _build(family: str, layers: int, queries: int, heads: int, **others: Any) -> nn.Module:
    if family in GROUPED:
        return _build_grouped(family, decoder_layers=layers, num_queries=queries, heads=heads, **others)
    if family in DENSE:
        sizes = {"decoder_layers": layers, "num_queries": queries, "decoder_attention_heads": heads}
        return _dense_attention(*DENSE[family], **sizes, **others)
    common = {"decoder_layers": layers, "num_queries": queries, "decoder_attention_heads": heads, **others}
    if family in RT_DETRS:
        config, model = RT_DETRS[family]
        return model(config(backbone_config=RTDetrResNetConfig(**_BACKBONE), **{**_RT_DETR, **common}))
    two_stage, refine = DEFORMABLES[family]
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(**_BACKBONE),
        two_stage=two_stage,
        with_box_refine=refine,
        **{**_DEFORMABLE, **common, "two_stage_num_proposals": queries},
    )
    return DeformableDetrForObjectDetection(config).requires_grad_(True)


def _build_grouped(family: str, heads: int, windows: int, scales: list[float], **others: Any) -> nn.Module:
    common = {**_GROUPS, "decoder_self_attention_heads": heads, "decoder_cross_attention_heads": heads, **others}
    if family == "lw-detr":
        backbone = LwDetrViTConfig(
            pretrain_image_size=64, window_block_indices=[0], **{**_VIT, "num_windows": windows * windows}
        )
        return LwDetrForObjectDetection(
            LwDetrConfig(backbone_config=backbone, projector_scale_factors=scales, **common)
        )
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(**{**_VIT, "num_windows": windows})
    return transformers.RfDetrForObjectDetection(transformers.RfDetrConfig(backbone_config=backbone, **common))


def _boxes(draw: st.DrawFn, count: int, shortest: float) -> Tensor:
    """``(count, 4)``, from a pixel to the whole image, some at its border."""
    unit = st.floats(0, 1, width=32)
    sides = torch.tensor([[draw(unit), draw(unit)] for _ in range(count)]).reshape(-1, 2)
    sides = shortest + sides.square() * (1 - shortest)
    where = torch.tensor([[draw(unit), draw(unit)] for _ in range(count)]).reshape(-1, 2)
    return torch.cat([sides / 2 + where * (1 - sides), sides], dim=1)


@st.composite
def transformers_cases(draw: st.DrawFn, family: str) -> Case:
    """Everything that a host of the family takes."""
    is_rt_detr, is_grouped = family in RT_DETRS, family in GROUPED
    # RT-DETRv2 and Deformable-DETR declare ties that a single layer does not have, and cannot be built
    queries, layers = draw(st.integers(2, 12)), draw(st.integers(1 if family == "rt-detr" or is_grouped else 2, 6))
    others: dict[str, Any] = {"auxiliary_loss": draw(st.booleans())}
    if is_rt_detr:
        others["num_denoising"] = draw(st.sampled_from([0, 6, 20]))
    elif is_grouped:
        # the hosts split the queries into groups for a loss in evaluation, too, where there is one group of them
        others["group_detr"] = draw(st.integers(1, min(3, queries)))
        others["windows"] = draw(st.integers(1, 2))
        others["scales"] = draw(st.sampled_from([[1.0], [2.0], [2.0, 1.0], [1.0, 0.5]]))
    elif family in DEFORMABLES:
        others["num_feature_levels"] = draw(st.integers(3, 4))  # the backbone has three
    # RT-DETR merges levels, LW-DETR splits patches into windows, and both want multiples of 32; norms want more than
    # one pixel of the coarsest level
    coarsest = 32 if others.get("num_feature_levels", 3) == 3 else 64
    side = st.integers(2, 4).map(lambda n: 32 * n) if is_rt_detr or is_grouped else st.integers(coarsest + 1, 120)
    heads = draw(st.sampled_from([1, 2, 4]))
    note(f"{family}: {layers} layers, {queries} queries, {heads} heads, {others}")
    host = TransformersHost(family, lambda: _build(family, layers, queries, heads, **others), is_rt_detr)
    fixed = family == "conditional-detr" or is_grouped
    config = draw(configs(box_refinement=family == "plain", initial_layer=draw(st.integers(1, layers if fixed else 1))))
    return Case(host, config, *draw(batches(side, queries + 3)))


@st.composite
def detrex_cases(draw: st.DrawFn, name: str) -> Case:
    """A config of detrex with other numbers of layers, queries and heads, with or without auxiliary losses."""
    row = DETREX[name]
    queries, layers, heads = draw(st.integers(2, 12)), draw(st.integers(2, 6)), draw(st.sampled_from([1, 2, 4, 8]))
    # H-Deformable-DETR's branch of one to many wants auxiliary outputs
    auxiliary = draw(st.booleans()) or name == "detrex-h-deformable-detr"
    note(f"{name}: {layers} layers, {queries} queries, {heads} heads, auxiliary losses: {auxiliary}")

    def build_host() -> nn.Module:
        model = detrex_hosts.BUILDERS[name](queries=queries, layers=layers, heads=heads)
        if not auxiliary:
            row.without_auxiliary_losses(model)
        return model

    images, labels = draw(batches(SIDE, queries + 3))
    # Focus-DETR's own loss fails without any truth
    assume(name != "detrex-focus-detr" or any(len(target["boxes"]) for target in labels))
    initial_layer = draw(st.integers(1, layers if row.fixed_references else 1))
    config = draw(configs(initial_layer=initial_layer, **row.settings))
    return Case(replace(row, build=build_host), config, images, labels)


@st.composite
def rtdetr_cases(draw: st.DrawFn, name: str) -> Case:
    """A model of RT-DETR's own repository, for images of any size."""
    row = RTDETR[name]
    sizes = {"num_queries": draw(st.integers(2, 12)), "num_layers": draw(st.integers(1, 6))}
    others = {
        "nhead": draw(st.sampled_from([1, 2, 4])),
        "num_denoising": draw(st.sampled_from([0, 6, 20])),
        "aux_loss": draw(st.booleans()),
    }
    note(f"{name}: {sizes}, {others}")
    host = replace(row, build=lambda: rtdetr_hosts.build_model(row.version, **sizes, **others))
    side = st.integers(2, 4).map(lambda n: 32 * n)
    return Case(host, draw(configs()), *draw(batches(side, sizes["num_queries"] + 3)))


@st.composite
def mmdet_cases(draw: st.DrawFn, name: str) -> Case:
    """A config of MMDetection with other numbers of layers, queries and heads."""
    row = MMDET[name]
    sizes = {
        "queries": draw(st.integers(2, 12)),
        "layers": draw(st.integers(2, 6)),
        "heads": draw(st.sampled_from([1, 2, 4])),
    }
    note(f"{name}: {sizes}")
    host = replace(row, build=lambda: mmdet_hosts.BUILDERS[name](**sizes))
    return Case(host, draw(configs(**row.settings)), *draw(batches(SIDE, sizes["queries"] + 3)))


SIDE = st.integers(33, 120)
"""Of images whose coarsest level has more than one pixel, at a stride of 32."""


@st.composite
def configs(draw: st.DrawFn, **others: Any) -> FDRConfig:
    flags = {name: draw(st.booleans()) for name in ("union", "ddf", "lqe", "target_gating")}
    return FDRConfig(num_bins=draw(st.sampled_from([4, 16, 32])), **others, **flags)


@st.composite
def batches(draw: st.DrawFn, side: st.SearchStrategy[int], truths: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """One to four images of a size, with none to so many truths each."""
    height, width = draw(side), draw(side)
    note(f"{height} x {width}")
    counts = draw(st.lists(st.integers(0, truths), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = [
        {
            "class_labels": torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            "boxes": _boxes(draw, count, 1 / max(height, width)),
        }
        for count in counts
    ]
    return torch.rand(len(counts), 3, height, width, generator=generator), labels


def cases(family: str) -> st.SearchStrategy[Case]:
    for rows, of_library in ((DETREX, detrex_cases), (RTDETR, rtdetr_cases), (MMDET, mmdet_cases)):
        if family in rows:
            return of_library(family)
    return transformers_cases(family)


def holders(case: Case, model: Any) -> list[nn.Module]:
    """What has to be in training for a host to compute losses, its parts in evaluation."""
    if isinstance(case.host, TransformersHost):
        return []
    return [model, model.decoder, model.decoder.decoder] if case.host.name in RTDETR else [model]


def losses(case: Case, model: nn.Module, order: list[int] | None = None) -> dict[str, Tensor]:
    """All terms in evaluation for the batch, or for its images in another order, but those of denoising queries, which
    are random."""
    model.eval()
    for module in holders(case, model):
        module.training = True
    order = list(range(len(case.images))) if order is None else order
    torch.manual_seed(5)  # of denoising queries
    terms = case.host.losses(model, case.images[order], [case.labels[i] for i in order])[1]
    assert not in_scope()
    return {name: term for name, term in terms.items() if "_dn" not in name and "dn_" not in name}


def without_gradient(case: Case, model: nn.Module) -> set[str]:
    torch.manual_seed(5)
    case.host.loss(model.train(), case.images, case.labels).backward()
    found = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return found


@torch.no_grad()
def predictions(case: Case, model: nn.Module) -> tuple[Tensor, ...]:
    found = find_adapter(model).detector(model.eval())(case.host.pixels(case.images))
    assert all(tensor.isfinite().all() for tensor in found)
    return found


def assert_same(case: Case, first: nn.Module, second: nn.Module) -> None:
    """All weights bit for bit; predictions to rounding, which for small images depends on where tensors lie."""
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert_close(predictions(case, first), predictions(case, second))


def saved_and_loaded(case: Case, model: nn.Module) -> nn.Module:
    """As the host's library does it."""
    with TemporaryDirectory() as folder:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            return load_pretrained(folder)
        torch.save(model.state_dict(), Path(folder) / "model.pth")
        other = wrap_decoder(build(case.host, seed=9), case.config)
        other.load_state_dict(torch.load(Path(folder) / "model.pth"))
        return other


def assert_close(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for found, wanted in zip(first, second, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@LAW
@given(st.data())
def test_the_life_of_a_wrapped_host(family: str, data: st.DataObject) -> None:
    """Trains, with a gradient wherever the bare host has one; saves, loads, deploys and unwraps as it was."""
    case = data.draw(cases(family))
    bare = build(case.host)
    with_bare = without_gradient(case, copy.deepcopy(bare))

    model = wrap_decoder(copy.deepcopy(bare), case.config)
    randomise_fdr(case.host, model)
    twin = copy.deepcopy(model)
    assert without_gradient(case, model) <= with_bare
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    total = case.host.loss(model.train(), case.images, case.labels)
    assert total.isfinite()
    total.backward()
    optimizer.step()

    assert_same(case, saved_and_loaded(case, model), model)
    assert_close(predictions(case, deploy(copy.deepcopy(model))), predictions(case, model))
    assert_same(case, unwrap_decoder(twin), bare)


@pytest.mark.slow
@LAW
@given(st.data())
def test_the_order_of_images_and_truths_and_an_image_without_truths(family: str, data: st.DataObject) -> None:
    """Neither order changes a term; one image more, without truths, changes none of the pairs'."""
    case = data.draw(cases(family))
    model = wrap_decoder(build(case.host), case.config)
    randomise_fdr(case.host, model)
    with torch.no_grad():
        expected = losses(case, model)
        moved = losses(case, model, data.draw(st.permutations(range(len(case.images)))))
        for truths in case.labels:
            order = data.draw(st.permutations(range(len(truths["boxes"]))))
            truths.update({name: tensor[order] for name, tensor in truths.items()})
        reordered = losses(case, model)
        case.images = torch.cat([case.images, torch.zeros_like(case.images[:1])])
        case.labels.append({"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)})
        longer = losses(case, model)
    for name, term in expected.items():
        torch.testing.assert_close(moved[name], term, rtol=1e-3, atol=1e-5, msg=name)
        if not case.config.union:  # which breaks ties between truths by their number
            torch.testing.assert_close(reordered[name], term, rtol=1e-3, atol=1e-5, msg=name)
        if name.startswith(("loss_bbox", "loss_giou", "loss_fgl")):
            torch.testing.assert_close(longer[name], reordered[name], rtol=1e-3, atol=1e-5, msg=name)
