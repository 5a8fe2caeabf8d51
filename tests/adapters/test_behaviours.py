"""The life of a wrapped model, over every host: copies, checkpoints, precision, threads, and the way back."""

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from dfine_plugin import UnsupportedModelError, WrapStateError, deploy, unwrap_decoder, wrap_decoder
from dfine_plugin.adapters.transformers_common import load_pretrained

from .hosts import Host, build, images, labels, randomise_fdr


def wrapped(host: Host, seed: int = 0) -> PreTrainedModel:
    """A wrapped host whose FDR head has left its zeros."""
    model = wrap_decoder(build(host, seed), host.config())
    randomise_fdr(model)
    return model


def train_step(model: PreTrainedModel, rate: float = 1e-3) -> float:
    model.train()
    torch.manual_seed(11)
    loss = model(images(), labels=labels()).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad / parameter.grad.norm().clamp(min=1)
                parameter.grad = None
    model.eval()
    return loss.item()


@torch.no_grad()
def predict(model: nn.Module) -> tuple[Tensor, Tensor]:
    outputs = model(images())
    return outputs.logits, outputs.pred_boxes


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(predict(first), predict(second), strict=True):
        assert torch.equal(a, b)


def test_wrapping_is_in_place_and_keeps_the_hosts_parameter_names(host: Host) -> None:
    model = build(host)
    before = dict(model.named_parameters(remove_duplicate=False))
    result = wrap_decoder(model, host.config())
    assert result is model
    assert type(model) is type(build(host))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before.keys() & after.keys())
    retired = before.keys() - after.keys()
    assert retired
    assert all("bbox_embed" in name and "bbox_embed.0" not in name for name in retired)
    # a host without box refinement has no heads on its decoder: the wrapped one gets a second name for the first head
    gained = {name for name in after.keys() - before.keys() if not name.startswith("model.decoder.fdr.")}
    assert all(any(after[name] is p for p in before.values()) for name in gained)


def test_a_fresh_wrap_reports_the_hosts_first_boxes(host: Host) -> None:
    baseline = build(host)
    model = wrap_decoder(copy.deepcopy(baseline), host.config())
    first = wrap_decoder(copy.deepcopy(baseline), host.config())
    randomise_fdr(first)
    boxes = predict(model)[1]
    assert not torch.allclose(boxes, predict(first)[1])  # the head does act once it is off its zeros
    given = {}
    baseline.model.decoder.layers[0].register_forward_hook(lambda m, a, out: given.setdefault("hidden", out))
    baseline.model.decoder.register_forward_pre_hook(
        lambda m, a, kwargs: given.update(reference=kwargs["reference_points"]), with_kwargs=True
    )
    predict(baseline)
    heads = baseline.model.decoder.bbox_embed
    head = (baseline.bbox_embed if heads is None else heads)[0]
    reference = given["reference"] if host.name.startswith("rt-detr") else torch.logit(given["reference"], eps=1e-5)
    delta = head(given["hidden"])
    delta[..., : reference.shape[-1]] += reference
    torch.testing.assert_close(boxes, delta.sigmoid(), atol=1e-5, rtol=0)


def test_outputs_have_the_hosts_fields_and_shapes(host: Host) -> None:
    baseline, model = build(host), wrapped(host)
    for arguments in ({}, {"labels": labels()}, {"output_hidden_states": True, "output_attentions": True}):
        with torch.no_grad():
            theirs, ours = baseline(images(), **arguments), model(images(), **arguments)
        assert list(theirs.keys()) == list(ours.keys())
        for key, value in theirs.items():
            if host.name == "deformable-detr-plain" and key == "intermediate_reference_points":
                continue  # refining, it has boxes where the bare host repeats its 2-d references
            if isinstance(value, Tensor):
                assert ours[key].shape == value.shape, key
                assert ours[key].dtype == value.dtype, key
            elif isinstance(value, tuple):
                assert [v.shape for v in ours[key]] == [v.shape for v in value], key
    assert isinstance(model(images(), return_dict=False), tuple)


def test_the_loss_dict_keeps_the_hosts_terms_and_gains_ours(host: Host) -> None:
    torch.manual_seed(0)
    theirs = build(host).train()(images(), labels=labels()).loss_dict
    ours = wrapped(host).train()(images(), labels=labels()).loss_dict
    assert theirs.keys() <= ours.keys()
    gained = ours.keys() - theirs.keys()
    assert all(name.startswith(("loss_fgl", "loss_ddf")) or name.endswith("_pre") for name in gained)
    assert {"loss_fgl", "loss_bbox_pre"} <= gained


def test_every_trainable_parameter_gets_a_gradient(host: Host) -> None:
    baseline, model = build(host).train(), wrapped(host).train()
    baseline(images(), labels=labels()).loss.backward()
    idle = {name for name, p in baseline.named_parameters() if p.requires_grad and p.grad is None}
    model(images(), labels=labels()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} <= idle


