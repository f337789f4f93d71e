"""Data as a model takes it: what every batch and every encoded set is checked for, once, before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from ..checks import check_dense, has_integers, is_integer, kind
from ..data import Encoded
from ..errors import refusal

IGNORED = -100  # a label that is not counted
MOST_POSITIONS = 2**31  # of a model that names no limit
# A batch of these alone has no tokens that stand for images or sound, which may lie beyond the vocabulary.
_TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}

Labels = Literal["rows", "positions"]


class ModelInputs:
    """What a model takes: arguments, vocabulary, positions, and labels of ``classes`` classes for its rows or positions.

    ``labels=None``: labels are not looked at.
    """

    def __init__(self, model: Any, classes: int, labels: Labels | None) -> None:
        self.name = type(model).__name__
        self.classes, self.labels = classes, labels
        parameters = inspect.signature(model.forward).parameters.values()
        self.accepted = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            self.accepted |= {"position_ids", *TransformersKwargs.__annotations__}
        self.vocabulary = vocabulary(model)
        self.positions = most_positions(model)
        self._keys: set[str] | None = None

    def batch(self, key: Hashable, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a batch that the caller made: ids, mask and labels as int64, the labels last.

        Raises:
            ValueError: anything that the model would fail on or pass over; the batch, the key and the way out are named.
        """
        try:
            return self._checked({name: value for name, value in raw.items() if value is not None})
        except ValueError as error:
            raise ValueError(f"batch {key}, {error}") from None

    def _checked(self, found: dict[str, Any]) -> dict[str, Tensor]:
        for name, value in found.items():
            if name not in self.accepted and name != "token_type_ids":
                close = difflib.get_close_matches(str(name), sorted(self.accepted), n=1, cutoff=0.75)
                fix = f"rename it to {close[0]!r}" if close else "take it out of the batch"
                raise refusal(name, "a key", f"an argument of {self.name}", fix)
            check_dense(name, value)
        self._check_keys(set(found))
        ids = found["input_ids"] = token_rows(found["input_ids"])
        if found.keys() <= _TEXT:
            _check_range("input_ids", ids, self.vocabulary, "take the model's own tokenizer")
        if "attention_mask" in found:
            found["attention_mask"] = attention_mask(found["attention_mask"], ids)
        if "token_type_ids" in found:
            types = _integers("token_type_ids", found["token_type_ids"], ids.shape, "one for each token")
            if "token_type_ids" not in self.accepted:
                # Many tokenizers write zeros for models that have no types.
                if types.any():
                    raise refusal("token_type_ids", "numbers other than 0", f"no types in {self.name}", "take them out")
                del found["token_type_ids"]
        longest = ids.shape[1]
        if "position_ids" in found:
            positions, fix = found["position_ids"], "clamp those of the padding, .clamp(min=0)"
            # Of any number of rows: a model may take several kinds of positions.
            _integers("position_ids", positions, (*positions.shape[:-1], longest), "one for each token")
            longest = _check_range("position_ids", positions, None, fix) + 1
        self._check_length("input_ids", longest)
        given = found.pop("labels", None)
        if given is not None and self.labels is not None:
            found["labels"] = self._checked_labels(given, ids)
        return found

    def _check_keys(self, keys: set[str]) -> None:
        keys = keys - ({"token_type_ids"} - self.accepted)
        earlier = self._keys = keys if self._keys is None else self._keys
        if keys != earlier:
            name = min(keys ^ earlier)
            got = "a key that earlier batches lack" if name in keys else "no such key, which earlier batches have"
            raise refusal(name, got, "the same keys in all batches", "add it to every batch, or take it out of all")

    def _check_length(self, what: str, tokens: int) -> None:
        if tokens > self.positions:
            expected = f"at most {self.positions}, the positions of {self.name} (max_position_embeddings)"
            fix = "shorten the text or leave it out; raise model.config.max_position_embeddings if the model takes more"
            raise refusal(what, f"{tokens} tokens", expected, fix)

    def _checked_labels(self, labels: Tensor, ids: Tensor) -> Tensor:
        by_position = self.labels == "positions"
        shape = ids.shape if by_position else ids.shape[:1]
        if not has_integers(labels):
            fix = "pass indices of classes; predict_multi_label and predict_regression take other labels"
            raise refusal("labels", kind(labels), f"int64 of shape {tuple(shape)}", fix)
        if labels.shape != shape:
            each = "token (for one answer a prompt: tfb_ext.encode(examples, tokenizer))" if by_position else "row"
            fix = f"one label for each {each}, or none for unlabelled data"
            raise refusal("labels", kind(labels), f"shape {tuple(shape)}", fix)
        labels, fix = labels.long(), "count from 0, and leave the key out of all batches for unlabelled data"
        counted = labels[labels != IGNORED] if by_position else labels
        _check_range("labels", counted, self.classes, fix, f" or {IGNORED} where none is" if by_position else "")
        return labels

    def encoded(self, data: Encoded, rows: Encoded) -> None:
        """Check an encoded set, also one that was not made by ``encode``; ``rows`` are ``data.sequences()`` where it has any.

        Raises:
            ValueError: an item without tokens, too long or with tokens beyond the vocabulary, or a label that is no choice.
        """
        if data.targets is not None:
            raise refusal("targets", "the rows of sequences()", "the set of items", "pass what they were made of")
        if not is_integer(data.pad_id):
            raise refusal("pad_id", repr(data.pad_id), "a token", "the tokenizer's pad_token_id, or 0")
        most = len(data.choices)
        for number, label in enumerate(data.labels if self.labels is not None else ()):
            if label is not None and not (is_integer(label) and label in range(most)):
                expected = f"0 to {most - 1}, an index into the choices"
                raise refusal(f"item {number}", f"the label {label!r}", expected, "count from 0, None for unlabelled")
        for number, ids in enumerate(data.token_ids):
            self._check_tokens(f"item {number}", ids)
        for ids in [*(rows.targets or ()), *([data.choice_ids] if data.choice_ids is not None else ())]:
            self._check_tokens("choices", ids)
        for choices in [data.choice_ids, data.choice_tokens, *(data.item_choice_tokens or ())]:
            listed = [tuple(c) if isinstance(c, Sequence) else c for c in choices or ()]
            if len(set(listed)) < len(listed):
                raise refusal("choices", f"the tokens {listed!r}", "different ones", "take other choices")
        for number, ids in enumerate(rows.token_ids):
            self._check_length(f"item {number * len(data) // len(rows)}", len(ids))

    def _check_tokens(self, what: str, ids: Sequence[int]) -> None:
        whole = all(issubclass(found, Integral) and found is not bool for found in set(map(type, ids)))
        if not len(ids) or not whole or min(ids) < 0 or max(ids) >= self.vocabulary:
            expected = f"at least one, each from 0 to {self.vocabulary - 1}"
            raise refusal(what, f"the tokens {list(ids)!r}", expected, "take the model's own tokenizer")


