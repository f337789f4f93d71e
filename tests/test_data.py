from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_fakes import bpe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tfb_ext.data import Encoded, Example, encode, read_dataset, read_jsonl

CHOICES = (" no", " yes")


def make_tokenizer(template: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    vocabulary, merges = bpe(["Ġyes", "Ġno"])
    inner = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [tuple(m.split(" ")) for m in merges])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **({"eos_token": "<|end|>"} | special))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def examples(*prompts: str) -> list[Example]:
    return [Example(prompt, CHOICES, number % 2) for number, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets", reason="read_dataset needs the package datasets")
    rows = {"premise": ["a", "b", "c"], "hypothesis": ["x", "y", "z"], "label": [1, 0, -1]}
    rows["flag"], rows["answer"] = [True, False, True], [" yes", " no", " yes"]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("premise", "hypothesis", "answer")}
        | {"label": datasets.ClassLabel(names=["bad", "good"]), "flag": datasets.Value("bool")}
    )
    folder = tmp_path_factory.mktemp("data")
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(folder / "one")
    datasets.DatasetDict({"dev": table}).save_to_disk(folder / "many")
    return folder


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


class TestExample:
    def test_is_a_value(self) -> None:
        example = Example("a", [" no", " yes"], 1)  # type: ignore[arg-type]
        assert example == Example("a", CHOICES, 1) and hash(example) == hash(Example("a", CHOICES, 1))
        with pytest.raises(FrozenInstanceError):
            example.label = 0  # type: ignore[misc]

    def test_labels_may_be_integers_of_any_library(self) -> None:
        example = Example("a", CHOICES, np.int64(1))
        assert example == Example("a", CHOICES, 1) and type(example.label) is int

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("", CHOICES, 0), "prompt: got ''"),
            ((None, CHOICES, 0), "prompt: got None"),
            (("a", ("x",), 0), r"choices: got \['x'\], expected at least two"),
            (("a", ("x", "y", "x"), 0), r"choices: got \['x', 'y', 'x'\].*all different"),
            (("a", ("x", ""), 0), "choices: got '', expected a text that is not empty"),
            (("a", ("x", 1), 0), "choices: got 1"),
            (("a", "xy", 0), "choices: got 'xy', expected a list of texts"),
            (("a", CHOICES, 2), "label: got 2, expected an index from 0 to 1"),
            (("a", CHOICES, -1), "label: got -1"),
            (("a", CHOICES, True), "label: got True"),
            (("a", CHOICES, 1.0), "label: got 1.0"),
            (("a", CHOICES, " yes"), "label: got ' yes'"),
            (("a", CHOICES, np.bool_(True)), "label: got .*True"),
            (("a", CHOICES, np.int64(2)), "label: got 2"),
            (("a \ud83d:", CHOICES, 0), r"prompt: got '\\ud83d' at character 2, half of a character.*Fix"),
            (("a", (" no", " \udc4d"), 0), r"choices: got '\\udc4d' at character 1, half"),
        ],
    )
    def test_refuses(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Example(*arguments)


class TestEncode:
    def test_keeps_items_in_order_and_reads_the_next_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        items = [Example("longer prompt:", CHOICES, 1), Example("a:", CHOICES), Example("bc:", CHOICES, 0)]
        encoded = encode(items, tokenizer)
        assert [tokenizer.decode(ids) for ids in encoded.token_ids] == [item.prompt for item in items]
        assert encoded.labels == [1, None, 0] and not encoded.labelled
        assert [tokenizer.decode([token]) for token in encoded.choice_ids] == list(CHOICES)
        for item, ids in zip(items, encoded.token_ids, strict=True):
            for choice, token in zip(CHOICES, encoded.choice_ids, strict=True):
                assert tokenizer(item.prompt + choice).input_ids == [*ids, token]

    def test_special_tokens_belong_to_prompts_only(self) -> None:
        beginning = make_tokenizer("<|end|> $A")
        encoded, plain = encode(examples("ab"), beginning), encode(examples("ab"), make_tokenizer())
        assert encoded.token_ids == [[0, *plain.token_ids[0]]] and encoded.choice_ids == plain.choice_ids

    def test_padding_token_falls_back(self) -> None:
        assert encode(examples("a"), make_tokenizer(pad_token="b")).pad_id == make_tokenizer().convert_tokens_to_ids(
            "b"
        )
        assert encode(examples("a"), make_tokenizer(eos_token="c")).pad_id == make_tokenizer().convert_tokens_to_ids(
            "c"
        )
        bare = make_tokenizer()
        bare.eos_token = None
        assert encode(examples("a"), bare).pad_id == 0

    def test_head_takes_any_class_names(self) -> None:
        items = [Example("a", ("bad film", "good film"), 1)]
        encoded = encode(items, make_tokenizer("$A <|end|>"), head=True)
        assert encoded.choice_ids is None and encoded.choices == ("bad film", "good film")
        assert encoded.token_ids[0][-1] == 0  # an encoder's closing token belongs there

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([], "no examples"),
            (
                [Example("a", CHOICES), Example("a", (" yes", " no"))],
                "example 1: got the choices .*expected those of example 0",
            ),
            (
                [Example("a", (" yes", " maybe"))],
                r"choice ' maybe' after .*: got 6 tokens, \['Ġ', 'm', .*Fix: another word",
            ),
            ([Example("a", ("yes", " no"))], r"choice 'yes' after .*: got 3 tokens, \['y', 'e', 's'\].*Fix: ' yes'"),
        ],
    )
    def test_refuses(self, tokenizer: PreTrainedTokenizerFast, items: list[Example], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            encode(items, tokenizer)

    def test_refuses_choices_of_one_token(self) -> None:
        from tokenizers import normalizers

        lower = make_tokenizer()
        lower.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(ValueError, match=r"choice ' Yes' after .*: got the same tokens as ' yes', \['Ġyes'\]"):
            encode([Example("a", (" yes", " Yes"))], lower)

    def test_refuses_long_prompts_and_cuts_none(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert encode(examples("abc"), tokenizer, max_length=3).token_ids == [tokenizer("abc").input_ids]
        with pytest.raises(ValueError, match="the prompt of example 1: got 4 tokens, expected at most max_length=3"):
            encode(examples("abc", "abcd"), tokenizer, max_length=3)

    @pytest.mark.parametrize("value", [0, -1, True, 3.0, "3"])
    def test_max_length_is_checked(self, tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
        assert len(encode(examples("abc"), tokenizer, max_length=np.int64(3))) == 1
        with pytest.raises(ValueError, match="max_length is .*, expected a count of tokens"):
            encode(examples("abc"), tokenizer, max_length=value)

    def test_refuses_what_is_no_example(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert len(encode(iter(examples("a", "b")), tokenizer)) == 2  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="example 1: got a str, expected a tfb_ext.Example"):
            encode([*examples("a"), "b"], tokenizer)  # type: ignore[list-item]

    def test_refuses_an_appended_end_token(self) -> None:
        with pytest.raises(ValueError, match="the prompt of example 0: got '<|end|>' at its end.*add_eos_token"):
            encode(examples("a"), make_tokenizer("$A <|end|>"))

    def test_refuses_a_prompt_without_tokens(self) -> None:
        from tokenizers import normalizers

        stripping = make_tokenizer()
        stripping.backend_tokenizer.normalizer = normalizers.Strip()
        with pytest.raises(ValueError, match="the prompt of example 0: got no tokens"):
            encode([Example("  ", ("a", "b"))], stripping)


class TestEncoded:
    SET = Encoded([[5, 6, 7], [8], [9, 10]], [0, 1, None], (1, 2), CHOICES, pad_id=3)

    def test_select(self) -> None:
        chosen = self.SET.select([2, 0])
        assert (chosen.token_ids, chosen.labels) == ([[9, 10], [5, 6, 7]], [None, 0])
        assert chosen.choice_ids == (1, 2) and chosen.pad_id == 3 and len(chosen) == 2

    @pytest.mark.parametrize(
        "chosen", [[True, False, True], torch.tensor([True, False, True]), [3], [-4], [0.0], ["0"]]
    )
    def test_select_takes_numbers_of_items(self, chosen: object) -> None:
        with pytest.raises(ValueError, match="indices: got .*, expected numbers of the 3 items, from 0"):
            self.SET.select(chosen)

    def test_labels(self) -> None:
        labelled = self.SET.select([1, 0])
        assert labelled.labelled and labelled.labels_tensor().tolist() == [1, 0]
        assert labelled.labels_tensor().dtype == torch.int64
        with pytest.raises(ValueError, match="1 of 3 items have no label, the first is item 2"):
            self.SET.labels_tensor()

    def test_collate_left(self) -> None:
        batch = self.SET.collate([1, 0, 2])
        assert batch["input_ids"].tolist() == [[3, 3, 8], [5, 6, 7], [3, 9, 10]]
        assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
        assert batch["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 1]]
        assert batch["index"].tolist() == [1, 0, 2]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    def test_collate_right_leaves_positions_to_the_model(self) -> None:
        batch = self.SET.collate([1, 2], left=False)
        assert batch["input_ids"].tolist() == [[8, 3], [9, 10]] and batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
        assert "position_ids" not in batch

    def test_only_the_model_arguments_move(self) -> None:
        batch = self.SET.collate([0], "meta")
        assert {name: tensor.device.type for name, tensor in batch.items()} == {
            "input_ids": "meta",
            "attention_mask": "meta",
            "position_ids": "meta",
            "index": "cpu",
        }

    @pytest.mark.parametrize("left", [True, False])
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
    def test_batches_hold_every_item_once(self, batch_size: int, left: bool) -> None:
        lengths = [3, 1, 7, 2, 7, 5, 1, 4, 9, 2, 6]
        data = Encoded([[100 + i] * n for i, n in enumerate(lengths)], [0] * 11, (1, 2), CHOICES, pad_id=0)
        found: dict[int, list[int]] = {}
        sizes = []
        for batch in data.batches(batch_size, left=left):
            sizes.append(len(batch["index"]))
            for position, ids, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True):
                found[int(position)] = ids[mask.bool()].tolist()
        assert [found[i] for i in range(11)] == data.token_ids
        assert sum(sizes) == 11 and set(sizes[:-1]) <= {batch_size}

    def test_batches_pad_little_and_start_with_the_longest(self) -> None:
        data = Encoded([[1] * n for n in (1, 9, 1, 9, 1, 9)], [0] * 6, (1, 2), CHOICES, pad_id=0)
        shapes = [tuple(batch["input_ids"].shape) for batch in data.batches(3)]
        assert shapes == [(3, 9), (3, 1)]

    def test_batch_size_is_checked(self) -> None:
        with pytest.raises(ValueError, match="batch_size is 0, expected"):
            next(self.SET.batches(0))

    def test_padding_does_not_change_a_model(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config).eval()
        with torch.inference_mode():
            for batch in self.SET.batches(3):
                index = batch.pop("index")
                together = model(**batch).logits[:, -1]
                for row, item in zip(together, index.tolist(), strict=True):
                    alone = model(input_ids=torch.tensor([self.SET.token_ids[item]])).logits[0, -1]
                    torch.testing.assert_close(row, alone)


class TestReadJsonl:
    def test_reads_every_way_of_labelling(self, tmp_path: Path) -> None:
        common = {"prompt": "ä:", "choices": list(CHOICES)}
        path = write_lines(
            tmp_path / "a.jsonl",
            {**common, "label": 1},
            {**common, "label": " no", "source": "passed over"},
            "",
            {**common, "label": None},
            common,
        )
        assert read_jsonl(path) == [Example("ä:", CHOICES, label) for label in (1, 0, None, None)]
        assert read_jsonl(str(path)) == read_jsonl(path)

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "a", "choices": CHOICES}).encode())
        assert read_jsonl(path) == [Example("a", CHOICES)]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{not json", "Expecting property name"),
            ('["a"]', r"got \['a'\], expected an object"),
            ({"choices": CHOICES}, r"prompt: missing, the fields are \['choices'\]"),
            ({"prompt": "a"}, "choices: missing"),
            ({"prompt": 3, "choices": CHOICES}, "prompt: got 3, expected a text"),
            ({"prompt": "a", "choices": "yes"}, "choices: got 'yes', expected a list"),
            (
                {"prompt": "a", "choices": CHOICES, "label": "yes"},
                "label: got 'yes', expected one of .*spaces included",
            ),
            ({"prompt": "a", "choices": CHOICES, "label": 7}, "label: got 7, expected an index from 0 to 1"),
            ({"prompt": "a", "choices": CHOICES, "label": True}, "label: got True"),
            (
                {"prompt": "a", "choices": CHOICES, "label": "1"},
                "label: got '1', expected one of .* or its index as a number",
            ),
            ('{"prompt": "a", "choices": ["x", "y"], "label": NaN}', "label: got nan"),
            ('{"prompt": "a", "choices": ["x", "y"], "label": 1e999}', "label: got inf"),
            (
                '{"prompt": "a", "choices": ["x", "y"], "label": 1' + "0" * 30 + "}",
                "label: got 10000.*expected an index",
            ),
            ('{"prompt": "a", "choices": ["x", "y"], "label": 1' + "0" * 9000 + "}", "digits"),
            (
                '{"prompt": "a", "choices": ["x", "y"], "label": 0, "label": 1}',
                "label: got more than one, expected one",
            ),
            ('{"prompt": "a", "prompt": "b", "choices": ["x", "y"]}', "prompt: got more than one"),
            ({"prompt": "a", "choices": CHOICES, "labels": 1}, "label: got none, but a field 'labels'.*rename"),
            ({"prompt": "a", "choices": CHOICES, "Label": 1}, "label: got none, but a field 'label'"),
            (r'{"prompt": "a \ud83d", "choices": ["x", "y"]}', r"prompt: got '\\ud83d' at character 2, half"),
            ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deep"),
        ],
    )
    def test_bad_line_is_named(self, tmp_path: Path, line: object, message: str) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "choices": CHOICES}, line)
        with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
            read_jsonl(path)

    def test_bad_encoding_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\n{"prompt": "\xff"}')
        with pytest.raises(ValueError, match=r"a\.jsonl:2: .*utf-8"):
            read_jsonl(path)

    def test_empty_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a\.jsonl: no examples"):
            read_jsonl(write_lines(tmp_path / "a.jsonl", "", ""))