@pytest.mark.parametrize("counts", [(0, 3), (0, 0)], ids=["an-empty-image", "an-empty-batch"])
def test_images_without_truths_give_finite_losses_and_all_gradients(host: Host, counts: tuple[int, ...]) -> None:
    baseline, model = build(host).train(), wrapped(host).train()
    baseline(images(), labels=labels()).loss.backward()
    idle = {name for name, p in baseline.named_parameters() if p.requires_grad and p.grad is None}
    outputs = model(images(), labels=labels(counts))
    assert all(term.isfinite() for term in outputs.loss_dict.values())
    outputs.loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= idle
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_unwrap_gives_back_the_host_bit_for_bit(host: Host) -> None:
    baseline = build(host)
    model = wrap_decoder(copy.deepcopy(baseline), host.config())
    randomise_fdr(model)
    predict(model)
    assert unwrap_decoder(model) is model
    assert_equal(model, baseline)
    assert list(model.state_dict()) == list(baseline.state_dict())
    assert model.config.to_dict() == baseline.config.to_dict()
    assert [type(m) for m in model.modules()] == [type(m) for m in baseline.modules()]
    for network in (model, baseline):
        network.train()
        torch.manual_seed(4)
        network.loss = network(images(), labels=labels()).loss
        network.loss.backward()
    assert torch.equal(model.loss, baseline.loss)
    for (name, p), q in zip(model.named_parameters(), baseline.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_unwrap_after_training_keeps_the_shared_weights(host: Host) -> None:
    model = wrapped(host)
    train_step(model)
    trained = {name: p.clone() for name, p in model.named_parameters() if ".fdr." not in name}
    unwrap_decoder(model)
    for name, p in model.named_parameters():
        if name in trained:
            assert torch.equal(p, trained[name]), name
    wrap_decoder(model, host.config())
    train_step(model)


def test_wrapping_twice_and_unwrapping_a_bare_host_are_refused_and_change_nothing(host: Host) -> None:
    model = wrapped(host)
    expected = predict(model)
    with pytest.raises(WrapStateError, match="wrapped already"):
        wrap_decoder(model, host.config())
    assert all(torch.equal(a, b) for a, b in zip(predict(model), expected, strict=True))
    bare = build(host)
    with pytest.raises(WrapStateError, match="not wrapped"):
        unwrap_decoder(bare)
    with pytest.raises(WrapStateError, match="takes a wrapped model"):
        deploy(bare)


def test_deepcopy_after_a_training_step_lives_its_own_life(host: Host) -> None:
    model = wrapped(host)
    train_step(model)
    twin = copy.deepcopy(model)
    assert_equal(model, twin)
    before = predict(twin)
    assert train_step(model) == train_step(twin)
    assert_equal(model, twin)
    train_step(model)
    after = predict(twin)
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(predict(model)[1], after[1])
    assert_equal(unwrap_decoder(copy.deepcopy(twin)), unwrap_decoder(twin))


def test_a_copy_taken_with_a_graph_at_hand(host: Host) -> None:
    model = wrapped(host).train()
    outputs = model(images(), labels=labels())
    twin = copy.deepcopy(model)  # graph tensors on a module would fail here
    outputs.loss.backward()
    assert torch.isfinite(twin(images(), labels=labels()).loss)


def test_pickle_round_trip(host: Host) -> None:
    model = wrapped(host)
    train_step(model)
    twin = pickle.loads(pickle.dumps(model))
    assert_equal(model, twin)
    assert train_step(model) == train_step(twin)


def test_ema_copy_follows_the_weights_not_the_original(host: Host) -> None:
    model = wrapped(host)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, rate=1e-2)
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, (start[name] + dict(model.named_parameters())[name]) / 2)
    average.eval()
    expected = wrapped(host)
    expected.load_state_dict(average.module.state_dict())
    assert_equal(average.module, expected.eval())


def test_two_threads_do_not_disturb_each_other(host: Host) -> None:
    models = [wrapped(host, seed).eval() for seed in (0, 1)]
    batches = [images(seed=20), images(seed=21)]
    truths = [labels(seed=30), labels((4, 1), seed=31)]

    def losses(index: int) -> list[float]:
        with torch.no_grad():
            return [float(models[index](batches[index], labels=truths[index]).loss) for _ in range(10)]

    expected = [losses(0), losses(1)]
    found: dict[int, list[float]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: losses(i)})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected


