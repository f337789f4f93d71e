"""Prompts with a closed set of answers: reading them, and turning them into padded batches.

Every item asks a causal language model one question whose answer is the next token: ``choices`` are the answers, and
the model's classes are the tokens of the choices; ``encode(..., score="sequence")`` takes answers of several tokens. For
a model with a classification head the choices are the names of its classes. Items come from JSON lines (``read_jsonl``) or from anything that the ``datasets`` package opens
(``read_dataset``).
"""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .checks import check_count, is_integer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Score = Literal["sequence", "token"]
FIELDS = ("prompt", "choices", "label")  # of a line of JSON
_TEXTS = 4096  # that are tokenised at a time


@dataclass(frozen=True)
class Example:
    """One item: the text before the answer, the possible answers and the index of the right one, None if unknown.

    A choice is compared with what the model says next, so its leading space belongs to it: ``" yes"`` after a prompt
    that ends in ``":"``.

    Raises:
        ValueError: empty prompt, fewer than two choices, an empty or repeated choice, half a character, a label that is no
            index.
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
        for name, text in [("prompt", self.prompt), *(("choices", choice) for choice in self.choices)]:
            _check_text(name, text)
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices: {list(self.choices)!r}; expected at least two, all different")
        if self.label is None:
            return
        if is_integer(self.label):
            object.__setattr__(self, "label", int(self.label))
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
        item_choice_tokens: the same for each item, where they are not the same for all; ``choice_tokens`` are the first's.
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
    item_choice_tokens: list[tuple[tuple[int, ...], ...]] | None = None

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ValueError: numbers of items or choices that differ, choices both as tokens and as sequences, or another score.
        """
        counts = {
            "targets": (self.targets, len(self)),
            "item_choice_tokens": (self.item_choice_tokens, len(self)),
            "choice_ids": (self.choice_ids, len(self.choices)),
            "choice_tokens": (self.choice_tokens, len(self.choices)),
        }
        for name, (values, count) in counts.items():
            if values is not None and len(values) != count:
                each = "choice" if count == len(self.choices) and name.startswith("choice") else "item"
                raise ValueError(f"{name}: got {len(values)} of them, expected {count}. Fix: one for each {each}")
        for item in self.item_choice_tokens or ():
            if len(item) != len(self.choices):
                raise ValueError(
                    f"item_choice_tokens: got {len(item)} choices, expected {len(self.choices)}. Fix: one for each choice"
                )
        if self.choice_ids is not None and self.choice_tokens is not None:
            raise ValueError(
                "choice_tokens: got them beside choice_ids, expected one of the two. Fix: choice_ids=None to score sequences"
            )
        if self.score not in get_args(Score):
            raise ValueError(f"score: got {self.score!r}, expected 'sequence' or 'token'. Fix: leave it out")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labelled(self) -> bool:
        """Whether every item has a label."""
        return None not in self.labels

    def select(self, indices: Iterable[int] | Tensor) -> Encoded:
        """The items at ``indices``, in that order.

        Raises:
            ValueError: a number that is no item's, or a mask.
        """
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        wrong = [i for i in chosen if not is_integer(i) or not -len(self) <= i < len(self)]
        if wrong:
            raise ValueError(
                f"indices: got {wrong[0]!r}, expected numbers of the {len(self)} items, from 0. Fix: mask.nonzero() gives those of a mask"
            )
        return replace(
            self,
            token_ids=[self.token_ids[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            targets=None if self.targets is None else [self.targets[i] for i in chosen],
            item_choice_tokens=None
            if self.item_choice_tokens is None
            else [self.item_choice_tokens[i] for i in chosen],
        )

    def sequences(self) -> Encoded:
        """One row for each item and choice, item-major: the prompt with the choice but for its last token, to score the choice."""
        assert self.choice_tokens is not None
        each = self.item_choice_tokens or [self.choice_tokens] * len(self)
        pairs = [(ids, choice) for ids, choices in zip(self.token_ids, each, strict=True) for choice in choices]
        return replace(
            self,
            token_ids=[[*ids, *choice[:-1]] for ids, choice in pairs],
            labels=[None] * len(pairs),
            choice_tokens=None,
            item_choice_tokens=None,
            targets=[choice for _, choice in pairs],
        )

    def choice_log_probabilities(self, logs: Tensor, lengths: Tensor) -> Tensor:
        """Log probabilities (..., N * C) of ``sequences``, of ``lengths`` (N * C) tokens -> (..., N, C), normalised among the
        choices of each of N items."""
        assert self.choice_tokens is not None
        if self.by_length:
            logs = logs / lengths
        return torch.log_softmax(logs.unflatten(-1, (-1, len(self.choice_tokens))), dim=-1)

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
        batch_size = check_count("batch_size", batch_size, "a count of items")
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
    """Prompts as the tokenizer makes them, special tokens included, and the tokens of each choice after its prompt.

    A choice's tokens are those that the tokenizer gives the joint text ``prompt + choice`` after the prompt's own. They are
    asked for item by item, since a vocabulary may write the same choice in other tokens after another prompt. A prompt that
    begins with the beginning-of-text token, as a rendered chat does, gets no second one.

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
        ValueError: no examples; examples with different choices; a prompt without tokens, longer than ``max_length``, or that
            ends in the end-of-text token; a prompt and a choice whose tokens merge; a choice without tokens or with the same
            tokens as another; ``score`` and ``head`` both, or ``by_length`` without ``score``. Without ``score`` also a choice
            that is not one token, or that is not the same one after every prompt. With ``head`` nothing is asked of the
            choices' tokens or of the prompts' last.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("no examples to encode; expected at least one")
    for number, example in enumerate(examples):
        if not isinstance(example, Example):
            raise ValueError(
                f"example {number}: got a {type(example).__name__}, expected a tfb_ext.Example. Fix: Example(prompt, choices, "
                "label), or read a file with read_jsonl or read_dataset"
            )
    if score is not None and score not in get_args(Score):
        raise ValueError(f"score={score!r}: expected 'sequence', 'token', or None for choices of one token")
    if head and score is not None:
        raise ValueError(f"score={score!r} with head=True: a classification head has no tokens to score; leave one out")
    if by_length and score is None:
        raise ValueError("by_length=True without score=: only sequences have lengths; add score='sequence'")
    if max_length is not None:
        max_length = check_count("max_length", max_length, "a count of tokens or None")
    choices = examples[0].choices
    for number, example in enumerate(examples):
        if example.choices != choices:
            raise ValueError(
                f"example {number} has the choices {list(example.choices)!r}, example 0 has {list(choices)!r}: all "
                "examples of a set share their choices; encode them as separate sets"
            )
    prompts = [example.prompt for example in examples]
    token_ids = [ids for some in _pieces(prompts, _TEXTS) for ids in _tokenise(tokenizer, some, head)]
    for number, ids in enumerate(token_ids):
        _check_length(number, ids, max_length)
        if not head:
            _check_end(number, ids, tokenizer)
    tokens = [] if head else _choice_tokens(prompts, token_ids, choices, tokenizer, single=score is None)
    differ = next((number for number, item in enumerate(tokens) if item != tokens[0]), None)
    if differ is not None and score is None:
        raise ValueError(
            f"examples 0 and {differ}: got the choices {list(choices)!r} as the tokens {_names(tokens[0], tokenizer)} after one "
            f"prompt and {_names(tokens[differ], tokenizer)} after the other, expected the same after all. Fix: end all prompts "
            "alike, such as in ':' with choices that begin with a space, or take score='sequence' (tfb: --score sequence)"
        )
    return Encoded(
        token_ids=token_ids,
        labels=[example.label for example in examples],
        choice_ids=None if head or score else tuple(choice[0] for choice in tokens[0]),
        choices=choices,
        pad_id=_pad_id(tokenizer),
        choice_tokens=None if score is None else tokens[0],
        item_choice_tokens=None if differ is None else tokens,
        score=score or "sequence",
        by_length=by_length,
    )


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a file of JSON objects, one a line.

    Fields: ``prompt`` (text), ``choices`` (list of texts), ``label`` (index of a choice, or its text; missing or null
    for an unlabelled item). Other fields and empty lines are passed over, but not one that looks like a misspelt ``label``.

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
            except RecursionError:
                raise ValueError(
                    f"{path}:{number}: objects or lists too deep within each other, expected one object"
                ) from None
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
    parts = [(field, form) for _, field, form, _ in string.Formatter().parse(prompt) if field is not None]
    fields = [field for field, _ in parts]
    for field, form in parts:
        if "{" in (form or ""):
            raise ValueError(
                f"prompt: got the format {form!r} of column {field!r}, expected none with columns in it. Fix: write it out"
            )
    for column in [*(fields or [prompt]), *([] if label is None else [label])]:
        if column not in dataset.column_names:
            raise ValueError(f"column {column!r} is not in {name}; expected one of {sorted(dataset.column_names)!r}")
    names = getattr(dataset.features[label], "names", None) if label is not None else None
    if choices is None:
        choices = names
    if choices is None:
        raise ValueError(f"choices: None, and {name} names no classes for the label {label!r}; pass choices=[...]")
    if names and isinstance(choices, list | tuple):
        bare = [str(choice).strip() for choice in choices]
        if bare != names and sorted(bare) == sorted(names):
            raise ValueError(
                f"choices: got {list(choices)!r}, expected the order of the label's classes, {names!r}, whose numbers the rows have. "
                "Fix: put the choices into that order"
            )
    examples = []
    for number, row in enumerate(dataset):
        try:
            text = _filled(prompt, fields, row) if fields else row[prompt]
            examples.append(_example(text, choices, None if label is None else _dataset_label(row[label])))
        except ValueError as error:
            raise ValueError(f"{name}, split {split}, row {number}: {error}") from error
    if not examples:
        raise ValueError(f"{name}, split {split}: no rows in it; expected at least one")
    return examples


def _parse_line(line: bytes) -> Example:
    record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    if not isinstance(record, dict):
        raise ValueError(f"{record!r}; expected an object with the fields prompt, choices and label")
    for field in ("prompt", "choices"):
        if field not in record:
            raise ValueError(f"{field}: missing; the fields are {sorted(record)!r}, expected prompt, choices and label")
    if "label" not in record:
        close = difflib.get_close_matches("label", [name.lower() for name in record], n=1, cutoff=0.8)
        if close:
            raise ValueError(
                f"label: missing, got a field {close[0]!r}, expected 'label'. Fix: rename or remove that field"
            )
    return _example(record["prompt"], record["choices"], record.get("label"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        for name in FIELDS:
            if sum(key == name for key, _ in pairs) > 1:
                raise ValueError(f"{name}: got more than one, expected one. Fix: leave one out")
    return record


def _filled(template: str, fields: Sequence[str], row: Mapping[str, Any]) -> str:
    for field in fields:
        value = row[field]
        if not _is_written(value):
            raise ValueError(
                f"column {field!r}: got {value!r}, expected a value for the template. Fix: leave the row out, or give it a text"
            )
    return template.format_map(row)


def _is_written(value: Any) -> bool:
    """Whether a value has a text: no bytes, and no missing value (None, or NaN as pandas writes it) anywhere in it."""
    if isinstance(value, list | tuple | dict):
        return all(map(_is_written, value.values() if isinstance(value, dict) else value))
    return not (value is None or isinstance(value, bytes | bytearray) or value != value)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: got {text[error.start : error.end]!r} at character {error.start}, half of a character, expected whole ones. "
            "Fix: write both halves of the emoji's \\u escape, or the character itself"
        ) from None


def _example(prompt: Any, choices: Any, label: Any) -> Example:
    if not isinstance(choices, (list, tuple)):
        raise ValueError(f"choices: {choices!r}; expected a list of texts")
    if isinstance(label, str):
        if label not in choices:
            raise ValueError(
                f"label: {label!r}; expected one of the choices {list(choices)!r}, spaces included, or its index as a number"
            )
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


def _pieces(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], as_it_is: bool = False) -> list[list[int]]:
    rows = [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    begin = None if as_it_is else getattr(tokenizer, "bos_token_id", None)
    return [ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids for ids in rows]


def _choice_tokens(
    prompts: Sequence[str],
    token_ids: Sequence[list[int]],
    choices: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    single: bool,
) -> list[tuple[tuple[int, ...], ...]]:
    """The tokens of each choice after each prompt, what the joint text has after the prompt's tokens; of one token if ``single``."""
    found: list[tuple[tuple[int, ...], ...]] = []
    known: dict[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = {}  # most items share theirs
    step = max(1, _TEXTS // len(choices))
    for start in range(0, len(prompts), step):
        some = range(start, min(start + step, len(prompts)))
        joint = iter(_tokenise(tokenizer, [prompts[n] + choice for n in some for choice in choices]))
        for number in some:
            ids, tokens = token_ids[number], []
            for choice in choices:
                whole = next(joint)
                if whole[: len(ids)] != ids:
                    raise ValueError(_merged(number, prompts[number], choice, ids, whole, tokenizer))
                tokens.append(tuple(whole[len(ids) :]))
            item = tuple(tokens)
            if item not in known:
                _check_choices(number, prompts[number], choices, item, tokenizer, single and not known)
                known[item] = item
            found.append(known[item])
    return found


def _merged(
    number: int, prompt: str, choice: str, ids: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Why the tokens of the prompt do not begin those of the joint text, and the way out."""
    same = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    stripped = prompt.rstrip()
    if len(ids) > len(bare) and ids[-len(bare) :] != list(bare):
        way = "switch off that the tokenizer adds a token after a text (add_eos_token, or its post-processor)"
    elif stripped and stripped != prompt and whole[: len(kept := _tokenise(tokenizer, [stripped])[0])] == kept:
        way = f"end the prompt without {prompt[len(stripped) :]!r} and begin the choices with it, {prompt[len(stripped) :] + choice!r}"
    else:
        way = "begin the choices with a space, or end the prompt otherwise, such as in ':'"
    return (
        f"example {number}: got the prompt's last tokens {tokenizer.convert_ids_to_tokens(ids[same:])!r} as "
        f"{tokenizer.convert_ids_to_tokens(whole[same:])!r} with the choice {choice!r} after them: they merge; expected a choice "
        f"that leaves the prompt's tokens as they are. Fix: {way}"
    )


def _check_choices(
    number: int,
    prompt: str,
    choices: Sequence[str],
    tokens: Sequence[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    single: bool,
) -> None:
    owner: dict[tuple[int, ...], str] = {}
    for choice, ids in zip(choices, tokens, strict=True):
        names = tokenizer.convert_ids_to_tokens(list(ids))
        if single and len(ids) != 1:
            # The same choice with or without its leading space, if that is one token after this prompt.
            other = choice[1:] if choice.startswith(" ") else f" {choice}"
            before, whole = _tokenise(tokenizer, [prompt])[0], _tokenise(tokenizer, [prompt + other])[0]
            known = bool(other.strip()) and whole[:-1] == before
            raise ValueError(
                f"choice {choice!r} is {len(ids)} tokens, {names!r}, after the prompt of example {number}; expected one. Try "
                f"{f'{other!r}, ' if known else ''}another word or letter that is one token, or score='sequence' (tfb: --score "
                "sequence), which takes any number"
            )
        if not ids:
            raise ValueError(
                f"choice {choice!r} has no tokens after the prompt of example {number}; expected at least one"
            )
        if ids in owner:
            same = f"token, {names[0]!r}" if single else f"tokens, {names!r}"
            raise ValueError(
                f"choices {owner[ids]!r} and {choice!r} are the same {same}, after the prompt of example {number}; choose texts "
                "with different tokens"
            )
        owner[ids] = choice


def _names(tokens: Sequence[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    return [list(tokenizer.convert_ids_to_tokens(list(ids))) for ids in tokens]


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
