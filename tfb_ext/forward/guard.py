"""The guard: before the samples of one call are trusted, they are compared with separate passes on a tiny input.

Samples share a forward by laying out their rows side by side, which is right only where the model keeps rows first, sample-major,
in every input of a random layer, and uses its head's output as it is. That is learnt here, once for each model and first random
block: two calls of the mean adapter tell which arguments of the blocks belong to rows, then three samples in one call are
compared with three passes of one sample each, in which no row needs to be told from another. Two padded rows in one forward;
one row with a key-value cache and a step from it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.layers import ONE_SAMPLE, RowLayout, SampleBatch
from ..errors import GuardError, SamplingError
from .caches import cache_argument
from .fan import Fan, Layout, Predictive, batch_shape, check_packing

if TYPE_CHECKING:
    from ..adapters.adapter import BayesianAdapter

SAMPLES = (0, 2, 4)  # no two of them mirror each other
ROWS, TOKENS = 2, 5  # rows, rows * samples and rows * samples * tokens are all different
SIGMAS = tuple(0.05 * 4.0**i for i in range(6))
# By whether numbers have 24 bits or more. The samples should differ by this much (root mean square, of log probabilities in
# nats), and a call may differ from separate passes by this share of it; or, up to the largest share, by a few times what rounding
# does. Rows that get another sample's weights differ by about the whole of it.
SPREAD = {True: 0.03, False: 0.5}
SHARE = {True: 2e-3, False: 0.15}
NOISE, LARGEST_SHARE = 8.0, 0.4
FLOOR = -100.0  # a log probability below is none: some models give classes minus infinity
ATTEMPTS = 3  # with other tokens: routing to experts may tip over by rounding

Outputs = list[Tensor]  # of each call, (rows, ..., V)
Arguments = dict[int, dict[str, str | int]]  # what a block's arguments count, see Layout


def learn(
    adapter: BayesianAdapter, first: int, fanned: bool = True, example: Mapping[str, Any] | None = None
) -> tuple[Layout, bool]:
    """How the model lays out its rows at a first random block, once its samples are known to equal separate passes.

    And whether they are: of a model that gives NaN nothing is known but where its rows lie.

    Args:
        adapter: attached, with no context open.
        first: the first random block.
        fanned: compare the fan; otherwise calls for which the caller lays out the rows.
        example: arguments of a forward to compare on, instead of the tiny inputs.

    Raises:
        GuardError: the model cannot run on a tiny input, or several samples in one call are not what separate passes
            give. The message names what differs.
    """
    check_packing(adapter.anatomy.model, {})
    with adapter.in_order(), _plain_text(adapter.anatomy.model):
        return _learn(_Trial(adapter, first, fanned, example))


def _learn(trial: _Trial) -> tuple[Layout, bool]:
    adapter, first, fanned = trial.adapter, trial.first, trial.fanned
    arguments = trial.arguments() if fanned else {}
    problem = ""
    for attempt in range(ATTEMPTS):
        layers, problem = trial.compare(arguments, attempt)
        if not problem:
            return Layout(layers, arguments), trial.finite
        if not trial.rounds:
            break
    name = type(adapter.anatomy.model).__name__
    raise GuardError(
        f"{name}, first random block {first}: several samples in one call {problem}, expected what separate passes give. Fix: {ONE_SAMPLE}"
    )


class _Trial:
    """The calls on tiny inputs, or on an example, of one model."""

    def __init__(
        self, adapter: BayesianAdapter, first: int, fanned: bool, example: Mapping[str, Any] | None = None
    ) -> None:
        self.adapter, self.first, self.fanned, self.example = adapter, first, fanned, example
        self.rows, self.tokens = (ROWS, TOKENS) if example is None else batch_shape((), dict(example))
        self.model: Any = adapter.anatomy.model
        self.accepts = set(inspect.signature(self.model.forward).parameters)
        weights = [p for p in self.model.parameters() if p.is_floating_point()]
        self.exact = weights[0].dtype in (torch.float32, torch.float64)
        self.rounding = 0.0  # of the outputs
        self.others: list[dict[str, tuple[int, ...]]] = []  # shapes of what calls give beside logits
        # Of an offloaded model, whose own hooks move inputs, the weights may lie nowhere.
        self.device = next((w.device for w in weights if not w.is_meta), torch.device("cpu"))
        self.rounds = True  # whether another attempt could end otherwise
        self.finite = True

    # Inputs ---------------------------------------------------------------------------------------------------------

    def inputs(self, rows: int, padded: bool, attempt: int = 0, tokens: int = TOKENS) -> dict[str, Any]:
        """Arguments of a forward; the last row is padded on the right."""
        if self.example is not None:
            return {**self.example, "use_cache": False} if "use_cache" in self.accepts else dict(self.example)
        generator = torch.Generator().manual_seed(attempt)
        if self.model.main_input_name != "input_ids":
            return {self.model.main_input_name: self._other_input(rows, generator).to(self.device)}
        ids = _ordinary_tokens(self.model)
        chosen = ids[torch.randint(len(ids), (rows, tokens), generator=generator)]
        mask = torch.ones_like(chosen)
        if padded:
            mask[-1, -1] = 0
        given: dict[str, Any] = {"input_ids": chosen, "attention_mask": mask}
        if padded and "position_ids" in self.accepts:
            given["position_ids"] = torch.arange(tokens).expand(rows, tokens).contiguous()
        open_ended = "kwargs" in self.accepts or "input_ids" not in self.accepts
        given = {name: value.to(self.device) for name, value in given.items() if open_ended or name in self.accepts}
        given |= {} if getattr(self.model.config, "return_dict", True) else {"return_dict": True}
        return given | ({"use_cache": False} if "use_cache" in self.accepts else {})

    def _other_input(self, rows: int, generator: torch.Generator) -> Tensor:
        config = self.model.config
        size = getattr(config, "image_size", None)
        if self.model.main_input_name == "input_values":  # a fifth of a second of sound
            return torch.randn(rows, 3200, generator=generator).to(next(self.model.parameters()).dtype)
        if self.model.main_input_name != "pixel_values" or not isinstance(size, int):
            raise GuardError(
                f"{type(self.model).__name__} takes {self.model.main_input_name}, expected input_ids, input_values or pixel_values of "
                f"one size. Fix: {ONE_SAMPLE}; or pass guard=False, if you have compared its samples with separate passes"
            )
        pixels = torch.randn(rows, config.num_channels, size, size, generator=generator)
        return pixels.to(next(self.model.parameters()).dtype)

    def calls(self, attempt: int) -> list[Callable[[int], Outputs]]:
        """Forwards on one row after the other, each as a function of how often its rows are repeated."""
        generates = self.model.can_generate() and self.model.main_input_name == "input_ids"
        steps = generates and "use_cache" in self.accepts and self.adapter.mode == "weight"

        def forward(times: int) -> Outputs:
            return [self._logits(self.model(**_repeated(self.inputs(self.rows, True, attempt), times)))]

        def one_row(times: int) -> Outputs:
            given = _repeated(self.inputs(1, False, attempt), times)
            if generates and "logits_to_keep" in self.accepts:
                given["logits_to_keep"] = 1
            if not steps:
                return [self._logits(self.model(**given))]
            output = self.model(**{**given, "use_cache": True})
            name = cache_argument(self.model)
            cache = getattr(output, name, None)
            found = [self._logits(output)]
            if cache is not None:
                mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
                following = {
                    "input_ids": given["input_ids"][:, :1],
                    "attention_mask": mask,
                    name: cache,
                    "use_cache": True,
                }
                found.append(self._logits(self.model(**following)))
            return found

        return [forward] if self.example is not None else [forward, one_row]

    def _logits(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise SamplingError("return no logits, which averages are made of")
        self.others.append(
            {n: tuple(v.shape) for n, v in output.items() if isinstance(v, Tensor) and n not in ("logits", "loss")}
        )
        self.exact = self.exact and logits.dtype in (torch.float32, torch.float64)
        self.rounding = torch.finfo(logits.dtype).eps
        return logits.detach()

    # The mean adapter -----------------------------------------------------------------------------------------------

    def arguments(self) -> Arguments:
        """What the leading size of each tensor among a block's arguments counts: of two calls of different sizes."""
        sizes = []
        for more in (0, 1):
            with self._alone(), _arguments(self.adapter.anatomy.blocks[self.first :]) as found:
                self.model(**self.inputs(ROWS + more, padded=True, tokens=TOKENS + more))
            sizes.append(found)
        learnt: Arguments = {}
        if self.example is not None:  # one size tells less than two
            for (block, path), size in sizes[0].items():
                learnt.setdefault(self.first + block, {})[path] = "rows" if size == self.rows else size
            return learnt
        for (block, path), small in sizes[0].items():
            large = sizes[1].get((block, path), small)
            known = learnt.setdefault(self.first + block, {})
            if small * (ROWS + 1) == large * ROWS:
                known[path] = "rows"
            elif (small, large) == (TOKENS, TOKENS + 1):
                known[path] = "tokens"
            elif small == large:
                known[path] = small
            else:
                raise GuardError(
                    f"{type(self.model).__name__}: a block's argument {path!r} has {small} leading entries for {ROWS} rows of {TOKENS} "
                    f"tokens and {large} for {ROWS + 1} of {TOKENS + 1}, expected some number for each row. Fix: {ONE_SAMPLE}"
                )
        return learnt

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Calls outside any context; what they raise says that the tiny input is to blame."""
        try:
            with torch.no_grad():
                yield
        except (GuardError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise GuardError(
                f"{type(self.model).__name__} does not run on a tiny input ({_first_line(error)}), so its samples cannot be compared with "
                f"separate passes. Fix: {ONE_SAMPLE}; or pass guard=False, if you have compared them yourself"
            ) from error

    # The comparison -------------------------------------------------------------------------------------------------

    def compare(self, arguments: Arguments, attempt: int) -> tuple[dict[str, RowLayout], str]:
        """Each layer's layout of rows, and what is wrong; nothing if that is empty."""
        calls = self.calls(attempt)
        with self._alone():
            self.others = []
            alone = [self.values(out) for call in calls for out in call(1)]
            others, self.others = self.others, []
            beside = [
                self.values(out)[: len(a)] for call in calls for out, a in zip(call(len(SAMPLES)), alone, strict=False)
            ]
        # Rows of a batch are the same whatever is beside them, but for rounding; and outputs are rounded once more.
        noise = max(_rms(alone[0] - beside[0]), self.rounding * _rms(alone[0]) / math.sqrt(12))
        sigma, spread, separate = self._apart(calls, noise)
        self.finite = spread > 0
        if self.finite and LARGEST_SHARE * spread <= noise:
            return {}, "cannot be told apart on a tiny input"
        seen: list[tuple[str, tuple[int, ...]]] = []
        self.others = []
        try:
            together = self._together(calls, arguments, sigma, seen)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.rounds = False
            wrong = self._layouts(seen)[1]
            return {}, wrong or f"fail ({_first_line(error.__cause__ or error)})"
        layers, wrong = self._layouts(seen)
        if wrong:
            self.rounds = False
            return {}, wrong
        for shapes, usual in zip(self.others, others, strict=True) if self.fanned else ():
            if shapes != usual:
                self.rounds = False
                return {}, f"give outputs of shapes {shapes} where one gives {usual}"
        bound = max(SHARE[self.exact] * spread, min(NOISE * noise, LARGEST_SHARE * spread))
        categorical = self.adapter.anatomy.kind == "categorical"
        for found, expected in zip(together, self._expected(separate), strict=True) if self.finite else ():
            if found.shape != expected.shape:
                return {}, f"give outputs of shape {tuple(found.shape)} for {tuple(expected.shape)}"
            off = _rms((found.clamp(min=FLOOR) if categorical else found) - expected)
            if not off <= bound:
                return (
                    {},
                    f"differ by {off:.2g} on a tiny input, where samples differ by {spread:.2g} and rounding by {noise:.1g}",
                )
        return layers, ""

    def values(self, logits: Tensor) -> Tensor:
        """What the fold averages, in float32 or better."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.adapter.anatomy.kind == "categorical":
            return torch.log_softmax(logits, dim=-1).clamp(min=FLOOR)
        return logits

    def _batch(self, samples: tuple[int, ...], sigma: float) -> SampleBatch:
        return self.adapter.batch(samples, sigma)

    def _apart(self, calls: list[Callable[[int], Outputs]], noise: float) -> tuple[float, float, list[Tensor]]:
        """A sigma at which samples differ enough, by how much, and their separate passes; 0 where none gives finite numbers."""
        found: tuple[float, float, list[Tensor]] = (SIGMAS[0], 0.0, [])
        for sigma in (*SIGMAS, *(SIGMAS[0] / 4.0**i for i in range(1, 6))):
            with self._alone():
                separate = self._separate(calls[:1], sigma)
            spread = _rms(separate[0] - separate[0].mean(0))
            if math.isfinite(spread):
                found = (sigma, spread, separate)
            if found[1] and (spread != found[1] or sigma == SIGMAS[-1]):
                break  # a larger one overflows, or there is none
            if found[1] >= SPREAD[self.exact] and 2 * NOISE * noise <= found[1]:
                break
        sigma, spread, separate = found
        with self._alone():
            separate = separate + self._separate(calls[1:], sigma)
        return sigma, spread, separate

    def _separate(self, calls: list[Callable[[int], Outputs]], sigma: float) -> list[Tensor]:
        """(S, rows, ..., V) of each output: one pass a sample, all rows of which are that sample's."""
        found: list[list[Tensor]] = []
        for k in SAMPLES:
            with self.adapter.laid_out(self.first, self._batch((k,), sigma), None):
                found.append([self.values(out) for call in calls for out in call(1)])
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _together(
        self, calls: list[Callable[[int], Outputs]], arguments: Arguments, sigma: float, seen: list[Any]
    ) -> list[Tensor]:
        batch = self._batch(SAMPLES, sigma)
        state = self.adapter._state
        context: AbstractContextManager[Any] = self.adapter.laid_out(self.first, batch, None)
        if self.fanned:
            fan = Fan(
                self.adapter.anatomy,
                state,
                self.first,
                Predictive(batch),
                self.adapter.check_call,
                Layout({}, arguments),
            )
            context = self.adapter.opened(self.first, fan)
        with context:
            state.seen = seen
            try:
                outputs = [out for call in calls for out in call(1 if self.fanned else len(SAMPLES))]
            finally:
                state.seen = None
        return outputs if self.fanned else [self.values(out).unflatten(0, (len(SAMPLES), -1)) for out in outputs]

    def _expected(self, separate: list[Tensor]) -> list[Tensor]:
        if not self.fanned:
            return separate
        kind = self.adapter.anatomy.kind
        if kind == "regression":
            return [s.mean(0) for s in separate]
        if kind == "multi_label":
            sure = torch.nn.functional.logsigmoid
            return [torch.logsumexp(sure(s), 0) - torch.logsumexp(sure(-s), 0) for s in separate]
        return [torch.logsumexp(s, 0) - math.log(len(SAMPLES)) for s in separate]

    def _layouts(self, seen: list[tuple[str, tuple[int, ...]]]) -> tuple[dict[str, RowLayout], str]:
        """Of the shapes of the inputs that each layer had, its layout of rows, and the first input that has none."""
        found: dict[str, RowLayout] = {}
        for name, shape in seen:
            leads: dict[int, RowLayout] = {}
            for rows in (1, self.rows):
                leads[rows * len(SAMPLES) * self.tokens] = "tokens"
            for rows in (1, self.rows):
                leads[rows * len(SAMPLES)] = "rows"
            layout = leads.get(shape[0])
            if shape[0] == 0:  # a head whose columns are asked for gets no rows from the model
                continue
            if layout is None:
                expected = f"{self.rows * len(SAMPLES)} rows ({len(SAMPLES)} samples of {self.rows}) first"
                return {}, f"give layer {name!r} an input of shape {shape} where {expected} is needed"
            if layout == "tokens" or name not in found:
                found[name] = layout
        return found, ""


