"""The life of a wrapped model, over every host: copies, checkpoints, precision, threads, and the way back."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfine_plugin import (
    SettingsMismatchError,
    UnsupportedModelError,
    WrapStateError,
    calibrate,
    deploy,
    is_wrapped,
    unwrap_decoder,
    wrap_decoder,
)
from dfine_plugin.registry import find_adapter

from .hosts import (
    NUM_LAYERS,
    Host,
    assert_equal,
    build,
    idle_parameters,
    images,
    labels,
    predict,
    randomise_fdr,
    skip_without_truths,
    train_step,
    wrapped,
)


def test_wrapping_is_in_place_and_keeps_the_hosts_parameter_names(host: Host) -> None:
    model = build(host)
    before = dict(model.named_parameters(remove_duplicate=False))
    result = wrap_decoder(model, host.config())
    assert result is model
    assert type(model) is type(build(host))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before.keys() & after.keys())
    retired = before.keys() - after.keys()
    assert bool(retired) != host.one_box_head
    assert all(host.retired_heads in name and f"{host.retired_heads}.0" not in name for name in retired)
    # a host without box refinement has no heads on its decoder: the wrapped one gets a second name for the first head
    gained = {name for name in after.keys() - before.keys() if not name.startswith(f"{host.decoder}.fdr.")}
    assert all(any(after[name] is p for p in before.values()) for name in gained)


def test_the_loss_dict_keeps_the_hosts_terms_and_gains_ours(host: Host) -> None:
    torch.manual_seed(0)
    theirs = host.losses(build(host).train(), images(), labels())[1]
    ours = host.losses(wrapped(host).train(), images(), labels())[1]
    assert theirs.keys() <= ours.keys()
    gained = ours.keys() - theirs.keys()
    for name in gained:
        # without what says the layer or the queries
        term = name.rpartition(".")[2].removeprefix("dn_").removesuffix("_one2many")
        assert term.startswith(("loss_fgl", "loss_ddf")) or term.endswith("_pre"), name
    assert {"loss_fgl", "loss_bbox_pre"} <= gained


def test_every_trainable_parameter_gets_a_gradient(host: Host) -> None:
    model = wrapped(host).train()
    host.loss(model, images(), labels()).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} <= idle_parameters(host)


@pytest.mark.parametrize("counts", [(0, 3), (0, 0)], ids=["an-empty-image", "an-empty-batch"])
def test_images_without_truths_give_finite_losses_and_all_gradients(host: Host, counts: tuple[int, ...]) -> None:
    skip_without_truths(host, counts)
    model = wrapped(host).train()
    loss, terms = host.losses(model, images(), labels(counts))
    assert all(term.isfinite() for term in terms.values())
    assert terms.keys() == host.losses(model, images(), labels())[1].keys() or "rt-detr" in host.name
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= idle_parameters(host)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_unwrap_gives_back_the_host_bit_for_bit(host: Host) -> None:
    baseline = build(host)
    model = wrap_decoder(copy.deepcopy(baseline), host.config())
    randomise_fdr(host, model)
    predict(host, model)
    assert is_wrapped(model)
    assert unwrap_decoder(model) is model
    assert not is_wrapped(model)
    assert_equal(host, model, baseline)
    assert list(model.state_dict()) == list(baseline.state_dict())
    if hasattr(model, "config"):
        assert model.config.to_dict() == baseline.config.to_dict()
    assert [type(m) for m in model.modules()] == [type(m) for m in baseline.modules()]
    for network in (model, baseline):
        network.train()
        torch.manual_seed(4)
        network.loss = host.loss(network, images(), labels())
        network.loss.backward()
    assert torch.equal(model.loss, baseline.loss)
    for (name, p), q in zip(model.named_parameters(), baseline.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_unwrap_after_training_keeps_the_shared_weights(host: Host) -> None:
    model = wrapped(host)
    train_step(host, model)
    trained = {name: p.clone() for name, p in model.named_parameters() if ".fdr." not in name}
    unwrap_decoder(model)
    for name, p in model.named_parameters():
        if name in trained:
            assert torch.equal(p, trained[name]), name
    wrap_decoder(model, host.config())
    train_step(host, model)


def test_wrapping_twice_and_unwrapping_a_bare_host_are_refused_and_change_nothing(host: Host) -> None:
    model = wrapped(host)
    expected = predict(host, model)
    with pytest.raises(WrapStateError, match="wrapped already"):
        wrap_decoder(model, host.config())
    assert all(torch.equal(a, b) for a, b in zip(predict(host, model), expected, strict=True))
    bare = build(host)
    with pytest.raises(WrapStateError, match="not wrapped"):
        unwrap_decoder(bare)
    with pytest.raises(WrapStateError, match="takes a wrapped model"):
        deploy(bare)


def test_deepcopy_after_a_training_step_lives_its_own_life(host: Host) -> None:
    model = wrapped(host)
    train_step(host, model)
    twin = copy.deepcopy(model)
    assert_equal(host, model, twin)
    before = predict(host, twin)
    assert train_step(host, model) == train_step(host, twin)
    assert_equal(host, model, twin)
    train_step(host, model)
    after = predict(host, twin)
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(predict(host, model)[1], after[1])
    assert_equal(host, unwrap_decoder(copy.deepcopy(twin)), unwrap_decoder(twin))


def test_a_copy_taken_with_a_graph_at_hand(host: Host) -> None:
    model = wrapped(host).train()
    loss = host.loss(model, images(), labels())
    twin = copy.deepcopy(model)  # graph tensors on a module would fail here
    loss.backward()
    assert torch.isfinite(host.loss(twin, images(), labels()))


def test_pickle_round_trip(host: Host) -> None:
    try:
        pickle.dumps(build(host))
    except (pickle.PicklingError, AttributeError) as error:
        pytest.skip(f"the bare host cannot be pickled: {error}")
    model = wrapped(host)
    train_step(host, model)
    twin = pickle.loads(pickle.dumps(model))
    assert_equal(host, model, twin)
    assert train_step(host, model) == train_step(host, twin)


def test_ema_copy_follows_the_weights_not_the_original(host: Host) -> None:
    model = wrapped(host)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(host, model, rate=1e-2)
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, (start[name] + dict(model.named_parameters())[name]) / 2)
    average.eval()
    expected = wrapped(host)
    expected.load_state_dict(average.module.state_dict())
    assert_equal(host, average.module, expected.eval())


def test_two_threads_do_not_disturb_each_other(host: Host) -> None:
    in_training = host.name.startswith(("detrex", "mmdet"))  # which have no losses in evaluation
    if in_training and ("-dn-" in host.name or host.dino or host.name == "detrex-deta"):
        pytest.skip(f"{host} trains on random denoising queries or pairs, drawn from one generator for all threads")
    models = [wrapped(host, seed).train(in_training) for seed in (0, 1)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # the steps must not move its averages
    batches = [images(seed=20), images(seed=21)]
    truths = [labels(seed=30), labels((4, 1), seed=31)]

    def losses(index: int) -> list[float]:
        with torch.no_grad():
            return [float(host.loss(models[index], batches[index], truths[index])) for _ in range(5)]

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
        expected = [host.predict(model, batch)[1] for batch in batches]
    wrong: list[int] = []

    def check(index: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(host.predict(model, batches[index])[1], expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=check, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_state_dict_loads_bit_for_bit(host: Host, tmp_path: Path) -> None:
    model = wrapped(host)
    train_step(host, model)
    torch.save(model.state_dict(), tmp_path / "wrapped.pt")
    other = wrap_decoder(build(host, seed=9), host.config())
    other.load_state_dict(torch.load(tmp_path / "wrapped.pt"))
    assert_equal(host, model, other)


OTHER_SETTINGS = [
    ({"residual_scale": 8.0}, r"residual_scale 1\.0 \(this model: 8\.0\)"),
    (
        {"a": 0.3, "weighting": "uniform"},
        r"a 0\.5 \(this model: 0\.3\), weighting 'nonuniform' \(this model: 'uniform'\)",
    ),
    ({"c": 0.2}, r"c 0\.25 \(this model: 0\.2\)"),
    ({"num_bins": 16}, r"num_bins 32 \(this model: 16\)"),
    ({"lqe": False}, r"lqe True \(this model: False\)"),
]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_a_state_dict_of_other_settings_is_refused_by_name(host: Host, strict: bool) -> None:
    weights = wrapped(host).state_dict()
    for settings, message in OTHER_SETTINGS:
        other = wrap_decoder(build(host), host.config(**settings))
        with pytest.raises(SettingsMismatchError, match=message):
            other.load_state_dict(weights, strict=strict)
    wrap_decoder(build(host), host.config(temperature=3.0, union=False)).load_state_dict(weights)


def test_deployed_and_wrapped_state_dicts_are_not_mistaken_for_one_another(host: Host) -> None:
    def scaled() -> nn.Module:
        return wrap_decoder(build(host), host.config(residual_scale=8.0))

    deployed = deploy(scaled())
    with pytest.raises(SettingsMismatchError, match=r"residual_scale 8\.0 \(this model: 1\.0\)"):
        deployed.load_state_dict(scaled().state_dict(), strict=False)
    with pytest.raises(SettingsMismatchError, match=r"residual_scale 1\.0 \(this model: 8\.0\)"):
        scaled().load_state_dict(deployed.state_dict(), strict=False)
    other = deploy(scaled())
    randomise_fdr(host, other)
    other.load_state_dict(deployed.state_dict())
    assert_equal(host, deployed, other)


def test_a_state_dict_of_version_0_1_0_loads(host: Host) -> None:
    model = wrapped(host)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    assert len(weights) == len(model.state_dict()) - 1
    other = wrap_decoder(build(host, seed=9), host.config())
    other.load_state_dict(weights)
    assert_equal(host, model, other)


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
    assert_equal(host, model, expected)
    assert_equal(host, unwrap_decoder(model), baseline)


def test_a_baseline_state_dict_without_its_later_box_heads_says_so(host: Host) -> None:
    """As a loader hands it over that keeps only what the wrapped model has by the same name."""
    if host.settings or host.one_box_head or host.name == "grounding-dino":
        pytest.skip("the host's later box heads are its first one")
    model = wrap_decoder(build(host, seed=9), host.config())
    kept = {name: tensor for name, tensor in build(host).state_dict().items() if name in model.state_dict()}
    model.load_state_dict(kept, strict=False)
    with pytest.raises(WrapStateError, match="holds none of the box heads"):
        calibrate(model, [host.pixels(images())])
    with pytest.warns(UserWarning, match="of no use before these heads are trained"):
        unwrap_decoder(model)


def test_without_auxiliary_losses(host: Host) -> None:
    if host.name == "detrex-h-deformable-detr":
        pytest.skip("the bare host cannot do it: its one-to-many branch reads auxiliary outputs")
    model = build(host)
    host.without_auxiliary_losses(model)
    wrap_decoder(model, host.config()).train()
    randomise_fdr(host, model)
    loss, terms = host.losses(model, images(), labels())
    assert {"loss_fgl", "loss_bbox_pre"} <= terms.keys()
    assert not any(name.startswith("loss_ddf") for name in terms)
    loss.backward()
    # DistributedDataParallel waits for all of them, the quality estimates of layers without a loss included
    assert [name for name, p in host.fdr(model).named_parameters() if p.grad is None] == []


def test_deploy_changes_no_output(host: Host) -> None:
    model = wrapped(host)
    expected = predict(host, model)
    with pytest.raises(WrapStateError, match=r"model.eval\(\)"):
        deploy(model.train())
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    assert deploy(model) is model
    for found, wanted in zip(predict(host, model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert sum(p.numel() for p in model.parameters()) <= parameters
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(WrapStateError, match="for inference only"):
        host.loss(model.train(), images(), labels())
    with pytest.raises(WrapStateError, match="deployed"):
        unwrap_decoder(model)
    with pytest.raises(WrapStateError, match="deployed already"):
        deploy(model)


@pytest.mark.parametrize("num_layers", range(1, NUM_LAYERS + 1))
@torch.no_grad()
def test_deployed_with_fewer_layers_a_model_predicts_what_its_last_one_did(host: Host, num_layers: int) -> None:
    model = wrapped(host)
    wanted = host.predict_layers(model, images())[num_layers - 1]
    parameters = sum(p.numel() for p in model.parameters())
    assert deploy(model, num_layers) is model
    found = find_adapter(model).detector(model)(host.pixels(images()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    layers = model.get_submodule(host.decoder).layers
    assert len(layers) == num_layers
    gone = (NUM_LAYERS - num_layers) * sum(p.numel() for p in layers[0].parameters())
    assert sum(p.numel() for p in model.parameters()) <= parameters - gone
    predict(host, model)


@torch.no_grad()
def test_a_bare_hosts_first_layers_predict_what_they_did(host: Host) -> None:
    model = build(host)
    if host.name == "conditional-detr":
        with pytest.raises(ValueError, match="norms the states of its last layer twice"):
            find_adapter(model).keep_layers(model, 1)
        pytest.skip("the bare host's layers predict otherwise where they are the last")
    wanted = host.predict_layers(model, images())[0]
    find_adapter(model).keep_layers(model, 1)
    found = find_adapter(model).detector(model)(host.pixels(images()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", [0, -1, NUM_LAYERS + 1, 2.0, "2"])
def test_deploy_refuses_layers_that_the_model_has_not_and_changes_nothing(host: Host, num_layers: Any) -> None:
    model = wrapped(host)
    expected = predict(host, model)
    with pytest.raises(ValueError, match=r"num_layers must be in \[1, 3\], the decoder's layers; got"):
        deploy(model, num_layers)
    assert all(torch.equal(a, b) for a, b in zip(predict(host, model), expected, strict=True))
    unwrap_decoder(model)


def test_initial_boxes_of_a_later_layer(host: Host) -> None:
    """Only where no layer attends by another one's boxes; then in everything that a model does."""
    bare = build(host)
    if not host.fixed_references:
        with pytest.raises(
            UnsupportedModelError, match=r"initial boxes have to come of the first layer, and not of layer 2"
        ):
            wrap_decoder(bare, host.config(initial_layer=2))
        assert not is_wrapped(bare)
        return
    with pytest.raises(UnsupportedModelError, match=rf"has {NUM_LAYERS} decoder layers, and no layer {NUM_LAYERS + 1}"):
        wrap_decoder(bare, host.config(initial_layer=NUM_LAYERS + 1))
    best = 2 if "conditional" in host.name or "group" in host.name else 1
    assert host.fdr(wrap_decoder(build(host))).initial_layer == best
    own = host.predict_layers(bare.eval(), images())[1][1]
    model = wrap_decoder(bare, host.config(initial_layer=2)).eval()
    with torch.no_grad():
        for _, boxes in host.predict_layers(model, images()):  # a fresh head changes nothing
            torch.testing.assert_close(boxes, own, atol=1e-5, rtol=1e-5)
    randomise_fdr(host, model)
    expected = predict(host, model)
    twin = wrap_decoder(build(host), host.config(initial_layer=2)).eval()
    twin.load_state_dict(model.state_dict())
    assert_equal(host, twin, model)
    first = wrap_decoder(build(host), host.config()).eval()
    for one, other in ((first, model), (model, first)):
        with pytest.raises(SettingsMismatchError, match=r"initial_layer [12] \(this model: [12]\)"):
            one.load_state_dict(copy.deepcopy(other).state_dict())
    with pytest.raises(ValueError, match=r"decoder layer 2 \(initial_layer\), which is not among the first 1"):
        deploy(model, 1)
    assert_equal(host, twin, model)
    with torch.no_grad():
        wanted = host.predict_layers(model, images())[1]
        shorter = find_adapter(deploy(twin, 2)).detector(twin)(host.pixels(images()))
    for found, those in ((predict(host, deploy(model)), expected), (shorter, wanted)):
        for one, other in zip(found, those, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [lambda model: model, deploy], ids=["wrapped", "deployed"])
