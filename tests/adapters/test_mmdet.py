"""What is MMDetection's own: its initialisation, what is refused, and its runner."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dfine_plugin import UnsupportedModelError, WrapStateError, deploy, is_wrapped, unwrap_decoder, wrap_decoder
from dfine_plugin.benchmarks.models.mmdet_hosts import build_model, samples
from dfine_plugin.registry import find_adapter

from .hosts import build, images, labels, predict, wrapped
from .mmdet_hosts import HOSTS, MMDetHost, config, missing, row

pytestmark = [pytest.mark.mmdet, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
DINO, TWO_STAGE, REFINE, PLAIN = HOSTS


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, through_pickle], ids=["itself", "copy", "pickle"]
)
def test_the_runners_initialisation_leaves_the_fdr_head_alone(
    mmdet_host: MMDetHost, copied: Callable[[nn.Module], nn.Module]
) -> None:
    """MMEngine's runner initialises a model when training begins, with whatever has been wrapped by then."""
    model = copied(wrapped(mmdet_host))
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    model.init_weights()
    bare = build(mmdet_host)
    torch.manual_seed(7)
    bare.init_weights()
    theirs = dict(bare.named_parameters())
    drawn = []
    for name, p in model.named_parameters():
        if ".fdr." in name:
            assert torch.equal(p, before[name]), name
        elif theirs[name].dim() == 1:  # constants
            assert torch.equal(p, theirs[name]), name
        elif not torch.equal(p, before[name]):
            drawn.append(name)
    assert any("decoder.layers" in name for name in drawn)
    unwrap_decoder(model)
    assert "init_weights" not in vars(model)


REFUSED: list[tuple[MMDetHost, Callable[[Any], None], str]] = [
    (REFINE, lambda model: setattr(model.decoder, "return_intermediate", False), "returns its last layer only"),
    (TWO_STAGE, lambda model: setattr(model, "with_box_refine", False), "two-stage without box refinement"),
    (PLAIN, lambda model: None, r"FDRConfig\(box_refinement=True\) consents"),
    (
        DINO,
        lambda model: setattr(model.decoder, "__class__", type("Own", (type(model.decoder),), {})),
        "this DINO has a Own where DeformableDetrTransformerDecoder or DinoTransformerDecoder is expected",
    ),
    (
        DINO,
        lambda model: setattr(model.bbox_head, "loss_iou", nn.Identity()),
        "this DINO has a Identity where GIoULoss is expected",
    ),
]


