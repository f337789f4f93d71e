"""What a generation is: sequences, and every sample's probabilities of their tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import refusal
from ..files import for_json
from ..prediction.results import sample_variance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """Generated sequences: R rows of up to N new tokens, S samples; on the CPU, entropies and logarithms in nats.

    Without samples (``by="linear"``) S = 1, and the probabilities are the mean adapter's, which to first order in sigma are those of the
    posterior. What needs every sample's distribution over the vocabulary is not known then.

    Uncertainties are about the model's own next-token distribution, before temperature, top-k and the like changed it. Entries
    behind a row's end are NaN. Tokens there are what transformers fills an ended row with: padding, or, where it knows no
    end-of-sequence token, further tokens.

    Attributes:
        sequences: (R, P + N) int64, prompts and what follows.
        prompt_length: P, the padding of shorter prompts included.
        lengths: (R,) new tokens of each row up to where transformers' criteria ended it, the last token included.
        texts: what each row adds to its prompt, without special tokens; empty without a tokenizer.
        pieces: each new token's own part of the text, special tokens included; empty without a tokenizer.
        sample_log_probabilities: (S, R, N) of each new token under each sample.
        log_probabilities: (R, N) log of their mean probability: what the model inside the context gives.
        total: (R, N) entropy of the mean distribution.
        aleatoric: (R, N) mean entropy of the samples' distributions; NaN without samples.
        alternatives, alternative_probabilities: (R, N, K) the K most probable tokens and their mean probabilities.
        sigma, samples: of the posterior; ``samples`` is empty where none were drawn.
        seconds, scoring_seconds: of ``generate``, and of the forward that scores.
        antithetic: whether samples come in mirrored pairs.
        expected_deviation, expected_sequence_deviation: (R, N) and (R,), the standard deviations where no samples were drawn.
    """

    sequences: Tensor
    prompt_length: int
    lengths: Tensor
    texts: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    sample_log_probabilities: Tensor
    log_probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    alternatives: Tensor
    alternative_probabilities: Tensor
    sigma: float
    samples: tuple[int, ...]
    seconds: float
    scoring_seconds: float
    antithetic: bool = False
    expected_deviation: Tensor | None = None
    expected_sequence_deviation: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """(R, N) int64 the new tokens."""
        return self.sequences[:, self.prompt_length :]

    @property
    def epistemic(self) -> Tensor:
        """(R, N) mutual information of the token and the weights, total minus aleatoric: what the samples disagree about.

        Raises:
            ValueError: there are no samples, see ``standard_deviation``.
        """
        if self.expected_deviation is not None:
            expected = "samples: it needs the whole vocabulary, and by='linear' looks at the emitted tokens alone"
            raise refusal("epistemic", "a generation by='linear'", expected, "standard_deviation, or by='samples'")
        return (self.total - self.aleatoric).clamp(min=0)

    @property
    def standard_deviation(self) -> Tensor:
        """(R, N) of each new token's log probability under the posterior; NaN below two samples, or two mirrored pairs.

        Without samples it is right to first order in sigma.
        """
        if self.expected_deviation is not None:
            return self.expected_deviation
        return sample_variance(self.sample_log_probabilities, self.samples, self.antithetic).sqrt()

    @property
    def sequence_standard_deviation(self) -> Tensor:
        """(R,) the same of the whole continuation's log probability, which holds the covariance of all its tokens."""
        if self.expected_sequence_deviation is not None:
            return self.expected_sequence_deviation
        return sample_variance(self._whole, self.samples, self.antithetic).sqrt().float()

    @property
    def _whole(self) -> Tensor:
        """(S, R) each sample's log probability of the whole continuation."""
        return self.sample_log_probabilities.nan_to_num(0.0).double().sum(dim=-1)

    @property
    def uncertainties(self) -> tuple[str, ...]:
        """Names of what is known of every token; the last is how much of it is the model's own."""
        own = ("aleatoric", "epistemic") if self.expected_deviation is None else ("standard_deviation",)
        return ("total", *own)

    @property
    def sequence_scores(self) -> Tensor:
        """(R,) log of the mean over samples of the whole continuation's probability: weights are drawn once a text."""
        per_sample = self._whole
        return (torch.logsumexp(per_sample, dim=0) - math.log(len(per_sample))).float()

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts as JSON takes them: one entry of ``items`` for each row, null for what is not finite."""
        names = dict.fromkeys(("tokens", "log_probabilities", *self.uncertainties, "standard_deviation"))
        columns = {name: getattr(self, name) for name in (*names, "alternatives", "alternative_probabilities")}
        whole = {"sequence_score": self.sequence_scores, "token_score": self.token_scores}
        whole |= {"sequence_standard_deviation": self.sequence_standard_deviation}
        items = []
        for row, count in enumerate(self.lengths.tolist()):
            item: dict[str, Any] = {"text": self.texts[row]} if self.texts else {}
            item |= {name: value[row].item() for name, value in whole.items()}
            item |= {name: value[row, :count].tolist() for name, value in columns.items()}
            items.append(item | ({"pieces": list(self.pieces[row])} if self.pieces else {}))
        numbers = {"sigma": self.sigma, "samples": list(self.samples), "seconds": self.seconds}
        found: dict[str, Any] = for_json(numbers | {"items": items})
        return found

    @property
    def token_scores(self) -> Tensor:
        """(R,) sum of ``log_probabilities``: as if weights were drawn anew for every token."""
        return self.log_probabilities.nansum(dim=-1)


def pieces_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Each token's part of the text. A character of several tokens is the last one's; joined they are the decoded text."""

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part)))

    found: list[str] = []
    done = start = 0  # tokens before `start` are written out; some before `done` give the decoder its context
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[done:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(decode(tokens[done:start])) :])
        done, start = start, end
    whole = decode(tokens)
    if "".join(found) == whole:
        return tuple(found)
    # A decoder that looks further than a token back (bytes that are no character, clean-up): cut the whole text instead, each
    # piece up to where the text so far is still the whole's.
    ends = [0]
    for end in range(1, len(tokens)):
        ends.append(max(ends[-1], len(os.path.commonprefix([decode(tokens[:end]), whole]))))
    ends.append(len(whole))
    return tuple(whole[start:end] for start, end in pairwise(ends))


