"""Prompts with a closed set of answers: reading them, and turning them into padded batches.

Every item asks a causal language model one question whose answer is the next token: ``choices`` are the answers, and
the model's classes are the tokens of the choices; ``encode(..., score="sequence")`` takes answers of several tokens. For
a model with a classification head the choices are the names of its classes. Items come from JSON lines (``read_jsonl``) or from anything that the ``datasets`` package opens
(``read_dataset``).
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Score = Literal["sequence", "token"]


@dataclass(frozen=True)
class Example:
    """One item: the text before the answer, the possible answers and the index of the right one, None if unknown.

    A choice is compared with what the model says next, so its leading space belongs to it: ``" yes"`` after a prompt
    that ends in ``":"``.

    Raises:
        ValueError: empty prompt, fewer than two choices, an empty or repeated choice, a label that is no index.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt:
            raise ValueError(f"prompt: {self.prompt!r}; expected a text that is not empty")
        if isinstance(self.choices, str) or not all(isinstance(choice, str) and choice for choice in self.choices):
            raise ValueError(f"choices: {self.choices!r}; expected a sequence of texts, none of them empty")
        object.__setattr__(self, "choices", tuple(self.choices))
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices: {list(self.choices)!r}; expected at least two, all different")
        if self.label is None:
            return
        if type(self.label) is not int or not 0 <= self.label < len(self.choices):
            raise ValueError(
                f"label: {self.label!r}; expected an index from 0 to {len(self.choices) - 1} into the choices "
                f"{list(self.choices)!r}, or None for an unlabelled item"
            )


