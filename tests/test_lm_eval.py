"""The model ``tfb`` of lm-evaluation-harness against its plain model, run once for every sample with that sample's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_folders
import small_sets
import test_span
import torch
import zoo
from small_folders import Folders
from torch import Tensor

import tfb_ext
from tfb_ext.errors import SamplingError, UnsupportedModelError

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'tfb_ext[lm-eval]')")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tfb_ext.integrations.lm_eval import TFBLM

SAMPLES, SIGMA = 4, 0.3
PAIRS = [
    ("area man wins", " yes"),  # one token each after one context: a group of the harness, one row
    ("area man wins", " no"),
    ("area man wins", " senate"),
    ("area man", " wins senate"),  # the same tokens with another split, in the same group
    ("area", " man wins no"),
    ("senate votes on budget area man wins", " no votes on budget"),
    ("on", " budget"),
    ("on", " budget"),
    ("", "senate votes"),
    ("area man wins senate votes on budget area man wins senate votes", " on budget yes no"),  # cut at 8 positions
]
TEXTS = ["area man wins senate votes on budget yes no area man area man wins on on", "senate votes", "on"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny language model on disk, and an adapter with a saved posterior of its upper half."""
    made = small_folders.write(tmp_path_factory.mktemp("harness"))
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), depth=2, sigma=SIGMA, seed=5)
    adapter.save_pretrained(made.adapter)
    return made


def harness(folders: Folders, **options: Any) -> Any:
    given = {"device": "cpu", "n_samples": SAMPLES, "dtype": "float32", **options}
    return TFBLM(pretrained=str(folders.base), peft=str(folders.adapter), **given)


def direct(name: str = "llama", depth: Any = "all", **options: Any) -> Any:
    adapter = tfb_ext.bayesianize(zoo.peft_model(name), depth=depth, sigma=SIGMA)
    return TFBLM(adapter, tokenizer=small_folders.tokenizer(), **{"n_samples": SAMPLES, **options})


def plain(lm: Any, **options: Any) -> Any:
    """The harness's own model over the same weights.

    Without its grouping, which looks up a shorter split of the same tokens at the first positions of the longest one.
    """
    given = {"batch_size": lm.batch_size, "max_length": lm._max_length, "logits_cache": False, **options}
    return HFLM(pretrained=lm.adapter.model, tokenizer=lm.tokenizer, **given)


def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def each_sample(lm: Any, kind: str, arguments: list[tuple[Any, ...]]) -> Tensor:
    """(S, N) log-likelihoods: the harness's own model, once with each sample's weights written in."""
    model = plain(lm)

    def call() -> Tensor:
        results = getattr(model, kind)(asked(kind, arguments))
        return torch.tensor([r[0] if isinstance(r, tuple) else r for r in results], dtype=torch.float64)

    return zoo.separate_passes(lm.adapter, list(range(SAMPLES)), lm.adapter.sigma, call)


def under_the_predictive(lm: Any, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """The harness's own loop over logits of the mean probability."""
    with lm.adapter.predictive(SAMPLES):
        return getattr(plain(lm), kind)(asked(kind, arguments))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("name", ["llama", "llama-head", "gemma2", "gpt2"])
def test_log_likelihoods(name: str, depth: Any, cache: bool, batch_size: int) -> None:
    lm = direct(name, depth, batch_size=batch_size, max_length=8, logits_cache=cache)
    samples = each_sample(lm, "loglikelihood", PAIRS)
    assert (samples[0] - samples[1]).abs().max() > 0.01
    tokens = under_the_predictive(lm, "loglikelihood", PAIRS)
    for bma, expected in (
        ("sequence", zoo.average(samples)),
        ("token", torch.tensor([t[0] for t in tokens], dtype=torch.float64)),
    ):
        lm.bma = bma
        results = lm.loglikelihood(asked("loglikelihood", PAIRS))
        assert torch.allclose(torch.tensor([r[0] for r in results], dtype=torch.float64), expected, atol=1e-4), bma
        assert all(type(r[0]) is float and type(r[1]) is bool for r in results)
        assert [r[1] for r in results] == [t[1] for t in tokens]
    single = [i for i, (_, text) in enumerate(PAIRS) if len(text.split()) == 1]
    several = [i for i in range(len(PAIRS)) if i not in single]
    difference = (zoo.average(samples) - expected).abs()
    assert difference[single].max() < 1e-4 < 0.01 < difference[several].max()


@pytest.mark.parametrize(
    ("name", "span", "cache", "batch_size"),
    [("llama", "answer", True, 4), ("llama", 3, True, 4), ("gpt2", "answer", False, 4), ("gemma2", 2, True, 1)],
)
def test_log_likelihoods_with_a_span(name: str, span: Any, cache: bool, batch_size: int) -> None:
    """Against one row and one sample after a prompt of the mean adapter; a score depends on no other request."""
    lm = direct(name, batch_size=batch_size, max_length=8, logits_cache=cache)
    lm.adapter.span = span
    pairs = [*PAIRS, ("area", " man wins senate"), ("area man", " wins no")]
    expected: dict[str, list[float]] = {"sequence": [], "token": []}
    greedy = []
    for context, text in pairs:
        both, tokens = lm.tok_encode(" ".join(filter(None, [context, text.strip()]))), lm.tok_encode(text.strip())
        ids = torch.tensor([([lm.prefix_token_id] if not context else []) + both])[:, :-1][:, -8:]
        row = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1])[None],
        }
        count = len(tokens) + (0 if span == "answer" else span - 1)
        (logs,) = test_span.passes(lm.adapter, row, [count], list(range(SAMPLES)))
        logs = logs[:, -len(tokens) :]
        own = logs.gather(2, torch.tensor(tokens).expand(SAMPLES, -1)[..., None])[..., 0]
        expected["sequence"].append(float(zoo.average(own.sum(1))))
        expected["token"].append(float(zoo.average(own).sum()))
        greedy.append(zoo.average(logs).argmax(-1).tolist() == tokens)
    for bma, wanted in expected.items():
        lm.bma = bma
        found = lm.loglikelihood(asked("loglikelihood", pairs))
        assert [r[0] for r in found] == pytest.approx(wanted, abs=1e-4), bma
        assert [r[1] for r in found] == greedy
    alone = [lm.loglikelihood(asked("loglikelihood", [pair]))[0][0] for pair in pairs]
    assert alone == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("shared", "expected"), [(True, 1), (False, 2)])