class TestReadDataset:
    def test_column_and_class_names(self, saved: Path) -> None:
        found = read_dataset(saved / "one", "train", prompt="premise", label="label")
        assert found == [Example(p, ("bad", "good"), label) for p, label in zip("abc", (1, 0, None), strict=True)]

    def test_template_and_text_labels(self, saved: Path) -> None:
        template = "{premise} so {hypothesis}? {{}}:"
        found = read_dataset(saved / "many", "dev", prompt=template, label="answer", choices=CHOICES)
        assert found == [
            Example("a so x? {}:", CHOICES, 1),
            Example("b so y? {}:", CHOICES, 0),
            Example("c so z? {}:", CHOICES, 1),
        ]

    def test_booleans_and_no_labels(self, saved: Path) -> None:
        flags = read_dataset(saved / "one", "train", prompt="premise", label="flag", choices=CHOICES)
        assert [example.label for example in flags] == [1, 0, 1]
        bare = read_dataset(saved / "one", "train", prompt="premise", choices=CHOICES)
        assert [example.label for example in bare] == [None] * 3

    @pytest.mark.parametrize("missing", [None, float("nan")])
    def test_a_missing_value_is_no_text(self, tmp_path: Path, missing: float | None) -> None:
        datasets = pytest.importorskip("datasets", reason="read_dataset needs the package datasets")
        rows = {"a": ["x", "y", "z"], "n": [1.0, missing, 2.0]}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "d")
        with pytest.raises(ValueError, match=r"row 1: column 'n': got (None|nan), expected a value.*Fix"):
            read_dataset(tmp_path / "d", "train", prompt="{a} {n}:", choices=CHOICES)

    @pytest.mark.parametrize(
        "value", [["x", None], {"k": None}, [[float("nan")]], b"x"], ids=["list", "object", "nested", "bytes"]
    )
    def test_a_value_that_has_no_text(self, tmp_path: Path, value: object) -> None:
        datasets = pytest.importorskip("datasets", reason="read_dataset needs the package datasets")
        datasets.Dataset.from_dict({"a": [value]}).save_to_disk(tmp_path / "d")
        with pytest.raises(ValueError, match=r"row 0: column 'a': got .*, expected a value for the template"):
            read_dataset(tmp_path / "d", "train", prompt="{a}:", choices=CHOICES)

    def test_a_format_with_columns_in_it(self, saved: Path) -> None:
        with pytest.raises(
            ValueError, match=r"prompt: got the format '\{missing\}' of column 'premise', expected none"
        ):
            read_dataset(saved / "one", "train", prompt="{premise:{missing}}", choices=CHOICES)

    def test_choices_in_another_order_than_the_classes(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="read_dataset needs the package datasets")
        kinds = datasets.Features({"q": datasets.Value("string"), "y": datasets.ClassLabel(names=["yes", "no"])})
        datasets.Dataset.from_dict({"q": ["a"], "y": [1]}, features=kinds).save_to_disk(tmp_path / "d")
        with pytest.raises(
            ValueError, match=r"choices: got \[' no', ' yes'\], expected the order of the label's classes"
        ):
            read_dataset(tmp_path / "d", "train", prompt="q", label="y", choices=[" no", " yes"])
        read = read_dataset(tmp_path / "d", "train", prompt="q", label="y", choices=[" yes", " no"])
        assert read[0].choices[read[0].label] == " no"

    def test_builder(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets", reason="read_dataset needs the package datasets")
        path = write_lines(tmp_path / "rows.json", {"text": "a", "y": 1}, {"text": "b", "y": 0})
        options = {"data_files": str(path), "cache_dir": str(tmp_path / "cache")}
        found = read_dataset("json", "train[:1]", prompt="text", label="y", choices=CHOICES, **options)
        assert found == [Example("a", CHOICES, 1)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": "text"}, r"column 'text' is not in .*'premise'"),
            ({"prompt": "{premise} {text}"}, "column 'text'"),
            ({"prompt": "premise", "label": "gold"}, "column 'gold'"),
            ({"prompt": "premise", "label": "answer"}, r"choices: got None.*pass choices=\["),
            ({"prompt": "premise"}, "choices: got None"),
            ({"prompt": "premise", "label": "answer", "choices": ["yes", "no"]}, "row 0: label: got ' yes'"),
        ],
    )
    def test_refuses(self, saved: Path, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_dataset(saved / "one", "train", **arguments)

    def test_unknown_split(self, saved: Path) -> None:
        with pytest.raises(ValueError, match=r"split 'test' is not in .*\['dev'\]"):
            read_dataset(saved / "many", "test", prompt="premise", choices=CHOICES)