def joined(parts: Sequence[Generation], pad: int) -> Generation:
    """The rows of several generations of prompts of one length; rows of fewer tokens are filled, with ``pad`` and NaN."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.tokens.shape[1] for part in parts)

    def rows(name: str, value: float | int = math.nan, tokens: int = -1, dim: int = 0) -> Any:
        found = [getattr(part, name) for part in parts]
        if found[0] is None or isinstance(found[0], tuple):
            return None if found[0] is None else sum(found, ())
        whole = width + (parts[0].prompt_length if name == "sequences" else 0)
        tokens = tokens % found[0].dim()
        short = [(0, 0) * (each.dim() - 1 - tokens) + (0, whole - each.shape[tokens]) for each in found]
        filled = [
            torch.nn.functional.pad(each, missing, value=value) for each, missing in zip(found, short, strict=True)
        ]
        return torch.cat(filled, dim)

    return replace(
        parts[0],
        sequences=rows("sequences", pad),
        lengths=torch.cat([part.lengths for part in parts]),
        texts=rows("texts"),
        pieces=rows("pieces"),
        sample_log_probabilities=rows("sample_log_probabilities", dim=1),
        log_probabilities=rows("log_probabilities"),
        total=rows("total"),
        aleatoric=rows("aleatoric"),
        alternatives=rows("alternatives", 0, 1),
        alternative_probabilities=rows("alternative_probabilities", tokens=1),
        seconds=sum(part.seconds for part in parts),
        scoring_seconds=sum(part.scoring_seconds for part in parts),
        expected_deviation=rows("expected_deviation"),
        expected_sequence_deviation=None
        if parts[0].expected_sequence_deviation is None
        else torch.cat(
            [part.expected_sequence_deviation for part in parts if part.expected_sequence_deviation is not None]
        ),
    )
