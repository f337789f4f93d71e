"""Examples to token ids: the prompts, and the tokens of each choice after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ..checks import check_choice, check_count, kind
from ..errors import refusal
from .encoded import Encoded, Score
from .examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = 4096  # that are tokenised at a time
AS_SEQUENCES = "score='sequence' (tfb: --score sequence)"

ItemTokens = tuple[tuple[int, ...], ...]  # the tokens of each choice after one prompt


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
        score: None for choices of one token, whose probabilities are normalised among the choices alone. Otherwise choices
            of any number of tokens are scored as sequences. A token's probability is one of the whole vocabulary, given the
            prompt and the tokens of the choice before it. ``"sequence"``: for each sample the product over the choice's
            tokens, normalised among the choices; the average over samples is of these. ``"token"``: the product over the
            choice's tokens of the token's average over samples, normalised among the choices once; there is no distribution
            per sample then, and so no epistemic uncertainty.
        by_length: with ``score``, divide a choice's log probability by its number of tokens before it is normalised.

    Raises:
        ValueError: no examples, or of different choices; a prompt without tokens, too long, or that ends in the end-of-text
            token; a prompt and a choice whose tokens merge; a choice without tokens, or with those of another; ``score`` with ``head``, or
            ``by_length`` without ``score``. Without ``score`` also a choice that is not one token, the same after every prompt.
            ``head`` asks nothing of the choices' tokens and of the prompts' last.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("no examples to encode, expected at least one")
    if score is not None:
        check_choice("score", score, get_args(Score))
    if head and score is not None:
        raise ValueError(f"score={score!r} with head=True: a classification head has no tokens to score; leave one out")
    if by_length and score is None:
        raise ValueError("by_length=True without score=: only sequences have lengths; add score='sequence'")
    if max_length is not None:
        max_length = check_count("max_length", max_length, "a count of tokens or None")
    for number, example in enumerate(examples):
        if not isinstance(example, Example):
            fix = "Example(prompt, choices, label), or read a file with read_jsonl or read_dataset"
            raise refusal(f"example {number}", kind(example), "a tfb_ext.Example", fix)
        if example.choices != examples[0].choices:
            got, expected = (f"{list(e.choices)!r}" for e in (example, examples[0]))
            fix = "encode them as separate sets"
            raise refusal(f"example {number}", f"the choices {got}", f"those of example 0, {expected}", fix)
    words = _Words(tokenizer, examples[0].choices, head, single=score is None)
    prompts = [example.prompt for example in examples]
    token_ids = words.rows(prompts)
    for number, ids in enumerate(token_ids):
        words.check_prompt(number, ids, max_length)
    tokens = [] if head else words.after(prompts, token_ids)
    differ = next((number for number, item in enumerate(tokens) if item != tokens[0]), None)
    if differ is not None and score is None:
        one, other = ([words.names(ids) for ids in tokens[number]] for number in (0, differ))
        got = f"the choices {list(words.choices)!r} as the tokens {one} after one prompt and {other} after the other"
        fix = f"end all prompts alike, such as in ':' with choices that begin with a space, or take {AS_SEQUENCES}"
        raise refusal(f"examples 0 and {differ}", got, "the same after all", fix)
    # Any token will do under the mask, so a tokenizer that was never given a padding token is no reason to stop.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Encoded(
        token_ids=token_ids,
        labels=[example.label for example in examples],
        choice_ids=None if head or score else tuple(choice[0] for choice in tokens[0]),
        choices=words.choices,
        pad_id=next(token for token in pads if token is not None),
        choice_tokens=None if score is None else tokens[0],
        item_choice_tokens=None if differ is None else tokens,
        score=score or "sequence",
        by_length=by_length,
    )


@dataclass
class _Words:
    """A tokenizer, with the choices whose tokens are asked for; of one token each if ``single``."""

    tokenizer: PreTrainedTokenizerBase
    choices: tuple[str, ...]
    head: bool
    single: bool

    def rows(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text; a second beginning-of-text token is taken out, but for a classification head."""
        begin = None if self.head else getattr(self.tokenizer, "bos_token_id", None)
        rows: list[list[int]] = []
        for start in range(0, len(texts), TEXTS):
            rows += [list(ids) for ids in self.tokenizer(texts[start : start + TEXTS])["input_ids"]]
        return [ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids for ids in rows]

    def names(self, ids: Sequence[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(list(ids)))

    def check_prompt(self, number: int, ids: list[int], most: int | None) -> None:
        what = f"the prompt of example {number}"
        if not ids:
            raise refusal(what, "no tokens", "at least one", "leave the item out")
        if most is not None and len(ids) > most:
            fix = "shorten it, leave it out or raise max_length"
            raise refusal(what, f"{len(ids)} tokens", f"at most max_length={most}", fix)
        if not self.head and ids[-1] == self.tokenizer.eos_token_id:
            got = f"{self.tokenizer.eos_token!r} at its end, after which no answer follows"
            fix = "take it out of the prompt, or switch the tokenizer's add_eos_token off"
            raise refusal(what, got, "another end", fix)

    def after(self, prompts: Sequence[str], token_ids: Sequence[list[int]]) -> list[ItemTokens]:
        """The tokens of each choice after each prompt: what the joint text has after the prompt's tokens."""
        found: list[ItemTokens] = []
        known: dict[ItemTokens, ItemTokens] = {}  # most items share theirs
        step = max(1, TEXTS // len(self.choices))
        for number, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)):
            if number % step == 0:
                some = prompts[number : number + step]
                joint = iter(self.rows([text + choice for text in some for choice in self.choices]))
            tokens = []
            for choice in self.choices:
                whole = next(joint)
                if whole[: len(ids)] != ids:
                    raise self.merged(number, prompt, choice, ids, whole)
                tokens.append(tuple(whole[len(ids) :]))
            item = tuple(tokens)
            if item not in known:
                self.check_choices(number, prompt, item, self.single and not known)
            found.append(known.setdefault(item, item))
        return found

    def merged(self, number: int, prompt: str, choice: str, ids: list[int], whole: list[int]) -> ValueError:
        """Why the tokens of the prompt do not begin those of the joint text, and the way out."""
        same = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
        bare = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        stripped = prompt.rstrip()
        space = prompt[len(stripped) :]
        if len(ids) > len(bare) and ids[-len(bare) :] != list(bare):
            fix = "switch off that the tokenizer adds a token after a text (add_eos_token, or its post-processor)"
        elif stripped and space and whole[: len(kept := self.rows([stripped])[0])] == kept:
            fix = f"end the prompt without {space!r} and begin the choices with it, {space + choice!r}"
        else:
            fix = "begin the choices with a space, or end the prompt otherwise, such as in ':'"
        became = f"{self.names(whole[same:])!r} with the choice {choice!r} after them: they merge"
        got = f"the prompt's last tokens {self.names(ids[same:])!r} as {became}"
        return refusal(f"example {number}", got, "a choice that leaves the prompt's tokens as they are", fix)

    def check_choices(self, number: int, prompt: str, tokens: ItemTokens, single: bool) -> None:
        owner: dict[tuple[int, ...], str] = {}
        for choice, ids in zip(self.choices, tokens, strict=True):
            what = f"choice {choice!r} after the prompt of example {number}"
            if single and len(ids) != 1:
                # The same choice with or without its leading space, if that is one token after this prompt.
                other = choice[1:] if choice.startswith(" ") else f" {choice}"
                before, whole = self.rows([prompt, prompt + other])
                known = f"{other!r}, " if other.strip() and whole[:-1] == before else ""
                fix = f"{known}another word or letter that is one token, or {AS_SEQUENCES}, which takes any number"
                raise refusal(what, f"{len(ids)} tokens, {self.names(ids)!r}", "one", fix)
            if not ids:
                raise refusal(what, "no tokens", "at least one", "take another text")
            if ids in owner:
                got = f"the same tokens as {owner[ids]!r}, {self.names(ids)!r}"
                raise refusal(what, got, "different ones", "take other texts")
            owner[ids] = choice
