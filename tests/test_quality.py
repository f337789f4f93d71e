"""The quality study: data, training of each kind, every method's predictions, measures, resuming and the report."""

from __future__ import annotations

import copy
import csv
import gzip
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality_fakes
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer

import tfb_ext
from bench.quality import bank as banks
from bench.quality import check, data, laplace, measures, methods, report, results, run, spans, study, train
from bench.quality.bank import KINDS, TARGETS, Bank, Member, Recipe, members
from tfb_ext.app.demo.assets import DemoAssetError, base_model_dir
from tfb_ext.data import Encoded

RECIPE = Recipe(rank=4, alpha=8, epochs=3, batch_size=4, lr=2e-2)
CHOICES = (5, 9, 11)


def items(count: int, seed: int = 1) -> Encoded:
    """Random prompts of a tiny vocabulary; the label is a function of the first token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    ids = [torch.randint(12, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return Encoded(ids, [row[0] % 3 for row in ids], CHOICES, (" a", " b", " c"), 0)


@pytest.fixture(scope="module")
def base() -> Any:
    """A tiny Llama whose head is its embedding, as SmolLM2's is."""
    torch.manual_seed(0)
    model, _ = zoo._decoder("Llama", [], tie_word_embeddings=True)()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.mul_(3.0)
    return model.eval()


@pytest.fixture(scope="module")
def trained(base: Any) -> train.Trained:
    return train.train_bank(base, "qv", members(KINDS, (0, 1)), RECIPE, items(24), items(12, 2))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    quality_fakes.write(tmp_path, monkeypatch)
    yield tmp_path
    quality_fakes.forget()


@pytest.mark.slow
class TestData:
    @pytest.mark.parametrize("name", list(data.TASKS))
    def test_parts_share_no_text(self, files: Path, name: str) -> None:
        parts = data.TASKS[name].read()
        texts = [{item.text + item.question for item in parts[p]} for p in ("train", "validation", "anchor", "test")]
        assert all(texts) and sum(map(len, texts)) == len(set().union(*texts))

    def test_topics_come_from_both_files(self, files: Path) -> None:
        parts = data.TASKS["r8"].read()
        assert (
            len(parts["test"]) == 41 and sum(map(len, parts.values())) == 201
        )  # the empty and the repeated text are out
        for item in parts["train"]:
            assert item.text.endswith(list(data.R8_WORDS)[item.label]) and item.question == "\nTopic:"

    def test_logiqa_prompt(self, files: Path) -> None:
        every = [item for part in data.TASKS["logiqa"].read().values() for item in part]
        letters = "".join(f"\n{letter}. option {letter} of 5" for letter in "ABCD")
        assert data.Item("Passage: Fact 5 holds.", f"\nQuestion: Which one?{letters}\nAnswer:", 1) in every

    def test_only_the_text_is_cut(self) -> None:
        tokenizer = zoo_tokenizer()
        assert data.cut_texts(["no yes man", "no"], 2, tokenizer) == ["no yes", "no"]
        assert data.cut_texts(["no yes man"], None, tokenizer) == ["no yes man"]

    def test_prompts_end_with_fixed_words(self, files: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base_model_dir())
        for task in data.TASKS.values():
            assert task.ending and all(i.question.endswith(task.ending) for part in task.read().values() for i in part)
        parts = data.load(data.TASKS["headlines"], tokenizer, data.Sizes(test=20))
        (ending,) = {tuple(ids[-parts.question :]) for ids in parts.test.token_ids}
        assert tokenizer.decode(ending).strip() == "Sarcastic:" and len({len(ids) for ids in parts.test.token_ids}) > 1

    def test_another_file_is_refused(self, files: Path) -> None:
        path = data.unpacked_file(data.R8_TEST)
        path.write_text(path.read_text() + "earn\tone more\n")
        with pytest.raises(DemoAssetError, match="not the published file"):
            data.TASKS["r8"].read()


def zoo_tokenizer() -> Any:
    import small_folders

    return small_folders.tokenizer()


def peft_twin(base: Any, targets: str) -> Any:
    return get_peft_model(
        copy.deepcopy(base),
        LoraConfig(
            r=RECIPE.rank, lora_alpha=RECIPE.alpha, target_modules=list(TARGETS[targets]), task_type="CAUSAL_LM"
        ),
    )