def test_dynamic_quantization_runs(host: Host, change: Any) -> None:
    model = change(wrapped(host))
    try:
        predict(host, quantize_dynamic(build(host), {nn.Linear}))
    except (RuntimeError, AttributeError, TypeError) as error:
        pytest.skip(f"the bare host cannot: {error}")
    quantized = quantize_dynamic(model, {nn.Linear})
    first = host.fdr(quantized).refine[0][0]
    assert not isinstance(first, nn.Linear)
    hidden = torch.randn(2, 12, first.in_features, generator=torch.Generator().manual_seed(0))
    state, wanted = (host.fdr(m)(0, hidden, host.fdr(m).start(torch.full((2, 12, 4), 0.5))) for m in (quantized, model))
    assert (wanted.boxes - 0.5).abs().max() > 0.2
    torch.testing.assert_close(state.boxes, wanted.boxes, atol=0.05, rtol=0)
    last = len(host.fdr(model).quality) - 1
    found, expected = (host.fdr(m).quality_logits(last, wanted.probabilities) for m in (quantized, model))
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    assert all(tensor.isfinite().all() for tensor in predict(host, quantized))


def test_the_plugin_adds_few_parameters_and_no_persistent_buffer(host: Host) -> None:
    baseline, model = build(host), wrapped(host)
    assert dict(model.named_buffers()).keys() - dict(baseline.named_buffers()).keys() == {f"{host.decoder}.fdr.weights"}
    assert not any("weights" in key for key in model.state_dict() if ".fdr." in key)


def test_baseline_and_retired_weights_follow_a_move_of_the_model(host: Host) -> None:
    baseline = build(host)
    model = wrap_decoder(copy.deepcopy(baseline), host.config()).double()
    unwrap_decoder(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.float()
    assert_equal(host, model, baseline)
