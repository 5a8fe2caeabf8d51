"""What comes in wrong is named, and leaves nothing behind."""

import copy
import gc
import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DeformableDetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    OmDetTurboForObjectDetection,
    ResNetConfig,
)

from dfine_plugin import (
    FDRConfig,
    InvalidTargetError,
    NonFiniteError,
    UnsupportedModelError,
    WrapStateError,
    calibrate,
    deploy,
    record,
    register_adapter,
    registry,
    unwrap_decoder,
    validation,
    wrap_decoder,
)
from dfine_plugin.adapters import union_criterion
from dfine_plugin.adapters.class_losses import ClassLosses
from dfine_plugin.record import current_scope
from dfine_plugin.registry import find_adapter
from dfine_plugin.wrapping import predict_distributions, wrap_criterion

from . import detrex_hosts
from .hosts import Host, build, images, labels
from .transformers_hosts import HOSTS as TRANSFORMERS_HOSTS
from .transformers_hosts import TransformersHost

RT_DETR = TRANSFORMERS_HOSTS[0]

# What is wrong with the second image's truths, and what says so.
WRONG_TARGETS = [
    (lambda t: t["class_labels"].fill_(7), r"image 1, truth 0: label 7 is out of range for 3 classes"),
    (lambda t: t["class_labels"].fill_(-1), r"image 1, truth 0: label -1 is out of range"),
    (lambda t: t["boxes"].mul_(640), r"image 1, truth 0: box \[.*\] looks like pixels"),
    (lambda t: t["boxes"][2, 3].zero_(), r"image 1, truth 2: box \[.*\] .* has no area"),
    (lambda t: t["boxes"][1, 0].fill_(float("nan")), r"image 1, truth 1: box \[nan.*\] is not finite"),
    (
        lambda t: t.update(class_labels=t["class_labels"].float()),
        r"image 1: \w+ must be integers \(torch.int64\), got torch.float32",
    ),
]


def wrapped(host: Host) -> nn.Module:
    return wrap_decoder(build(host), host.config())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_targets_are_named_by_image_and_value(transformers_host: TransformersHost, training: bool) -> None:
    host = transformers_host
    model, inputs = wrapped(host).train(training), host.inputs(images())
    for spoil, message in WRONG_TARGETS:
        targets = labels()
        spoil(targets[1])
        with pytest.raises(InvalidTargetError, match=message):
            model(**inputs, labels=targets)
    ragged = labels()
    ragged[0]["boxes"] = ragged[0]["boxes"][:1]
    with pytest.raises(InvalidTargetError, match=r"image 0: boxes must be \(n, 4\) and class_labels \(n,\)"):
        model(**inputs, labels=ragged)
    with pytest.raises(InvalidTargetError, match=r"^labels of 1 images for a batch of 2$"):
        model(**inputs, labels=labels()[:1])
    with pytest.raises(InvalidTargetError, match=r"^labels of 3 images for a batch of 2$"):
        model(**inputs, labels=labels((1, 1, 1)))
    with pytest.raises(InvalidTargetError, match=r"^labels must be a list with one mapping an image, got a dict$"):
        model(**inputs, labels=labels()[0])
    unnamed = labels()
    unnamed[1]["bbox"] = unnamed[1].pop("boxes")
    with pytest.raises(InvalidTargetError, match=r"^image 1: no boxes among class_labels, bbox$"):
        model(**inputs, labels=unnamed)
    assert torch.isfinite(model(**inputs, labels=labels()).loss)