@pytest.mark.slow
class TestBank:
    @pytest.mark.parametrize("targets", list(TARGETS))
    def test_each_member_is_its_peft_adapter(self, base: Any, targets: str) -> None:
        group = members(KINDS, (0, 1))
        made = Bank(base, TARGETS[targets], group, RECIPE, CHOICES)
        for layer in made.layers.values():
            nn.init.normal_(layer.b, std=0.2)
        asked = items(5)
        table = train.Table.of(asked, torch.device("cpu"))
        with made.opened(), made.quiet():
            logits = made.logits(table.ids.repeat(len(group), 1), table.last.repeat(len(group)))
        assert not any(isinstance(module, banks.BankLayer) for module in base.modules())
        for k in (0, 5):
            with methods.adapted(base, TARGETS[targets], RECIPE.rank, RECIPE.alpha, RECIPE.dropout) as model:
                state = {n: v for n, v in made.state(k).items() if not n.endswith(".omega")}
                methods.set_weights(model, state)
                p = methods.passes(model, asked, 1, batch_size=2)[0]
            torch.testing.assert_close(p, logits[k].softmax(-1), atol=1e-5, rtol=1e-4)

    def test_trains_as_peft_and_adamw_do(self, base: Any) -> None:
        """One plain member against a loop of the usual parts; weight decay and clipping included."""
        recipe, training = replace(RECIPE, epochs=2, decay=0.5, clip=0.05), items(12)
        found = train.train_bank(base, "qv_head", members(("mle", "map"), (0,)), recipe, training, items(8, 2))
        for kind, k in (("mle", 0), ("map", 1)):
            model = peft_twin(base, "qv_head").eval()
            start = Bank(base, TARGETS["qv_head"], members(("mle",), (0,)), recipe, CHOICES).state(0)
            methods.set_weights(model, start)
            weights = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=recipe.decay if kind == "map" else 0.0)
            generator = torch.Generator().manual_seed(0)
            share = train.rates(6, recipe.warmup).tolist()
            for step in range(6):
                if step % 3 == 0:
                    order = torch.randperm(12, generator=generator)
                chosen = order[step % 3 * 4 : step % 3 * 4 + 4].tolist()
                batch = training.collate(chosen)
                del batch["index"]
                logits = model(**batch, logits_to_keep=1).logits[:, -1, list(CHOICES)]
                labels = training.labels_tensor()[chosen]
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, labels).backward()
                nn.utils.clip_grad_norm_(weights, recipe.clip)
                optimizer.param_groups[0]["lr"] = recipe.lr * share[step]
                optimizer.step()
            own = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
            for name, value in found.states["overfitted"][k].items():
                torch.testing.assert_close(own[name].data, value, atol=2e-5, rtol=1e-3)

    def test_members_do_not_touch_each_other(self, base: Any) -> None:
        pair = train.train_bank(base, "qv", members(("mle",), (0, 1)), RECIPE, items(12), items(8, 2))
        alone = train.train_bank(base, "qv", members(("mle",), (1,)), RECIPE, items(12), items(8, 2))
        for name, value in alone.states["overfitted"][0].items():
            torch.testing.assert_close(pair.states["overfitted"][1][name], value, atol=1e-5, rtol=1e-4)

    def test_every_kind_learns_and_is_its_own(self, trained: train.Trained) -> None:
        assert (trained.losses[-1] < trained.losses[0]).all()
        states = dict(zip(members(KINDS, (0, 1)), trained.states["overfitted"], strict=True))
        plain = states[Member("mle", 0)]
        norms = {kind: sum(float(v.square().sum()) for v in states[Member(kind, 0)].values()) for kind in KINDS[:2]}
        assert norms["map"] < norms["mle"]
        for kind in KINDS[1:]:
            assert any(not torch.equal(states[Member(kind, 0)][name], value) for name, value in plain.items())
        omega = [v for n, v in states[Member("blob", 0)].items() if n.endswith(".omega")]
        assert len(omega) == 8 and all((v > 0).all() for v in omega)
        assert not any(name.endswith(".omega") for name in plain)

    def test_early_is_the_best_check(self, base: Any, trained: train.Trained) -> None:
        group = members(KINDS, (0, 1))
        made = Bank(base, TARGETS["qv"], group, RECIPE, CHOICES)
        for k, state in enumerate(trained.states["early"]):
            for name, layer in made.layers.items():
                layer.a.data[k] = state[f"base_model.model.{name}.lora_A.weight"]
                layer.b.data[k] = state[f"base_model.model.{name}.lora_B.weight"]
        with made.opened():
            nll = train.judge(made, train.Table.of(items(12, 2), torch.device("cpu")))
        torch.testing.assert_close(nll, trained.validation.min(0).values, atol=1e-5, rtol=1e-4)

    def test_divergence_is_that_of_torch(self) -> None:
        torch.manual_seed(0)
        mean, root = torch.randn(3, 5, requires_grad=True), (torch.rand(3, 5) + 0.1).requires_grad_()
        prior = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(0.2))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, root.square()), prior).sum()
        expected = torch.autograd.grad(kl, [mean, root])
        torch.testing.assert_close(banks.divergence_gradient(mean.detach(), root.detach(), 0.2), expected)

    def test_kl_weights_of_a_cycle_sum_to_one(self) -> None:
        weights = train.kl_weights(300, 400, 8, 8.0)
        cycle = int(100 * 400 ** (math.pi / 8) / 8)
        assert weights[:cycle].sum().item() == pytest.approx(1, abs=1e-6)
        assert weights[cycle - 1].item() == pytest.approx(0.5) and torch.equal(
            weights[:50], weights[cycle : cycle + 50]
        )

    def test_divergence_pulls_towards_the_prior(self, base: Any) -> None:
        recipe = replace(RECIPE, lr=1e-12, kl_rate=0.05, kl_gamma=1e9)  # nothing but the divergence, in short cycles
        found = train.train_bank(
            base, "qv", members(("blob",), (0,)), replace(recipe, epochs=8), items(24), items(4, 2)
        )
        omega = torch.cat([v.flatten() for n, v in found.states["overfitted"][0].items() if n.endswith(".omega")])
        assert (omega > RECIPE.spread**2).all() and (omega < 2 * RECIPE.prior).all()

    def test_flipout_has_the_moments_of_one_draw(self) -> None:
        torch.manual_seed(0)
        x, omega = torch.randn(2, 3, 6), torch.rand(4, 6)
        draws = torch.stack([banks.flipout(x, omega * torch.randn(4, 6)) for _ in range(4000)])
        variance = x.square() @ omega.square().T
        error = draws.std(0) / 4000**0.5
        assert (draws.mean(0).abs() < 5 * error).all()
        assert ((draws.var(0) / variance - 1).abs() < 5 * (2 / 4000) ** 0.5 * 1.2).all()

    def test_too_few_items_are_refused(self, base: Any) -> None:
        with pytest.raises(ValueError, match="fewer than one batch"):
            train.train_bank(base, "qv", members(("mle",), (0,)), RECIPE, items(3), items(3))


