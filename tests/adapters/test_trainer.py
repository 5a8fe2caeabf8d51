"""transformers' Trainer, with wrapped models: what it saves it restores, to the last tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from dfine_plugin import load_pretrained, wrap_decoder

from .hosts import build, images, labels, wrapped
from .transformers_hosts import TransformersHost


@pytest.fixture
def host(transformers_host: TransformersHost) -> TransformersHost:
    return transformers_host


class Weights(TrainerCallback):
    """Keeps the model's tensors as training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.restored = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trainer(host: TransformersHost, model: PreTrainedModel, folder: Path, **settings: Any) -> Trainer:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        return {**host.inputs(pixels), "labels": [sample["labels"] for sample in samples]}

    samples = [{"pixel_values": x, "labels": y} for x, y in zip(images(8), labels((2, 3) * 4), strict=True)]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        **{"save_steps": 1, **settings},
    )
    return Trainer(model, arguments, train_dataset=samples, eval_dataset=samples[:2], data_collator=collate)


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("in_shards", [False, True], ids=["one-file", "shards"])
def test_resuming_restores_every_tensor(host: TransformersHost, in_shards: bool, tmp_path: Path) -> None:
    first = wrapped(host)
    trainer(host, first, tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    if in_shards:
        (checkpoint / "model.safetensors").unlink()
        size = sum(parameter.nbytes for parameter in first.parameters())
        first.save_pretrained(checkpoint, max_shard_size=size // 4)
        assert len(list(checkpoint.glob("*.safetensors"))) > 2
    second = trainer(host, wrap_decoder(build(host, seed=9), host.config()), tmp_path, max_steps=3)
    weights = Weights()
    second.add_callback(weights)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert differing(weights.restored, first.state_dict()) == []
    assert differing(load_pretrained(checkpoint).state_dict(), first.state_dict()) == []


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(host: TransformersHost, tmp_path: Path) -> None:
    whole = wrapped(host)
    trainer(host, whole, tmp_path, max_steps=3).train()
    resumed = trainer(host, wrap_decoder(build(host, seed=9), host.config()), tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert differing(resumed.model.state_dict(), whole.state_dict()) == []


def test_the_best_model_at_the_end_is_the_best_one_to_the_last_tensor(host: TransformersHost, tmp_path: Path) -> None:
    model = wrapped(host)
    run = trainer(
        host,
        model,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_step",
        greater_is_better=False,
    )
    run.evaluate = lambda **_: {"eval_step": run.state.global_step}  # the first is the best
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert differing(model.state_dict(), load_pretrained(tmp_path / "checkpoint-1").state_dict()) == []
    assert differing(model.state_dict(), load_pretrained(tmp_path / "checkpoint-3").state_dict()) != []
