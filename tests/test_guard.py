"""Samples in one call are separate passes, or the first context refuses the model in words: on layouts of rows of every kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tfb_ext
from tfb_ext.errors import SamplingError, TFBError, UnsupportedModelError

SIGMA = 0.3
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def bayesian(model: nn.Module, task: str | None, targets: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.mul_(4.0) if parameter.dim() > 1 else None
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type=task, target_modules=targets))
    zoo.randomise(peft)
    return tfb_ext.bayesianize(peft.eval(), sigma=SIGMA, **options)


def deberta(**extra: Any) -> Any:
    config = tf.DebertaV2Config(
        **SMALL, num_labels=3, position_buckets=256, share_att_key=True, pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm", relative_attention=True, **extra,
    )  # fmt: skip
    return bayesian(tf.DebertaV2ForSequenceClassification(config), "SEQ_CLS")


def longformer() -> Any:
    config = tf.LongformerConfig(**SMALL, num_labels=3, attention_window=4)
    return bayesian(tf.LongformerForSequenceClassification(config), "SEQ_CLS", ["query", "value"])


def bloom() -> Any:
    return bayesian(
        tf.BloomForCausalLM(tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)), "CAUSAL_LM"
    )


def openai_gpt() -> Any:
    config = tf.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return bayesian(tf.OpenAIGPTLMHeadModel(config), "CAUSAL_LM", ["c_attn"])


def xglm() -> Any:
    config = tf.XGLMConfig(
        vocab_size=97, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64
    )
    return bayesian(tf.XGLMForCausalLM(config), "CAUSAL_LM", ["q_proj", "v_proj"])


def zamba2() -> Any:
    config = tf.Zamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_expand=2, num_mem_blocks=1, max_position_embeddings=64,
        hybrid_layer_ids=[1, 3], layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], use_mem_eff_path=False, chunk_size=8,
    )  # fmt: skip
    return bayesian(tf.Zamba2ForCausalLM(config), "CAUSAL_LM", ["q_proj", "v_proj", "in_proj"])


def modern_bert(head: str = "SequenceClassification", **extra: Any) -> Any:
    config = tf.ModernBertConfig(**SMALL, num_labels=2, local_attention=8, **extra)
    model = getattr(tf, f"ModernBertFor{head}")(config)
    task = {"SequenceClassification": "SEQ_CLS", "QuestionAnswering": "QUESTION_ANS"}[head]
    return bayesian(model, task, ["Wqkv", "Wo"])


def euro_bert() -> Any:
    config = tf.EuroBertConfig(**SMALL, num_key_value_heads=2, num_labels=3, classifier_pooling="mean")
    return bayesian(tf.EuroBertForSequenceClassification(config), "SEQ_CLS", ["q_proj", "v_proj"])


def cohere() -> Any:
    config = tf.CohereConfig(**zoo._COMMON, logit_scale=0.0625)
    return bayesian(tf.CohereForCausalLM(config), "CAUSAL_LM", ["q_proj", "v_proj"])


def gpt_big_code() -> Any:
    config = tf.GPTBigCodeConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return bayesian(tf.GPTBigCodeForCausalLM(config), "CAUSAL_LM", ["c_attn"])


def opt() -> Any:
    config = tf.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return bayesian(tf.OPTForCausalLM(config), "CAUSAL_LM", ["q_proj", "fc1", "fc2"])


def falcon() -> Any:
    config = tf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    return bayesian(tf.FalconForCausalLM(config), "CAUSAL_LM", ["query_key_value", "dense"])


ZOO: dict[str, Callable[[], Any]] = {
    "deberta-v3": deberta,
    "longformer": longformer,
    "bloom": bloom,
    "openai-gpt": openai_gpt,
    "xglm": xglm,
    "zamba2": zamba2,
    "modernbert-mean": lambda: modern_bert(classifier_pooling="mean"),
    "modernbert-cls": lambda: modern_bert(classifier_pooling="cls"),
    "modernbert-qa": lambda: modern_bert("QuestionAnswering"),
    "eurobert-mean": euro_bert,
    "cohere": cohere,
    "gpt-big-code": gpt_big_code,
    "opt": opt,
    "falcon-alibi": falcon,
}
SERVED = {"bloom", "xglm", "zamba2", "opt", "falcon-alibi", "modernbert-cls"}


def batch(rows: int, tokens: int, padded: bool, positions: bool = False) -> dict[str, Tensor]:
    made = zoo.inputs(rows, tokens, padded, left=False)
    if not positions:
        del made["position_ids"]
    return made


def outputs_of(found: Any) -> Tensor:
    return found.logits if hasattr(found, "logits") else torch.stack([found.start_logits, found.end_logits], -1)


def right_or_refused(adapter: Any, given: dict[str, Tensor], samples: int) -> str:
    """``""`` where the predictive is that of separate passes, else the words that refuse it before any number is given."""
    try:
        with adapter.predictive(samples):
            found = adapter.model(**given).logits
    except TFBError as error:
        return str(error)
    apart = zoo.separate_passes(
        adapter, list(range(samples)), SIGMA, lambda: torch.log_softmax(adapter.model(**given).logits, -1)
    )
    spread = float((apart - apart.mean(0)).abs().max())
    assert spread > 1e-3
    assert (found - zoo.average(apart)).abs().max() < 1e-3 * spread + 1e-4
    return ""


@pytest.mark.parametrize("name", zoo.slow_but(ZOO, "bloom", "openai-gpt"))
def test_right_or_refused_with_a_way_out(name: str) -> None:
    adapter = ZOO[name]()
    refused = []
    for rows, tokens, padded, samples in [
        (8, 8, True, 2),
        (3, 6, True, 4),
        (1, 6, False, 8),
        (2, 4, True, 10),
        (2, 16, False, 16),
    ]:
        refused.append(right_or_refused(adapter, batch(rows, tokens, padded), samples))
    if name in SERVED:
        assert refused == [""] * 5
        return
    assert all("Fix: one sample a call" in words for words in refused)
    # The way out exists, and is right.
    given = batch(3, 6, True)
    for sample in (0, 3):
        with adapter.sampling([sample]):
            found = outputs_of(adapter.model(**given))
        (apart,) = zoo.separate_passes(adapter, [sample], SIGMA, lambda: outputs_of(adapter.model(**given)))
        assert torch.allclose(found, apart, atol=1e-4)
        with torch.no_grad():
            assert (outputs_of(adapter.model(**given)) - apart).abs().max() > 1e-3


def test_predict_refuses_too() -> None:
    adapter = deberta()
    data = [batch(8, 8, True)]
    with pytest.raises(TFBError, match="Fix: one sample a call"):
        tfb_ext.predict(adapter, data, samples=10)


@pytest.mark.parametrize("name", ["deberta-v3", "longformer"])
def test_rows_that_a_caller_lays_out_are_compared_too(name: str) -> None:
    adapter = ZOO[name]()
    with pytest.raises(UnsupportedModelError, match="several samples in one call"):
        with adapter.sampling(4):
            pass


def test_rows_laid_out_by_a_caller_serve_a_model_that_computes_on_its_logits() -> None:
    adapter, given = cohere(), batch(2, 6, True)
    with adapter.sampling(3):
        found = adapter.model(**{n: v.repeat(3, 1) for n, v in given.items()}).logits.unflatten(0, (3, 2))
    apart = zoo.separate_passes(adapter, [0, 1, 2], SIGMA, lambda: adapter.model(**given).logits)
    assert torch.allclose(found, apart, atol=1e-4)


class Shuffled(tf.LlamaForCausalLM):
    """A model whose attention gets its rows in another order, of which no size tells."""

    def __init__(self, config: Any, how: str) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.mlp.register_forward_pre_hook(lambda m, args: (self.moved(args[0], how),))
            block.mlp.register_forward_hook(lambda m, args, out: self.moved(out, how, back=True))

    @staticmethod
    def moved(x: Tensor, how: str, back: bool = False) -> Tensor:
        if how == "reversed":
            return x.flip(0)
        if how == "tokens first":
            return x.transpose(0, 1)
        if how == "flat":
            if back:
                return x.view(Shuffled.shape)
            Shuffled.shape = x.shape
            return x.reshape(-1, x.shape[-1])
        if how == "flat tokens first":
            if back:
                return x.view(Shuffled.shape[1], Shuffled.shape[0], -1).transpose(0, 1)
            Shuffled.shape = x.shape
            return x.transpose(0, 1).reshape(-1, x.shape[-1])
        return x


@pytest.mark.parametrize("how", ["as ever", "flat", "reversed", "tokens first", "flat tokens first"])
def test_any_order_of_rows_is_right_or_refused(how: str) -> None:
    torch.manual_seed(0)
    model = Shuffled(tf.LlamaConfig(**zoo._COMMON), how)
    adapter = bayesian(model, "CAUSAL_LM", ["gate_proj", "q_proj"])
    words = [
        right_or_refused(adapter, batch(r, t, False), s) for r, t, s in ((3, 6, 3), (2, 4, 2), (4, 4, 4), (1, 5, 5))
    ]
    assert all(words) if how not in ("as ever", "flat") else not any(words)


def takes(block: Any, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let a block's forward take an argument ``table``, which changes its hidden states."""
    own = block.forward

    def forward(hidden_states: Tensor, *args: Any, table: Tensor, **kwargs: Any) -> Any:
        return own(change(hidden_states, table), *args, **kwargs)

    block.forward = forward


