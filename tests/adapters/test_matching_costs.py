"""The fast matching against each host's own matcher: the same pairs."""

from typing import Any

import pytest
import torch

from dfine_plugin import NonFiniteError, wrap_decoder
from dfine_plugin.matching import GOLSDMatcher

from .hosts import Host, build, images, labels, randomise_fdr, skip_without_truths


@pytest.mark.parametrize("counts", [(2, 3), (0, 40), (0, 0)], ids=str)
def test_the_hosts_matcher_would_have_answered_the_same(
    host: Host, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sets that the host asks for, and the initial boxes'; not one of them goes to the host's matcher."""
    skip_without_truths(host, counts)
    if host.own_pairs:
        pytest.skip("the host is asked itself")
    compared: list[int] = []
    forward = GOLSDMatcher.forward

    def compare(
        self: GOLSDMatcher, outputs: dict[str, Any], targets: list[Any], *groups: int, **more: int
    ) -> list[Any]:
        assert self.knows(outputs["pred_boxes"]), "this set is not matched the fast way"
        found = forward(self, outputs, targets)
        answer = self.matcher(outputs, targets, *groups, **more)
        pairs = answer["indices"] if isinstance(answer, dict) else answer
        for ours, theirs in zip(found, pairs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        compared.append(len(found))
        return found

    monkeypatch.setattr(GOLSDMatcher, "forward", compare)
    model = wrap_decoder(build(host), host.config()).train()
    randomise_fdr(host, model)
    host.loss(model, images(), labels(counts))
    assert len(compared) >= 4


def test_a_matcher_that_nobody_knows_is_asked_itself(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass may compute other costs. It sees none that is not finite."""
    if host.name == "detrex-deta":
        pytest.skip("the host assigns, and asks no matcher")
    model = wrap_decoder(build(host), host.config()).train()
    randomise_fdr(host, model)
    asked: list[Any] = []
    matcher = host.matcher(model)
    if matcher is not None:
        kind = type(matcher)
    else:
        from dfine_plugin.adapters.transformers import deformable_detr, grounding_dino, lw_detr, rt_detr

        if host.name.startswith("rt-detr"):
            module, name = rt_detr, "RTDetrHungarianMatcher"
        elif host.name in ("lw-detr", "rf-detr"):
            module, name = lw_detr, "LwDetrHungarianMatcher"
        elif "grounding-dino" in host.name:
            module, name = grounding_dino, "GroundingDinoHungarianMatcher"
        else:
            module, name = deformable_detr, "DeformableDetrHungarianMatcher"
        kind = getattr(module, name)

    name = "assign" if hasattr(kind, "assign") else "forward"  # as MMDetection's are called, and all others
    answer = getattr(kind, name)
    own = type("Own", (kind,), {name: lambda self, *args, **more: asked.append(args) or answer(self, *args, **more)})
    if matcher is not None:
        matcher.__class__ = own
    else:
        construct = kind.__init__

        def make_own(self: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            self.__class__ = own

        monkeypatch.setattr(kind, "__init__", make_own)
    host.loss(model, images(), labels())
    assert len(asked) >= 4

    asked.clear()
    with torch.no_grad():
        host.fdr(model).refine[-1][-1].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="pred_boxes of decoder layer 3"):
        host.loss(model, images(), labels())
    assert not asked
