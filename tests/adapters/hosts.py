"""What every shared behaviour needs of a host: the real class, small, randomly initialised. The rows lie beside."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin import FDRConfig, wrap_decoder

NUM_CLASSES = 3
NUM_LAYERS = 3
IMAGE_SIZE = 64


def default_settings() -> dict[str, Any]:
    """What :class:`FDRConfig` chooses by default, where it departs from the paper."""
    default, paper = FDRConfig().to_dict(), FDRConfig.paper().to_dict()
    return {name: value for name, value in default.items() if value != paper[name]}


every_kind_of_loss = pytest.mark.parametrize(
    ("settings", "counts"),
    [
        pytest.param({}, (2, 3), id="paper"),
        pytest.param({"union": False, "ddf": False, "lqe": False}, (2, 3), id="fdr"),
        pytest.param(
            {"weighting": "uniform", "num_bins": 16, "a": 0.25, "temperature": 2.0}, (2, 0), id="other-bins-empty-image"
        ),
        pytest.param(default_settings(), (2, 3), id="default"),
        pytest.param({"distribution_losses_train": "head"}, (2, 3), id="head-alone"),
        pytest.param({"class_loss": "mal"}, (2, 3), id="mal"),
    ],
)
"""Settings, over the paper's, and numbers of truths that the losses of every host are compared with a slow loop at."""


@dataclass(frozen=True)
class Host(ABC):
    """One row: how to build the host, how to run it, and what is special about it."""

    name: str
    build: Callable[[], nn.Module]
    weighted_loss_dict: bool
    """Whether the host's loss dict holds weighted terms."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What an FDRConfig for this host must say."""
    checkpointing: bool = False
    """Whether the host supports gradient checkpointing."""
    missing: str | None = None
    """Why the host cannot be built here, if so."""
    one_box_head: bool = False
    """Whether all decoder layers share one box head, which stays."""
    fixed_references: bool = False
    """Whether they also all attend from the references of the first."""
    own_pairs: bool = False
    """Whether it is asked for its pairs, set by set: they are more than one a truth."""
    dino: bool = False
    """Whether it is a DINO of detrex or made of one."""

    decoder: ClassVar[str]
    """The dotted name of the decoder, and of the FDR head with ``.fdr`` behind it."""
    retired_heads: ClassVar[str] = "bbox_embed"
    """What the host calls the list of its box heads."""

    @property
    def encoder(self) -> str:
        """The dotted name of what runs before the decoder."""
        return self.decoder.replace("decoder", "encoder")

    def class_heads(self, model: nn.Module) -> nn.Module:
        """The list of class heads, or the one of all layers."""
        return model.class_embed

    def matcher(self, model: nn.Module) -> Any:
        """The matcher, or what the host calls its assigner; None where each loss makes its own."""
        return None

    @abstractmethod
    def losses(self, model: nn.Module, images: Tensor, labels: list[dict[str, Tensor]]) -> tuple[Tensor, dict]:
        """The loss to train with, and the loss dict."""

    @abstractmethod
    def predict(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """All that the host predicts, in evaluation mode."""

    @abstractmethod
    def predict_layers(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Class logits and boxes of every decoder layer, as the host in evaluation mode hands them to its loss."""

    def pixels(self, images: Tensor) -> Tensor:
        """Images of values from 0 to 1 as the adapter's detector takes them."""
        return images

    @abstractmethod
    def without_auxiliary_losses(self, model: nn.Module) -> None:
        """Tell the host to supervise its last layer only."""

    def to_gpu(self, model: nn.Module) -> None:
        """Move a model, in place."""
        model.cuda()

    def loss(self, model: nn.Module, images: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
        return self.losses(model, images, labels)[0]

    def config(self, **settings: Any) -> FDRConfig:
        """The paper's recipe and gates, so that every part is there."""
        gating = settings.get("trainable") != "head"
        return FDRConfig.paper(**{"target_gating": gating, **self.settings, **settings})

    def class_head(self, model: nn.Module, layer: int) -> nn.Module:
        """The class head of a decoder layer, from 0: its own, or the one of all."""
        heads = self.class_heads(model)
        return heads[layer] if isinstance(heads, nn.ModuleList) else heads

    def fdr(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(f"{self.decoder}.fdr")

    def __str__(self) -> str:
        return self.name


def build(host: Host, seed: int = 0) -> nn.Module:
    """The host with random weights, spread so that no head, norm or class sits at a special value."""
    torch.manual_seed(seed)
    model = host.build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bbox", "class_embed", "dec_score_head")):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def skip_without_truths(host: Host, counts: tuple[int, ...]) -> None:
    """Skip a batch without any truth where the bare host cannot have one."""
    if host.name == "detrex-focus-detr" and not any(counts):
        pytest.skip("the bare host cannot do it: it looks for the least area of no boxes")


def randomise_fdr(host: Host, model: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Move the FDR head off its zeros, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in host.fdr(model).parameters():
            # alike for any width: what a wide layer sums up must not grow with it
            spread = scale * min(1.0, (32 / parameter.shape[-1]) ** 0.5)
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * spread)


def images(batch: int = 2, seed: int = 2) -> Tensor:
    """``(B, 3, H, W)`` noise in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def labels(counts: tuple[int, ...] = (2, 3), seed: int = 3) -> list[dict[str, Tensor]]:
    """For each image so many random truths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            "boxes": torch.cat(
                [
                    0.3 + 0.4 * torch.rand(count, 2, generator=generator),
                    0.1 + 0.4 * torch.rand(count, 2, generator=generator),
                ],
                dim=1,
            ),
        }
        for count in counts
    ]


def wrapped(host: Host, seed: int = 0) -> nn.Module:
    """A wrapped host whose FDR head has left its zeros."""
    model = wrap_decoder(build(host, seed), host.config())
    randomise_fdr(host, model)
    return model


def train_step(host: Host, model: nn.Module, rate: float = 1e-3) -> float:
    """One step of normalised gradient descent; the loss before it."""
    model.train()
    torch.manual_seed(11)
    loss = host.loss(model, images(), labels())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad / parameter.grad.norm().clamp(min=1)
                parameter.grad = None
    model.eval()
    return loss.item()


@torch.no_grad()
def predict(host: Host, model: nn.Module) -> tuple[Tensor, ...]:
    return host.predict(model, images())


def assert_equal(host: Host, first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(predict(host, first), predict(host, second), strict=True):
        assert torch.equal(a, b)


def idle_parameters(host: Host, counts: tuple[int, ...] = (2, 3)) -> set[str]:
    """What the bare host itself leaves without a gradient."""
    model = build(host).train()
    host.loss(model, images(), labels(counts)).backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