class Sized(tf.LlamaForCausalLM):
    """A model whose blocks get a table that serves all rows, as long as a batch may be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, table=torch.arange(6.0)[:, None] * torch.ones(6, 32), **kwargs)


def test_a_shared_argument_of_the_batchs_size_is_not_repeated() -> None:
    torch.manual_seed(0)
    model = Sized(tf.LlamaConfig(**zoo._COMMON))
    for block in model.model.layers:
        takes(block, lambda hidden, table: hidden + 0.01 * table.sum(0))
    adapter = bayesian(model, "CAUSAL_LM", ["q_proj", "v_proj"])
    for rows in (1, 6, 3):
        assert not right_or_refused(adapter, batch(rows, 5, True), 4)


def test_a_layer_that_the_guard_did_not_see_is_refused() -> None:
    """An expert that only some tokens reach gets as many rows as it likes."""

    class Rare(tf.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.rare = nn.Linear(config.hidden_size, config.hidden_size)

    torch.manual_seed(0)
    model = Rare(tf.LlamaConfig(**zoo._COMMON))
    block = model.model.layers[-1]

    def hook(module: Any, args: Any, out: Any) -> Any:
        return out + model.rare(out) if out.shape[1] > 6 else out

    block.register_forward_hook(hook)
    adapter = bayesian(model, "CAUSAL_LM", ["q_proj", "rare"])
    assert not right_or_refused(adapter, batch(2, 5, True), 3)
    assert "did not run when the model was compared" in right_or_refused(adapter, batch(2, 8, True), 3)
    with adapter.predictive(1):  # one sample has all rows
        adapter.model(**batch(2, 8, True))


def test_every_call_checks_the_leading_sizes() -> None:
    adapter = zoo.compared(bayesian(tf.LlamaForCausalLM(tf.LlamaConfig(**zoo._COMMON)), "CAUSAL_LM", ["q_proj"]))
    layer = adapter.anatomy.blocks[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda m, args: (args[0].transpose(0, 1).contiguous(),))
    with (
        adapter.predictive(4),
        pytest.raises(SamplingError, match=r"q_proj' got an input of shape \(5, 8, 32\), expected 8 rows"),
    ):
        adapter.model(**batch(2, 5, False))
    hook.remove()
    assert not right_or_refused(adapter, batch(2, 5, False), 4)


def test_the_guard_can_be_put_off_and_says_so() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo._COMMON))
    adapter = bayesian(model, "CAUSAL_LM", ["q_proj"], guard=False)
    with pytest.warns(UserWarning, match="not compared with separate passes.*guard=False"):
        assert not right_or_refused(adapter, batch(2, 5, True), 4)
    adapter.guard = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapter.predictive(2):
            pass


def test_the_guard_runs_once_for_each_depth() -> None:
    adapter = bayesian(tf.LlamaForCausalLM(tf.LlamaConfig(**zoo._COMMON)), "CAUSAL_LM", ["q_proj"])
    calls: list[int] = []
    adapter.anatomy.model.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for depth in ("all", "all", 2, 2, "all"):
        adapter.depth = depth
        before = len(calls)
        with adapter.predictive(2):
            pass
        counts.append(len(calls) - before)
    assert counts[0] > 0 and counts[2] > 0 and counts[1] == counts[3] == counts[4] == 0
    assert counts[0] <= 40


def plain(adapter: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return adapter.model(**given).logits


def test_a_classifier_without_a_padding_token_is_served() -> None:
    config = tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=3)
    adapter = bayesian(tf.GPT2ForSequenceClassification(config), "SEQ_CLS", ["c_attn"])
    assert not right_or_refused(adapter, batch(1, 7, False), 4)
    assert adapter.anatomy.model.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):  # transformers' own words
        plain(adapter, batch(2, 7, False))


def test_the_guard_leaves_nothing_on_the_model() -> None:
    """BigBird turns its sparse attention off for good at the first short input."""
    config = tf.BigBirdConfig(
        **{**SMALL, "max_position_embeddings": 256}, attention_type="block_sparse", block_size=8, num_random_blocks=2, num_labels=3
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.BigBirdForSequenceClassification(config)
    given = {"input_ids": torch.randint(3, 97, (2, 160)), "attention_mask": torch.ones(2, 160, dtype=torch.int64)}
    adapter = bayesian(model, "SEQ_CLS", ["query", "value"])
    sparse = plain(adapter, given)
    assert "argument 'band_mask'" in right_or_refused(adapter, given, 4)  # which short texts do not have
    adapter.compare(**given)
    assert not right_or_refused(adapter, given, 4)
    assert torch.equal(plain(adapter, given), sparse)
    model.bert.set_attention_type("original_full")
    assert not torch.equal(plain(adapter, given), sparse)


@pytest.mark.parametrize("how", ["as ever", "reversed"])
def test_classes_of_minus_infinity_are_compared_too(how: str) -> None:
    adapter = bayesian(Shuffled(tf.LlamaConfig(**zoo._COMMON), how), "CAUSAL_LM", ["gate_proj", "q_proj"])
    model = adapter.anatomy.model
    model.lm_head.register_forward_hook(lambda m, args, out: out.index_fill(-1, torch.tensor([5, 6]), -torch.inf))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    if how == "reversed":
        with pytest.raises(UnsupportedModelError, match="several samples in one call"), adapter.predictive(2):
            pass
        return
    for _ in range(2):
        before = len(calls)
        with adapter.predictive(3):
            out = adapter.model(**batch(2, 5, False)).logits
    assert len(calls) == before + 1  # compared once
    given = batch(2, 5, False)
    apart = zoo.separate_passes(adapter, [0, 1, 2], SIGMA, lambda: plain(adapter, given).log_softmax(-1))
    assert torch.allclose(out, zoo.average(apart), atol=1e-4)


def vision_language(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny Qwen with pictures, and two texts with one picture each."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**zoo._COMMON, "num_hidden_layers": 3, "head_dim": 8, "rope_parameters": rope}
    sizes: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    own: dict[str, Any] = {
        "Qwen2VL": {"embed_dim": 32, "mlp_ratio": 2},
        "Qwen3VL": {"out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    }[name]  # fmt: skip
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = getattr(tf, f"{name}Config")(
        text_config=text, vision_config={**sizes, "temporal_patch_size": 2, **own}, **tokens
    )
    model = getattr(tf, f"{name}ForConditionalGeneration")(config)
    adapter = bayesian(model, "CAUSAL_LM", r".*language_model.*(q_proj|v_proj|down_proj)")
    ids = torch.randint(3, 80, (2, 9))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 92, 90, 93
    grid = torch.tensor([[1, 4, 4]] * 2)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": grid,
    }
    return adapter, given | {"mm_token_type_ids": (ids == 90).int()}  # fmt: skip


def test_a_model_that_saw_pictures_is_compared_as_before() -> None:
    adapter, given = vision_language("Qwen2VL")
    for depth in ("all", 1):  # each is compared after the last one's pictures
        adapter.depth = depth
        assert not right_or_refused(adapter, given, 3)


def test_what_fails_between_blocks_is_refused_in_words() -> None:
    """Qwen3-VL adds pictures to the states after a block, which have every sample's rows."""
    adapter, given = vision_language("Qwen3VL")
    assert "failed between its blocks" in right_or_refused(adapter, given, 3)
    text = {n: v for n, v in given.items() if n in ("input_ids", "attention_mask")}
    assert not right_or_refused(adapter, text | {"input_ids": text["input_ids"] % 80}, 3)
    with pytest.raises(IndexError, match="index out of range"), adapter.predictive(3):  # the caller's own fault
        adapter.model(input_ids=torch.full((1, 3), 10**6))
    with adapter.sampling([2]):  # the way out
        found = adapter.model(**given).logits
    (apart,) = zoo.separate_passes(adapter, [2], SIGMA, lambda: adapter.model(**given).logits)
    assert torch.allclose(found, apart, atol=1e-4)


