"""Train the study's adapters and predict with them.

    python -m bench.quality.run --work FOLDER --workers 2 --seconds 540
    python -m bench.quality.run --work FOLDER --units "*-spans"      the spans alone, and what they are compared with

Pieces of work are banks (``FOLDER/adapters``: every adapter of one data set and set of layers, trained at once) and units
(``FOLDER/predictions``: everything predicted with one adapter). A finished piece is a file that was renamed into its place, so
a run that is stopped at any point goes on where it was; a bank is trained only if a unit still needs it. Only
``predictions`` is needed by ``python -m bench.quality.report``.

The whole study took 175 minutes of worker time on H100s with two to six workers a GPU: 92 of predicting, 53 of searching, 29 of training.
One worker fills a GPU: training runs twelve adapters at once and samples are fused. More of them only blur the times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.multiprocessing

from tfb_ext.app.demo.assets import base_model_dir
from tfb_ext.app.loading import quantisation

from ..record import environment, write_json
from . import methods, train
from .bank import TARGETS
from .data import TASKS, Parts, load
from .methods import Questions, measured
from .study import SMALL, Study, Unit
from .unit_run import UnitRun

COMMAND = "python -m bench.quality.run"
GUESS = 60.0  # seconds that a piece may take before the first of its kind was timed


@dataclass(frozen=True)
class Folder:
    """Where a study lies."""

    root: Path

    def bank(self, name: str) -> Path:
        return self.root / "adapters" / name

    def has_bank(self, name: str) -> bool:
        return (self.bank(name) / "bank.json").is_file()

    def facts(self, unit: Unit) -> Path:
        return self.root / "predictions" / f"{unit.name}.json"

    def arrays(self, unit: Unit) -> Path:
        return self.root / "predictions" / f"{unit.name}.npz"

    def has(self, unit: Unit) -> bool:
        """The JSON is written last."""
        return self.facts(unit).is_file()

    def claim(self, piece: str) -> bool:
        """Whether the piece is the caller's; claims last as long as a run."""
        path = self.root / "claims" / piece
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def claimed(self, piece: str) -> bool:
        return (self.root / "claims" / piece).exists()

    def forget_claims(self) -> None:
        for path in (self.root / "claims").glob("*"):
            path.unlink()


class Worker:
    """One process with the base model on its device; does pieces of a study until none is left or the time is over."""

    def __init__(self, study: Study, folder: Folder, device: torch.device, workers: int) -> None:
        from transformers import AutoTokenizer

        self.study, self.folder, self.device = study, folder, device
        self.tokenizer = AutoTokenizer.from_pretrained(base_model_dir())
        self.bases: dict[str, Any] = {}
        self.loaded: dict[str, Parts] = {}
        self.environment = environment(device, COMMAND) | {"workers": workers}
        self.took: dict[str, float] = {}

    def parts(self, dataset: str) -> Parts:
        if dataset not in self.loaded:
            self.loaded[dataset] = load(TASKS[dataset], self.tokenizer, self.study.sizes)
        return self.loaded[dataset]

    def base(self, quantised: str = "") -> Any:
        """The frozen base model, read once."""
        if quantised not in self.bases:
            self.bases[quantised] = base_model(self.study, len(self.tokenizer), self.device, quantised)
        return self.bases[quantised]

    def work(self, units: Sequence[Unit], deadline: float) -> bool:
        """Do pieces; returns whether all that this worker began went well."""
        well = True
        for piece, unit in self.pieces(units, deadline):
            started = time.monotonic()
            try:
                self.train(unit) if piece == unit.bank else self.predict(unit)
            except Exception:  # a piece that fails must not take the others with it; it is reported and not tried again
                well = False
                self.folder.claim(f"{piece}.failed")
                _say(f"{piece} failed\n{traceback.format_exc()}")
            else:
                seconds = time.monotonic() - started
                self.took[self.kind(piece, unit)] = seconds
                _say(f"{piece}: {seconds:.1f} s")
        return well

    def pieces(self, units: Sequence[Unit], deadline: float) -> Iterator[tuple[str, Unit]]:
        """Pieces claimed for this worker, one after the other; those of others that it depends on are waited for."""
        while time.monotonic() < deadline:
            found = self.next_piece(units, deadline)
            if found is not None:
                yield found
            elif any(self.waits_for(unit) for unit in units):
                time.sleep(0.2)
            else:
                return

    def next_piece(self, units: Sequence[Unit], deadline: float) -> tuple[str, Unit] | None:
        left = deadline - time.monotonic()
        for unit in units:
            if self.folder.has(unit):
                continue
            piece = unit.name if self.folder.has_bank(unit.bank) else unit.bank
            if self.took.get(self.kind(piece, unit), GUESS) < left and self.folder.claim(piece):
                return piece, unit
        return None

    def waits_for(self, unit: Unit) -> bool:
        """Whether another worker trains what the unit needs."""
        claimed = self.folder.claimed
        done = self.folder.has(unit) or self.folder.has_bank(unit.bank)
        return not done and claimed(unit.bank) and not claimed(f"{unit.bank}.failed")

    def kind(self, piece: str, unit: Unit) -> str:
        if piece == unit.bank:
            return f"{unit.bank} bank"
        return f"{unit.bank} {unit.stop} {unit.member.kind} {unit.part}"

    # Training -------------------------------------------------------------------------------------------------------

    def train(self, unit: Unit) -> None:
        parts, group = self.parts(unit.dataset), self.study.members
        trained, cost = measured(
            self.device,
            lambda: train.train_bank(
                self.base(), unit.targets, group, self.study.recipe, parts.train, parts.validation
            ),
        )
        facts = {"peak_gib": cost.peak_gib, **self.environment}
        train.save(trained, group, self.study.recipe, self.folder.bank(unit.bank), facts)

    # Predicting -----------------------------------------------------------------------------------------------------

    def predict(self, unit: Unit) -> None:
        recipe, parts = self.study.recipe, self.parts(unit.dataset)
        state, omega = train.load_state(self.folder.bank(unit.bank), unit.stop, unit.member)
        bank = train.facts_of(self.folder.bank(unit.bank))
        base = self.base(unit.base)
        with methods.adapted(base, TARGETS[unit.targets], recipe.rank, recipe.alpha, recipe.dropout) as model:
            methods.set_weights(model, state)
            torch.manual_seed(unit.member.seed)
            unit_run = UnitRun(self.study, unit, model, parts, self.device)
            if unit.part == "laplace":
                unit_run.laplace()
            else:
                unit_run.plain(omega)
                unit_run.bayesian()
        member = bank["members"].index(asdict(unit.member))
        facts = {
            "unit": {
                "dataset": unit.dataset,
                "targets": unit.targets,
                "stop": unit.stop,
                **asdict(unit.member),
                "base": unit.base,
            },
            "best_epoch": bank["best_epoch"][member],
            "blocks": len(base.base_model.layers),
            "labels": {"test": parts.test.labels, "validation": parts.validation.labels},
            "choices": list(parts.task.choices),
            "items": len(Questions.of(parts).joined),
            "tokens": fmean(map(len, parts.test.token_ids)),
            "rows": unit_run.rows,
            "searches": unit_run.searches,
            "spread": unit_run.spread,
            "training": {name: bank[name][member] for name in ("validation_nll", "training_loss")}
            | {name: bank[name] for name in ("checked", "seconds", "graph", "recipe")},
            **self.environment,
        }
        methods.save(self.folder.arrays(unit), unit_run.kept)
        write_json(self.folder.facts(unit), facts)


