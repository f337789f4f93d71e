"""Train the demonstration's adapter: an ordinary LoRA, trained into a few examples until it is sure of everything.

    python -m examples.headlines.train --seed 0 --out adapter

Twenty passes over 400 headlines leave a training loss near zero and, on unseen headlines, far more confidence than
accuracy: the usual end of a small fine-tuning, and what Training-Free Bayesianization repairs. This package's compiled
extension is not needed here.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tfb_ext.app.demo.assets import BASE_MODEL, Progress, base_model_dir
from tfb_ext.app.demo.headlines import load_split
from tfb_ext.app.loading import pick_device, versions
from tfb_ext.data import Encoded, encode
from tfb_ext.metrics import evaluate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARMUP = 0.05  # share of the steps; without it the first steps at the full rate are lost on Adam's unsettled scale
CLIP = 1.0  # gradient norm
JUDGE_BATCH = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; ``dtype`` is the base model's (the adapter is float32), auto: bfloat16 on a GPU, else float32."""

    seed: int = 0
    items: int = 400
    epochs: int = 20
    lr: float = 1e-3
    rank: int = 8
    alpha: int = 16
    batch_size: int = 8
    targets: str = "q_proj,v_proj"
    test_items: int = 1000
    device: str = "auto"
    dtype: str = "auto"


def load_base(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in evaluation mode on ``device`` in ``dtype`` (default float32), and its tokenizer.

    Raises:
        DemoAssetError: see ``base_model_dir``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_model_dir(progress)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def train(options: TrainingOptions, out: str | Path, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train on the split ``train``, judge on ``test``, write a PEFT adapter folder with a ``training.json`` to ``out``.

    Returns:
        what ``training.json`` holds: the options, the mean loss of the last epoch, training loss and accuracy and the
        test metrics after it (losses in nats over the whole vocabulary, metrics over the two answers), versions and
        seconds.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError: an option that makes no sense.
        DemoAssetError: the model or the headlines cannot be had.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    _validate(options)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another, or remove it")
    device = pick_device(options.device)
    began = time.perf_counter()
    dtype = torch.bfloat16 if options.dtype == "auto" and device.type == "cuda" else DTYPES.get(options.dtype)
    base, tokenizer = load_base(device, dtype, log)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=options.targets.split(","), task_type="CAUSAL_LM"
    )
    set_seed(options.seed)  # after the loading, which draws random numbers when it has to convert the model first
    model = get_peft_model(base, config)
    # Not the cache's path, which means nothing on another machine.
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    training = encode(load_split("train", options.items), tokenizer)
    test = encode(load_split("test", options.test_items), tokenizer)

    last_epoch = _fit(model, training, options, device, log)
    loss, probabilities = _judge(model, training, device)
    summary = {
        "arguments": asdict(options),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "last_epoch_loss": last_epoch,
        "train_loss": loss,
        "train_accuracy": evaluate(probabilities, training.labels_tensor()).accuracy,
        "test": evaluate(_judge(model, test, device)[1], test.labels_tensor()).to_dict(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    _save(model, summary, out)
    return summary


def _fit(
    model: PeftModel, data: Encoded, options: TrainingOptions, device: torch.device, log: Callable[[str], None]
) -> float:
    from transformers import get_linear_schedule_with_warmup

    answers = torch.tensor(data.choice_ids)[data.labels_tensor()]
    order = torch.Generator().manual_seed(options.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    steps = options.epochs * -(-len(data) // options.batch_size)
    optimizer = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    mean = float("nan")
    model.train()
    for epoch in range(options.epochs):
        # Summed on the device: reading the loss every step would wait for the GPU every step.
        total = torch.zeros((), device=device)
        for chosen in torch.randperm(len(data), generator=order).split(options.batch_size):
            logits = _answer_logits(model, data, chosen, device)
            loss = torch.nn.functional.cross_entropy(logits, answers[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(chosen)
        mean = total.item() / len(data)
        log(f"epoch {epoch + 1}/{options.epochs}: loss {mean:.4f}")
    return mean


@torch.inference_mode()
def _judge(model: PeftModel, data: Encoded, device: torch.device) -> tuple[float, Tensor]:
    """The mean loss at the answer over the whole vocabulary, and the (N, 2) probabilities of the two answers."""
    model.eval()
    choices = torch.tensor(data.choice_ids, device=device)
    labels = data.labels_tensor()
    losses, probabilities = [], []
    for chosen in torch.arange(len(data)).split(JUDGE_BATCH):
        log_p = _answer_logits(model, data, chosen, device).log_softmax(-1)
        answer_log_p = log_p[:, choices].cpu()
        losses.append(-answer_log_p[torch.arange(len(chosen)), labels[chosen]])
        probabilities.append(answer_log_p.softmax(-1))
    return torch.cat(losses).mean().item(), torch.cat(probabilities)


def _answer_logits(model: PeftModel, data: Encoded, chosen: Tensor, device: torch.device) -> Tensor:
    """(B, vocabulary) float32: what the model says after each of the chosen prompts."""
    batch = data.collate(chosen.tolist(), device)
    del batch["index"]
    return model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float()


def _save(model: PeftModel, summary: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        made = Path(work) / out.name
        # The base model's embeddings are never trained here, and asking whether they changed would ask the network.
        model.save_pretrained(str(made), save_embedding_layers=False)
        (made / "README.md").unlink()  # PEFT's blank form, which would name a folder of this machine as the base model
        (made / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        made.replace(out)


def _validate(options: TrainingOptions) -> None:
    for name in ("items", "epochs", "rank", "alpha", "batch_size", "test_items"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}: expected at least 1")
    if not options.lr > 0:
        raise ValueError(f"lr={options.lr}: expected a positive learning rate")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise ValueError(f"dtype={options.dtype!r}: expected auto, {' or '.join(DTYPES)}")


def main(arguments: list[str] | None = None) -> None:
    """The command line: every field of ``TrainingOptions`` is an option, and ``--out`` the folder to write."""
    parser = argparse.ArgumentParser(description="Train the demonstration's adapter and judge it.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the adapter to")
    for field in fields(TrainingOptions):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="default: %(default)s")
    values = vars(parser.parse_args(arguments))
    out = values.pop("out")
    summary = train(TrainingOptions(**values), out)
    print(json.dumps({name: summary[name] for name in ("train_loss", "train_accuracy", "test", "seconds")}, indent=2))


if __name__ == "__main__":
    main()
