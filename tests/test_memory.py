"""No noise tensor exists: neither in any operation's result, nor in the peak of a forward pass."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model

import tfb_ext
from tfb_ext.app import loading
from tfb_ext.forward import memory

SAMPLES, RANK, WIDTH, TOKENS = 8, 32, 256, 2


def wide_model(device: str, width: int = WIDTH) -> Any:
    """One row of two tokens, so that one sample's noise (rank, width) is larger than any activation of all samples."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
    )
    model = get_peft_model(
        tf.LlamaForCausalLM(config), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    zoo.randomise(model, 0.05)
    return tfb_ext.bayesianize(model.eval().to(device), sigma=0.02)


def largest_of_a_forward(adapter: Any, device: str, plain: bool = False) -> int:
    """Elements; ``plain``: with the definitions in the operators' place, which draw a sample's noise as a tensor."""
    ids = torch.randint(0, 64, (1, TOKENS), device=device)
    with adapter.predictive(SAMPLES):
        adapter.model(input_ids=ids, use_cache=False)
        with zoo.Largest() as largest, zoo.Operators(plain):
            adapter.model(input_ids=ids, use_cache=False)
    return largest.elements


@pytest.mark.parametrize("device", zoo.DEVICES)
def test_no_operation_returns_as_much_as_one_samples_noise(device: str) -> None:
    adapter = wide_model(device)
    noise = RANK * WIDTH
    activation = SAMPLES * TOKENS * 2 * WIDTH  # of the widest layer, all samples together
    assert activation <= noise, "the shapes must tell noise from activations"
    assert largest_of_a_forward(adapter, device) <= activation
    assert largest_of_a_forward(adapter, device, plain=True) >= noise


@pytest.mark.gpu
def test_peak_of_the_gpu_is_the_plain_adapters() -> None:
    adapter = wide_model("cuda", width=4096)
    ids = torch.randint(0, 64, (1, TOKENS), device="cuda")

    def peak(fused: bool) -> int:
        def call() -> None:
            if fused:
                with adapter.predictive(SAMPLES):
                    adapter.model(input_ids=ids, use_cache=False)
            else:
                with torch.no_grad():
                    adapter.model(input_ids=ids.repeat(SAMPLES, 1), use_cache=False)

        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    noise = 4 * RANK * 4096  # bytes of one sample's noise in one layer
    plain = peak(fused=False)
    assert peak(fused=True) < plain + noise
    with zoo.Operators(plain=True):
        assert peak(fused=True) >= plain + noise


# Run in a process of its own: a process keeps the highest peak it ever had.
_PEAK = """
import json, re, sys, torch
from pathlib import Path
from tfb_ext import ops
from tfb_ext.ops import reference
torch.set_num_threads(1)

def peak():  # ru_maxrss would start at the parent's own peak
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

rank, width, tokens, samples = 64, 200_000, 4, 4
x = torch.randn(samples * tokens, width)
mean = torch.randn(rank, width)
sigma = torch.full((samples,), 0.1)
numbers = torch.arange(samples, dtype=torch.int32)
seed = torch.zeros(1, dtype=torch.int64)
small = (x[:, :64].contiguous(), mean[:, :64].contiguous(), sigma, numbers, seed, 7)
chosen = {"ops": ops, "reference": reference}[sys.argv[1]]
chosen.shrink(*small)
torch.mm(x, mean.T)
before = peak()
z = chosen.shrink(x, mean, sigma, numbers, seed, 7)
after = peak()
print(json.dumps({"growth": (after - before) * 1024, "noise": 4 * rank * width, "finite": bool(z.isfinite().all())}))
"""


def growth(which: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, which], capture_output=True, text=True, cwd=root, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_of_the_process_grows_by_less_than_the_noise() -> None:
    fused, materialised = growth("ops"), growth("reference")
    assert fused["finite"] and materialised["finite"]
    assert fused["growth"] < fused["noise"] / 4
    assert materialised["growth"] >= materialised["noise"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A GPU of 24 bytes, by what torch says of it: 16 free, 4 allocated, 2 kept idle."""
    state = {"fraction": 1.0, "free": 16.0, "allocated": 4.0, "reserved": 6.0, "total": 24.0}
    for name, value in {
        "mem_get_info": lambda device: (state["free"], state["total"]),
        "memory_allocated": lambda device: state["allocated"],
        "memory_reserved": lambda device: state["reserved"],
        "get_per_process_memory_fraction": lambda device: state["fraction"],
        "set_per_process_memory_fraction": lambda fraction, device: state.update(fraction=fraction),
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def test_free_memory_is_within_a_process_share(card: dict[str, float]) -> None:
    gpu = torch.device("cuda", 0)
    assert memory.free_memory(gpu) == 16 + 2
    card["fraction"] = 0.5  # 12, of which 4 are taken
    assert memory.free_memory(gpu) == 8
    card["free"] = 3  # others have the rest
    assert memory.free_memory(gpu) == 3 + 2


def test_a_process_is_held_to_an_amount(card: dict[str, float]) -> None:
    gpu = torch.device("cuda", 0)
    card["total"] = 24.0 * 2**30
    assert loading.hold_memory("8 GiB", gpu) == 8 * 2**30 - loading.CONTEXT
    assert card["fraction"] == pytest.approx((8 * 2**30 - loading.CONTEXT) / card["total"])
    assert loading.hold_memory("8.5gb", gpu) == 8_500_000_000 - loading.CONTEXT
    for amount in ("0.5GiB", "25GiB"):
        expected = re.escape(
            f"memory: got '{amount}', expected more than CUDA's context (0.6 GiB), and no more than the card has"
        )
        with pytest.raises(ValueError, match=expected):
            loading.hold_memory(amount, gpu)


def test_rows_of_a_generation_by_their_keys_and_values(card: dict[str, float]) -> None:
    model = zoo.peft_model("llama").get_base_model()
    config = model.config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    token = 2 * config.num_hidden_layers * heads * 4  # bytes
    gpu = torch.device("cuda", 0)
    card |= {"allocated": 0.0, "reserved": 0.0, "total": 1e12, "free": 2.0 * 10 * token * (6 + 3 * 5)}
    assert memory.room_for_rows(model, gpu, shared=6, own=5, copies=3) == 10
    assert memory.room_for_rows(model, gpu, shared=0, own=11, copies=3) == 6
    card["free"] = 1.0
    assert memory.room_for_rows(model, gpu, shared=0, own=11, copies=3) == 1
    assert memory.room_for_rows(model, torch.device("cpu"), 0, 11, 3) > 10**9