@pytest.mark.parametrize(("host", "change", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_wrapped_is_named_and_stays(
    host: MMDetHost, change: Callable[[Any], None], message: str
) -> None:
    model = build(host)
    change(model)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UnsupportedModelError, match=message):
        wrap_decoder(model)
    assert not is_wrapped(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_detectors_made_of_dino_are_refused_by_what_differs() -> None:
    from mmdet.models.detectors import DDQDETR

    model = build(DINO)
    model.__class__ = DDQDETR
    from mmdet.models.layers import DDQTransformerDecoder

    model.decoder.__class__ = DDQTransformerDecoder
    with pytest.raises(UnsupportedModelError, match="this DDQDETR has a DDQTransformerDecoder where"):
        wrap_decoder(model)


def test_mal_takes_the_place_of_a_sigmoid_loss_alone() -> None:
    from mmdet.models.losses import CrossEntropyLoss

    model = build(REFINE)
    model.bbox_head.loss_cls = CrossEntropyLoss(use_sigmoid=True)
    with pytest.raises(UnsupportedModelError, match="has a CrossEntropyLoss where FocalLoss or QualityFocalLoss is"):
        wrap_decoder(model, REFINE.config(class_loss="mal"))
    loss = REFINE.loss(wrap_decoder(model, REFINE.config()).train(), images(), labels())
    assert loss.isfinite()


def test_a_deployed_model_has_no_loss(mmdet_host: MMDetHost) -> None:
    model = deploy(wrapped(mmdet_host)).train()
    with pytest.raises(WrapStateError, match="a deployed model is for inference only"):
        mmdet_host.loss(model, images(), labels())


@torch.no_grad()
def test_the_detector_takes_what_the_data_preprocessor_takes(mmdet_host: MMDetHost) -> None:
    model = wrapped(mmdet_host)
    pixels = mmdet_host.pixels(images())
    batch = model.data_preprocessor({"inputs": [*pixels], "data_samples": samples(pixels)})
    logits, boxes = model(**batch, mode="tensor")
    for found, wanted in zip(find_adapter(model).detector(model)(pixels), (logits[-1], boxes[-1]), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


class Pictures(Dataset):
    """Four images, as MMDetection's pipelines hand them to the data preprocessor."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = DINO.pixels(images(1, seed=index))[0]
        (sample,) = samples(pixels[None], labels((2,), seed=index))
        return {"inputs": pixels, "data_samples": sample}


def runner(folder: Path, model: dict[str, Any], **settings: Any) -> Any:
    """MMEngine's, for two epochs of two steps."""
    from mmdet.registry import DATASETS
    from mmengine.config import Config
    from mmengine.runner import Runner

    import dfine_plugin.projects.mmdet  # noqa: F401  (registers the detectors)

    DATASETS.register_module(module=Pictures, force=True)

    return Runner.from_cfg(
        Config(
            {
                "model": model,
                "work_dir": str(folder),
                "default_scope": "mmdet",
                "train_dataloader": {
                    "dataset": {"type": "Pictures"},
                    "batch_size": 2,
                    "num_workers": 0,
                    "sampler": {"type": "DefaultSampler", "shuffle": False},
                    "collate_fn": {"type": "pseudo_collate"},
                },
                "train_cfg": {"by_epoch": True, "max_epochs": 2},
                "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-4}, "clip_grad": {"max_norm": 0.1}},
                "custom_hooks": [{"type": "EMAHook"}],
                "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
                "randomness": {"seed": 0},
                "log_level": "ERROR",
                **settings,
            }
        )
    )


@pytest.mark.parametrize("kind", ["DINO", "DeformableDETR"])
def test_the_runner_trains_averages_and_resumes(kind: str, tmp_path: Path) -> None:
    """By a config whose detector has another type; a checkpoint of the bare host seeds it."""
    bare = row("bare", kind).build()
    with torch.no_grad():
        bare.bbox_head.reg_branches[0][-1].bias.add_(0.5)
    torch.save({"state_dict": bare.state_dict()}, tmp_path / "zoo.pth")
    wanted = config(kind) | {"type": f"FDR{kind}", "fdr": {"num_bins": 16}}
    if kind == "DINO":  # the runner does not take up random numbers where it left them
        wanted["dn_cfg"] |= {"label_noise_scale": 1e-9, "box_noise_scale": 1e-9}

    whole = runner(tmp_path / "whole", copy.deepcopy(wanted), load_from=str(tmp_path / "zoo.pth"))
    model = whole.model
    assert is_wrapped(model)
    assert model.decoder.fdr.config.num_bins == 16
    given: list[Tensor] = []
    first = model.bbox_head.reg_branches[0][-1].bias
    model.register_forward_pre_hook(lambda *_: given.append(first.detach().clone()))
    start = copy.deepcopy(model.decoder.fdr.state_dict())
    whole.train()
    assert torch.equal(given[0], bare.bbox_head.reg_branches[0][-1].bias)
    moved = model.decoder.fdr.state_dict()
    assert any(not torch.equal(moved[name], start[name]) for name in moved if name.startswith("refine"))

    half = str(tmp_path / "whole/epoch_1.pth")
    again = runner(tmp_path / "again", copy.deepcopy(wanted), load_from=half, resume=True)
    again.train()
    for name, tensor in model.state_dict().items():
        if not name.endswith("_extra_state"):
            torch.testing.assert_close(again.model.state_dict()[name], tensor, msg=name)
    assert predict(row("trained", kind), again.model.eval())[1].isfinite().all()


def test_settings_that_are_wrong_are_named_by_the_builder() -> None:
    import dfine_plugin.projects.mmdet  # noqa: F401

    with pytest.raises(TypeError, match="bins"):
        build_model(config("DINO") | {"type": "FDRDINO", "fdr": {"bins": 16}})
