"""A wrapped model with a teacher, over every host."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfine_plugin import (
    FDRConfig,
    NonFiniteError,
    UnsupportedModelError,
    WrapStateError,
    deploy,
    learn_from,
    unwrap_decoder,
    wrap_decoder,
)
from dfine_plugin.record import in_scope
from dfine_plugin.wrapping import binding_of, keep_records, predict_distributions

from . import detrex_hosts
from .detrex_hosts import missing
from .hosts import Host, assert_equal, build, images, labels, randomise_fdr, skip_without_truths, train_step, wrapped
from .transformers_hosts import HOSTS, TextHost


def teacher_of(host: Host, num_bins: int = 16) -> nn.Module:
    """Of the same kind, with other weights and in other bins."""
    teacher = wrap_decoder(build(host, seed=4), host.config(num_bins=num_bins))
    randomise_fdr(host, teacher, seed=10, scale=0.1)  # whose boxes have not shrunk to lines
    return teacher


def losses(host: Host, model: nn.Module, counts: tuple[int, ...] = (2, 3)) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a training step with the same random numbers each time, and averages of batch norms that stay. The first truth
    of an image is nearly all of it, which whatever a teacher says overlaps."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    truths = labels(counts)
    for target in truths:
        target["boxes"][:1] = torch.tensor([0.5, 0.5, 0.96, 0.96])
    torch.manual_seed(11)
    return host.losses(model, images(len(counts)), truths)


def test_fgl_alone_hears_of_the_teacher(host: Host) -> None:
    model, teacher = wrapped(host), teacher_of(host)
    _, without = losses(host, model)
    assert learn_from(model, teacher) is model
    total, taught = losses(host, model)
    assert taught.keys() == without.keys()
    for name, term in without.items():
        assert torch.equal(taught[name], term) != ("fgl" in name), name
    assert not in_scope()

    weights = {name: p.detach().clone() for name, p in teacher.state_dict().items() if isinstance(p, Tensor)}
    total.backward()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(teacher.state_dict()[name], kept) for name, kept in weights.items())
    learn_from(model, None)
    _, again = losses(host, model)
    assert all(torch.equal(again[name], term) for name, term in without.items())


def test_the_lesson_is_what_the_teacher_says_of_the_images_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(host)
    model = learn_from(wrapped(host), teacher)
    lessons: list[Any] = []
    kept: Any = type(binding_of(model).teacher)
    answer = kept._answer
    monkeypatch.setattr(kept, "_answer", lambda *given: lessons.append(answer(*given)) or lessons[-1])
    losses(host, model)
    (lesson,) = lessons
    _, _, record = predict_distributions(teacher, host.pixels(images()))
    torch.testing.assert_close(lesson.boxes[-1], record.boxes[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lesson.corner_logits[-1], record.corner_logits[-1], atol=1e-4, rtol=1e-4)
    model.eval()
    host.predict(model, images())
    assert len(lessons) == 1  # in training only


@pytest.mark.parametrize("counts", [(0, 3), (0, 0)], ids=["an-empty-image", "an-empty-batch"])
def test_images_without_truths_with_a_teacher(host: Host, counts: tuple[int, ...]) -> None:
    skip_without_truths(host, counts)
    model = learn_from(wrapped(host), teacher_of(host))
    total, found = losses(host, model, counts)
    assert all(torch.isfinite(term) for term in found.values())
    total.backward()
    assert all(p.grad is not None for p in host.fdr(model).refine.parameters())


def test_a_model_holds_no_part_of_its_teacher(host: Host) -> None:
    alone = wrapped(host)
    model = learn_from(wrapped(host), teacher_of(host))
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in alone.named_parameters()]
    twin = copy.deepcopy(model)
    assert binding_of(twin).teacher is None
    assert binding_of(model).teacher is not None
    assert train_step(host, twin) == train_step(host, alone)
    try:
        pickled = pickle.loads(pickle.dumps(model))
    except (pickle.PicklingError, AttributeError):
        return  # the bare host cannot be pickled
    assert binding_of(pickled).teacher is None
    assert_equal(host, pickled, model)


def test_the_way_back_and_out_leaves_the_teacher(host: Host) -> None:
    model = learn_from(wrapped(host), teacher_of(host))
    assert binding_of(deploy(copy.deepcopy(model).eval())).teacher is None
    deployed = deploy(model.eval())
    assert binding_of(deployed).teacher is None
    other = learn_from(wrapped(host), teacher_of(host))
    unwrap_decoder(other)
    assert_equal(host, other, build(host))


def test_a_teacher_of_another_precision(transformers_host: Host) -> None:
    """A folder in half precision gives such a teacher; what it says is near to what it would say in float32."""
    host: Any = transformers_host
    if host.name == "dab-detr":
        pytest.skip("the bare host cannot run in bfloat16: its queries begin as zeros of the default dtype")
    said = []
    for teacher in (teacher_of(host), teacher_of(host).bfloat16()):
        model = learn_from(wrapped(host), teacher)
        _, found = losses(host, model)
        said.append(torch.stack([term.detach() for name, term in found.items() if "fgl" in name]))
    torch.testing.assert_close(*said, atol=0.02, rtol=0.02)


def test_a_teacher_runs_in_the_learners_autocast(transformers_host: Host) -> None:
    host: Any = transformers_host
    model, teacher = wrapped(host), teacher_of(host)
    learn_from(model, teacher)
    inside: list[bool] = []
    teacher.get_submodule(host.decoder).register_forward_pre_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu"))
    )
    forward = model.forward

    def under_autocast(*args: Any, **kwargs: Any) -> Any:  # as accelerate puts it around forward alone
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = under_autocast  # type: ignore[method-assign]
    losses(host, model)
    assert inside == [True]


def test_a_teacher_that_is_not_finite_is_named(host: Host) -> None:
    model, teacher = wrapped(host), teacher_of(host)
    with torch.no_grad():
        fdr: Any = host.fdr(teacher)
        fdr.refine[-1][-1].bias.fill_(float("nan"))
    learn_from(model, teacher)
    if host.name.startswith("detrex"):  # which looks at the teacher's boxes itself
        with pytest.raises(AssertionError, match="Box tensor contains infinite or NaN"):
            losses(host, model)
        return
    with pytest.raises(NonFiniteError, match="corner logits of the teacher"):
        losses(host, model)


@pytest.mark.detrex
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_images_of_other_sizes_do_not_disturb_one_another(detrex_host: Host) -> None:
    """In evaluation most hosts of detrex do not mask what fills a batch up: each image is seen by itself."""
    host: Any = detrex_host
    model, teacher = wrapped(host).train(), teacher_of(host)
    learn_from(model, teacher)
    given = detrex_hosts.batched_inputs(images(), labels())
    wide = torch.cat([given[0]["image"]] * 2, -1)
    given[0] = {**given[0], "image": wide, "width": wide.shape[-1]}
    given[0]["instances"]._image_size = tuple(wide.shape[-2:])
    lessons: list[Any] = []
    kept = binding_of(model).teacher
    answer = kept._answer
    kept._answer = lambda *asked: lessons.append(answer(*asked)) or lessons[-1]
    model(given)
    with keep_records(teacher) as records, torch.no_grad():
        for one in given:
            teacher([one])
    for image, record in enumerate(records):
        torch.testing.assert_close(lessons[0].boxes[-1][image], record.boxes[-1][0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lessons[0].initial_boxes[image], record.initial_boxes[0], atol=1e-6, rtol=1e-6)


def test_what_cannot_teach_or_learn_is_told(transformers_host: Host) -> None:
    host: Any = transformers_host
    model, teacher = wrapped(host), teacher_of(host)
    with pytest.raises(WrapStateError, match="is not wrapped: model = wrap_decoder"):
        learn_from(build(host), teacher)
    with pytest.raises(WrapStateError, match="is not wrapped: its boxes come from no distributions"):
        learn_from(model, build(host))
    with pytest.raises(WrapStateError, match="a deployed model is for inference only"):
        learn_from(deploy(wrapped(host).eval()), teacher)
    with pytest.raises(WrapStateError, match="a deployed teacher keeps no record"):
        learn_from(model, deploy(teacher_of(host).eval()))
    with pytest.raises(ValueError, match="its own teacher"):
        learn_from(model, model)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
            learn_from(model, teacher, share)
    with pytest.raises(ValueError, match="fgl_weight is 0"):
        learn_from(wrap_decoder(build(host), host.config(fgl_weight=0.0)), teacher)
    with pytest.raises(UnsupportedModelError, match="takes a model, got the name 'teacher'"):
        learn_from(model, "teacher")  # type: ignore[arg-type]
    assert binding_of(model).teacher is None
    binding_of(model).adapter = object()  # one of before there were teachers
    with pytest.raises(UnsupportedModelError, match="has no without_truths"):
        learn_from(model, teacher)


def test_a_teacher_of_another_host_and_gradients_that_end_in_the_head(transformers_host: Host) -> None:
    """Whatever teaches: the settings that keep FGL's gradient in the head keep the teacher's part of it there."""
    host: Any = transformers_host
    of_texts = isinstance(host, TextHost)
    other = next(row for row in HOSTS if row.name != host.name and isinstance(row, TextHost) == of_texts)
    config = FDRConfig(**{**host.settings, "distribution_losses_train": "head"})
    model = wrap_decoder(build(host), config)
    randomise_fdr(host, model)
    learn_from(model, teacher_of(other))
    _, found = losses(host, model)
    loss: Any = sum(term for name, term in found.items() if "fgl" in name)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    reached = {name for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}
    assert reached
    assert all(".fdr." in name for name in reached)