def _ordinary_tokens(model: Any) -> Tensor:
    """Token ids that no entry of the configuration gives a meaning of its own."""
    config = model.config.get_text_config()
    size = int(getattr(config, "vocab_size", 0) or 2)  # a model of characters has no vocabulary
    special: set[int] = set()
    for settings in (model.config, config):
        for name, value in vars(settings).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    ids = [i for i in range(min(size, 4096)) if i not in special]
    return torch.tensor(ids or list(range(size)))


@contextmanager
def _plain_text(model: Any) -> Iterator[None]:
    """Inside, the model takes rows of text whatever it did before.

    One without a padding token has one that no text holds, since classifiers want one for several rows. What a vision-language
    model remembers of its last images (Qwen2-VL and its kin, for the positions of the steps after them) is put away.
    """
    with_images = [m for m in model.modules() if vars(m).get("rope_deltas") is not None]
    for module in with_images:  # the adapter puts back what modules hold
        module.rope_deltas = None
    settings = [vars(c) for c in {id(c): c for c in (model.config, model.config.get_text_config())}.values()]
    without = [s for s in settings if s.get("pad_token_id", 0) is None]
    try:
        for s in without:
            s["pad_token_id"] = -1
        yield
    finally:
        for s in without:
            s["pad_token_id"] = None


def _repeated(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    return {n: v.repeat(times, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v for n, v in inputs.items()}


@contextmanager
def _arguments(blocks: Any) -> Iterator[dict[tuple[int, str], int]]:
    """Collects the leading size of every tensor among each block's arguments, by path; hidden states left out."""
    found: dict[tuple[int, str], int] = {}

    def note(value: Any, index: int, path: str) -> None:
        if isinstance(value, Tensor) and value.dim() > 0:
            found[index, path] = value.shape[0]
        elif isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            for i, part in enumerate(value):
                note(part, index, f"{path}.{i}")
        elif type(value) is dict:
            for name, part in value.items():
                note(part, index, f"{path}.{name}")

    def hook(index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for i, value in enumerate(args[1:], 1):
            note(value, index, str(i))
        for name, value in kwargs.items():
            if name != "hidden_states":
                note(value, index, name)

    hooks = [b.register_forward_pre_hook(partial(hook, i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        yield found
    finally:
        for h in hooks:
            h.remove()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