def test_a_box_beyond_the_image_is_warned_of_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_warned_beyond", False)
    model = wrapped(host).train()
    targets = labels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets[0]["boxes"][0] = torch.tensor([0.5, 0.5, 1.0, 1.001])  # rounded, and all of the image
        validation.check_targets(targets, 3, "class_labels", "boxes")
    targets[1]["boxes"][2] = torch.tensor([0.9, 0.5, 0.5, 0.25])
    with pytest.warns(UserWarning, match=r"^image 1, truth 2: box \[0.9, 0.5, 0.5, 0.25\] .* beyond the image"):
        assert torch.isfinite(host.loss(model, images(), targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*beyond the image")
        assert torch.isfinite(host.loss(model, images(), targets))


def test_wrong_instances_are_named_by_image_and_value(detrex_host: Host) -> None:
    model = wrapped(detrex_host).train()
    for spoil, message in WRONG_TARGETS:
        targets = labels()
        spoil(targets[1])
        with pytest.raises(InvalidTargetError, match=message):
            detrex_host.loss(model, images(), targets)
    assert torch.isfinite(detrex_host.loss(model, images(), labels()))


def test_positional_labels_are_checked_too(transformers_host: TransformersHost) -> None:
    model, inputs = wrapped(transformers_host), transformers_host.inputs(images())
    targets = labels()
    targets[0]["class_labels"].fill_(9)
    names = list(inspect.signature(type(model).forward).parameters)
    before = names[names.index("pixel_values") : names.index("labels")]
    with pytest.raises(InvalidTargetError, match="label 9"):
        model(*[inputs.get(name) for name in before], targets)


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


def test_forward_called_directly_says_to_call_the_model(transformers_host: TransformersHost) -> None:
    model = wrapped(transformers_host)
    with pytest.raises(RuntimeError, match=r"call the model itself, model\(\.\.\.\)"):
        model.forward(**transformers_host.inputs(images()), labels=labels())


@pytest.mark.parametrize("part", ["boxes", "logits"])
def test_non_finite_predictions_are_named_by_layer(host: Host, part: str) -> None:
    model = wrapped(host).train()
    denoises = any("_dn" in name or "dn_" in name for name in host.losses(model, images(), labels())[1])
    with torch.no_grad():
        if part == "boxes":
            host.fdr(model).refine[1][-1].bias[5] = float("nan")
        else:
            head = host.class_head(model, 1)
            head.register_forward_hook(lambda module, inputs, out: out.index_fill(-1, torch.tensor(0), torch.inf))
    with pytest.raises(NonFiniteError, match=f"not finite: .*{part} of decoder layer [12]") as error:
        host.loss(model, images(), labels())
    assert (f"{part} of the denoising queries in decoder layer 2" in str(error.value)) == denoises


def step(host: Host, model: nn.Module) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of the usual batch, all gradients, and the weights and statistics after it."""
    model.zero_grad()
    torch.manual_seed(5)  # of denoising queries
    loss = host.loss(model, images(), labels())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, model.state_dict()


def assert_a_step_as_if_nothing_had_been(host: Host, model: nn.Module, twin: nn.Module) -> None:
    (loss, *found), (expected, *wanted) = step(host, model), step(host, twin)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_an_image_that_is_not_finite_is_named_and_training_goes_on(host: Host, value: float) -> None:
    """Nothing of it stays, in the batch norms' statistics neither."""
    model = wrapped(host).train()
    twin = copy.deepcopy(model)
    spoilt = images()
    spoilt[1, 2, 30, 40] = value
    with pytest.raises(NonFiniteError, match=r"^not finite: image 1 \(1 of 12288 values\)$"):
        host.loss(model, spoilt, labels())
    assert_a_step_as_if_nothing_had_been(host, model, twin)


def test_training_goes_on_after_a_layer_was_not_finite_once(host: Host) -> None:
    """The statistics of batch norms have the batch, as the bare host's would; losses and gradients do not."""
    model = wrapped(host).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    twin = copy.deepcopy(model)
    hook = host.fdr(model).refine[1].register_forward_hook(lambda *given: given[-1] * float("nan"))
    with pytest.raises(NonFiniteError, match=r"not finite: .*corner logits of decoder layer 2"):
        host.loss(model, images(), labels())
    hook.remove()
    assert_a_step_as_if_nothing_had_been(host, model, twin)


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

    def records() -> int:
        return sum(type(thing) is record.FDRRecord for thing in gc.get_objects())

    def interrupt(*_: Any, **__: Any) -> None:
        assert part != "loss" or records() > 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if part == "loss":
            patch.setattr(union_criterion.UnionCriterion, "match", interrupt)
        else:
            interrupted = {
                "encoder": model.get_submodule(host.encoder),
                "decoder": decoder.layers[1],
                "class head": host.class_head(model, 1),
            }
            patch.setattr(interrupted[part], "forward", interrupt)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                host.loss(model, images(), labels())
            assert len(record._scopes.stack) <= 1
    gc.collect()
    assert part != "loss" or records() == 0
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
    with pytest.raises(
        UnsupportedModelError,
        match=r"^no adapter for torch.nn.modules.linear.Linear. Supported: RTDetrForObjectDetection, "
        r"RTDetrV2ForObjectDetection, DeformableDetrForObjectDetection, ConditionalDetrForObjectDetection, "
        r"DabDetrForObjectDetection, LwDetrForObjectDetection, RfDetrForObjectDetection, "
        r"GroundingDinoForObjectDetection, MMGroundingDinoForObjectDetection \(transformers\); DeformableDETR, "
        r".*DINO.* \(detrex\); RTDETR \(RT-DETR's own repository\).*register_adapter",
    ):
        wrap_decoder(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("PekingU/rtdetr_r50vd", r"got the name 'PekingU/rtdetr_r50vd': load the model first"),
        (None, r"takes a model, got None$"),
        (DeformableDetrForObjectDetection, r"got the class DeformableDetrForObjectDetection: make a model of it first"),
        (DFineConfig(), r"takes a model, got a DFineConfig$"),
    ],
    ids=["name", "None", "class", "config"],
)
def test_what_is_no_model(value: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        wrap_decoder(value)


def test_a_config_of_another_kind() -> None:
    model = build(RT_DETR)
    before = list(model.state_dict())
    with pytest.raises(TypeError, match=r"^config must be an FDRConfig, got a dict: FDRConfig.from_dict\(config\)"):
        wrap_decoder(model, FDRConfig().to_dict())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^config must be an FDRConfig, got a type$"):
        wrap_decoder(model, FDRConfig)  # type: ignore[arg-type]
    assert list(model.state_dict()) == before


def _distributed(model: nn.Module, folder: Path) -> nn.Module:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        return DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


def _sharded(model: nn.Module, folder: Path) -> nn.Module:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()


def _peft(model: nn.Module, _: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def _compiled_in_place(model: nn.Module, _: Path) -> nn.Module:
    model.compile()
    return model


def _with_adapters(model: nn.Module, folder: Path) -> nn.Module:
    return _peft(model, folder).base_model.model


@pytest.mark.parametrize(
    ("put_around", "message"),
    [
        (lambda model, _: torch.compile(model), r"is a OptimizedModule: wrap before torch.compile\(model\)"),
        (_compiled_in_place, r"this RTDetrForObjectDetection is compiled: wrap before model.compile\(\)"),
        (_distributed, r"is a DistributedDataParallel: wrap before DistributedDataParallel\(model\), model = wrap_dec"),
        (_sharded, r"is a FSDPRTDetrForObjectDetection: wrap before fully_shard\(model\), model = wrap_decoder"),
        (lambda model, _: nn.DataParallel(model), r"is a DataParallel: wrap before DataParallel\(model\)"),
        (_peft, r"is a PeftModel: wrap before get_peft_model\(model, ...\)"),
        (_with_adapters, r"has adapters of PEFT in it: wrap before model.add_adapter"),
    ],
    ids=["compile", "compile in place", "DDP", "FSDP2", "DataParallel", "PEFT", "adapters"],
)
def test_a_model_within_another(
    put_around: Callable[[nn.Module, Path], nn.Module], message: str, tmp_path: Path
) -> None:
    model = put_around(build(RT_DETR), tmp_path)
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        wrap_decoder(model)
    assert list(model.state_dict()) == before


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


def test_d_fine_of_its_authors_is_refused_by_its_name() -> None:
    own = type("DFINE", (nn.Module,), {"__module__": "src.zoo.dfine.dfine"})
    with pytest.raises(UnsupportedModelError, match=r"^src.zoo.dfine.dfine.DFINE is an FDR model already"):
        wrap_decoder(own())


def test_a_host_that_transformers_cannot_train_is_refused() -> None:
    from transformers import CLIPTextConfig, OmDetTurboConfig, SwinConfig

    with torch.device("meta"):
        model = OmDetTurboForObjectDetection(
            OmDetTurboConfig(text_config=CLIPTextConfig(), backbone_config=SwinConfig(out_indices=[1, 2, 3]))
        )
    with pytest.raises(UnsupportedModelError, match=r"OmDetTurboForObjectDetection cannot be trained: .* no loss"):
        wrap_decoder(model)


NO_LOSS = "cannot be trained: transformers has no loss"
NO_REFERENCES = "has no .*reference boxes.* for FDR to ref"


def newer(name: str, reason: str) -> Any:
    """A row for a host that the oldest transformers which we admit may lack."""
    absent = pytest.mark.skipif(not hasattr(transformers, name), reason=f"transformers has no {name}")
    return pytest.param(name, reason, marks=absent)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        newer("PPDocLayoutV2ForObjectDetection", NO_LOSS),
        newer("PPDocLayoutV3ForObjectDetection", NO_LOSS),
        newer("PPDocLayoutV4ForObjectDetection", NO_LOSS),
        newer("RfDetrForInstanceSegmentation", "predicts masks beside boxes"),
        ("DetrForObjectDetection", NO_REFERENCES),
        ("TableTransformerForObjectDetection", NO_REFERENCES),
        ("YolosForObjectDetection", NO_REFERENCES),
    ],
)
def test_hosts_of_transformers_are_refused_by_their_names_with_the_reason(name: str, reason: str) -> None:
    host = getattr(transformers, name)
    with pytest.raises(UnsupportedModelError, match=rf"\.{name} {reason}"):
        find_adapter(host.__new__(host))


def test_mal_wants_a_loss_of_classes_to_stand_in_for() -> None:
    criterion = ClassLosses()
    criterion.losses = ["boxes", "bce"]
    with pytest.raises(UnsupportedModelError, match="for the loss labels of this ClassLosses, which has boxes, bce"):
        criterion.choose_class_loss("mal")
    assert criterion.class_loss == "host"
    criterion.choose_class_loss("host")


REFUSED_OF_DETREX = {
    "projects.detr.modeling.detr.DETR": "has no reference boxes",
    "projects.pnp_detr.modeling.detr.PnPDETR": "has no reference boxes",
    "projects.anchor_detr.modeling.anchor_detr.AnchorDETR": "no decoder for FDR to refine in",
    "projects.maskdino.maskdino.MaskDINO": "predicts masks beside boxes",
    "projects.co_mot.modeling.mot.MOT": "its queries go on from frame to frame",
}


@pytest.mark.parametrize("name", REFUSED_OF_DETREX)
def test_hosts_of_detrex_that_fdr_has_no_place_in_are_refused_by_their_names(name: str) -> None:
    module, _, cls = name.rpartition(".")
    own = type(cls, (nn.Module,), {"__module__": module})
    with pytest.raises(UnsupportedModelError, match=f"^{re.escape(name)} .*{REFUSED_OF_DETREX[name]}"):
        wrap_decoder(own())


@pytest.mark.detrex
@pytest.mark.skipif(detrex_hosts.missing() is not None, reason=str(detrex_hosts.missing()))
@pytest.mark.parametrize("name", REFUSED_OF_DETREX)
def test_the_refused_names_are_detrexs(name: str) -> None:
    module, _, cls = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), cls), nn.Module)


