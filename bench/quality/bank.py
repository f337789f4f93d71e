"""Many LoRA adapters trained at once on one frozen base model: a bank.

Training one adapter on batches of eight short prompts leaves a GPU idle most of the time. A bank of K adapters runs K batches
as one: rows ``k b .. (k+1) b - 1`` of a batch of ``K b`` rows belong to adapter k and see its weights alone. Nothing is shared
but the frozen base, so every adapter gets the gradients that it would get alone; optimiser and clipping are per adapter too.

The kinds of adapter:

* ``mle``: maximum likelihood.
* ``map``: that with weight decay, a Gaussian prior on A and B.
* ``dropout``: that with dropout on the input of A.
* ``blob``: Bayes by Backprop on A (BLoB; Wang, Shi, Han, Metaxas, Wang, NeurIPS 2024). ``q(A) = N(M, diag(Omega^2))`` with
  ``Omega = G * G`` elementwise; B is a point. The prior on the full weight is the low-rank Gaussian under which the
  divergence is that of A against ``N(0, prior^2)``; sampling is by flipout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("mle", "map", "dropout", "blob")
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qv_head": ("q_proj", "v_proj", "lm_head"),
    "all_linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Recipe:
    """How the adapters of a bank are shaped and trained.

    Attributes:
        decay: AdamW's weight decay of the kind ``map``: at this rate and schedule the weights shrink by 40 % over a thousand
            steps if nothing opposes, while values below 0.1 leave an over-fitted adapter what it was.
        dropout: probability of the kind ``dropout``.
        prior, spread: BLoB's standard deviation of the prior, and the upper end of G at the start (the lower is
            ``spread / sqrt(2)``), as its authors set them.
        kl_rate, kl_gamma: rate of the plain gradient descent on the divergence, and the exponent's divisor of its cycle, see
            ``train.kl_weights``; their published code's defaults.
    """

    rank: int = 8
    alpha: int = 16
    epochs: int = 20
    batch_size: int = 8
    lr: float = 1e-3
    warmup: float = 0.05
    clip: float = 1.0
    decay: float = 1.0
    dropout: float = 0.1
    prior: float = 0.2
    spread: float = 0.05
    kl_rate: float = 0.02
    kl_gamma: float = 8.0

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Member:
    """One adapter of a bank. Members of one seed start from the same weights and see the items in the same order."""

    kind: str
    seed: int


def members(kinds: Sequence[str], seeds: Sequence[int]) -> tuple[Member, ...]:
    """The members in a bank's order: by kind, so that each kind is one slice of the bank."""
    return tuple(Member(kind, seed) for kind in KINDS if kind in kinds for seed in seeds)


class BankLayer(nn.Module):
    """A frozen linear layer and K adapters on it.

    Semantics: ``y[k] = x[k] W^T + b + s (x[k] A[k]^T) B[k]^T`` for the K groups of rows of x; for members of the kind
    ``dropout`` x is masked first, for ``blob`` ``(x * s1) (Omega * E)^T * s2`` joins ``x A^T``: E is one normal draw a step,
    s1 and s2 random signs for every token. Masks and noise only while ``noisy``.

    Attributes:
        a: (K, r, n) and b: (K, m, r), float32 parameters; g: (K_blob, r, n), the root of BLoB's Omega.
    """

    def __init__(self, base: nn.Linear, group: Sequence[Member], recipe: Recipe, rows: Tensor | None = None) -> None:
        """``rows``: the only output rows that are asked for (a head's label tokens); None for all."""
        super().__init__()
        weight = base.weight if rows is None else base.weight[rows]
        self.weight, self.bias = weight.detach(), None if base.bias is None else base.bias.detach()
        m, n = weight.shape
        size = len(group)
        device = weight.device
        self.scaling, self.dropout = recipe.scaling, recipe.dropout
        self.a = nn.Parameter(torch.empty(size, recipe.rank, n, device=device))
        self.b = nn.Parameter(torch.zeros(size, m, recipe.rank, device=device))
        self.dropped = members_of(group, "dropout")
        self.blob = members_of(group, "blob")
        blobs = self.blob.stop - self.blob.start
        self.g = nn.Parameter(torch.empty(blobs, recipe.rank, n, device=device)) if blobs else None
        self.noisy = True

    def start(self, group: Sequence[Member], generators: dict[int, torch.Generator], recipe: Recipe) -> None:
        """Initial weights as PEFT's: A uniform within ``1 / sqrt(n)``, B zero; G as ``Recipe.spread`` says."""
        _, rank, n = self.a.shape
        for seed, generator in generators.items():
            a = (2 * torch.rand(rank, n, generator=generator) - 1) / math.sqrt(n)
            low = recipe.spread / math.sqrt(2)
            g = low + (recipe.spread - low) * torch.rand(rank, n, generator=generator)
            for k, member in enumerate(group):
                if member.seed == seed:
                    self.a.data[k] = a
                    if self.g is not None and member.kind == "blob":
                        self.g.data[k - self.blob.start] = g

    def forward(self, x: Tensor) -> Tensor:
        """x (K * b, ..., n) -> (K * b, ..., m), in x's type."""
        size = self.a.shape[0]
        rows = x.reshape(size, -1, x.shape[-1])
        z = torch.bmm(self.masked(rows), self.a.to(x.dtype).mT)
        if self.noisy and self.g is not None:
            z = torch.cat([z[: self.blob.start], z[self.blob] + self.noise(rows[self.blob]), z[self.blob.stop :]])
        update = torch.bmm(z, self.b.to(x.dtype).mT).reshape(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.weight, self.bias) + self.scaling * update

    def masked(self, rows: Tensor) -> Tensor:
        if not self.noisy or self.dropped.start == self.dropped.stop:
            return rows
        kept = nn.functional.dropout(rows[self.dropped], self.dropout)
        return torch.cat([rows[: self.dropped.start], kept, rows[self.dropped.stop :]])

    def noise(self, rows: Tensor) -> Tensor:
        assert self.g is not None
        return flipout(rows, (self.g * self.g) * torch.randn_like(self.g))