def test_outputs_beside_logits_are_compared() -> None:
    config = tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    adapter = bayesian(tf.GPT2DoubleHeadsModel(config), None, ["c_attn"])
    assert "mc_logits" in right_or_refused(adapter, batch(2, 5, False), 3)


def test_router_logits_are_refused_in_words() -> None:
    config = tf.MixtralConfig(**zoo._COMMON, num_local_experts=4, num_experts_per_tok=2)
    adapter = bayesian(tf.MixtralForCausalLM(config), "CAUSAL_LM", ["q_proj"])
    with pytest.raises(SamplingError, match="output_router_logits is on"), adapter.predictive(3):
        adapter.model(**batch(2, 5, True), output_router_logits=True)
    assert not right_or_refused(adapter, batch(2, 5, True), 3)


def pictures() -> tuple[Any, Tensor]:
    config = tf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return bayesian(tf.ViTForImageClassification(config), None, ["q_proj", "v_proj"]), torch.randn(3, 3, 16, 16)  # fmt: skip


def sound() -> tuple[Any, Tensor]:
    config = tf.Wav2Vec2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=(32, 32), conv_stride=(5, 4),
        conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, num_labels=3,
    )  # fmt: skip
    return bayesian(tf.Wav2Vec2ForSequenceClassification(config), None, ["q_proj", "v_proj"]), torch.randn(3, 800)