def test_one_model_in_two_threads(host: Host) -> None:
    model = wrapped(host).eval()
    batches = [images(seed=20), images(seed=21)]
    with torch.no_grad():
        expected = [model(batch).pred_boxes for batch in batches]
    wrong: list[int] = []

    def check(index: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(model(batches[index]).pred_boxes, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=check, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_state_dict_loads_bit_for_bit(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    train_step(model)
    torch.save(model.state_dict(), tmp_path / "wrapped.pt")
    other = wrap_decoder(build(host, seed=9), host.config())
    other.load_state_dict(torch.load(tmp_path / "wrapped.pt"))
    assert_equal(model, other)


def test_a_baseline_state_dict_seeds_a_wrapped_model(host: Host) -> None:
    baseline = build(host)
    expected = wrap_decoder(copy.deepcopy(baseline), host.config())
    model = wrap_decoder(build(host, seed=9), host.config())
    parameters = dict(model.named_parameters())
    model.load_state_dict(baseline.state_dict())
    assert all(parameters[name] is p for name, p in model.named_parameters())  # an optimizer's view of them holds
    for name, p in expected.named_parameters():
        if ".fdr." not in name:
            assert torch.equal(parameters[name], p), name
    assert_equal(model, expected)
    assert_equal(unwrap_decoder(model), baseline)


def test_save_pretrained_and_load(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    train_step(model)
    model.save_pretrained(tmp_path / "one")
    loaded = load_pretrained(tmp_path / "one")
    assert type(loaded) is type(model)
    assert_equal(model, loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_equal(model, load_pretrained(tmp_path / "shards"))
    assert train_step(model) == train_step(loaded)
    unwrap_decoder(loaded)


def test_the_hosts_own_from_pretrained_cannot_pass_for_a_wrapped_model(host: Host, tmp_path: Path) -> None:
    wrapped(host).save_pretrained(tmp_path)
    bare = type(build(host)).from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="load_pretrained"):
        wrap_decoder(bare, host.config())
    build(host).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no wrapped model"):
        load_pretrained(tmp_path)


def test_ties_survive_wrapping(host: Host) -> None:
    model = wrapped(host)
    expected = predict(model)
    model.tie_weights()
    assert all(torch.equal(a, b) for a, b in zip(predict(model), expected, strict=True))


def test_hosts_of_one_config_object_stay_apart(host: Host) -> None:
    config = build(host).config
    first, second = type(build(host))(config), type(build(host))(config)
    wrap_decoder(first, host.config())
    assert not hasattr(config, "dfine_plugin")
    wrap_decoder(second, host.config())
    first.config.num_labels = 7
    assert first.model.config.num_labels == 7
    assert second.config.num_labels != 7


def test_bf16_autocast_keeps_boxes_in_float32(host: Host) -> None:
    model = wrapped(host).train()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images(), labels=labels())
    assert outputs.pred_boxes.dtype == torch.float32
    assert torch.isfinite(outputs.loss)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # boxes off the bfloat16 grid: nothing rounded them on the way
    assert not torch.equal(outputs.pred_boxes, outputs.pred_boxes.bfloat16().float())


def test_a_model_in_half_precision_keeps_its_bins(host: Host) -> None:
    try:
        with torch.no_grad():
            build(host).bfloat16()(images().bfloat16())
    except RuntimeError as error:
        pytest.skip(f"the bare host cannot do it with this torch: {error}")
    model = wrapped(host)
    expected = predict(model)
    model.bfloat16()
    assert model.model.decoder.fdr.weights.dtype == torch.float32
    with torch.no_grad():
        outputs = model(images().bfloat16())
    assert outputs.pred_boxes.dtype == torch.float32
    assert outputs.pred_boxes.isfinite().all()
    assert outputs.pred_boxes.shape == expected[1].shape


def test_gradient_checkpointing_changes_nothing(host: Host) -> None:
    if not host.checkpointing:
        pytest.skip(f"{host} has no gradient checkpointing")
    model = wrapped(host).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        loss = model(images(), labels=labels()).loss
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_without_auxiliary_losses(host: Host) -> None:
    model = build(host)
    model.config.auxiliary_loss = False
    wrap_decoder(model, host.config()).train()
    randomise_fdr(model)
    outputs = model(images(), labels=labels())
    assert {"loss_fgl", "loss_bbox_pre"} <= outputs.loss_dict.keys()
    assert not any(name.startswith("loss_ddf") for name in outputs.loss_dict)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.model.decoder.fdr.refine.parameters())


def test_deploy_changes_no_output(host: Host) -> None:
    model = wrapped(host)
    expected = predict(model)
    with pytest.raises(WrapStateError, match=r"model.eval\(\)"):
        deploy(model.train())
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    assert deploy(model) is model
    for found, wanted in zip(predict(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in model.parameters()) <= parameters
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(WrapStateError, match="without labels"):
        model(images(), labels=labels())
    with pytest.raises(WrapStateError, match="deployed"):
        unwrap_decoder(model)
    with pytest.raises(WrapStateError, match="deployed already"):
        deploy(model)


def test_the_plugin_adds_few_parameters_and_no_persistent_buffer(host: Host) -> None:
    baseline, model = build(host), wrapped(host)
    assert dict(model.named_buffers()).keys() - dict(baseline.named_buffers()).keys() == {"model.decoder.fdr.weights"}
    assert not any("weights" in key for key in model.state_dict() if ".fdr." in key)


def test_baseline_and_retired_weights_follow_a_move_of_the_model(host: Host) -> None:
    baseline = build(host)
    model = wrap_decoder(copy.deepcopy(baseline), host.config()).double()
    unwrap_decoder(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.float()
    assert_equal(model, baseline)