def vocabulary(model: Any) -> int:
    """How many tokens the model has embeddings for; 2**31 where it does not say."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    return int(size or getattr(model.config.get_text_config(), "vocab_size", 0) or 2**31)


def most_positions(model: Any) -> int:
    """The most tokens of a row: what the configuration says, less where the table has rows for padding before position 0."""
    config = model.config.get_text_config()
    given = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT has the second name
    # XLNet's -1, or none: any number. Dynamic scaling stretches the positions to whatever length there is.
    stretched = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    most = given if isinstance(given, int) and given > 0 and not stretched else MOST_POSITIONS
    for name, module in model.named_modules():
        # RoBERTa and models like it: transformers 5.24, create_position_ids_from_input_ids, counts from padding_idx + 1.
        table = isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] == "position_embeddings"
        if table and module.padding_idx is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most


def token_rows(ids: Any) -> Tensor:
    """``input_ids`` as int64.

    Raises:
        ValueError: no integers of shape (rows, tokens), at least one of each.
    """
    if check_dense("input_ids", ids).dim() != 2 or not ids.numel() or not has_integers(ids):
        fix = "leave empty rows out, and pass what a tokenizer returns"
        raise refusal("input_ids", kind(ids), "int64 of shape (rows, tokens), at least one of each", fix)
    return ids.long()


def attention_mask(mask: Any, ids: Tensor) -> Tensor:
    """The mask of ``ids`` as int64.

    Raises:
        ValueError: another shape, numbers other than 0 and 1, or a row without a 1.
    """
    fix = "1 where a token is attended to, 0 for padding"
    if check_dense("attention_mask", mask).shape != ids.shape:
        raise refusal("attention_mask", kind(mask), f"shape {tuple(ids.shape)}, one number for each token", fix)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise refusal("attention_mask", "numbers other than 0 and 1", "0 or 1 for each token", fix)
    empty = (~mask.bool().any(dim=1)).nonzero()[:, 0]
    if len(empty):
        fix = "leave rows without a text out"
        raise refusal("attention_mask", f"0 alone in row {int(empty[0])}", "a 1 in every row", fix)
    return mask.long()


def _integers(name: str, values: Tensor, shape: Sequence[int], fix: str) -> Tensor:
    if tuple(values.shape) != tuple(shape) or not has_integers(values) or not values.numel():
        raise refusal(name, kind(values), f"integers of shape {tuple(shape)}", fix)
    return values


def _check_range(name: str, values: Tensor, end: int | None, fix: str, other: str = "") -> int:
    """The largest of the values, which must be 0 or more and, where there is an ``end``, below it."""
    low, high = (int(v) for v in values.long().aminmax()) if values.numel() else (0, 0)
    if low < 0 or (end is not None and high >= end):
        expected = "at least 0" if end is None else f"0 to {end - 1}{other}"
        raise refusal(name, low if low < 0 else high, expected, fix)
    return high