@pytest.mark.parametrize("made", [pictures, sound])
def test_models_without_text_are_served(made: Callable[[], tuple[Any, Tensor]]) -> None:
    adapter, values = made()
    name = adapter.anatomy.model.main_input_name
    assert not right_or_refused(adapter, {name: values}, 4)
    with torch.no_grad(), adapter.predictive(4):
        assert torch.equal(adapter.model(values).logits, adapter.model(**{name: values}).logits)


@pytest.mark.parametrize("length", [lambda n: n, lambda n: min(n, 4), lambda n: 3], ids=["tokens", "at most 4", "3"])
def test_a_table_that_serves_all_rows_is_never_repeated(length: Callable[[int], int]) -> None:
    """Also in a step from a cache, where the table is as long as the batch."""

    class Tabled(tf.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            table = torch.ones(length(seen + input_ids.shape[1]), 32)
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, table=table, **kwargs)

    model = Tabled(tf.LlamaConfig(**zoo._COMMON))
    for block in model.model.layers:
        takes(block, lambda hidden, table: hidden + 0.05 * table.sum(0))
    adapter = bayesian(model, "CAUSAL_LM", ["q_proj", "v_proj"])

    def stepped() -> Tensor:
        first = adapter.model(**batch(6, 5, False), use_cache=True)
        after = adapter.model(input_ids=torch.full((6, 1), 7), past_key_values=first.past_key_values)
        return torch.cat([first.logits, after.logits], 1)

    # Where the table's length does not tell whether it is the batch's, the call is refused.
    for rows, tokens in ((3, 6), (6, 6), (4, 4), (3, 3), (1, 6), (6, 5)):
        words = right_or_refused(adapter, batch(rows, tokens, False), 3)
        assert not words or "a block's argument 'table'" in words
    with adapter.predictive(3):
        out = stepped()
    apart = zoo.separate_passes(adapter, [0, 1, 2], SIGMA, lambda: stepped().log_softmax(-1))
    assert torch.allclose(out, zoo.average(apart), atol=1e-4)


