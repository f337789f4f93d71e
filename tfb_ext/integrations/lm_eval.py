"""A TFB posterior in lm-evaluation-harness: its model ``tfb``, and its command line with that model in it.

``python -m tfb_ext.integrations.lm_eval --model tfb --model_args pretrained=BASE,peft=ADAPTER,n_samples=10 --tasks TASK`` takes what
``lm-eval`` takes. Reading, ordering, batching and caching of requests are the harness's own; only the scores of a batch are
made here, of all samples in one fused forward, from which each sample's log probabilities of the asked tokens are kept.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.adapter import BayesianAdapter, Depth, Span
from ..adapters.attach import bayesianize, load
from ..checks import check_sigma
from ..data import Encoded
from ..errors import UnsupportedModelError
from ..forward.batches import Batches
from ..forward.engine import Request, run
from ..forward.rows import last_positions
from ..posterior.config import CONFIG_NAME, TFBConfig

try:
    from lm_eval.api.model import CacheHook
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
    from lm_eval.models.utils_hf import pad_and_concat
except ImportError as error:
    MISSING = f"the model for lm-evaluation-harness needs lm_eval ({error}): pip install 'tfb_ext[lm-eval]'"
    if __name__ == "__main__":
        raise SystemExit(MISSING) from None
    raise ImportError(MISSING) from error

BMA = ("sequence", "token")


@register_model("tfb")
class TFBLM(HFLM):
    """The harness's Hugging Face model, averaged over posterior samples of its LoRA adapter.

    Semantics, of a continuation's tokens ``c_1 ... c_L`` after a context, with the samples' probabilities ``p_s``:

    - ``bma="sequence"``: ``log mean_s prod_t p_s(c_t)``, the posterior predictive of the whole continuation, in a rolling
      log-likelihood of the whole document, over all its windows.
    - ``bma="token"``: ``sum_t log mean_s p_s(c_t)``, what the model under :meth:`BayesianAdapter.predictive` gives.
    - ``is_greedy``, with either: whether every ``c_t`` is the arg max of ``mean_s p_s``.
    - generation: transformers' own ``generate`` under the predictive, which averages each token over the samples.

    Args:
        pretrained: base model, a folder or a hub name; or a PEFT model, or a Bayesian adapter on which the options are set.
        n_samples: posterior samples; 0 for the mean adapter, which then is the harness's own ``hf`` model with ``peft``.
        sigma: posterior scale; default: the one saved beside the adapter.
        depth: random blocks from the top: a number, a fraction, ``"all"``, ``"head"``; default: the saved one, else all.
        span: random tokens, see :class:`~tfb_ext.adapters.adapter.BayesianAdapter`; an answer is read from the token before the
            continuation. Default: the saved one, else all.
        bma: ``"sequence"`` or ``"token"``, the place where samples are averaged in log-likelihoods.
        seed: noise seed; default: the saved one, else 0.
        antithetic: draw samples in mirrored pairs; default: as saved, else yes.
        **options: those of the harness's ``hf`` model, among them ``peft``, the adapter's folder (or, without a saved posterior,
            its hub name), ``dtype``, ``device``, ``batch_size``.

    Raises:
        ValueError: an unknown ``bma``, a bad number of samples, sigma, depth, span or seed, no sigma anywhere.
        UnsupportedModelError: no adapter, or one that cannot carry a posterior; an encoder-decoder model.
        ConfigError: a saved posterior that is damaged or of another adapter.
    """

    cache_hook: Any

    def __init__(
        self,
        pretrained: str | PeftModel | BayesianAdapter,
        *,
        n_samples: int = 10,
        sigma: float | None = None,
        depth: Depth | None = None,
        span: Span | None = None,
        bma: str = "sequence",
        seed: int | None = None,
        antithetic: bool | None = None,
        **options: Any,
    ) -> None:
        if bma not in BMA:
            raise ValueError(f"bma is {bma!r}, expected one of {', '.join(map(repr, BMA))}")
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 0:
            raise ValueError(f"n_samples is {n_samples!r}, expected a count, 0 for the mean adapter")
        if sigma is not None:
            check_sigma(sigma)
        folder = options.get("peft")
        given = isinstance(pretrained, PeftModel | BayesianAdapter)
        if not given and not folder:
            raise UnsupportedModelError(
                "no adapter: expected peft=FOLDER among the model's arguments, the adapter's folder (or pretrained, a PEFT model)"
            )
        if given and folder:
            raise UnsupportedModelError(
                f"peft is {folder!r}, but pretrained holds an adapter already; give one of the two"
            )
        # Before the weights are read, which takes minutes.
        saved = folder if folder and (Path(folder) / CONFIG_NAME).is_file() else None
        known = sigma or (TFBConfig.read(saved).sigma if saved else getattr(pretrained, "sigma", None))
        if n_samples and known is None:
            raise ValueError(
                f"no sigma: none is saved with {folder or 'the adapter'}; run `tfb search ... --save FOLDER` and give that folder as "
                "peft, or give sigma=..., or n_samples=0 for the mean adapter"
            )
        super().__init__(pretrained.model if isinstance(pretrained, BayesianAdapter) else pretrained, **options)
        if isinstance(pretrained, BayesianAdapter):
            self.adapter = pretrained
        else:
            self.adapter = load(self.model, saved) if saved else bayesianize(self.model)
        if sigma is not None:
            self.adapter.sigma = sigma
        if depth is not None:
            self.adapter.depth = depth
        if span is not None:
            self.adapter.span = span
        if seed is not None:
            self.adapter.seed = seed
        if antithetic is not None:
            self.adapter.antithetic = antithetic
        self.n_samples = n_samples
        self.bma = bma
        self._joining = False

    # The predictive -------------------------------------------------------------------------------------------------

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); the harness asks for them here only to find the largest batch, and for the mean adapter."""
        if self.n_samples == 0:
            return super()._model_call(inps, attn_mask, labels)
        # A request may be for all tokens of a text, which then are random with any span.
        with self.adapter.predictive(self.n_samples, span="all"):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self.n_samples == 0:
            return super()._model_generate(context, max_length, stop, **options)
        with self.adapter.predictive(self.n_samples):
            return super()._model_generate(context, max_length, stop, **options)

    def _target_logs(self, inps: Tensor, lengths: list[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample log probabilities (S, B, T', K) of targets (B, T', K), the last positions', and the arg max (B, T') of the mean.

        Both on the CPU. ``lengths``: of the rows of ``inps``, which are padded on the right.
        """
        keep, targets = last_positions(self.adapter.anatomy.model, targets, inps.shape[1])
        inputs = {"input_ids": inps, **keep}
        if self.adapter.span != "all":  # else the padding behind an answer would be random too, once for each sample
            mask = torch.arange(inps.shape[1]) < torch.tensor(lengths)[:, None]
            inputs["attention_mask"] = mask.long().to(inps.device)
        return self._run(Request(inputs, targets=targets))

    def _run(self, request: Request) -> tuple[Tensor, Tensor]:
        kind = self.mixed_precision_dtype
        self.adapter.attached.check_ready()
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            result = run(self.adapter, replace(request, samples=self.adapter.batch(self.n_samples)))
        assert result.targets is not None
        return result.targets.cpu(), result.average.argmax(dim=-1).cpu()

    # Log-likelihoods ------------------------------------------------------------------------------------------------

    def _averaged(self, logs: Tensor) -> Any:
        """One score of per-sample log probabilities (S, L) of L tokens; per sample (S,) while a document's windows are joined."""
        logs = logs.double()
        if self.bma == "token":
            return float((torch.logsumexp(logs, dim=0) - math.log(self.n_samples)).sum())
        return logs.sum(dim=1) if self._joining else self._mixed(logs.sum(dim=1))

    def _mixed(self, logs: Tensor) -> float:
        return float(torch.logsumexp(logs, dim=0)) - math.log(self.n_samples)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Scores of the requests; those of one context share its forward, where the model can hold them side by side."""
        if self.n_samples == 0:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        found: dict[int, tuple[float, bool]] = {}
        if self.logits_cache:  # the harness's switch for requests that share a forward
            found = self._shared_scores(requests, override_bs)
        left = [number for number in range(len(requests)) if number not in found]
        rows = self._scores_by_row([requests[number] for number in left], disable_tqdm, override_bs) if left else []
        found |= zip(left, rows, strict=True)
        return [found[number] for number in range(len(requests))]

    def _shared_scores(self, requests: list[Any], override_bs: int | None) -> dict[int, tuple[Any, bool]]:
        """By number, of the requests whose context others have too."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(number)
        by_count: dict[int, list[list[int]]] = {}
        for context, numbers in by_context.items():
            given = {tuple(requests[number][2]) for number in numbers}
            fits = context and all(given) and len(context) + max(map(len, given)) - 1 <= self.max_length
            if fits and len(given) == len(numbers) > 1:
                by_count.setdefault(len(numbers), []).append(numbers)
        if not by_count or not self.adapter.shares_prompts():
            return {}
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else self._detect_batch_size())
        found: dict[int, tuple[Any, bool]] = {}
        for count, groups in by_count.items():
            continuations = [tuple(tuple(requests[number][2]) for number in group) for group in groups]
            prompts = [list(requests[group[0]][1]) for group in groups]
            blank = Encoded(prompts, [None] * len(groups), None, ("",) * count, 0, continuations[0])
            data = replace(blank, item_choice_tokens=continuations)
            for batch in Batches(self.adapter, data, batch_size=size, samples=self.n_samples).batches:
                logs, best = self._run(Request(batch.inputs, targets=batch.targets, branches=batch.branches))
                assert batch.targets is not None
                width = batch.targets.shape[1] // count
                for row, item in enumerate(batch.items.tolist()):
                    for place, number in enumerate(groups[item]):
                        tokens = requests[number][2]
                        own = slice(place * width, place * width + len(tokens))
                        greedy = best[row, own].tolist() == list(tokens)
                        found[number] = self._averaged(logs[:, row, own]), greedy
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def _scores_by_row(
        self, requests: list[Any], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        """The harness's loop with its order, its batches and its grouping of continuations that differ in their last token.

        With a span continuations of a row are of one length, as their first token is where the random ones begin.
        """
        whole = self.adapter.span == "all"

        def lead(context: list[int], continuation: list[int]) -> list[int]:
            """What continuations of one row have in common, before all their tokens but the last."""
            return context if whole else [len(continuation), *context]

        order = Collator(
            requests,
            sort_fn=lambda r: (-len(r[1] + r[2]), tuple(r[1] + r[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda r: lead(r[-2], r[-1]) + r[-1][:-1],
        )
        automatic = self.batch_size == "auto"
        schedule = self._batch_scheduler if automatic and len(order) and not override_bs else None
        if schedule is not None:
            self.batch_sizes: dict[int, int] = {}
        chunks = order.get_batched(n=(override_bs or 0) if automatic else self.batch_size, batch_fn=schedule)
        results: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for chunk in chunks:
            # Continuations that share a row: the harness's cache gives them by its logits, of which it needs the shape alone.
            rows = [list(order.get_cache(r, lead(c, t), t, torch.empty(1, 1, 0))) for r, c, t in chunk]
            for request, score, greedy in self._scores(chunk, rows):
                results.append((score, greedy))
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, (score, greedy))
                bar.update(1)
        bar.close()
        return order.get_original(results)

    def _scores(self, chunk: list[Any], rows: list[list[Any]]) -> list[tuple[Any, Any, bool]]:
        """(request, score, is greedy) of every continuation of one batch.

        Args:
            chunk: (request, context tokens, continuation tokens) of each row.
            rows: of each row, (request, continuation tokens, unused) of the continuations that end it in tokens of their own.
        """
        inputs = [
            torch.tensor((context + continuation)[-(self.max_length + 1) :][:-1], device=self.device)
            for _, context, continuation in chunk
        ]
        lengths = [len(i) for i in inputs]
        width = max(lengths)
        longest = [max(len(tokens) for _, tokens, _ in row) for row in rows]
        for count, length in zip(longest, lengths, strict=True):
            if not 0 < count <= length:
                raise ValueError(
                    f"a continuation has {count} tokens, expected 1 to {length}, what the model's {self.max_length} positions hold; "
                    "raise max_length among the model's arguments if the model takes more"
                )
        first = min(length - count for length, count in zip(lengths, longest, strict=True))
        targets = torch.full((len(rows), width - first, max(map(len, rows))), -100)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            # They share all tokens but the last one, so the longest has the others' too.
            tokens = max((tokens for _, tokens, _ in row), key=len)
            last = length - first - 1
            targets[number, last + 1 - len(tokens) : last, 0] = torch.tensor(tokens[:-1], dtype=torch.int64)
            targets[number, last, : len(row)] = torch.tensor([tokens[-1] for _, tokens, _ in row])
        batch = pad_and_concat(width, inputs, padding_side="right")
        logs, best = self._target_logs(batch, lengths, targets)
        logs, best = logs[:, :, first - width :], best[:, first - width :]
        found = []
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for place, (request, tokens, _) in enumerate(row):
                start, last = length - first - len(tokens), length - first - 1
                asked = torch.cat([logs[:, number, start:last, 0], logs[:, number, last : last + 1, place]], dim=1)
                greedy = best[number, start : last + 1].tolist() == list(tokens)
                found.append((request, self._averaged(asked), greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self.n_samples == 0 or self.bma == "token":
            return super().loglikelihood_rolling(requests, disable_tqdm)
        # Its sums over a document's windows are then of each sample (S,), which are no results to cache.
        hook: Any = self.cache_hook
        self.cache_hook, self._joining = CacheHook(None), True
        try:
            sums = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.cache_hook, self._joining = hook, False
        scores = [self._mixed(s) for s in sums]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return scores

    def get_model_info(self) -> dict[str, Any]:
        """The harness's facts about the model, and under ``tfb`` what defines the posterior, for the results file."""
        adapter = self.adapter
        posterior = {
            "n_samples": self.n_samples,
            "bma": self.bma,
            "sigma": adapter.sigma,
            "depth": adapter.depth,
            "span": adapter.span,
            "seed": adapter.seed,
            "antithetic": adapter.antithetic,
            "mode": adapter.mode,
            "family": adapter.family,
        }
        return {**super().get_model_info(), "tfb": posterior}


def main() -> None:
    """The harness's command line, which knows the model ``tfb`` beside its own."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