def entropy(*p: float) -> float:
    return -sum(q * math.log(q) for q in p)


@pytest.mark.slow
class TestMethods:
    @pytest.fixture
    def model(self, base: Any, trained: train.Trained) -> Iterator[Any]:
        with methods.adapted(base, TARGETS["qv"], RECIPE.rank, RECIPE.alpha, 0.5) as model:
            methods.set_weights(model, {n: v for n, v in trained.states["overfitted"][6].items() if "omega" not in n})
            yield model

    def omega(self, trained: train.Trained) -> dict[str, torch.Tensor]:
        state = trained.states["overfitted"][6]
        return {name.removesuffix(".omega"): v for name, v in state.items() if name.endswith(".omega")}

    def test_rows_sum_to_one_and_passes_differ(self, model: Any, trained: train.Trained) -> None:
        asked = items(7)
        mean = methods.passes(model, asked, 1)
        with methods.dropping(model):
            dropped = methods.passes(model, asked, 3, batch_size=2)
        with methods.blobbing(model, self.omega(trained)):
            blob = methods.passes(model, asked, 3, batch_size=2)
        for p in (mean, dropped, blob):
            torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:2]))
        for p in (dropped, blob):
            assert not torch.equal(p[0], p[1]) and not torch.equal(p[0], mean[0])
        torch.testing.assert_close(methods.passes(model, asked, 1, batch_size=2), mean)  # nothing is left switched on

    def test_blob_draws_what_it_says(self, model: Any, trained: train.Trained) -> None:
        """One layer's sampled A x against its own mean and deviation."""
        name, omega = next(iter(self.omega(trained).items()))
        layer = model.get_base_model().get_submodule(name).lora_A["default"]
        x = torch.randn(1, 1, layer.in_features).expand(2000, 1, -1)
        torch.manual_seed(0)
        with methods.blobbing(model, {name: omega}), torch.no_grad():
            draws = torch.stack([layer(x[:1])[0, 0] for _ in range(2000)])
        deviation = (x[0] ** 2 @ omega.square().T).sqrt()[0]
        assert ((draws.mean(0) - layer(x[:1])[0, 0]).abs() < 5 * deviation / 2000**0.5).all()
        assert ((draws.std(0) / deviation - 1).abs() < 5 * (2 * 2000) ** -0.5 * 1.2).all()

    def test_rows_are_of_their_span(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        sets = [items(5, seed) for seed in range(5)]
        parts = data.Parts(data.TASKS["r8"], *sets, question=2)
        unit = next(u for u in TINY.units() if u.part == "spans")
        unit_run = run.UnitRun(TINY, unit, model, parts, torch.device("cpu"))

        real = tfb_ext.search_sigma

        def search(adapter: Any, anchors: Any, samples: int, **options: Any) -> Any:
            adapter.sigma = 0.1 * samples
            return real(adapter, anchors, samples=samples, progress=False, apply=False)

        with monkeypatch.context() as patched:
            patched.setattr(tfb_ext, "search_sigma", search)
            unit_run.bayesian()
        sampled = [row for row in unit_run.rows if (row["method"], row["depth"]) == ("tfb", "all")]
        found = {row["span"]: unit_run.kept[row["name"]].test for row in sampled}
        adapter = tfb_ext.bayesianize(model, seed=unit.member.seed)
        for span, tokens, samples, sigma in (("all", "all", 10, 0.2), ("answer", 1, 2, 0.2), ("question", 2, 4, 0.4)):
            adapter.span, adapter.sigma = tokens, sigma
            p = tfb_ext.predict(adapter, unit_run.questions.joined, samples=samples).sample_probabilities
            assert np.array_equal(found[span], unit_run.questions.keep(p).test)
        adapter.unload()
        assert not np.array_equal(found["answer"], found["all"])

    def test_the_closed_form_is_at_its_own_sigma(self, model: Any) -> None:
        sets = [items(5, seed) for seed in range(5)]
        parts = data.Parts(data.TASKS["r8"], *sets, question=2)
        unit = next(u for u in TINY.units() if u.part == "linear")
        unit_run = run.UnitRun(TINY, unit, model, parts, torch.device("cpu"))
        unit_run.bayesian()
        assert [search["by"] for search in unit_run.searches] == ["linear", "linear"]
        rows = [row for row in unit_run.rows if row["method"] == "linear"]
        assert [(row["span"], row["span_tokens"], row["samples"]) for row in rows] == [
            ("all", None, 0),
            ("answer", 1, 0),
        ]
        adapter = tfb_ext.bayesianize(model, seed=unit.member.seed)
        for row in rows:
            adapter.span = row["span"]
            searched = tfb_ext.search_sigma(adapter, parts.anchor, by="linear", progress=False)
            assert row["sigma"] == searched.sigma and row["search_seconds"] > 0
            found = adapter.gaussian(unit_run.questions.joined).predict(row["sigma"])
            kept = unit_run.kept[row["name"]]
            chosen = unit_run.questions.test
            torch.testing.assert_close(
                torch.from_numpy(kept.test).float(), found.probabilities[chosen].log(), atol=2e-3, rtol=2e-3
            )
            torch.testing.assert_close(
                torch.from_numpy(kept.information).float(), found.epistemic[chosen].float(), atol=1e-3, rtol=1e-2
            )
        adapter.unload()

    def test_base_is_itself_again_and_tied(self, base: Any) -> None:
        asked = items(4)
        batch = asked.collate(range(4))
        del batch["index"]
        before = base(**batch).logits
        names = {name for name, _ in base.named_modules()}
        with methods.adapted(base, TARGETS["qv_head"], 4, 8, 0.1) as model:
            head = model.get_base_model().get_output_embeddings()
            assert torch.equal(head.base_layer.weight, base.get_input_embeddings().weight)
            nn.init.ones_(head.lora_B["default"].weight)
        assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
        assert {name for name, _ in base.named_modules()} == names
        assert torch.equal(base(**batch).logits, before)

    def test_wrong_names_are_refused(self, model: Any) -> None:
        with pytest.raises(ValueError, match="not both in the adapter and in the state"):
            methods.set_weights(model, {"base_model.model.lm_head.lora_A.weight": torch.zeros(1)})

    def test_kept_values(self, tmp_path: Path) -> None:
        joined = items(3)
        questions = methods.Questions(joined, slice(0, 1), slice(1, 2), slice(2, 3))
        p = torch.tensor(
            [[[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [1.0, 0, 0]], [[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [1.0, 0, 0]]]
        )
        kept = questions.keep(p)
        assert kept.test.tolist()[0] == pytest.approx([math.log(0.3), math.log(0.7), -80], rel=1e-3)
        expected = entropy(0.3, 0.7) - (entropy(0.5, 0.5) + entropy(0.1, 0.9)) / 2
        assert kept.information.tolist() == pytest.approx([expected], rel=1e-3)
        assert kept.stranger[:, 0].tolist() == pytest.approx([-math.log(0.9), entropy(0.9, 0.1), 0], rel=1e-3, abs=1e-6)
        assert kept.validation.shape == (1, 3) and kept.outside.shape == (1, 3)
        assert questions.keep(p, whole=False).validation.shape == (0, 3)
        methods.save(tmp_path / "a.npz", {"0": kept})
        with np.load(tmp_path / "a.npz") as arrays:
            again = methods.Kept.of(arrays, "0")
        assert all(np.array_equal(getattr(again, f), getattr(kept, f)) for f in ("test", "information", "stranger"))
        assert not list(tmp_path.glob("*.part"))

    def test_jacobians_are_autograds(self, model: Any) -> None:
        classifier = laplace.LabelLogits(model, torch.tensor(CHOICES))
        batch = next(iter(laplace.Loader(items(3), 3, torch.device("cpu"))))
        weights = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
        jacobians, values = laplace.adapter_jacobians(classifier, list(weights), batch)
        output = classifier(batch)
        torch.testing.assert_close(values, output.detach())
        for row, column in ((0, 0), (2, 1)):
            grads = torch.autograd.grad(output[row, column], list(weights.values()), retain_graph=True)
            expected = torch.cat([grad.flatten() for grad in grads])
            torch.testing.assert_close(jacobians[row, column], expected, atol=1e-6, rtol=1e-4)

    def test_no_position_looks_at_nothing(self) -> None:
        mask = laplace.causal_mask(torch.tensor([[0, 1, 1]]))
        assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]

    def test_laplace(self, model: Any) -> None:
        pytest.importorskip("laplace", reason="the Laplace approximation is laplace-torch's")
        training, asked = items(12), items(5, 2)
        found = laplace.predict(model, training, items(8, 3), asked)
        torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(found.samples, 5))
        assert found.prior_precision > 0 and found.probabilities.std(0).max() > 0
        mean = methods.passes(model, asked, 1)[0]
        assert (found.probabilities.mean(0) - mean).abs().mean() < 0.3

    def test_laplace_under_a_half_precision_base(self, base: Any, trained: train.Trained) -> None:
        """Its own arithmetic stays float32, so the answers are nearly those under a float32 base."""
        pytest.importorskip("laplace", reason="the Laplace approximation is laplace-torch's")
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(base).to(dtype)
            model.tie_weights()
            with methods.adapted(model, TARGETS["qv"], RECIPE.rank, RECIPE.alpha, 0.0) as adapted:
                methods.set_weights(adapted, trained.states["overfitted"][0])
                found.append(laplace.predict(adapted, items(24), items(8, 3), items(5, 2)))
        assert found[0].prior_precision == found[1].prior_precision
        torch.testing.assert_close(found[0].probabilities.mean(0), found[1].probabilities.mean(0), atol=0.03, rtol=0)


def predicted(p: list[list[float]], labels: list[int], strange: list[float]) -> measures.Predicted:
    logs = torch.tensor(p, dtype=torch.float64).log()
    outside = torch.tensor(strange, dtype=torch.float64)
    return results.judged(logs, torch.tensor(labels), torch.zeros(len(labels)), dict.fromkeys(measures.SCORES, outside))


class TestMeasures:
    def test_by_hand(self) -> None:
        one = predicted([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]], [0, 1, 1, 0], [0.69, 0.5])
        found = measures.measure(one)
        assert found["accuracy"] == 0.5
        assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.4) + math.log(0.7)) / 4)
        assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.6 + 0.3) / 4)
        assert found["brier"] == pytest.approx(2 * (0.01 + 0.64 + 0.36 + 0.09) / 4)
        # Confidences .9 right, .8 wrong, .7 right, .6 wrong: of the four pairs (wrong, right) three are in order.
        assert found["auroc_error"] == 0.75
        assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
        entropies = [-(q * math.log(q) + (1 - q) * math.log(1 - q)) for q in (0.9, 0.8, 0.6, 0.7)]
        above = sum(s > e for s in (0.69, 0.5) for e in entropies) / 8
        assert found["auroc_ood"] == above

    def test_missing_areas_are_none(self) -> None:
        found = measures.measure(predicted([[0.9, 0.1]], [0], [0.5]))
        assert found["auroc_error"] is None and found["auroc_ood"] == 1.0

    def test_ties_share_their_errors(self) -> None:
        scores, wrong = torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.tensor([False, True, False, True])
        coverage, risk = measures.risk_coverage(scores, wrong)
        assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
        assert risk.tolist() == pytest.approx([0, 0.5 / 2, 1 / 3, 2 / 4])

    def test_large_scores_are_not_squashed(self) -> None:
        scores = torch.tensor([50.0, 60.0, 70.0, 80.0], dtype=torch.float64)
        assert measures.auroc(scores, torch.tensor([False, False, True, True])) == 1.0

    def test_temperature_is_found(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(20000, 4, generator=generator, dtype=torch.float64) * 2
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        assert measures.fit_temperature((3 * logits).log_softmax(-1), labels) == pytest.approx(3, rel=0.05)

    def test_bootstrap(self) -> None:
        generator = torch.Generator().manual_seed(0)
        p = torch.rand(300, 3, generator=generator, dtype=torch.float64).softmax(-1)
        labels = torch.randint(0, 3, (300,), generator=generator)
        a = predicted(p.tolist(), labels.tolist(), [0.5])
        b = predicted((p**3 / (p**3).sum(1, keepdim=True)).tolist(), labels.tolist(), [0.5])
        same = measures.compare([a], [a, a])
        assert all(d.value == d.error == 0 for d in same.values())
        found = measures.compare([a], [b, b])
        for name in ("accuracy", "ece", "nll", "brier"):
            expected = getattr(tfb_ext.evaluate(a.probabilities, labels), name)
            expected -= getattr(tfb_ext.evaluate(b.probabilities, labels), name)
            assert found[name].value == pytest.approx(expected, abs=1e-6)
            assert found[name].low <= found[name].value <= found[name].high or name == "ece"
        nll = (b.probabilities.gather(1, labels[:, None]) / a.probabilities.gather(1, labels[:, None])).log()
        assert found["nll"].error == pytest.approx(float(nll.std() / 300**0.5), rel=0.1)
        with pytest.raises(ValueError, match="different labels"):
            measures.compare([a], [predicted(p.tolist(), (2 - labels).tolist(), [0.5])])

    def test_forwards(self) -> None:
        assert results.forwards("tfb", 10, 2, 30, 30) == 10
        assert results.forwards("tfb", 10, 2, 30, 4) == pytest.approx(2.2)
        assert results.forwards("tfb", 10, 2, 30, 0) == 1
        assert results.forwards("dropout", 10, 2, 30, None) == 10
        assert results.forwards("laplace", 1000, 2, 30, None) == 5
        assert results.forwards("tfb", 40, 2, 30, 30, share=3 / 60) == pytest.approx(3)
        assert results.forwards("linear", 0, 2, 30, None) == 3
        assert results.forwards("linear", 0, 8, 30, None, share=3 / 60) == pytest.approx(1.7)


class TestStudy:
    def test_units_are_ordered_and_named_apart(self) -> None:
        units = study.Study().units()
        names = [unit.name for unit in units]
        assert len(set(names)) == len(names)
        first = units[: 3 * 4 * 3]
        assert {u.dataset for u in first} == set(check.SETS) and {(u.targets, u.stop) for u in first} == {
            ("qv", "overfitted")
        }

    def test_everything_that_is_asked_is_drawn(self) -> None:
        by_name = {unit.name: unit for unit in study.Study().units()}
        unit = by_name["r8-qv-overfitted-mle-0"]
        drawn = {
            (s.recipe, s.depth, s.mode, d.antithetic, n) for s in unit.searches for d in s.draws for n in d.prefixes
        }
        assert {("auto", "all", "weight", a, n) for a in (True, False) for n in (1, 3, 5, 10, 30)} <= drawn
        assert {
            ("auto", d, "weight", a, n) for d in (0.5, 0.25, 0.125) for a in (True, False) for n in (4, 10)
        } <= drawn
        assert {(r, d, "weight", False, 10) for r in ("paper",) for d in ("all", 0.5, 0.25, 0.125)} <= drawn
        assert {("official", d, "flipout", False, 10) for d in ("all", 0.5, 0.25, 0.125)} <= drawn
        assert ("auto", "all", "flipout", True, 10) in drawn
        head = by_name["r8-qv_head-overfitted-mle-0"]
        assert {s.recipe for s in head.searches if s.depth == "head"} == {"auto", "paper", "official"}

    def test_spans_are_searched_with_their_samples(self) -> None:
        units = [unit for unit in study.Study().units() if unit.part == "spans"]
        assert [unit.stop for unit in units] == ["overfitted"] * 18 + ["early"] * 18
        assert {(u.dataset, u.targets, u.member.seed) for u in units} == {
            (d, t, s) for d in check.SETS for t in ("qv", "all_linear") for s in range(3)
        }
        for unit in units:
            assert unit.name.endswith("-spans") and {(s.recipe, s.mode) for s in unit.searches} == {("auto", "weight")}
            assert [(s.span, s.depth, s.samples or 10, s.draws) for s in unit.searches] == [
                (span, depth, n, (study.Draw(n, True, (n,)),))
                for span, depth, n in (
                    ("all", "all", 10), ("all", 0.125, 10), ("answer", "all", 10), ("answer", "all", 40), ("question", "all", 40),
                )
            ]  # fmt: skip

    def test_quantised_bases_have_the_base_setting(self) -> None:
        units = [unit for unit in study.Study().units() if unit.base]
        assert {(u.base, u.dataset, u.member.seed) for u in units} == {
            (b, d, s) for b in ("nf4", "int8") for d in ("headlines", "newsgroups") for s in range(3)
        }
        assert all(u.name.endswith(f"-{u.base}") and [s.recipe for s in u.searches] == ["auto"] for u in units)

    def test_closed_form_has_samples_beside_it_somewhere(self) -> None:
        units = [unit for unit in study.Study().units() if unit.part == "linear"]
        assert len({unit.name for unit in units}) == len(units) == 3 * 3 * 2 * (3 + 1 + 1)
        assert {u.member.kind for u in units} == {"mle", "map", "blob"}
        spanned = {unit.name.removesuffix("-spans") for unit in study.Study().units() if unit.part == "spans"}
        for unit in units:
            assert unit.linear == ("all", "answer") and unit.name.endswith("-linear")
            assert bool(unit.searches) == (unit.name.removesuffix("-linear") not in spanned)


TINY = replace(
    study.SMALL,
    kinds=("mle", "dropout", "blob"),
    targets=("qv",),
    seeds=(0, 1),
    recipes=("auto", "official"),
    sizes=data.Sizes(train=8, validation=6, anchor=6, test=10, stranger=5),
    recipe=Recipe(epochs=1, batch_size=4, lr=1e-2),
    laplace=False,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished study of two seeds on stand-in headlines."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patched:
        quality_fakes.write(root, patched)
        assert run.run(TINY, root / "work", 1, float("inf"))
        yield root / "work"
    quality_fakes.forget()


@pytest.mark.slow
class TestRun:
    def test_all_units_are_there_with_their_facts(self, work: Path) -> None:
        folder = run.Folder(work)
        assert all(folder.has(unit) for unit in TINY.units())
        assert not list(work.rglob("*.part"))
        facts = json.loads((work / "predictions" / "headlines-qv-overfitted-mle-0.json").read_text())
        assert facts["commit"] and facts["training"]["checked"] == [1]
        assert {row["method"] for row in facts["rows"]} == {"mean", "tfb"}
        assert [search["recipe"] for search in facts["searches"]].count("official") == 2
        assert facts["spread"]["independent"]["10"] > 0

    def test_prefixes_are_what_a_smaller_call_gives(self, work: Path) -> None:
        found = results.load(work)
        rows = found.pick(
            adapter="qv-overfitted-mle", method="tfb", recipe="auto", mode="weight", depth="all", span="all", seed=0
        )
        assert {row.samples for row in rows if row.antithetic} == {1, 2, 10}
        assert {row.samples: row.seconds is not None for row in rows if row.antithetic} == {
            1: False,
            2: False,
            10: True,
        }

    def test_spans(self, work: Path) -> None:
        facts = json.loads((work / "predictions" / "headlines-qv-early-mle-1-spans.json").read_text())
        asked = [("all", "all", 10), ("all", 0.5, 10), ("answer", "all", 2), ("question", "all", 4)]
        sampled = [row for row in facts["rows"] if row["method"] == "tfb"]
        assert [(row["span"], row["depth"], row["samples"]) for row in sampled] == asked
        assert [row["span_tokens"] for row in sampled[:3]] == [None, None, 1] and sampled[3]["span_tokens"] > 1
        assert [search["samples"] for search in facts["searches"]] == [2, 2, 2, 4]
        assert [search["span"] for search in facts["searches"][:3]] == ["all", "all", "answer"]
        rows = results.load(work).pick(adapter="qv-early-mle", seed=1)
        for span, _, samples in asked[2:]:
            (row,) = [row for row in rows if row.method == "tfb" and row.span == span]
            tokens = next(r["span_tokens"] for r in sampled if r["span"] == span)
            assert row.forwards == pytest.approx(1 + samples * tokens / facts["tokens"])
        assert all(row.search_seconds for row in rows if row.method == "tfb" and row.span != "all")

    def test_quantised_bases(self, work: Path) -> None:
        rows = results.load(work)
        plain = rows.pick(adapter="qv-overfitted-mle", seed=0, method="mean")
        for base in ("nf4", "int8"):
            found = rows.pick(adapter="qv-overfitted-mle", seed=0, base=base)
            assert {row.method for row in found} == {"mean", "mean+temperature", "tfb", "tfb+temperature"}
            assert found[0].measures["nll"] != plain[0].measures["nll"]

    def test_closed_form(self, work: Path) -> None:
        facts = json.loads((work / "predictions" / "headlines-qv-early-mle-1-linear.json").read_text())
        assert [row["method"] for row in facts["rows"]] == ["mean", "linear", "linear"]
        blob = json.loads((work / "predictions" / "headlines-qv-early-blob-1-linear.json").read_text())
        assert "tfb" in [row["method"] for row in blob["rows"]]
        linear = results.load(work).pick(adapter="qv-early-mle", seed=1, method="linear")
        assert [row.span for row in linear] == ["all", "answer"] and all(row.sigma and row.seconds for row in linear)
        assert linear[1].forwards == pytest.approx(1 + 2 / facts["tokens"])

    def test_goes_on_where_it_was(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = run.Folder(work)
        unit = next(u for u in TINY.units() if u.name == "headlines-qv-early-dropout-1")
        before = folder.facts(unit).read_text()
        folder.facts(unit).unlink()  # as if the run had been stopped between the two files
        folder.arrays(unit).with_name(folder.arrays(unit).name + ".part").write_bytes(b"half")
        untouched = {f: f.stat().st_mtime_ns for f in (work / "predictions").glob("*.json")}
        assert run.run(TINY, work, 1, float("inf"))
        said = capsys.readouterr().out
        assert said.count(" s\n") == 1 and unit.name in said and f"{len(TINY.units())} of" in said
        assert {f: f.stat().st_mtime_ns for f in untouched} == untouched
        again = json.loads(folder.facts(unit).read_text())
        assert again["rows"][0].keys() == json.loads(before)["rows"][0].keys()

    def test_failing_piece_is_told_and_the_others_go_on(
        self, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, units = run.Folder(work), TINY.units()
        bad, good = (next(u for u in units if u.name == f"headlines-qv-early-mle-{s}") for s in (0, 1))
        for unit in (bad, good):
            folder.facts(unit).unlink()
        whole = run.UnitRun.plain

        def plain(self: Any, omega: Any) -> None:
            if self.unit.name == bad.name:
                raise RuntimeError("no such luck")
            whole(self, omega)

        with monkeypatch.context() as patched:
            patched.setattr(run.UnitRun, "plain", plain)
            assert not run.run(TINY, work, 1, float("inf"))
        assert "no such luck" in capsys.readouterr().out
        assert folder.has(good) and not folder.has(bad)
        assert run.run(TINY, work, 1, float("inf")) and folder.has(bad)

    def test_nothing_is_begun_that_would_end_too_late(self, work: Path) -> None:
        folder, unit = run.Folder(work), TINY.units()[0]
        folder.forget_claims()
        saved = folder.facts(unit).rename(work / "aside.json")
        try:
            worker = run.Worker(TINY, folder, torch.device("cpu"), 1)
            now = run.time.monotonic()
            assert list(worker.pieces([unit], now + run.GUESS / 2)) == []
            assert next(worker.pieces([unit], now + 2 * run.GUESS)) == (unit.name, unit)
            assert list(worker.pieces([unit], now + 2 * run.GUESS)) == []  # it is claimed
        finally:
            saved.rename(folder.facts(unit))

    def test_list(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run.main(["--work", str(tmp_path), "--list", "--units", "r8-qv-over*-blob-?"]) == 0
        assert json.loads(capsys.readouterr().out) == {f"r8-qv-overfitted-blob-{s}": False for s in range(3)}


@pytest.fixture(scope="module")
def found(work: Path) -> results.Results:
    return results.load(work)


@pytest.mark.slow
class TestReport:
    def test_ensemble_averages_probabilities(self, found: results.Results) -> None:
        (row,) = found.pick(method="ensemble", adapter="qv-overfitted-mle")
        own = found.pick(method="mean", adapter="qv-overfitted-mle")
        mean = torch.stack([r.predicted.probabilities for r in own]).mean(0)
        torch.testing.assert_close(row.predicted.probabilities, mean)
        assert row.forwards == 2 and row.seed is None and (row.predicted.scores["information"] > 0).any()

    def test_temperature_keeps_the_answers(self, found: results.Results) -> None:
        plain = check.base_rows(found, "headlines", seed=0)[0]
        scaled = found.pick(method="tfb+temperature", adapter="qv-overfitted-mle", seed=0)[0]
        assert torch.equal(plain.predicted.probabilities.argmax(1), scaled.predicted.probabilities.argmax(1))
        assert scaled.temperature is not None and scaled.measures["nll"] != plain.measures["nll"]

    def test_report_writes_everything(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / report.WORDS).write_text("# What we found\n\nIn plain words.\n")
        assert report.main(["--work", str(work), "--out", str(tmp_path)]) == 0
        with gzip.open(tmp_path / "rows.csv.gz", "rt", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(results.load(work).rows) and set(results.FIELDS) <= set(rows[0])
        methods = {"mean", "mean+temperature", "dropout", "blob", "ensemble", "tfb", "linear", "linear+temperature"}
        assert {row["method"] for row in rows} >= methods
        text = (tmp_path / "RESULTS.md").read_text()
        assert text.startswith("# What we found\n\nIn plain words.\n\n## The bars")
        assert "| TFB on MLE |" in text and "| qv-early |" in text
        spanned = text[text.index("## Spans\n") : text.index("## Pictures\n")]
        assert (
            "| Sarcastic headlines, qv-overfitted | question, N = 4 |" in spanned and "temperature scaling" in spanned
        )
        assert "| Sarcastic headlines, qv-overfitted | answer, linear |" in spanned and "answer, linear: NLL" in spanned
        assert {row["span"] for row in rows} == {"all", "answer", "question"}
        pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
        assert pictures == [
            "cost_ece.png", "cost_nll.png", "reliability_headlines.png", "risk_coverage.png", "samples.png", "sigma.png",
        ]  # fmt: skip
        assert all(f"plots/{name}" in text for name in pictures)
        assert "not run" in capsys.readouterr().out and "not run" in text

    def test_rows_of_nan_are_left_out_and_named(self, work: Path, tmp_path: Path) -> None:
        name = "headlines-qv-overfitted-dropout-0"
        folder = tmp_path / "predictions"
        folder.mkdir()
        for suffix in (".json", ".npz"):
            shutil.copy(work / "predictions" / f"{name}{suffix}", folder)
        with np.load(folder / f"{name}.npz") as arrays:
            changed = dict(arrays)
        changed["1/test"][3] = np.nan
        np.savez_compressed(folder / f"{name}.npz", **changed)
        found = results.load(tmp_path)
        assert {row.method for row in found.rows} == {"mean", "mean+temperature"}
        assert found.unusable == ["headlines qv-overfitted-dropout 0: dropout"]
        assert "gave NaN: headlines qv-overfitted-dropout 0" in report.document(found, [], "", [])

    def test_merge_keeps_what_it_does_not_renew(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A folder of spans alone, merged into a table of before there were spans."""
        folder, out = tmp_path / "predictions", tmp_path / "out"
        folder.mkdir()
        out.mkdir()
        for file in (work / "predictions").glob(
            "*-*-*-*-*-*.*"
        ):  # those of spans, of the closed form, of quantised bases
            shutil.copy(file, folder)
        whole = [report.line_of(row) for row in results.load(work).rows]
        old = [line for line in whole if line["span"] == "all" and "linear" not in line["method"] and not line["base"]]
        old = [line | {"commit": "older"} for line in old]
        with gzip.open(out / report.ROWS, "wt", newline="") as file:
            table = csv.DictWriter(
                file, [name for name in old[0] if name not in ("span", "base")], extrasaction="ignore"
            )
            table.writeheader()
            table.writerows(old)
        (out / "RESULTS.md").write_text("# Before\n\nWords.\n\n## The bars\n\n| a |\n\n## Pictures\n\nNone.\n")
        (out / report.WORDS).write_text("# After\n")
        for _ in range(2):  # the second time nothing is new
            assert report.main(["--work", str(tmp_path), "--out", str(out), "--merge"]) == 0
            found = report.read_rows(out / report.ROWS)
            assert [line | {"commit": ""} for line in found] == [line | {"commit": ""} for line in whole]
            kept = [line for line in found if line["commit"] == "older"]
            again = [line for line in whole if line not in found]
            assert kept and len(kept) == len(again) and all(line["span"] == "all" for line in again)
            text = (out / "RESULTS.md").read_text()
            assert text.startswith("# After\n\n## The bars\n\n| a |\n\n## Spans\n\n") and text.count("## Spans") == 1
            assert text.count("## Quantised base models") == 1 and "| nf4, double quantisation | TFB |" in text
            assert text.endswith("\n\n## Pictures\n\nNone.\n")
        said = capsys.readouterr().out.splitlines()
        spanned = len(whole) - len(old)
        assert said[0].startswith(f"{spanned} rows added") and said[1].startswith("0 rows added")
        assert said[0].endswith("8 of 8 adapters have the NLL that they had")

    def test_check_fails_where_runs_are_missing(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert report.main(["--work", str(work), "--check", "--json"]) == 1
        printed = json.loads(capsys.readouterr().out)
        assert any(bar["passed"] is None and bar["bar"].startswith("r8") for bar in printed)

    def test_empty_folder_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="python -m bench.quality.run"):
            results.load(tmp_path)


def made_up(sure: float, honest: float, antithetic_gain: float = 2.0) -> results.Results:
    """A hundred items, 80 of them answered right: by a plain adapter that is ``sure``, by TFB that is ``honest``."""
    labels = [0] * 80 + [1] * 20

    def row(
        kind: str, method: str, confidence: float, samples: int = 1, forwards: float = 1, **more: Any
    ) -> results.Row:
        p = predicted([[confidence, 1 - confidence]] * 100, labels, [0.1])
        return results.Row("", f"qv-overfitted-{kind}", method, 0, samples, forwards, p, **more)

    tfb = {"recipe": "auto", "mode": "weight", "antithetic": True}
    rows = [
        *(row("mle", "mean", sure), row("dropout", "dropout", sure, 10), row("mle", "ensemble", sure, 3)),
        *(row("blob", "blob", honest, 10), row("blob", "tfb", honest, 10, 10, depth="all", **tfb)),
        row("mle", "tfb", honest, 10, 10, depth="all", **tfb),
        row("mle", "tfb", honest, 10, 10, depth="all", **{**tfb, "antithetic": False}),
        *(row("mle", "tfb", honest, 4, 1.8, depth=0.25, **tfb), row("mle", "tfb", sure, 2, 2, depth="all", **tfb)),
    ]
    spread = {"independent": {"10": antithetic_gain}, "antithetic": {"10": 1.0}}
    return results.Results(
        [replace(one, dataset=dataset) for dataset in check.SETS for one in rows],
        [{"unit": {"dataset": dataset}, "spread": spread} for dataset in check.SETS],
    )


class TestSpans:
    def test_verdict(self) -> None:
        found = made_up(0.999, 0.81)
        (base,) = [row for row in check.base_rows(found, "r8") if row.depth == "all"]
        worse = predicted([[0.999, 0.001]] * 100, base.predicted.labels.tolist(), [0.1])
        for dataset in check.SETS:
            changed = worse if dataset == "headlines" else base.predicted
            found.rows.append(
                replace(base, dataset=dataset, span="answer", samples=40, forwards=1.6, predicted=changed)
            )
            found.rows.append(replace(base, dataset=dataset, depth=0.125, forwards=2.2, predicted=changed))
        text = spans.section(found, report.markdown)
        assert text is not None
        assert "| set, adapter | upper eighth, N = 10: NLL |" in text
        assert "* **upper eighth, N = 10**: NLL is level with that of all tokens, N = 10 or lower in 2 of 3" in text
        assert (
            "* **answer, N = 40**: NLL is level with that of all tokens, N = 10 or lower in 2 of 3 (higher: Sarcastic headlines, "
            "qv-overfitted); ECE is"
        ) in text
        line = next(
            line for line in text.splitlines() if line.startswith("| Reuters R8, qv-overfitted | answer, N = 40 |")
        )
        assert "| 1.6 |" in line and f"| {base.measures['nll']:.3f} |" in line

    def test_nothing_without_spans(self) -> None:
        assert spans.section(made_up(0.999, 0.81), report.markdown) is None


class TestBars:
    def test_all_cleared(self) -> None:
        bars = check.bars(made_up(0.999, 0.81))
        assert all(bar.passed for bar in bars), "\n".join(map(str, bars))
        cheap = next(bar for bar in bars if "setting of at most" in bar.name)
        assert cheap.detail == "depth 0.25 N 4 antithetic"

    def test_not_cleared(self) -> None:
        failed = {bar.name for bar in check.bars(made_up(0.82, 0.81, antithetic_gain=0.5)) if not bar.passed}
        assert "r8: TFB cuts NLL to at most 70%" in failed
        assert "antithetic pairs lower the Monte-Carlo variance at N = 10" in failed
        assert "r8: accuracy within one point" not in failed
