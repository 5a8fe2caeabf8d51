"""Which adapter knows which host. Nothing here, nor anything it imports, loads a host library."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from .config import FDRConfig
from .errors import UnsupportedModelError

ENTRY_POINT_GROUP = "dfine_plugin.adapters"


@runtime_checkable
class Adapter(Protocol):
    """How one family of hosts is tied to the FDR head. An adapter holds no state of its own: one serves all models."""

    decoder: str
    """The dotted name of the host's decoder.

    An adapter for hosts whose layers all predict from one reference, which lets the initial boxes come of any layer
    (``FDRConfig.initial_layer``), says so by ``fixed_references = True`` besides, and by ``initial_layer`` which one is
    best, if not the first.
    """

    def check(self, model: nn.Module, config: FDRConfig) -> None:
        """Raise :class:`UnsupportedModelError` if the model cannot be wrapped as it is; change nothing."""

    def attach(self, model: nn.Module, config: FDRConfig) -> Any:
        """Tie the FDR head into the model, in place, as ``<decoder>.fdr``, and return what :meth:`detach` needs to undo
        it. For :func:`~dfine_plugin.calibrate` that has `box_heads`, which :meth:`host_boxes` uses (none where the host
        does not refine), and `outdated`, whether they belong to other weights than the model's."""

    def detach(self, model: nn.Module, retired: Any) -> None:
        """Undo :meth:`attach`."""

    def keep_layers(self, model: nn.Module, num_layers: int) -> None:
        """Leave the decoder of a model, wrapped or not, its first layers and their heads, in place, for inference;
        raise ``ValueError``, and change nothing, where it does not have so many."""

    def deploy(self, model: nn.Module) -> None:
        """Leave only what inference needs, in place."""

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at a forward's arguments before the host does: raise :class:`InvalidTargetError` on ground truths that
        no loss can use, and leave in the scope what the loss will need of them."""

    def host_boxes(
        self, model: nn.Module, layer: int, hidden_states: Tensor, reference: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the host itself would do, with the box heads that it was wrapped with: the reference boxes that its
        decoder would go on with after layer ``layer`` (from 0, not the first), and the boxes that it would report, both
        ``(B, Q, 4)`` cxcywh, from the layer's output ``(B, Q, C)`` and the reference boxes before it."""

    def detector(self, model: nn.Module) -> nn.Module:
        """The model, wrapped or not, as a function of tensors for inference: images ``(B, 3, H, W)`` as the host takes
        them, to class logits ``(B, Q, classes)`` and boxes ``(B, Q, 4)`` cxcywh in image sides."""


@runtime_checkable
class AdapterWithCriterion(Protocol):
    """What an adapter has besides, where the host's criterion is no part of the model."""

    def attach_criterion(self, model: nn.Module, retired: Any, criterion: nn.Module) -> None:
        """Let the criterion train the model, in place, and note it in what :meth:`Adapter.attach` has returned, for
        :meth:`Adapter.detach` to undo. Raise :class:`UnsupportedModelError` on one that cannot, and change nothing."""


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Of a call, by position and by name."""


@runtime_checkable
class AdapterOfLearners(Protocol):
    """What an adapter has besides, whose models can have a teacher (:func:`~dfine_plugin.learn_from`)."""

    def without_truths(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Arguments]:
        """A training forward's arguments as a model of this kind takes them in evaluation: for all images at once, or
        for parts of them in their order, where these would disturb one another."""


_BUILT_IN = {
    "transformers.models.rt_detr.modeling_rt_detr.RTDetrForObjectDetection": "transformers.rt_detr",
    "transformers.models.rt_detr_v2.modeling_rt_detr_v2.RTDetrV2ForObjectDetection": "transformers.rt_detr",
    "transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrForObjectDetection": (
        "transformers.deformable_detr"
    ),
    "transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrForObjectDetection": (
        "transformers.conditional_detr"
    ),
    "transformers.models.dab_detr.modeling_dab_detr.DabDetrForObjectDetection": "transformers.dab_detr",
    "transformers.models.lw_detr.modeling_lw_detr.LwDetrForObjectDetection": "transformers.lw_detr",
    "transformers.models.rf_detr.modeling_rf_detr.RfDetrForObjectDetection": "transformers.rf_detr",
    "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoForObjectDetection": (
        "transformers.grounding_dino"
    ),
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoForObjectDetection": (
        "transformers.mm_grounding_dino"
    ),
    "projects.deformable_detr.modeling.deformable_detr.DeformableDETR": "detrex.deformable_detr",
    "projects.h_deformable_detr.modeling.h_deformable_detr.HDeformableDETR": "detrex.h_deformable_detr",
    "projects.dab_deformable_detr.modeling.dab_deformable_detr.DabDeformableDETR": "detrex.dab_deformable_detr",
    "projects.dn_deformable_detr.modeling.dn_deformable_detr.DNDeformableDETR": "detrex.dn_deformable_detr",
    "projects.dino.modeling.dino.DINO": "detrex.dino",
    "projects.dino_eva.modeling.dino.DINO": "detrex.dino_eva",
    "projects.align_detr.modeling.aligndetr.AlignDETR": "detrex.align_detr",
    "projects.focus_detr.modeling.focus_detr.FOCUS_DETR": "detrex.focus_detr",
    "projects.deta.modeling.deformable_detr.DeformableDETR": "detrex.deta",
    "projects.conditional_detr.modeling.conditional_detr.ConditionalDETR": "detrex.conditional_detr",
    "projects.group_detr.modeling.group_detr.GroupDETR": "detrex.group_detr",
    "projects.dab_detr.modeling.dab_detr.DABDETR": "detrex.dab_detr",
    "projects.dn_detr.modeling.dn_detr.DNDETR": "detrex.dn_detr",
    "src.zoo.rtdetr.rtdetr.RTDETR": "rtdetr.adapter",
    "mmdet.models.detectors.deformable_detr.DeformableDETR": "mmdet.adapter",
    "mmdet.models.detectors.dino.DINO": "mmdet.adapter",
}
"""Host class to the module of ``dfine_plugin.adapters`` that registers its adapter."""

_LIBRARIES = {"projects": "detrex", "src": "RT-DETR's own repository", "mmdet": "MMDetection"}
"""What hosts' packages are called, to whose they are."""

