"""Training a bank of adapters: every step on the device, in a CUDA graph where there is one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tfb_ext.data import Encoded

from ..record import write_json
from .bank import TARGETS, Bank, Member, Recipe, divergence_gradient, members_of

EAGER_STEPS = 3  # before a capture: the optimiser's state and the libraries' workspaces must exist
JUDGE_ROWS = 2048


@dataclass(frozen=True)
class Table:
    """Encoded items as tensors on a device, padded on the right: ids (N, L), last (N,) index of the last token, labels (N,)."""

    ids: Tensor
    last: Tensor
    labels: Tensor

    @classmethod
    def of(cls, data: Encoded, device: torch.device) -> Table:
        longest = max(map(len, data.token_ids))
        ids = torch.full((len(data), -(-longest // 8) * 8), data.pad_id)
        for row, tokens in enumerate(data.token_ids):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        last = torch.tensor([len(tokens) - 1 for tokens in data.token_ids])
        return cls(ids.to(device), last.to(device), data.labels_tensor(device))


@dataclass(frozen=True)
class Trained:
    """A bank after training.

    Attributes:
        states: stop -> one PEFT state dict a member. ``overfitted`` is the end of the training, ``early`` each member's
            epoch of the lowest validation NLL.
        validation: (checks, K) mean NLL on the validation part, after the epochs in ``checked``.
        losses: (epochs, K) mean training loss.
        graph: whether the steps ran as a CUDA graph.
    """

    states: dict[str, list[dict[str, Tensor]]]
    checked: tuple[int, ...]
    validation: Tensor
    losses: Tensor
    seconds: float
    graph: bool


def kl_weights(steps: int, items: int, batch_size: int, gamma: float) -> Tensor:
    """BLoB's weight of the divergence at each step, (steps,).

    ``2^i / (2^(M+1) - 1)`` at the i-th step (from 1) of a cycle of ``M = 100 items^(pi / gamma) / batch_size`` steps: almost
    all of a cycle's weight, which is 1, lies on its last few steps.
    """
    cycle = max(int(100 * items ** (torch.pi / gamma) / batch_size), 1)
    return torch.tensor([2 ** (step % cycle + 1) / (2 ** (cycle + 1) - 1) for step in range(steps)])


def rates(steps: int, warmup: float) -> Tensor:
    """Share of the full rate at each step: linear from 0 over the ``warmup`` share of the steps, then linear down to 0."""
    first = max(round(warmup * steps), 1)
    step = torch.arange(steps, dtype=torch.float32)
    return torch.minimum(step / first, (steps - step) / max(steps - first, 1)).clamp(max=1)


def checks(epochs: int) -> tuple[int, ...]:
    """Epochs after which the members are judged: all of the first eight, where the best one lies, then every fourth."""
    return tuple(epoch for epoch in range(1, epochs + 1) if epoch <= 8 or epoch % 4 == 0 or epoch == epochs)


class Trainer:
    """One bank, its optimiser and its data; ``step`` is all that a CUDA graph has to hold."""

    def __init__(self, bank: Bank, data: Table, seeds: Sequence[int]) -> None:
        recipe, device = bank.recipe, data.ids.device
        self.bank, self.data = bank, data
        self.per_epoch = len(data.ids) // recipe.batch_size
        self.steps = recipe.epochs * self.per_epoch
        self.order = self._order(seeds).to(device)
        share = rates(self.steps, recipe.warmup).to(device)
        self.lr = recipe.lr * share
        weights = kl_weights(self.steps, len(data.ids), recipe.batch_size, recipe.kl_gamma).to(device)
        self.kl_rate = recipe.kl_rate * share * weights
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(self.steps, len(bank.group), device=device)
        self.parameters = bank.parameters()
        cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, weight_decay=0.0, fused=cuda, capturable=cuda, foreach=False
        )
        self.decayed = members_of(bank.group, "map")
        self.blob = [layer for layer in bank.layers.values() if layer.g is not None]

    def _order(self, seeds: Sequence[int]) -> Tensor:
        """(steps, K, b) item numbers: a new permutation every epoch, the same for all members of a seed."""
        size, batch = len(self.data.ids), self.bank.recipe.batch_size
        if not self.per_epoch:
            raise ValueError(f"{size} training items are fewer than one batch of {batch}; lower batch_size")
        by_seed = {}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            epochs = [torch.randperm(size, generator=generator) for _ in range(self.bank.recipe.epochs)]
            kept = self.per_epoch * batch  # what is left of an epoch's permutation has its turn in another epoch
            by_seed[seed] = torch.cat([order[:kept].view(-1, batch) for order in epochs])
        return torch.stack([by_seed[member.seed] for member in self.bank.group], dim=1)

    def step(self) -> None:
        """One optimiser step of every member, without a look at the device from the host."""
        chosen = self.order.index_select(0, self.number)[0]
        rows = chosen.flatten()
        logits = self.bank.logits(self.data.ids[rows], self.data.last[rows])
        targets = self.data.labels[rows]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        loss = each.view(chosen.shape).mean(1)  # (K,)
        self.losses.index_copy_(0, self.number, loss.detach()[None])
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        self._clip(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()  # the fused optimiser asks for the strides of its parameter
        self.rate.copy_(self.lr.index_select(0, self.number)[0])
        if self.decayed.stop:
            kept = 1 - self.rate * self.bank.recipe.decay
            for layer in self.bank.layers.values():
                layer.a.data[self.decayed] *= kept
                layer.b.data[self.decayed] *= kept
        self.optimizer.step()
        if self.blob:
            self._descend_divergence()
        self.number += 1

    def _clip(self, gradients: Sequence[Tensor]) -> None:
        """Scale each member's gradient to a norm of at most ``clip``."""
        squares: dict[int, Tensor] = {}
        size = len(self.bank.group)
        total = torch.zeros(size, device=self.number.device)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            squares[id(parameter)] = torch.linalg.vector_norm(gradient, dim=(1, 2)).square()
        for layer in self.bank.layers.values():
            total += squares[id(layer.a)] + squares[id(layer.b)]
            if layer.g is not None:
                total[layer.blob] += squares[id(layer.g)]
        scale = (self.bank.recipe.clip / (total.sqrt() + 1e-6)).clamp(max=1)
        for gradient in gradients:
            whole = gradient.shape[0] == size
            gradient.mul_((scale if whole else scale[self.blob[0].blob])[:, None, None])

    def _descend_divergence(self) -> None:
        """BLoB's second optimiser: plain gradient descent on the weighted divergence of A from its prior."""
        rate = self.kl_rate.index_select(0, self.number)[0]
        for layer in self.blob:
            assert layer.g is not None
            mean, root = layer.a.data[layer.blob], layer.g.data
            by_mean, by_root = divergence_gradient(mean, root, self.bank.recipe.prior)
            mean -= rate * by_mean
            root -= rate * by_root

    def run(self, steps: int, graph: torch.cuda.CUDAGraph | None) -> None:
        for _ in range(steps):
            self.step() if graph is None else graph.replay()

    def capture(self) -> torch.cuda.CUDAGraph:
        """Take the first steps on a side stream, as graphs want it, then record one more without taking it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(EAGER_STEPS, None)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph


def judge(bank: Bank, data: Table) -> Tensor:
    """Mean NLL of every member on ``data``, (K,), members at their means."""
    size = len(bank.group)
    total = torch.zeros(size, device=data.ids.device)
    with bank.quiet():
        for start in range(0, len(data.ids), max(JUDGE_ROWS // size, 1)):
            part = slice(start, start + max(JUDGE_ROWS // size, 1))
            logits = bank.logits(data.ids[part].repeat(size, 1), data.last[part].repeat(size))
            targets = data.labels[part].repeat(size)
            each = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            total += each.view(size, -1).sum(1)
    return total / len(data.ids)


def train_bank(
    base: Any,
    targets: str,
    group: Sequence[Member],
    recipe: Recipe,
    training: Encoded,
    validation: Encoded,
    graph: bool | None = None,
) -> Trained:
    """Train every member of ``group`` on the frozen ``base``.

    Args:
        targets: a name in ``TARGETS``.
        graph: run the steps as a CUDA graph; None: where the model is on a GPU. A training of a few steps
            never is one.

    Raises:
        RuntimeError: the steps cannot be captured (pass ``graph=False``).
    """
    started = time.perf_counter()
    device = base.device
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    assert training.choice_ids is not None
    bank = Bank(base.eval(), TARGETS[targets], group, recipe, training.choice_ids)
    trainer = Trainer(bank, Table.of(training, device), sorted({member.seed for member in group}))
    held_out = Table.of(validation, device)
    enough = recipe.epochs * trainer.per_epoch > EAGER_STEPS
    graph = enough and (device.type == "cuda" if graph is None else graph)
    torch.manual_seed(min(member.seed for member in group))  # masks, signs and noise
    history: list[Tensor] = []
    with bank.opened():
        best = torch.full((len(group),), torch.inf, device=device)
        kept = [parameter.detach().clone() for parameter in trainer.parameters]
        captured = trainer.capture() if graph else None
        taken = EAGER_STEPS if captured is not None else 0
        for epoch in range(1, recipe.epochs + 1):
            trainer.run(epoch * trainer.per_epoch - taken, captured)
            taken = epoch * trainer.per_epoch
            if epoch not in checks(recipe.epochs):
                continue
            nll = judge(bank, held_out)
            history.append(nll)
            better = nll < best
            best = torch.where(better, nll, best)
            for parameter, copy in zip(trainer.parameters, kept, strict=True):
                mask = better if copy.shape[0] == len(group) else better[trainer.blob[0].blob]
                copy.copy_(torch.where(mask[:, None, None], parameter.detach(), copy))
        states = {"overfitted": [bank.state(k) for k in range(len(group))]}
        for parameter, copy in zip(trainer.parameters, kept, strict=True):
            parameter.data.copy_(copy)
        states["early"] = [bank.state(k) for k in range(len(group))]
    losses = trainer.losses.view(recipe.epochs, trainer.per_epoch, -1).mean(1)
    seconds = time.perf_counter() - started
    return Trained(states, checks(recipe.epochs), torch.stack(history).cpu(), losses.cpu(), seconds, graph)


def save(trained: Trained, group: Sequence[Member], recipe: Recipe, folder: Path, facts: dict[str, Any]) -> None:
    """Write each adapter to ``STOP-KIND-SEED.safetensors`` and, last, ``bank.json``: with it the folder is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for stop, states in trained.states.items():
        for member, state in zip(group, states, strict=True):
            path = folder / f"{stop}-{member.kind}-{member.seed}.safetensors"
            save_file(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    best = trained.validation.argmin(0).tolist()
    write_json(
        folder / "bank.json",
        {
            "members": [asdict(member) for member in group],
            "recipe": asdict(recipe),
            "checked": list(trained.checked),
            "best_epoch": [trained.checked[b] for b in best],
            "validation_nll": trained.validation.T.tolist(),
            "training_loss": trained.losses.T.tolist(),
            "seconds": trained.seconds,
            "graph": trained.graph,
            **facts,
        },
    )


def load_state(folder: Path, stop: str, member: Member) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A saved adapter: PEFT's state dict, and layer name -> Omega of BLoB (empty for other kinds)."""
    state = load_file(folder / f"{stop}-{member.kind}-{member.seed}.safetensors")
    omega = {name.removesuffix(".omega"): value for name, value in state.items() if name.endswith(".omega")}
    return {name: value for name, value in state.items() if not name.endswith(".omega")}, omega


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bank.json").read_text())