def test_continuations_of_one_context_share_its_forward(shared: bool, expected: int) -> None:
    lm = direct(batch_size=64)
    lm.adapter.span = "answer"
    assert lm.adapter.shares_prompts()
    if not shared:  # then those of one length share a row
        lm.adapter.shares_prompts = lambda: False
    lm.loglikelihood(asked("loglikelihood", PAIRS[:1]))
    rows = small_sets.rows_through(lm.adapter.anatomy.blocks[0].input_layernorm)
    lm.loglikelihood(asked("loglikelihood", PAIRS[:4]))  # three of one token, and one of two
    assert rows and set(rows) == {expected}


def test_padding_is_not_random() -> None:
    lm = direct(batch_size=4)
    lm.adapter.span = "answer"
    lm.loglikelihood(asked("loglikelihood", PAIRS[:1]))
    shapes = small_sets.shapes_through(lm.adapter.anatomy.blocks[0].input_layernorm)
    lm.loglikelihood(asked("loglikelihood", [("area man wins senate votes on budget", " yes"), ("on", " no")]))
    assert sum(shape[1] for shape in shapes) == 7 + SAMPLES


@pytest.mark.parametrize("span", ["answer", 3])
def test_rolling_with_a_span(span: Any) -> None:
    """Every token but a window's first one is the answer's."""
    lm = direct(batch_size=4, max_length=64)
    lm.adapter.span = span
    expected = []
    for text in TEXTS:
        tokens = lm.tok_encode(text)
        ids = torch.tensor([[lm.prefix_token_id, *tokens[:-1]]])
        row = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1])[None],
        }
        (logs,) = test_span.passes(lm.adapter, row, [len(tokens)], list(range(SAMPLES)))
        own = logs.gather(2, torch.tensor(tokens).expand(SAMPLES, -1)[..., None])[..., 0]
        expected.append(float(zoo.average(own.sum(1))))
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in TEXTS]))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("span", ["answer", 2])
def test_generation_with_a_span(span: Any) -> None:
    """Each token the arg max of the mean probability after those before, by separate passes."""
    lm = direct("llama", 2, batch_size=3)
    lm.adapter.span = span
    options = {"until": ["<end>"], "max_gen_toks": 4, "do_sample": False}
    prompts = ["area man wins", "senate votes on budget yes", "no"]
    texts = lm.generate_until(asked("generate_until", [(p, options) for p in prompts]))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)])
        start = ids.shape[1]
        for new in range(4):
            row = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "position_ids": torch.arange(ids.shape[1])[None],
            }
            count = new + (1 if span == "answer" else span)
            (logs,) = test_span.passes(lm.adapter, row, [count], list(range(SAMPLES)))
            ids = torch.cat([ids, zoo.average(logs)[-1].argmax()[None, None]], 1)
        assert text == lm.tok_decode(ids[0, start:].tolist()).split("<end>")[0]


