"""What only hosts have that take a text: phrases for classes, texts that differ, a text that is fixed."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection
from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss
from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS, build_label_maps

from dfine_plugin import FDRConfig, InvalidTargetError, UnsupportedModelError, calibrate, deploy, wrap_decoder
from dfine_plugin.adapters.transformers.grounding_dino import UnionGroundingDinoLoss
from dfine_plugin.adapters.transformers.prompt import class_logits, count_phrases, fix_prompt, token_shares
from dfine_plugin.export import export_onnx
from dfine_plugin.registry import find_adapter
from dfine_plugin.validation import FiniteCheck
from dfine_plugin.wrapping import predict_distributions

from .hosts import build, images, labels, wrapped
from .transformers_hosts import HOSTS, NO_TEXT_HOSTS, TEXT, TextHost, _grounding_dino

pytestmark = pytest.mark.skipif(NO_TEXT_HOSTS is not None, reason=str(NO_TEXT_HOSTS))

TEXTS = torch.tensor(
    [
        [101, 20, 21, 1012, 30, 1012, 102, 0, 0, 0],  # two phrases
        [101, 20, 1012, 30, 31, 32, 1012, 40, 1012, 102],  # three
    ]
)


@pytest.fixture(params=[host for host in HOSTS if isinstance(host, TextHost)], ids=str)
def host(request: pytest.FixtureRequest) -> TextHost:
    return request.param


@given(st.lists(st.sampled_from([0, 20, 30, *SPECIAL_TOKENS]), min_size=1, max_size=12))
def test_phrases_are_counted_as_the_host_maps_them(tokens: list[int]) -> None:
    text = torch.tensor([tokens])
    (maps,) = build_label_maps(torch.empty(1, len(tokens)), text)
    assert count_phrases(text).tolist() == [len(maps)]


def predictions(seed: int) -> dict[str, Tensor]:
    """A prediction set of two images with a text each, six queries."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, 16, generator=generator)
    mask = torch.zeros(2, 6, 16, dtype=torch.bool)
    mask[:, :, : TEXTS.shape[1]] = (TEXTS != 0)[:, None]
    boxes = 0.2 + 0.5 * torch.rand(2, 6, 4, generator=generator)
    label_maps = build_label_maps(logits, TEXTS)
    logits = logits.masked_fill(~mask, -torch.inf)
    return {"logits": logits, "pred_boxes": boxes, "label_maps": label_maps, "text_mask": mask}


def criterion(kind: type[GroundingDinoImageLoss], **settings: object) -> GroundingDinoImageLoss:
    matcher = GroundingDinoHungarianMatcher(class_cost=20.0, bbox_cost=0.5, giou_cost=0.2)
    return kind(matcher=matcher, focal_alpha=0.25, losses=["labels"], **settings)


@pytest.mark.parametrize("seed", range(5))
def test_truths_are_matched_by_the_tokens_of_their_own_images_text(seed: int) -> None:
    sets = [predictions(2 * seed), predictions(2 * seed + 1)]
    targets = labels((2, 3), seed)
    targets[0]["class_labels"].clamp_(max=1)
    ours = criterion(UnionGroundingDinoLoss, label_maps=sets[0]["label_maps"])
    theirs = ours.matcher
    check = FiniteCheck({"boxes": sets[0]["pred_boxes"]})
    ours.match([(one, targets) for one in sets], FDRConfig.paper(), check)
    for one in sets:
        found, expected = ours.matcher(one, targets), theirs(one, targets)
        assert all(torch.equal(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True))


