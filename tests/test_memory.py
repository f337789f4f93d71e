"""No noise tensor exists: neither in any operation's result, nor in the peak of a forward pass."""

from __future__ import annotations

import json
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
