"""For LazyConfigs that go on from a trained host: load it, wrap it, calibrate its FDR head; the trainer comes after."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from dfine_plugin import FDRConfig, calibrate, wrap_decoder


def wrap_trained(
    model: nn.Module,
    checkpoint: str,
    dataloader: Iterable[list[dict[str, Any]]],
    config: FDRConfig | None = None,
    num_images: int = 256,
    device: str = "cuda",
) -> nn.Module:
    """A trained host, wrapped, with an FDR head that has learnt the host's own boxes (:func:`~dfine_plugin.calibrate`).

    In a config: ``model = L(wrap_trained)(model=model, checkpoint="...", dataloader=dataloader.train)``, and
    ``train.init_checkpoint = ""``, for the trainer would load it once more. Where it trains on several GPUs, each
    process calibrates and the first one's head is what all go on with. A run that is resumed or evaluated does all this
    again before the trainer loads its own checkpoint over it.

    Args:
        model: detrex's, as its config builds it.
        checkpoint: what detectron2's checkpointer loads, such as a file of the model zoo.
        dataloader: of the training images.
        config: of the wrap.
        num_images: how many images to calibrate with.
        device: to calibrate on.

    Raises:
        ValueError: the data loader has no images.
    """
    DetectionCheckpointer(model).load(checkpoint)
    wrap_decoder(model.to(device), config)
    calibrate(model, _images(dataloader, num_images))
    return model


def _images(dataloader: Iterable[list[dict[str, Any]]], count: int) -> Iterator[Tensor]:
    # one by one, for they differ in size: a batch would pad them
    singles = (inputs["image"][None].float() for batch in dataloader for inputs in batch)
    return islice(singles, count)