def most_probable(lm: Any, prompt: str, count: int) -> list[int]:
    """The next tokens, each the arg max of the mean probability after those before, by separate uncached passes."""
    ids = torch.tensor([lm.tok_encode(prompt)])
    start = ids.shape[1]
    for _ in range(count):
        call = partial(lambda ids: lm.model(ids).logits[:, -1].log_softmax(-1), ids)
        logs = zoo.average(zoo.separate_passes(lm.adapter, list(range(SAMPLES)), SIGMA, call))
        ids = torch.cat([ids, logs.argmax(-1)[None]], dim=1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("bma", ["sequence", "token"])
def test_greedy_is_the_arg_max_of_the_mean_probability(bma: str) -> None:
    lm = direct(bma=bma)
    context = lm.tok_encode("area man wins")
    best = most_probable(lm, "area man wins", 3)
    other = [*best[:2], (best[2] + 1) % zoo.VOCAB]
    results = lm._loglikelihood_tokens([(("", ""), context, best), (("", ""), context, other)])
    assert [greedy for _, greedy in results] == [True, False]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rolling_joins_the_windows_of_a_document(name: str, batch_size: int) -> None:
    lm = direct(name, batch_size=batch_size, max_length=5)
    texts = [(text,) for text in TEXTS]
    samples = each_sample(lm, "loglikelihood_rolling", texts)
    joined = torch.tensor(lm.loglikelihood_rolling(asked("loglikelihood_rolling", texts)), dtype=torch.float64)
    assert torch.allclose(joined, zoo.average(samples), atol=1e-4)
    lm.bma = "token"
    expected = under_the_predictive(lm, "loglikelihood_rolling", texts)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", texts))
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
    assert (torch.tensor(found).double() - joined)[:2].abs().min() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_averages_every_token(batch_size: int) -> None:
    lm = direct("llama", 2, batch_size=batch_size)
    options = {"until": ["<end>"], "max_gen_toks": 4, "do_sample": False}
    prompts = ["area man wins", "senate votes on budget yes", "no"]
    texts = lm.generate_until(asked("generate_until", [(p, options) for p in prompts]))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == lm.tok_decode(most_probable(lm, prompt, 4)).split("<end>")[0]


def test_no_samples_is_the_harness_s_own_model() -> None:
    lm = direct("llama", n_samples=0, batch_size=2)
    own = plain(lm, logits_cache=True)
    assert lm.loglikelihood(asked("loglikelihood", PAIRS)) == own.loglikelihood(asked("loglikelihood", PAIRS))
    texts = asked("loglikelihood_rolling", [(t,) for t in TEXTS])
    assert lm.loglikelihood_rolling(texts) == own.loglikelihood_rolling(texts)
    until = asked("generate_until", [("area man", {"until": ["<end>"], "max_gen_toks": 3})])
    assert lm.generate_until(until) == own.generate_until(until)


# Tasks --------------------------------------------------------------------------------------------------------------


def write_tasks(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A multiple-choice task whose choices have one to three tokens, and a generation task; their data lie in ``root``."""
    words = small_folders.WORDS[5:12]
    rows = [
        {
            "question": " ".join(words[(i * k + k) % 7] for k in range(1, 3 + i % 4)),
            "choices": ["yes", "no", "senate votes", "man wins budget"],
            "answer": i % 4,
            "text": words[i % 7],
        }
        for i in range(6)
    ]
    (root / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "items.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}} sarcastic:",
    }
    choice = {
        **common,
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        **common,
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return choice, text


def evaluated(lm: Any, tasks: list[Any]) -> Any:
    manager = TaskManager(include_defaults=False)  # reading the harness's own thousands takes half a minute
    return simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0, task_manager=manager)


def test_tasks_equal_one_run_for_every_sample(folders: Folders, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    lm = harness(folders, batch_size=4)
    results = evaluated(lm, [dict(t) for t in tasks])
    items = results["samples"]["tiny_choice"]
    found = torch.tensor([[float(r[0][0]) for r in item["resps"]] for item in items])
    assert found.shape == (6, 4)

    def call() -> Tensor:
        run = evaluated(plain(lm), [dict(tasks[0])])["samples"]["tiny_choice"]
        return torch.tensor([[float(r[0][0]) for r in item["resps"]] for item in run], dtype=torch.float64)

    expected = zoo.average(zoo.separate_passes(lm.adapter, list(range(SAMPLES)), SIGMA, call))
    assert torch.allclose(found.double(), expected, atol=1e-4)
    answers = torch.tensor([i % 4 for i in range(6)])
    accuracy = float((expected.argmax(-1) == answers).double().mean())
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy)
    with lm.adapter.predictive(SAMPLES):
        own = evaluated(plain(lm), [dict(tasks[1])])
    texts = [[item["resps"] for item in run["samples"]["tiny_text"]] for run in (results, own)]
    assert texts[0] == texts[1]
    assert results["config"]["tfb"]["sigma"] == SIGMA and results["config"]["tfb"]["bma"] == "sequence"


def test_command_line(folders: Folders, tmp_path: Path) -> None:
    choice, text = write_tasks(tmp_path)
    (tmp_path / "choice.yaml").write_text(json.dumps(choice))
    arguments = [
        *("--model", "tfb", "--tasks", "tiny_choice", "--include_path", str(tmp_path), "--device", "cpu"),
        *(
            "--model_args",
            f"pretrained={folders.base},peft={folders.adapter},n_samples=2,depth=0.25,span=2,bma=token,sigma=1e-1",
        ),
        *("--output_path", str(tmp_path / "out"), "--batch_size", "4"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "tfb_ext.integrations.lm_eval", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "|tiny_choice|" in run.stdout
    (written,) = (tmp_path / "out").rglob("results*.json")
    config = json.loads(written.read_text())["config"]
    assert config["tfb"] == {
        "n_samples": 2,
        "bma": "token",
        "sigma": 0.1,
        "depth": 1,
        "span": 2,
        "seed": 5,
        "antithetic": True,
        "mode": "weight",
        "family": "low-rank",
    }


def test_results_are_cached_as_numbers(tmp_path: Path) -> None:
    lm = direct(batch_size=4, max_length=5)
    pairs, texts = asked("loglikelihood", PAIRS[:4]), asked("loglikelihood_rolling", [(t,) for t in TEXTS])
    expected = lm.loglikelihood(pairs), lm.loglikelihood_rolling(texts)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    for _ in range(2):
        assert (cached.loglikelihood(pairs), cached.loglikelihood_rolling(texts)) == expected
    assert {type(v) for v in cached.dbdict.values()} == {tuple, float}


# Options and errors -------------------------------------------------------------------------------------------------


def test_options_come_before_what_is_saved(folders: Folders) -> None:
    saved = harness(folders).adapter
    assert (saved.sigma, saved.depth, saved.seed, saved.antithetic) == (SIGMA, 2, 5, True)
    other = harness(folders, sigma=0.1, depth=0.25, span="answer", seed=7, antithetic=False).adapter
    assert (other.sigma, other.depth, other.span, other.seed, other.antithetic) == (0.1, 1, "answer", 7, False)
    first, second = (harness(folders, seed=s).loglikelihood(asked("loglikelihood", PAIRS[:2])) for s in (5, 6))
    assert first != second


def test_needs_a_sigma(folders: Folders, llama: Folders) -> None:
    with pytest.raises(ValueError, match=r"no sigma: none is saved with .*tfb search .*sigma=.*n_samples=0"):
        harness(llama)
    assert harness(llama, n_samples=0).adapter.sigma is None
    assert harness(llama, sigma=0.2).adapter.sigma == 0.2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bma": "mean"}, "bma is 'mean', expected one of 'sequence', 'token'"),
        ({"n_samples": -1}, "n_samples is -1, expected a count, 0 for the mean adapter"),
        ({"n_samples": 2.5}, "n_samples is 2.5, expected a count"),
        ({"sigma": -0.1}, "sigma is -0.1, expected a finite number above 0"),
        ({"sigma": "auto"}, "sigma is 'auto', expected a finite number"),
        ({"depth": 99}, "depth is 99, expected 1 to 4 blocks"),
        *(
            ({"span": v}, "span is .*, expected 'all', 'answer' or a number of last tokens")
            for v in (0, "last", True, 1.5)
        ),
    ],
)
def test_refuses_bad_options(folders: Folders, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        harness(folders, **options)


def test_refuses_models_without_one_adapter(folders: Folders) -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter: expected peft=FOLDER"):
        TFBLM(pretrained=str(folders.base))
    with pytest.raises(UnsupportedModelError, match="holds an adapter already; give one of the two"):
        TFBLM(pretrained=zoo.peft_model("llama"), peft=str(folders.adapter), sigma=0.1)


def test_refuses_merged_adapters() -> None:
    lm = direct()
    lm.model.merge_adapter()
    with pytest.raises(SamplingError, match="merged into its weight"):
        lm.loglikelihood(asked("loglikelihood", PAIRS[:1]))


def test_refuses_continuations_beyond_the_model() -> None:
    lm = direct(max_length=3)
    with pytest.raises(ValueError, match="a continuation has 4 tokens, expected 1 to 3, .*max_length"):
        lm.loglikelihood(asked("loglikelihood", [("area", " man wins senate votes")]))


@pytest.mark.parametrize(
    "arguments", [["-m", "tfb_ext.integrations.lm_eval"], ["-c", "import tfb_ext.integrations.lm_eval"]]
)
def test_says_what_to_install(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise ImportError('No module named lm_eval')")
    search = os.pathsep.join([str(tmp_path), str(Path(tfb_ext.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": search}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 1 and "pip install 'tfb_ext[lm-eval]'" in run.stderr
    assert ("Traceback" in run.stderr) is (arguments[0] == "-c")