def flipout(x: Tensor, noise: Tensor) -> Tensor:
    """``((x * s1) noise^T) * s2`` with fresh random signs s1, s2 for every row; x (..., T, n), noise (..., r, n)."""
    inner = torch.randint_like(x, 2) * 2 - 1
    out = torch.matmul(x * inner, noise.to(x.dtype).mT)
    return out * (torch.randint_like(out, 2) * 2 - 1)


def divergence_gradient(mean: Tensor, root: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """Gradients by ``mean`` and ``root`` of the KL of ``N(mean, root^4)`` (standard deviation ``root^2``) from ``N(0, prior^2)``.

    The KL is ``(root^4 + mean^2) / (2 prior^2) - 2 log root``, up to a constant. In closed form because autograd would launch
    two thousand small kernels a step for it.
    """
    return mean / prior**2, 2 * root**3 / prior**2 - 2 / root


def decoder(model: Any, ids: Tensor) -> Tensor:
    """Final hidden states (rows, L, d) of a Llama without its head, attention causal and nothing else.

    The model's own forward looks at its mask's values, which a CUDA graph cannot, and a mask would cost the fast attention.
    """
    hidden = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = model.rotary_emb(hidden, position_ids=positions)
    for block in model.layers:
        hidden = block(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
    return model.norm(hidden)


class Bank:
    """K adapters on ``base``, whose target layers are bank layers while the bank is open (see ``opened``).

    Attributes:
        layers: name in the base model -> layer. The head's is computed for the label tokens alone, in float32.
    """

    def __init__(
        self, base: Any, targets: Sequence[str], group: Sequence[Member], recipe: Recipe, choice_ids: Sequence[int]
    ) -> None:
        self.base, self.group, self.recipe = base, tuple(group), recipe
        self.choices = torch.tensor(choice_ids, device=base.device)
        self.layers: dict[str, BankLayer] = {}
        head = base.get_output_embeddings()
        self.vocabulary = head.weight.shape[0]
        self.head_weight = head.weight.detach()[self.choices].float()
        for name, module in base.named_modules():
            if name.rsplit(".", 1)[-1] not in targets or not isinstance(module, nn.Linear):
                continue
            # Only the label tokens' rows get gradients, so the others of B stay zero and need no place here.
            self.layers[name] = BankLayer(module, group, recipe, self.choices if module is head else None)
        generators = {seed: torch.Generator().manual_seed(seed) for seed in dict.fromkeys(m.seed for m in group)}
        for layer in self.layers.values():
            layer.start(group, generators, recipe)
        self.head = next((layer for name, layer in self.layers.items() if base.get_submodule(name) is head), None)
        if self.head is not None:
            self.head.weight = self.head_weight

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.a, layer.b, layer.g) if p is not None]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, the base model's target layers are the bank's."""
        before = {name: self.base.get_submodule(name) for name in self.layers}
        for name, layer in self.layers.items():
            self.base.set_submodule(name, layer)
        try:
            yield
        finally:
            for name, module in before.items():
                self.base.set_submodule(name, module)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, without gradients: no dropout masks, no sampling, every adapter is its mean."""
        for layer in self.layers.values():
            layer.noisy = False
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self.layers.values():
                layer.noisy = True

    def logits(self, ids: Tensor, last: Tensor) -> Tensor:
        """Logits of the label tokens after each prompt, float32.

        Args:
            ids: (K * b, L) token ids, padded on the right: what follows a row's last token is never seen.
            last: (K * b,) index of each row's last token.

        Returns:
            (K, b, C).
        """
        hidden = decoder(self.base.base_model, ids)
        final = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0].float()
        logits = nn.functional.linear(final, self.head_weight) if self.head is None else self.head(final)
        return logits.reshape(len(self.group), -1, len(self.choices))

    def state(self, k: int) -> dict[str, Tensor]:
        """Member k as PEFT's state dict, float32 on the CPU; ``NAME.omega`` beside it for BLoB."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            prefix = f"base_model.model.{name}"
            b = layer.b.data[k].float().cpu()
            if layer is self.head:
                b = torch.zeros(self.vocabulary, b.shape[1]).index_copy(0, self.choices.cpu(), b)
            state[f"{prefix}.lora_A.weight"] = layer.a.data[k].float().cpu().clone()
            state[f"{prefix}.lora_B.weight"] = b.clone()
            if self.group[k].kind == "blob":
                assert layer.g is not None
                state[f"{name}.omega"] = layer.g.data[k - layer.blob.start].square().float().cpu().clone()
        return state


def members_of(group: Sequence[Member], kind: str) -> slice:
    """Where a kind's members are in a bank; empty without one."""
    places = [k for k, member in enumerate(group) if member.kind == kind]
    return slice(places[0], places[-1] + 1) if places else slice(0, 0)