@dataclass(frozen=True)
class Encoded:
    """Items as token ids, in the order they came, nothing padded.

    Attributes:
        token_ids: the prompt's tokens, one list an item.
        labels: the index into ``choices`` of the right answer, one an item, None where unknown.
        choice_ids: the token of each choice (C of them): the rows of the language model's head that are the classes.
            None for a classification head, whose rows are the classes.
        choices: their texts.
        pad_id: the token that fills a batch up; always masked.
        choice_tokens: the tokens of each choice where they are scored as sequences, and ``choice_ids`` is None.
        score: what a sequence's probability is averaged from, see ``encode``.
        by_length: whether a sequence's log probability is divided by its number of tokens.
        targets: the tokens to score after the last positions of each row, in what ``sequences`` returns.
    """

    token_ids: list[list[int]]
    labels: list[int | None]
    choice_ids: tuple[int, ...] | None
    choices: tuple[str, ...]
    pad_id: int
    choice_tokens: tuple[tuple[int, ...], ...] | None = None
    score: Score = "sequence"
    by_length: bool = False
    targets: list[tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labelled(self) -> bool:
        """Whether every item has a label."""
        return None not in self.labels

    def select(self, indices: Iterable[int]) -> Encoded:
        """The items at ``indices``, in that order."""
        chosen = list(indices)
        return replace(
            self,
            token_ids=[self.token_ids[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            targets=None if self.targets is None else [self.targets[i] for i in chosen],
        )

    def sequences(self) -> Encoded:
        """One row for each item and choice, item-major: the prompt with the choice but for its last token, to score the choice."""
        assert self.choice_tokens is not None
        pairs = [(ids, choice) for ids in self.token_ids for choice in self.choice_tokens]
        return replace(
            self,
            token_ids=[[*ids, *choice[:-1]] for ids, choice in pairs],
            labels=[None] * len(pairs),
            choice_tokens=None,
            targets=[choice for _, choice in pairs],
        )

    def choice_log_probabilities(self, logs: Tensor) -> Tensor:
        """Log probabilities (..., N * C) of ``sequences`` -> (..., N, C), normalised among the choices of each of N items."""
        assert self.choice_tokens is not None
        logs = logs.unflatten(-1, (-1, len(self.choice_tokens)))
        if self.by_length:
            logs = logs / torch.tensor([len(choice) for choice in self.choice_tokens], device=logs.device)
        return torch.log_softmax(logs, dim=-1)

    def labels_tensor(self, device: str | torch.device = "cpu") -> Tensor:
        """The labels, (N,) int64.

        Raises:
            ValueError: an item has none.
        """
        unlabelled = [i for i, label in enumerate(self.labels) if label is None]
        if unlabelled:
            raise ValueError(
                f"{len(unlabelled)} of {len(self)} items have no label, the first is item {unlabelled[0]}; label them "
                "or leave them out with select()"
            )
        return torch.tensor(self.labels, dtype=torch.int64, device=device)

    def collate(
        self, indices: Sequence[int], device: str | torch.device = "cpu", *, left: bool = True
    ) -> dict[str, Tensor]:
        """The items at ``indices`` as one padded batch of B rows, as long as its longest item (L tokens).

        Args:
            left: pad on the left, so that the last column is every item's last token and the answer is read there. An
                encoder, which reads its first column, wants the padding on the right.

        Returns:
            ``input_ids``, ``attention_mask``: (B, L) int64 on ``device``, arguments of the model.
            ``position_ids``: likewise, with padding on the left only. They count from each item's own first token:
            models that count from the padding (GPT-2) would be wrong without. With padding on the right every model
            counts right by itself, and some (RoBERTa) do not count from 0.
            ``index``: (B,) int64 on the CPU, ``indices`` themselves. Take it out before the call of the model.
        """
        input_ids, mask = pad_rows([self.token_ids[i] for i in indices], self.pad_id, left=left)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if left:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return {**batch, "index": torch.tensor(indices, dtype=torch.int64)}

    def groups(self, batch_size: int) -> list[list[int]]:
        """Indices of the items of each batch: every item once, ``batch_size`` at a time (fewer in the last).

        Items of similar length share a batch, which wastes little on padding; the longest come first, so that a batch
        size that memory does not allow fails at once.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        order = sorted(range(len(self)), key=lambda i: -len(self.token_ids[i]))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def batches(
        self, batch_size: int, device: str | torch.device = "cpu", *, left: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """The ``groups`` as padded batches, see ``collate``."""
        for group in self.groups(batch_size):
            yield self.collate(group, device, left=left)


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    head: bool = False,
    score: Score | None = None,
    by_length: bool = False,
) -> Encoded:
    """Tokenise prompts (with the tokenizer's special tokens) and choices (without: each is what follows a prompt).

    Args:
        max_length: the most tokens a prompt may have; None for no limit. Nothing is ever cut.
        head: the model has a classification head, whose classes the choices name in its order; they need not be tokens.
        score: score choices of any number of tokens as sequences. The probability of a token is one of the whole
            vocabulary, given the prompt and the tokens of the choice before it. ``"sequence"``: for each sample the product
            over the choice's tokens, normalised among the choices; the average over samples is of these, since all tokens of
            one answer come from one sampled model. ``"token"``: the product over the choice's tokens of the token's average
            over samples, normalised among the choices once; there is no distribution per sample then, and so no epistemic
            uncertainty. None asks for choices of one token, whose probabilities are normalised among the choices alone.
        by_length: with ``score``, divide a choice's log probability by its number of tokens before it is normalised.

    Raises:
        ValueError: no examples; examples with different choices; a choice that is not one token (without ``score``) or none,
            or the same tokens as another; ``score`` and ``head`` both, or ``by_length`` without ``score``; a prompt without tokens or longer than ``max_length``; one that ends in the end-of-text token
            (unless ``head``).
    """
    if not examples:
        raise ValueError("no examples to encode; expected at least one")
    if score is not None and score not in get_args(Score):
        raise ValueError(f"score={score!r}: expected 'sequence', 'token', or None for choices of one token")
    if head and score is not None:
        raise ValueError(f"score={score!r} with head=True: a classification head has no tokens to score; leave one out")
    if by_length and score is None:
        raise ValueError("by_length=True without score=: only sequences have lengths; add score='sequence'")
    choices = examples[0].choices
    for number, example in enumerate(examples):
        if example.choices != choices:
            raise ValueError(
                f"example {number} has the choices {list(example.choices)!r}, example 0 has {list(choices)!r}: all "
                "examples of a set share their choices; encode them as separate sets"
            )
    token_ids = [list(tokenizer(example.prompt)["input_ids"]) for example in examples]
    for number, ids in enumerate(token_ids):
        _check_length(number, ids, max_length)
        if not head:
            _check_end(number, ids, tokenizer)
    return Encoded(
        token_ids=token_ids,
        labels=[example.label for example in examples],
        choice_ids=None if head or score else _choice_ids(choices, tokenizer),
        choices=choices,
        pad_id=_pad_id(tokenizer),
        choice_tokens=None if score is None else _choice_tokens(choices, tokenizer),
        score=score or "sequence",
        by_length=by_length,
    )


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a file of JSON objects, one a line.

    Fields: ``prompt`` (text), ``choices`` (list of texts), ``label`` (index of a choice, or its text; missing or null
    for an unlabelled item). Other fields and empty lines are passed over.

    Raises:
        ValueError: a line that is none of that, as ``file:line: field: value; what was expected``; a file without any.
    """
    path = Path(path)
    examples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                examples.append(_parse_line(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not examples:
        raise ValueError(f"{path}: no examples in it; expected one JSON object a line")
    return examples


def read_dataset(
    name: str | Path,
    split: str,
    *,
    prompt: str,
    label: str | None = None,
    choices: Sequence[str] | None = None,
    **options: Any,
) -> list[Example]:
    """Read examples through the ``datasets`` package.

    Args:
        name: a data set's name on the hub, a builder (``"json"``, ``"csv"``, with ``data_files=...``), or a folder
            written by ``save_to_disk``.
        split: the split's name; slices such as ``"train[:200]"`` work for everything but ``save_to_disk`` folders.
        prompt: the column with the prompt, or a template over columns: ``"{premise} Therefore, {hypothesis}?"``.
        label: the column with the answer: an index into ``choices`` (true is 1, and -1, the hub's mark of a withheld
            label, is None) or the text of a choice. None for unlabelled items.
        choices: the answers. May be left out where the label column knows its class names.
        options: further arguments of ``datasets.load_dataset``.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: no such column or split, no choices, no rows, or a row that makes no example (its number is named).
    """
    dataset = _load_dataset(str(name), split, options)
    fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
    for column in [*(fields or [prompt]), *([] if label is None else [label])]:
        if column not in dataset.column_names:
            raise ValueError(f"column {column!r} is not in {name}; expected one of {sorted(dataset.column_names)!r}")
    if choices is None:
        choices = getattr(dataset.features[label], "names", None) if label is not None else None
        if choices is None:
            raise ValueError(f"choices: None, and {name} names no classes for the label {label!r}; pass choices=[...]")
    examples = []
    for number, row in enumerate(dataset):
        text = prompt.format_map(row) if fields else row[prompt]
        try:
            examples.append(_example(text, choices, None if label is None else _dataset_label(row[label])))
        except ValueError as error:
            raise ValueError(f"{name}, split {split}, row {number}: {error}") from error
    if not examples:
        raise ValueError(f"{name}, split {split}: no rows in it; expected at least one")
    return examples


def _parse_line(line: bytes) -> Example:
    record = json.loads(line.decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError(f"{record!r}; expected an object with the fields prompt, choices and label")
    for field in ("prompt", "choices"):
        if field not in record:
            raise ValueError(f"{field}: missing; the fields are {sorted(record)!r}, expected prompt, choices and label")
    return _example(record["prompt"], record["choices"], record.get("label"))


def _example(prompt: Any, choices: Any, label: Any) -> Example:
    if not isinstance(choices, (list, tuple)):
        raise ValueError(f"choices: {choices!r}; expected a list of texts")
    if isinstance(label, str):
        if label not in choices:
            raise ValueError(f"label: {label!r}; expected one of the choices {list(choices)!r}, spaces included")
        label = choices.index(label)
    return Example(prompt, tuple(choices), label)


def _dataset_label(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return None if value == -1 else value


def _load_dataset(name: str, split: str, options: Mapping[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("read_dataset needs the package datasets: pip install datasets") from error
    saved = [Path(name) / file for file in ("dataset_dict.json", "state.json")]
    if not any(file.is_file() for file in saved):
        return datasets.load_dataset(name, split=split, **options)
    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"split {split!r} is not in {name}; expected one of {sorted(loaded)!r}")
    return loaded[split]


def _check_length(number: int, ids: list[int], max_length: int | None) -> None:
    if not ids:
        raise ValueError(f"example {number}: its prompt has no tokens; expected at least one")
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"example {number}: its prompt has {len(ids)} tokens, more than max_length={max_length}; shorten it, "
            "leave it out or raise max_length"
        )


def _check_end(number: int, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    if ids[-1] == tokenizer.eos_token_id:
        raise ValueError(
            f"example {number}: its prompt ends in {tokenizer.eos_token!r}, after which no answer follows; take it "
            "out of the prompt, or switch the tokenizer's add_eos_token off"
        )


def _choice_ids(choices: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    owner: dict[int, str] = {}
    for choice in choices:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            other = choice[1:] if choice.startswith(" ") else f" {choice}"
            raise ValueError(
                f"choice {choice!r} is {len(ids)} tokens, {tokenizer.convert_ids_to_tokens(ids)!r}; expected one. Try "
                f"{other!r}, another word or letter that is one token, or score='sequence' (tfb: --score sequence), which takes any number"
            )
        if ids[0] in owner:
            token = tokenizer.convert_ids_to_tokens(ids)[0]
            raise ValueError(
                f"choices {owner[ids[0]]!r} and {choice!r} are the same token, {token!r}; choose texts with different "
                "tokens"
            )
        owner[ids[0]] = choice
    return tuple(owner)


def _choice_tokens(choices: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    owner: dict[tuple[int, ...], str] = {}
    for choice in choices:
        ids = tuple(tokenizer(choice, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"choice {choice!r} has no tokens; expected at least one")
        if ids in owner:
            raise ValueError(
                f"choices {owner[ids]!r} and {choice!r} are the same tokens, {list(ids)}; choose different texts"
            )
        owner[ids] = choice
    return tuple(owner)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids of B rows as one batch, as long as the longest (L tokens), and its attention mask: both (B, L) int64."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        input_ids[number, where] = torch.tensor(row)
        mask[number, where] = 1
    return input_ids, mask


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any token will do under the mask, so a tokenizer that was never given a padding token is no reason to stop.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