@pytest.mark.detrex
@pytest.mark.skipif(detrex_hosts.missing() is not None, reason=str(detrex_hosts.missing()))
def test_a_decoder_that_recollects_queries_is_refused() -> None:
    model = detrex_hosts.build_config("sqr_detr/configs/dab_detr_r50_50ep_sqr.py")
    with pytest.raises(UnsupportedModelError, match="has a DabDetrTransformerDecoder_qr where DabDetrTransformer"):
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


def test_classes_of_any_integer_type_are_what_they_say(host: Host) -> None:
    """But for uint8, which torch indexes with as with a mask."""
    if not isinstance(host, TransformersHost) or host.name.startswith("rt-detr"):
        pytest.skip("the host's own denoising indexes with them")
    model = wrapped(host).train()
    losses = []
    for kind in (torch.int64, torch.int32):
        targets = labels((0, 3))
        for target in targets:
            target["class_labels"] = target["class_labels"].to(kind)
        targets[0]["class_labels"] = torch.tensor([])
        losses.append(host.losses(model, images(), targets)[0])
    assert torch.equal(*losses)
    targets[1]["class_labels"] = targets[1]["class_labels"].to(torch.uint8)
    with pytest.raises(
        InvalidTargetError, match=r"image 1: class_labels must be integers \(torch.int64\), got .*uint8"
    ):
        host.losses(model, images(), targets)


