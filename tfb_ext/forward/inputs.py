"""Data as a model takes it: what every batch and every encoded set is checked for, once, before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from ..checks import is_dense, is_integer
from ..data import Encoded

IGNORED = -100  # a label that is not counted
MOST_POSITIONS = 2**31  # of a model that names no limit
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
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
        embedding = model.get_input_embeddings()
        self.vocabulary = int(
            getattr(embedding, "num_embeddings", 0) or getattr(model.config.get_text_config(), "vocab_size", 0) or 2**31
        )
        self.positions = most_positions(model)
        self._keys: set[str] | None = None

    def batch(self, key: Hashable, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a batch of the caller's own: ids, mask and labels as int64, the labels last.

        Raises:
            ValueError: anything that the model would fail on or pass over; the batch, the key and the way out are named.
        """
        found = {name: value for name, value in raw.items() if value is not None}
        for name, value in found.items():
            if name not in self.accepted and name != "token_type_ids":
                close = difflib.get_close_matches(str(name), sorted(self.accepted), n=1, cutoff=0.75)
                way = f"rename it to {close[0]!r}" if close else "take it out of the batch"
                _refuse(key, name, "a key", f"an argument of {self.name}", way)
            if not isinstance(value, Tensor):
                _refuse(
                    key,
                    name,
                    f"a {type(value).__name__}",
                    "a tensor",
                    "torch.as_tensor(...), or take it out of the batch",
                )
            if not is_dense(value):
                _refuse(key, name, _storage(value), "a dense tensor with data", ".to_dense(), or load its data first")
        self._check_keys(key, set(found))
        ids = found["input_ids"]
        if ids.dim() != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
            _refuse(
                key,
                "input_ids",
                _kind(ids),
                "int64 of shape (rows, tokens), at least one of each",
                "leave empty batches out, and pass token ids as torch.int64",
            )
        shape = tuple(ids.shape)
        ids = found["input_ids"] = ids.long()
        if found.keys() <= _TEXT:
            self._check_range(key, "input_ids", ids, self.vocabulary, "take the model's own tokenizer")
        if "attention_mask" in found:
            found["attention_mask"] = _mask(key, found["attention_mask"], shape)
        types = found.get("token_type_ids")
        if types is not None:
            if types.shape != ids.shape or types.dtype not in _INTEGERS:
                _refuse(key, "token_type_ids", _kind(types), f"integers of shape {shape}", "one for each token")
            if "token_type_ids" not in self.accepted:
                # Many tokenizers write zeros for models that have no types.
                if types.any():
                    _refuse(
                        key,
                        "token_type_ids",
                        "numbers other than 0",
                        f"none: {self.name} has no types",
                        "take them out",
                    )
                del found["token_type_ids"]
        self._check_positions(key, found, shape)
        given = found.pop("labels", None)
        if given is not None and self.labels is not None:
            found["labels"] = self._checked_labels(key, given, shape)
        return found

    def encoded(self, data: Encoded, rows: Encoded) -> None:
        """Check an encoded set, also one that was not made by ``encode``; ``rows`` are ``data.sequences()`` where it has any.

        Raises:
            ValueError: an item without tokens, too long or with tokens beyond the vocabulary, or a label that is no choice.
        """
        if len(data.labels) != len(data):
            raise ValueError(
                f"labels: got {len(data.labels)} of them, expected {len(data)}, one for each item. Fix: None for an unlabelled "
                "item"
            )
        if data.targets is not None:
            raise ValueError(
                "targets: got the rows of sequences(), expected the set of items. Fix: pass the set that they were made of"
            )
        if not is_integer(data.pad_id):
            raise ValueError(f"pad_id: got {data.pad_id!r}, expected a token. Fix: the tokenizer's pad_token_id, or 0")
        if self.labels is not None:
            for number, label in enumerate(data.labels):
                if label is not None and not (is_integer(label) and 0 <= label < len(data.choices)):
                    raise ValueError(
                        f"item {number}: got the label {label!r}, expected 0 to {len(data.choices) - 1}, an index into the "
                        "choices. Fix: count from 0, and None for an unlabelled item"
                    )
        for number, ids in enumerate(data.token_ids):
            self._check_tokens(f"item {number}", ids)
        for ids in [*(rows.targets or ()), *([data.choice_ids] if data.choice_ids is not None else ())]:
            self._check_tokens("choices", ids)
        for choices in [data.choice_ids, data.choice_tokens, *(data.item_choice_tokens or ())]:
            listed = [tuple(c) if isinstance(c, Sequence) else c for c in choices or ()]
            if len(set(listed)) < len(listed):
                raise ValueError(f"choices: got the tokens {listed!r}, expected different ones. Fix: other choices")
        for number, ids in enumerate(rows.token_ids):
            if len(ids) > self.positions:
                raise ValueError(f"item {number * len(data) // len(rows)}: {self._too_long(len(ids))}")

    def _check_tokens(self, what: str, ids: Sequence[int]) -> None:
        whole = all(issubclass(kind, Integral) and kind is not bool for kind in set(map(type, ids)))
        if not len(ids) or not whole or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(
                f"{what}: got the tokens {list(ids)!r}, expected at least one, each from 0 to {self.vocabulary - 1}. Fix: take the "
                "model's own tokenizer"
            )

    def _check_keys(self, key: Hashable, keys: set[str]) -> None:
        keys = keys - {"token_type_ids"} if "token_type_ids" not in self.accepted else keys
        if self._keys is None:
            self._keys = keys
        if keys != self._keys:
            name = sorted(keys ^ self._keys)[0]
            got = "a key that earlier batches lack" if name in keys else "no such key, which earlier batches have"
            _refuse(key, name, got, "the same keys in all batches", "add it to every batch, or take it out of all")

    def _check_range(self, key: Hashable, name: str, values: Tensor, end: int, way: str) -> None:
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high >= end:
            _refuse(key, name, low if low < 0 else high, f"0 to {end - 1}", way)

    def _check_positions(self, key: Hashable, found: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        longest, positions = shape[1], found.get("position_ids")
        if positions is not None:
            if positions.dtype not in _INTEGERS or positions.shape[-1:] != shape[1:] or not positions.numel():
                _refuse(key, "position_ids", _kind(positions), f"integers of shape {shape}", "one for each token")
            low, high = (int(v) for v in positions.aminmax())
            if low < 0:
                _refuse(key, "position_ids", low, "at least 0", "clamp those of the padding, .clamp(min=0)")
            longest = high + 1
        if longest > self.positions:
            raise ValueError(f"batch {key}, input_ids: {self._too_long(longest)}")

    def _too_long(self, tokens: int) -> str:
        return (
            f"got {tokens} tokens, expected at most {self.positions}, the positions of {self.name} (max_position_embeddings). "
            "Fix: shorten the text or leave it out; where the model takes more, raise model.config.max_position_embeddings"
        )

    def _checked_labels(self, key: Hashable, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
        expected = shape if self.labels == "positions" else shape[:1]
        what = "one for each token" if self.labels == "positions" else "one for each row"
        if labels.dtype not in _INTEGERS:
            _refuse(
                key,
                "labels",
                _kind(labels),
                f"int64 of shape {expected}, {what}",
                "pass indices of classes; several labels an item or targets of a regression go to predict_multi_label and "
                "predict_regression",
            )
        if tuple(labels.shape) != expected:
            way = f"labels of {self.name} are {what}; leave them out for unlabelled data"
            if self.labels == "positions":
                way += ", or take tfb_ext.encode(examples, tokenizer) for one answer a prompt"
            _refuse(key, "labels", _kind(labels), f"shape {expected}", way)
        labels = labels.long()
        counted = labels[labels != IGNORED] if self.labels == "positions" else labels
        if counted.numel():
            skipped = f" or {IGNORED} where none is" if self.labels == "positions" else ""
            way = "count from 0, and leave the key out of all batches for unlabelled data"
            low, high = (int(v) for v in counted.aminmax())
            if low < 0 or high >= self.classes:
                _refuse(key, "labels", low if low < 0 else high, f"0 to {self.classes - 1}{skipped}", way)
        return labels


def most_positions(model: Any) -> int:
    """The most tokens of a row: what the configuration says, less where the table has rows for padding before position 0."""
    config = model.config.get_text_config()
    given = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT's name is the other
    # XLNet's -1, or none: any number. Dynamic scaling stretches the positions to whatever length there is.
    stretched = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    most = given if isinstance(given, int) and given > 0 and not stretched else MOST_POSITIONS
    for name, module in model.named_modules():
        # RoBERTa and its kin: transformers 5.24, create_position_ids_from_input_ids, counts from padding_idx + 1.
        table = isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] == "position_embeddings"
        if table and module.padding_idx is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most


def _mask(key: Hashable, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) != shape:
        _refuse(
            key, "attention_mask", _kind(mask), f"shape {shape}", "one number for each token, 1 where it is attended to"
        )
    made = mask.long()
    if not bool(((mask == 0) | (mask == 1)).all()):
        _refuse(
            key,
            "attention_mask",
            "numbers other than 0 and 1",
            "0 or 1 for each token",
            "1 where a token is attended to",
        )
    empty = (made.sum(dim=1) == 0).nonzero()[:, 0]
    if len(empty):
        _refuse(
            key,
            "attention_mask",
            f"0 alone in row {int(empty[0])}",
            "a 1 in every row",
            "leave rows without a text out",
        )
    return made


def _storage(tensor: Tensor) -> str:
    layout = str(tensor.layout).removeprefix("torch.")
    return "a tensor without data (meta)" if tensor.is_meta else f"a tensor of layout {layout}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _refuse(key: Hashable, name: str, got: object, expected: str, way: str) -> NoReturn:
    raise ValueError(f"batch {key}, {name}: got {got}, expected {expected}. Fix: {way}")
