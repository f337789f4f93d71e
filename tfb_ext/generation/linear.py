"""How far emitted tokens' log probabilities vary under the posterior, to first order in sigma: one backward a token, no samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters.adapter import BayesianAdapter
from ..forward.batch import Batch
from ..forward.inputs import IGNORED
from ..forward.linear import MOST_OUTPUTS, Linear, ready
from ..forward.memory import BATCH_CPU, BATCH_CUDA
from ..forward.rows import last_positions
from .scores import sequence_arguments


def linear_sigma(adapter: BayesianAdapter, sigma: float | None) -> float:
    """The sigma of a generation by ``"linear"``; what its scores could not serve is refused here, before anything is generated."""
    scale = adapter.scale(sigma, "linear")
    with ready(adapter, adapter.place):
        return scale


class _Tokens(Linear):
    """Log probabilities of the tokens of a row that ``part`` names, and of all its tokens together where ``whole``, as outputs."""

    count, part, whole = 0, slice(0), False

    def items(self, values: Tensor | None, batch: Batch, stacked: bool = False) -> Tensor:
        assert values is not None
        values = nn.functional.pad(values, (max(self.count - values.shape[1], 0), 0))  # rows that are all shorter
        own = values[:, self.part]
        return torch.cat([own, values.sum(1, keepdim=True)], 1) if self.whole else own


def token_variances(
    adapter: BayesianAdapter, sequences: Tensor, mask: Tensor, start: int, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """At sigma 1, of each token's log probability (R, N), and of the whole answer's (R,), which holds the covariance of all its tokens.

    The mean adapter reads the tokens as they are, in one forward with a graph for 63 of them. One backward for each token of the longest
    answer, and one for all of them, serves every row. float32; anything behind a row's end.

    Args:
        sequences, mask: (R, P + N), prompts that are padded on the left, and what follows.
        start: P.
        lengths: (R,) new tokens of each row, at least 1.
    """
    model, count = adapter.anatomy.model, sequences.shape[1] - start
    linear = _Tokens(adapter, [], adapter.place, may_be_empty=True)
    linear.count = count
    most = BATCH_CUDA if sequences.is_cuda else BATCH_CPU
    parts: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad():
        # Answers end together, so that the prompts can be run by themselves.
        moved = count - lengths[:, None]
        columns = (torch.arange(start + count, device=sequences.device) - moved) % (start + count)
        ids, mask = sequences.gather(1, columns), mask.gather(1, columns)
        order = torch.arange(count, device=sequences.device)
        targets = ids[:, start:].masked_fill(order < moved, IGNORED)
        inputs = sequence_arguments(model, ids[:, :-1], mask[:, :-1])  # nothing is read behind it
        keep, targets = last_positions(model, targets, start + count - 1)
        for key, rows in enumerate(torch.arange(len(ids), device=ids.device).split(most)):
            own = {name: value[rows] for name, value in inputs.items()}
            batch = Batch(key, {**own, **keep, "use_cache": False}, None, rows, None, False, targets[rows])
            found: list[Tensor] = []
            for first in range(0, count, MOST_OUTPUTS - 1):
                last = min(first + MOST_OUTPUTS - 1, count)
                linear.part, linear.whole = slice(first - count, last - count or None), first == 0
                variance = linear.of(batch, adapter.place).covariance.diagonal(dim1=1, dim2=2)
                found += [variance[:, -1:], variance[:, :-1]] if linear.whole else [variance]
            parts.append(torch.cat(found, 1))
        whole, tokens = torch.cat(parts).to(sequences.device, torch.float32).split([1, count], 1)
        return tokens.gather(1, (order + moved) % count), whole[:, 0]