VERBS: dict[str, Callable[[Any], Any]] = {
    "deploy": deploy,
    "unwrap_decoder": unwrap_decoder,
    "calibrate": lambda model: calibrate(model, []),
    "predict_distributions": lambda model: predict_distributions(model, images()),
    "wrap_criterion": lambda model: wrap_criterion(nn.Identity(), model),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_takes_a_wrapped_model_says_what_it_was_given(verb: str) -> None:
    model = wrapped(RT_DETR)
    for around, made_by in ((nn.DataParallel(model), "DataParallel"), (torch.compile(model), "torch.compile")):
        with pytest.raises(WrapStateError, match=rf"{verb} takes the model that {made_by}\(model\) was given"):
            VERBS[verb](around)
    with pytest.raises(WrapStateError, match="this RTDetrForObjectDetection is not wrapped"):
        VERBS[verb](build(RT_DETR))
    with pytest.raises(UnsupportedModelError, match=f"{verb} takes a model, got None"):
        VERBS[verb](None)


def test_an_adapter_of_the_users_own_for_a_refused_host_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{OmDetTurboForObjectDetection.__module__}.{OmDetTurboForObjectDetection.__qualname__}"
    adapter = object()
    monkeypatch.setitem(registry._registered, name, adapter)  # type: ignore[arg-type]
    assert find_adapter(OmDetTurboForObjectDetection.__new__(OmDetTurboForObjectDetection)) is adapter


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