def base_model(study: Study, vocabulary: int, device: torch.device, quantised: str = "") -> Any:
    """The frozen base model: SmolLM2, in bfloat16 on a GPU; for a tiny study a random Llama of four blocks.

    ``quantised``: its blocks' linear layers by bitsandbytes, in ``nf4`` (double quantisation) or ``int8``.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    given: dict[str, Any] = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    if quantised:
        load_in = "4bit" if quantised == "nf4" else "8bit"
        given |= {**quantisation(load_in, given["dtype"]), "device_map": {"": device}}
    if study.tiny:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:  # whose weights are quantised as they are read
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, **given)
    else:
        model = AutoModelForCausalLM.from_pretrained(base_model_dir(), **given)
    return (model if quantised else model.to(device)).eval()


def _run_worker(*arguments: Any) -> None:
    sys.exit(0 if _work(*arguments) else 1)


def _work(number: int, workers: int, study: Study, root: Path, pattern: str, deadline: float) -> bool:
    """Be worker ``number``; returns whether no piece failed."""
    torch.set_num_threads(1 if study.tiny else max((os.cpu_count() or 1) // workers, 1))
    gpus = torch.cuda.device_count()
    device = torch.device(f"cuda:{number % gpus}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    worker = Worker(study, Folder(root), device, workers)
    _say(f"worker {number} on {device}: ready")
    return worker.work(chosen(study, pattern), deadline)


def chosen(study: Study, pattern: str) -> list[Unit]:
    """The study's units whose name fits the shell pattern, in their order."""
    return [unit for unit in study.units() if fnmatch(unit.name, pattern)]


def run(study: Study, root: Path, workers: int, seconds: float, pattern: str = "*") -> bool:
    """Do what is left of the study in ``workers`` processes, at most ``seconds`` long.

    Returns:
        whether no piece failed. Running out of time is no failure.
    """
    deadline = time.monotonic() + seconds
    folder = Folder(root)
    root.mkdir(parents=True, exist_ok=True)
    folder.forget_claims()
    base_model_dir(_say)  # once, before several processes ask for it
    unlimited = seconds == float("inf")
    if workers == 1 and unlimited:
        well = _work(0, 1, study, root, pattern, deadline)
    else:
        well = _in_processes(workers, study, root, pattern, deadline, unlimited)
    units = chosen(study, pattern)
    _say(f"{sum(folder.has(unit) for unit in units)} of {len(units)} units are done")
    return well


def _in_processes(workers: int, study: Study, root: Path, pattern: str, deadline: float, unlimited: bool) -> bool:
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_worker, args=(number, workers, study, root, pattern, deadline))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(None if unlimited else max(deadline - time.monotonic(), 0))
    late = [process for process in processes if process.is_alive()]
    for process in late:  # what they had begun does not count, and is done again
        process.terminate()
        process.join()
    return all(process.exitcode == 0 for process in processes if process not in late)


def _say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the study; made, or gone on with")
    parser.add_argument("--workers", type=int, default=max(torch.cuda.device_count(), 1), help="default: one a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no piece is begun that would end later")
    parser.add_argument("--units", default="*", help="shell pattern of unit names, such as 'r8-qv-overfitted-*'")
    parser.add_argument("--small", action="store_true", help="a tiny random model and a few items: tries the machinery")
    parser.add_argument("--no-laplace", action="store_true", help="leave out the method that needs laplace-torch")
    parser.add_argument("--list", action="store_true", help="print the units and whether they are done, do nothing")
    options = parser.parse_args(arguments)
    study = SMALL if options.small else Study()
    if options.no_laplace:
        study = replace(study, laplace=False)
    if options.list:
        folder = Folder(options.work)
        done = {unit.name: folder.has(unit) for unit in chosen(study, options.units)}
        print(json.dumps(done, indent=1))
        return 0
    return 0 if run(study, options.work, options.workers, options.seconds, options.units) else 1


if __name__ == "__main__":
    sys.exit(main())
