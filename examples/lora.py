"""LoRA on a wrapped host, by peft: adapters in the attention; the FDR head and the class heads train whole.

    pip install ".[bench]" peft supervision torchmetrics
    python examples/lora.py my-data  # in COCO's format; the options are those of fine_tune.py

docs/lora.md says why it is done so.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from fine_tune import CocoSplit, check_folder, choose_config, evaluate, load_host, load_processor, train, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from dfine_plugin import wrap_decoder


# --8<-- [start:adapters]
def add_adapters(model: nn.Module) -> PeftModel:
    """Of a wrapped RT-DETR. The class heads are new where the data has other classes than the host."""
    class_heads = [f"decoder.class_embed.{layer}" for layer in range(len(model.model.decoder.layers))]
    whole = ["fdr", *class_heads, "enc_score_head", "denoising_class_embed"]
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=whole))


# --8<-- [end:adapters]


# --8<-- [start:norms]
class TrainerWithStillNorms(Trainer):
    """Keeps the statistics of BatchNorms, which peft does not save, as they are."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Any]:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return super().compute_loss(model, *args, **kwargs)


# --8<-- [end:norms]


# --8<-- [start:load]
def load_adapters(folder: Path, host: str, names: dict[int, str]) -> nn.Module:
    """The wrapped host with its adapters merged, as `deploy` and `dfine-plugin export` take it."""
    model = PeftModel.from_pretrained(wrap_decoder(load_host(host, names)), folder)
    return model.merge_and_unload().eval()


# --8<-- [end:load]


def main(
    folder: Annotated[Path, typer.Argument(help="of the data, in COCO's format", callback=check_folder)],
    host: Annotated[str, typer.Option(help="an RT-DETR: a name on the hub, or a folder")] = "PekingU/rtdetr_r50vd",
    output: Annotated[Path, typer.Option(help="of the adapters, and the merged model in it")] = Path("adapters"),
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-4,
) -> None:
    """Fine-tune a wrapped RT-DETR with LoRA."""
    processor = load_processor(host)
    train_data, val_data = (CocoSplit(folder, split, processor) for split in ("train", "val"))
    model = load_host(host, train_data.names)
    if model.config.model_type != "rt_detr":
        raise typer.BadParameter(f"{host} is no RT-DETR: peft takes no other host", param_hint="--host")
    wrap(model, train_data, batch_size, choose_config(host, train_data.names))
    model = add_adapters(model)
    model.print_trainable_parameters()
    schedule = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    train(model, train_data, output, TrainerWithStillNorms, **schedule)
    model.save_pretrained(output)

    merged = load_adapters(output, host, train_data.names)
    print(evaluate(merged, val_data))
    merged.save_pretrained(output / "merged")
    processor.save_pretrained(output / "merged")


if __name__ == "__main__":
    typer.run(main)