def test_blocks_differ_in_what_an_argument_counts() -> None:
    """The lower blocks get an entry for each row, the others a table that serves all rows, by the same name."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo._COMMON))
    number = [0]
    model.register_forward_pre_hook(
        lambda m, args, kwargs: number.__setitem__(0, len(kwargs["input_ids"])), with_kwargs=True
    )
    for i, block in enumerate(model.model.layers):
        serves_all = i > 1
        takes(block, lambda hidden, table, all=serves_all: hidden + 0.05 * (table.sum(0) if all else table[:, None]))
        given = torch.ones(6, 32) if serves_all else None

        def give(module: Any, args: Any, kwargs: Any, given: Any = given) -> Any:
            rows = torch.arange(number[0] * 32.0).view(-1, 32) / 99
            return args, kwargs | {"table": rows if given is None else given}

        block.register_forward_pre_hook(give, with_kwargs=True)
    adapter = bayesian(model, "CAUSAL_LM", ["q_proj", "v_proj"])
    assert not right_or_refused(adapter, batch(6, 5, False), 3)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans())


@pytest.mark.parametrize("name", zoo.slow_but(["bloom", "opt", "zamba2", "llama", "bert", "gpt2", "gemma3"], "llama"))
def test_served_models_are_right_at_any_sizes(name: str) -> None:
    adapter = ZOO[name]() if name in ZOO else tfb_ext.bayesianize(zoo.peft_model(name), sigma=SIGMA)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(SIZES)
    def run(sizes: tuple[int, int, int, bool, bool]) -> None:
        rows, tokens, samples, padded, positions = sizes
        given_batch = batch(rows, max(tokens, rows), padded, positions and name not in ("bert", "bloom", "zamba2"))
        adapter.depth = "all" if samples % 2 else 1
        if samples == 1:
            return
        assert not right_or_refused(adapter, given_batch, samples)

    run()


class Coloured(tf.LlamaForCausalLM):
    """A model with an argument of its own, a number for each row and feature, which its blocks get."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.model.layers:
            own = block.forward
            block.forward = lambda hidden, *a, colour=None, own=own, **k: own(
                hidden if colour is None else hidden + colour[:, None], *a, **k
            )


def test_an_argument_of_blocks_that_was_not_compared_is_refused_until_it_is() -> None:
    torch.manual_seed(0)
    adapter = bayesian(Coloured(tf.LlamaConfig(**zoo._COMMON)), "CAUSAL_LM", ["q_proj", "v_proj"])
    given = {**batch(2, 6, True), "colour": torch.randn(2, 32)}
    assert not right_or_refused(adapter, batch(2, 6, True), 4)
    assert "argument 'colour' of shape (2, 32), which it did not have" in right_or_refused(adapter, given, 4)
    adapter.compare(**given)
    assert not right_or_refused(adapter, given, 4)
    assert not right_or_refused(adapter, {**batch(3, 7, False), "colour": torch.randn(3, 32)}, 2)
