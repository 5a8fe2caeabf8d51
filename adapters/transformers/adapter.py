"""What the adapters for transformers share: heads, ties and state dicts."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dfine_plugin.config import FDRConfig
from dfine_plugin.errors import UnsupportedModelError, WrapStateError
from dfine_plugin.head import FDRHead
from dfine_plugin.record import closes_on_interrupt, current_record
from dfine_plugin.registry import Arguments
from dfine_plugin.validation import check_targets
from dfine_plugin.wrapping import binding_of

from .. import host_parts
from ..host_parts import Host
from ..union_criterion import UnionCriterion, check_losses, named_terms
from . import saving

_check_targets = torch.compiler.disable(check_targets)  # it looks at values


@dataclass
class Retired(host_parts.Retired):
    """With the host's declarations of tied parameters, as declared and as expanded."""

    ties: tuple[dict[str, str] | None, dict[str, str]] = (None, {})


class GOLSDLoss:
    """Base of what stands in for a host's loss function on a wrapped model: same arguments, same results."""

    def __init__(self, config: FDRConfig) -> None:
        self.config = config

    @torch.compiler.disable  # matching is the CPU's, and pairs are of as many truths as there are
    @closes_on_interrupt
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Any]] | None]:
        return self.total(*args, **kwargs)

    def total(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Any]] | None]:
        """The loss, its terms, and the auxiliary prediction sets if the host's config has them: as the host's loss
        function, whose signature a subclass takes."""
        raise NotImplementedError

    def with_distribution_losses(
        self,
        losses: dict[str, Tensor],
        criterion: UnionCriterion,
        layers: list[dict[str, Tensor]],
        config: Any,
        class_weight: float = 1.0,
    ) -> Tensor:
        """The weighted total of a host's unweighted losses, which FGL's and DDF's terms join.

        Args:
            losses: the criterion's, of the layers, the initial boxes (``*_pre``) and, if there are any, the encoder's
                proposals (``*_enc``); changed in place.
            criterion: which has matched them.
            layers: the decoder layers that are supervised, the last of all at the end.
            config: the host's, with the weights of its box losses.
            class_weight: of its class losses.
        """
        terms = criterion.distribution_losses(current_record().last(len(layers)), layers, self.config)
        suffixes = [*(f"_{i}" for i in range(len(layers) - 1)), ""]
        losses.update(named_terms(terms, suffixes))
        check_losses(losses)
        weights = {
            "loss_ce": class_weight,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
            "loss_fgl": self.config.fgl_weight,
            "loss_ddf": self.config.ddf_weight,
        }
        return weighted_total(losses, weights, [*suffixes, "_pre", "_enc"])