def test_the_class_loss_is_the_hosts_and_so_is_its_gradient() -> None:
    outputs, targets = predictions(0), labels((2, 2))
    targets[0]["class_labels"].clamp_(max=1)
    targets[1] = {name: tensor[:0] for name, tensor in targets[1].items()}
    pairs = [(torch.tensor([1, 4]), torch.tensor([1, 0])), (torch.tensor([], dtype=torch.int64),) * 2]
    found = []
    for one in (criterion(UnionGroundingDinoLoss, label_maps=outputs["label_maps"]), criterion(GroundingDinoImageLoss)):
        logits = outputs["logits"].clone().requires_grad_(True)
        loss = one.loss_labels({**outputs, "logits": logits}, targets, pairs, 3.0)["loss_ce"]
        loss.backward()
        found.append((loss.detach(), logits.grad))
    assert found[1][0] > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_class_is_the_tokens_of_its_own_images_text() -> None:
    """Of three images whose texts have two, one and three phrases; the host takes other texts' tokens from the second
    image on. Loss and gradient are those of a focal loss token by token."""
    texts = torch.tensor([[101, 20, 1012, 30, 31, 102], [101, 40, 41, 42, 1012, 102], [101, 50, 1012, 60, 1012, 70]])
    logits = 3 * torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label_maps = build_label_maps(logits, texts)
    outputs = {"logits": logits, "label_maps": label_maps, "text_mask": torch.ones(3, 4, 6, dtype=torch.bool)}
    targets = [{"class_labels": torch.tensor(found)} for found in ([1, 0], [0], [2, 1])]
    pairs = [(torch.tensor(q), torch.tensor(t)) for q, t in (([0, 3], [1, 0]), ([2], [0]), ([1, 2], [0, 1]))]
    ours = criterion(UnionGroundingDinoLoss, label_maps=label_maps)
    found = ours._get_target_classes_one_hot(outputs, targets, pairs)
    slow = torch.zeros(3, 4, 6, dtype=torch.float64)
    slow[0, 0, 1] = slow[0, 3, [3, 4]] = 1
    slow[1, 2, [1, 2, 3]] = 1
    slow[2, 1, 5] = slow[2, 2, 3] = 1
    assert torch.equal(found, slow)

    logits.requires_grad_(True)
    loss = ours.loss_labels(outputs, targets, pairs, 5.0)["loss_ce"]
    wanted = torch.zeros((), dtype=torch.float64)
    for image, query, token in itertools.product(range(3), range(4), range(6)):
        p = logits[image, query, token].sigmoid()
        wanted = wanted - (0.25 * (1 - p) ** 2 * p.log() if slow[image, query, token] else 0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(loss, wanted / 5)
    gradients = (torch.autograd.grad(total, logits)[0] for total in (loss, wanted / 5))
    torch.testing.assert_close(*gradients)


def test_labels_name_phrases_of_their_own_images_text(host: TextHost) -> None:
    model = wrapped(host).train()
    inputs = {"pixel_values": images(), "input_ids": TEXTS, "attention_mask": (TEXTS != 0).long()}
    targets = labels()
    targets[0]["class_labels"].fill_(1)
    targets[1]["class_labels"].fill_(2)
    targets[0]["class_labels"][1] = 2
    with pytest.raises(InvalidTargetError, match=r"^image 0, truth 1: label 2 is out of range for 2 classes$"):
        model(**inputs, labels=targets)


def test_a_fixed_text_stands_for_the_text_of_all_images(host: TextHost) -> None:
    model = build(host)
    text = {"input_ids": TEXTS[1:], "token_type_ids": torch.zeros_like(TEXTS[1:])}
    for network in (model, wrap_decoder(model, host.config()), copy.deepcopy(model), deploy(model)):
        fix_prompt(network, **text)
        with torch.no_grad():
            logits, boxes = find_adapter(network).detector(network)(images())
            expected = network(images(), **{name: tokens.expand(2, -1) for name, tokens in text.items()})
        # of three phrases, and a class has the mean of its tokens' probabilities
        tokens = expected.logits.sigmoid()
        classes = torch.stack([tokens[..., [1]], tokens[..., [3, 4, 5]].mean(-1, True), tokens[..., [7]]], -2)[..., 0]
        torch.testing.assert_close(logits.sigmoid(), classes, atol=2e-7, rtol=1e-4)
        assert torch.equal(boxes, expected.pred_boxes)


def test_without_a_fixed_text_images_alone_are_refused(host: TextHost) -> None:
    model = wrap_decoder(type(build(host))(build(host).config), host.config()).eval()
    for call in (calibrate, predict_distributions):
        with pytest.raises(UnsupportedModelError, match=r"is asked with images and a text.*fix_prompt\(model"):
            call(model, [images()] if call is calibrate else images())


def test_without_a_fixed_text_nothing_is_exported(host: TextHost, tmp_path: Path) -> None:
    model = type(build(host))(build(host).config).eval()
    with pytest.raises(UnsupportedModelError, match=r"is asked with images and a text.*fix_prompt\(model"):
        export_onnx(model, tmp_path / "model.onnx", (64, 64))
    assert not (tmp_path / "model.onnx").exists()


def test_what_is_computed_in_a_graph_is_the_same_without_the_text_encoder(host: TextHost) -> None:
    """And the host's module has its own function again after it."""
    model = deploy(wrapped(host))
    detector = find_adapter(copy.deepcopy(model)).detector(copy.deepcopy(model))
    with torch.no_grad():
        expected = detector(images())
        with detector.in_graph(images()[:1]):
            found = detector(images())
        assert not [name for name, _ in detector.named_parameters() if "text_backbone" in name]
        assert torch.equal(find_adapter(model).detector(model)(images())[0], expected[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@given(st.integers(0, 10_000))
def test_the_probability_of_a_class_is_the_mean_of_its_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    logits[..., 5] = -torch.inf
    logits.requires_grad_(True)
    owners = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0]])
    found = class_logits(logits, token_shares([owners])[0])
    slow = torch.zeros(2, 3, 3, dtype=torch.float64)
    for image, query, label in itertools.product(range(2), range(3), range(3)):
        mine = [float(logits.detach()[image, query, token].sigmoid()) for token in range(6) if owners[label, token]]
        slow[image, query, label] = sum(mine) / len(mine)
    torch.testing.assert_close(found.sigmoid(), slow, atol=2e-7, rtol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("text", [TEXTS, TEXTS[0], "a cat."], ids=["two texts", "no batch", "no tokens"])
def test_a_text_that_is_none_is_not_fixed(text: object) -> None:
    with pytest.raises(ValueError, match=r"takes tensors \(1, T\) of one text; input_ids is none"):
        fix_prompt(nn.Identity(), text)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of one text; attention_mask is none"):
        fix_prompt(nn.Identity(), TEXT["input_ids"], attention_mask=text)  # type: ignore[arg-type]


def test_a_text_without_classes_or_too_long_is_not_fixed(host: TextHost) -> None:
    model = build(host)
    with pytest.raises(ValueError, match="the text names no class"):
        fix_prompt(model, torch.tensor([[101, 1012, 102, 0]]))
    with pytest.raises(ValueError, match="the text has 17 tokens, and the model takes 16"):
        fix_prompt(model, torch.tensor([[101, *range(20, 36)]]))


def test_box_heads_that_model_and_decoder_do_not_share_are_refused() -> None:
    model = _grounding_dino(GroundingDinoConfig, GroundingDinoForObjectDetection, tie_word_embeddings=False)
    if model.bbox_embed[0].layers[0].weight is model.model.decoder.bbox_embed[0].layers[0].weight:
        pytest.skip("this release of transformers ties them all the same")
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="different box heads on model and decoder"):
        wrap_decoder(model)
    assert list(model.state_dict()) == before


def test_an_older_release_is_refused(host: TextHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfine_plugin.adapters.transformers.grounding_dino.version", lambda _: "5.22.1")
    with pytest.raises(UnsupportedModelError, match=r"is of transformers 5.22.1: pip install 'transformers>=5.23.0'"):
        wrap_decoder(build(host))