_FDR_ALREADY = "is an FDR model already: its boxes are refined distributions"

_NO_REFERENCES = "has no reference boxes: each of its decoder layers predicts boxes anew, and none for FDR to refine"

_NO_LOSS = "cannot be trained: transformers has no loss for it, and so there is none for FDR to join"

_MASKS = "predicts masks beside boxes and matches queries by both, in a criterion with no place for FDR's terms"

_REFUSED = {
    "transformers.models.d_fine.modeling_d_fine.DFineForObjectDetection": _FDR_ALREADY,
    "transformers.models.deimv2.modeling_deimv2.Deimv2ForObjectDetection": _FDR_ALREADY,
    "src.zoo.dfine.dfine.DFINE": _FDR_ALREADY,
    "transformers.models.omdet_turbo.modeling_omdet_turbo.OmDetTurboForObjectDetection": _NO_LOSS,
    "transformers.models.pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ForObjectDetection": _NO_LOSS,
    "transformers.models.pp_doclayout_v3.modeling_pp_doclayout_v3.PPDocLayoutV3ForObjectDetection": _NO_LOSS,
    "transformers.models.pp_doclayout_v4.modeling_pp_doclayout_v4.PPDocLayoutV4ForObjectDetection": _NO_LOSS,
    "transformers.models.rf_detr.modeling_rf_detr.RfDetrForInstanceSegmentation": _MASKS,
    "transformers.models.detr.modeling_detr.DetrForObjectDetection": _NO_REFERENCES,
    "transformers.models.table_transformer.modeling_table_transformer.TableTransformerForObjectDetection": (
        _NO_REFERENCES
    ),
    "transformers.models.yolos.modeling_yolos.YolosForObjectDetection": (
        "has no decoder: its tokens become boxes in one go, with no reference boxes for FDR to refine"
    ),
    "projects.detr.modeling.detr.DETR": _NO_REFERENCES,
    "projects.pnp_detr.modeling.detr.PnPDETR": _NO_REFERENCES,
    "projects.anchor_detr.modeling.anchor_detr.AnchorDETR": (
        "has its decoder's layers and box heads in its transformer's forward, and no decoder for FDR to refine in"
    ),
    "projects.maskdino.maskdino.MaskDINO": _MASKS,
    "projects.co_mot.modeling.mot.MOT": (
        "tracks: its queries go on from frame to frame, and so does its matching, of which there is no union"
    ),
}
"""Host class to why it is not wrapped."""

_registered: dict[str, Adapter] = {}

AdapterClass = TypeVar("AdapterClass", bound=type)


def register_adapter(*host_classes: str) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: the adapter for host classes of these dotted names and for their subclasses.

    Example:
        >>> @register_adapter("my_package.models.MyDetr")
        ... class MyDetrAdapter: ...

    Another package makes its adapter known without an import through an entry point of the group
    ``dfine_plugin.adapters``, named like the host class's dotted name and pointing at the decorated class.
    """

    def register(adapter_class: AdapterClass) -> AdapterClass:
        for name in host_classes:
            _registered[name] = adapter_class()
        return adapter_class

    return register


def supported_hosts() -> list[str]:
    """Dotted names of all host classes that an adapter is known for."""
    names = {*_BUILT_IN, *_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}
    return sorted(names)


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter for the model's class, or for the nearest of its base classes that has one.

    Raises:
        UnsupportedModelError: names the class, the supported ones and how to register one.
    """
    for cls in type(model).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name not in _registered:
            _load(name)
        if name in _registered:
            return _registered[name]
        if name in _REFUSED:
            raise UnsupportedModelError(f"{name} {_REFUSED[name]}")
    own = type(model)
    raise UnsupportedModelError(
        f"no adapter for {own.__module__}.{own.__qualname__}. Supported: {_short_names()}. "
        "To support another host, write an adapter and register it with dfine_plugin.register_adapter "
        f"or an entry point of the group {ENTRY_POINT_GROUP!r}."
    )


def _short_names() -> str:
    """The host classes that are supported, by library, those of this package first."""
    by_library: dict[str, dict[str, None]] = {}
    for name in dict.fromkeys([*_BUILT_IN, *supported_hosts()]):
        package = name.partition(".")[0]
        names = by_library.setdefault(_LIBRARIES.get(package, package), {})
        names[name.rpartition(".")[2]] = None  # once: some projects of detrex call their hosts alike
    return "; ".join(f"{', '.join(names)} ({library})" for library, names in by_library.items())


def _load(name: str) -> None:
    """Import whatever registers an adapter for this host class, if anything does."""
    if name in _BUILT_IN:
        import_module(f"dfine_plugin.adapters.{_BUILT_IN[name]}")
        return
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        register_adapter(name)(point.load())
