"""The bare twin of a host that learns its classes by MAL: the same loss as written out slowly, and nothing else new."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin import FDRConfig, wrap_decoder
from dfine_plugin.benchmarks.models.hosts import HOSTS, build_host
from dfine_plugin.benchmarks.models.matchability import learn_classes_by_mal

from ..adapters import slow_loop as slow

COSTS = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
CLASSES = {"rt_detr": "loss_vfl", "rt_detr_v2": "loss_vfl"}


def step(model: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """Outputs and truths, in evaluation mode, where there are no denoising queries."""
    generator = torch.Generator().manual_seed(3)
    boxes = 0.2 + 0.5 * torch.rand(2, 2, 4, generator=generator)
    targets = [{"class_labels": torch.tensor([2, 0]), "boxes": of_image} for of_image in boxes]
    pixels = torch.rand(2, 3, 64, 64, generator=generator)
    return model.eval()(pixel_values=pixels, labels=targets), targets


@pytest.mark.parametrize("host", [name for name in HOSTS if "/" not in name and HOSTS[name].bare_learns_by_mal])
def test_a_bare_host_learns_its_classes_by_mal_and_all_else_as_before(host: str) -> None:
    torch.manual_seed(0)
    model: Any = build_host(host, ["a", "b", "c"])
    before, _ = step(model)
    learn_classes_by_mal(model)
    outputs, targets = step(model)
    name = CLASSES.get(model.config.model_type, "loss_ce")
    groups = getattr(model.config, "group_detr", 1)
    pairs = slow.match_groups(outputs.logits, outputs.pred_boxes, targets, COSTS, groups)
    wanted = slow.mal(outputs.logits, outputs.pred_boxes, targets, pairs, 4 * groups)
    torch.testing.assert_close(outputs.loss_dict[name], wanted)
    changed = {key for key, value in before.loss_dict.items() if not torch.equal(value, outputs.loss_dict[key])}
    assert name in changed
    assert all(key.startswith(name) for key in changed)


@pytest.mark.detrex
def test_so_does_a_host_of_detrex() -> None:
    pytest.importorskip("detrex")
    torch.manual_seed(0)
    model: Any = build_host("detrex/deformable-detr", ["a", "b", "c"])
    learn_classes_by_mal(model)
    criterion = model.detector.criterion
    logits, boxes = torch.randn(2, 6, 3), 0.2 + 0.5 * torch.rand(2, 6, 4)
    targets = [{"labels": torch.tensor([2, 0]), "boxes": 0.2 + 0.5 * torch.rand(2, 4)}] * 2
    losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)
    named = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    wanted = slow.mal(logits, boxes, named, slow.match(logits, boxes, named, COSTS), 4)
    torch.testing.assert_close(losses["loss_class"], wanted)


def test_a_loss_that_is_not_known_is_refused() -> None:
    class Other(nn.Module):
        @staticmethod
        def loss_function() -> None: ...

    with pytest.raises(ValueError, match="Other has a loss that MAL is not known to fit: loss_function"):
        learn_classes_by_mal(Other())


def test_wrapped_and_bare_share_what_is_not_the_boxes() -> None:
    """With the same predictions: the first layer's class logits are the host's own, and so is their loss."""
    torch.manual_seed(0)
    bare: Any = build_host("deformable-detr", ["a", "b", "c"])
    torch.manual_seed(0)
    wrapped = wrap_decoder(build_host("deformable-detr", ["a", "b", "c"]), FDRConfig(class_loss="mal"))
    learn_classes_by_mal(bare)
    theirs, ours = (step(model)[0].loss_dict for model in (bare, wrapped))
    torch.testing.assert_close(ours["loss_ce_pre"], theirs["loss_ce_0"])