class TransformersAdapter:
    """Base of the adapters for transformers: everything but the host's own decoder and loss.

    A subclass says which decoder class (:attr:`decoder_classes`) and which loss (:attr:`loss_class`) take over, and may
    change more of the model in :meth:`attach_heads`.
    """

    decoder = "model.decoder"
    decoder_classes: ClassVar[dict[type[nn.Module], type[nn.Module]]]
    """From each host decoder class to its subclass that refines distributions."""
    loss_class: ClassVar[type[GOLSDLoss]]
    hidden_dim: ClassVar[str] = "d_model"
    """The config's name for C, the width of the decoder's hidden states."""
    norms: ClassVar[tuple[str, str]] = ("self_attn_layer_norm", "encoder_attn_layer_norm")
    """Of a decoder layer, the norms before and behind its attention to the image."""

    def attach_heads(self, model: Host, config: FDRConfig, retired: Retired) -> None:
        """Retire the host's box heads after the first one, and note in ``retired`` what was changed."""
        raise NotImplementedError

    def check(self, model: Host, config: FDRConfig) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        name = type(model).__name__
        if hasattr(model.config, saving.SETTINGS):
            raise UnsupportedModelError(
                f"this {name}'s config comes from a wrapped model, whose FDR weights {name}.from_pretrained does not "
                "know. Load such a checkpoint with dfine_plugin.load_pretrained(path); "
                "to wrap anew, build the host with a config of its own"
            )
        if "_loss_function" in model.__dict__:
            raise UnsupportedModelError(
                f"this {name} has a loss_function of its own, which the plugin cannot feed the union"
            )
        if type(model.model.decoder) not in self.decoder_classes:
            raise UnsupportedModelError(f"this {name} has a decoder of another class: {type(model.model.decoder)}")
        host_parts.check_gates(model, self.decoder, self.norms, config)

    def attach(self, model: Host, config: FDRConfig) -> Retired:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        decoder = model.model.decoder
        parameter = next(decoder.parameters())
        retired = Retired(ties=(model._tied_weights_keys, dict(model.all_tied_weights_keys)))
        self.attach_heads(model, config, retired)
        twin = self.decoder_classes[type(decoder)]
        with torch.device("meta"):
            twin(decoder.config)  # transformers learns at construction which outputs a class can record
        retired.recast(model, "model.decoder", twin)
        decoder.fdr = FDRHead(getattr(model.config, self.hidden_dim), len(decoder.layers), config).to(parameter)
        decoder.fdr.train(decoder.training)
        host_parts.gate_layers(model, self.decoder, self.norms, retired)
        retie(model)
        saving.note_settings(model, config)
        model.loss_function = self.loss_class(config)
        retired.load_hook = model.register_load_state_dict_pre_hook(_prepare_loading)
        return retired

    def detach(self, model: Host, retired: Retired) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        del model.model.decoder.fdr, model._loss_function
        retired.restore(model, like=next(model.model.decoder.parameters()))
        model._tied_weights_keys, model.all_tied_weights_keys = retired.ties
        saving.forget_settings(model)
        retired.load_hook.remove()

    def keep_layers(self, model: Host, num_layers: int) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        host_parts.keep_first_layers(model, self.decoder, num_layers)
        retie(model)

    def deploy(self, model: Host) -> None:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        model.model.decoder.fdr.deploy()
        model.loss_function = _refuse_loss
        saving.note_deployment(model)

    def begin(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[dict[str, Tensor]] | None:
        """See :class:`~dfine_plugin.registry.Adapter`. Returns the labels among the arguments."""
        given = _by_name(model, args, kwargs)
        labels, pixels = given.get("labels"), given.get("pixel_values")
        if labels is not None:
            if model.training:
                host_parts.warn_of_frozen_head(model, "model.decoder.fdr")
            _check_targets(labels, self.num_classes(model, given), "class_labels", "boxes", images=pixels)
        return labels

    def without_truths(self, model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Arguments]:
        """See :class:`~dfine_plugin.registry.AdapterOfLearners`."""
        return [((), {key: value for key, value in _by_name(model, args, kwargs).items() if key != "labels"})]

    def num_classes(self, model: Host, given: Mapping[str, Any]) -> int | Tensor:
        """How many classes labels may name, by the arguments of a forward; ``(B,)`` where it depends on the image."""
        return model.config.num_labels

    def host_boxes(self, model: Host, layer: int, hidden_states: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        box = host_parts.host_box(model, layer, hidden_states, reference)
        return box, box

    def detector(self, model: Host) -> nn.Module:
        """See :class:`~dfine_plugin.registry.Adapter`."""
        return TransformersDetector(model)


class TransformersDetector(nn.Module):
    """A model's logits and boxes, as a tuple."""

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values)
        return outputs.logits, outputs.pred_boxes


def _by_name(model: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by their names, those of no name of their own among them."""
    signature = inspect.signature(type(model).forward)
    given = signature.bind(None, *args, **kwargs).arguments
    del given[next(iter(signature.parameters))]  # the model
    others = (name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD)
    return {**given, **given.pop(next(others, ""), {})}


def check_box_heads_are_shared(model: Host) -> None:
    """Raise :class:`UnsupportedModelError` for a model whose decoder has other box heads than the model itself."""
    if model.model.decoder.bbox_embed[0].layers[0].weight is not model.bbox_embed[0].layers[0].weight:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has different box heads on model and decoder (tie_word_embeddings=False)"
        )


def with_boxes_in_rows(labels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A forward's labels, with the empty boxes ``(0,)`` that hosts accept as ``(0, 4)``, and classes as int64."""
    return [{**t, "boxes": t["boxes"].reshape(-1, 4), "class_labels": t["class_labels"].long()} for t in labels]


def prediction_set(logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """One prediction set as the hosts' criteria take it: ``(B, Q, classes)`` and ``(B, Q, 4)``."""
    return {"logits": logits, "pred_boxes": boxes}


def weighted_total(losses: Mapping[str, Tensor], weights: Mapping[str, float], suffixes: Iterable[str]) -> Tensor:
    """The sum of the terms that a loss dict has by these names, with each of the suffixes, each with its weight."""
    names = [(name + suffix, weight) for suffix in suffixes for name, weight in weights.items()]
    return torch.stack([weight * losses[name] for name, weight in names if name in losses]).sum()


def _refuse_loss(*_: Any, **__: Any) -> None:
    raise WrapStateError("a deployed model is for inference only: call it without labels")


def retie(model: Host) -> None:
    """Declare tied what is, so that saving writes each parameter once and re-tying finds all it looks for.

    Of several names a parameter keeps the one that the host saves it by.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    sources = set(model.all_tied_weights_keys.values())
    ties = {}
    for group in names.values():
        saved = next((name for name in group if name in sources), group[0])
        ties.update({name: saved for name in group if name != saved})
    if ties or model._tied_weights_keys:
        model._tied_weights_keys = ties
        model.all_tied_weights_keys = dict(ties)


def _prepare_loading(model: Host, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    binding = binding_of(model)
    assert binding is not None
    saving.rename_saved(model, state_dict, prefix)
    host_parts.complete_ties(state_dict, prefix, model.all_tied_weights_keys.items())
    host_parts.seed_from_baseline(state_dict, prefix, model, binding.retired, "model.decoder.fdr")
