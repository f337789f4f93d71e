"""A search on several processes: the result of one process, whoever has which anchors, and a clear end if one dies."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("torch.distributed", reason="this torch has no distributed")
HERE = Path(__file__).parent
# Ranks start as users start them; what they import takes most of the time, so one start serves many cases.
PROGRAM = """
import json, os, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import test_search_ranks as tests
tests.main({out!r}, {mode!r})
"""
OPTIONS: dict[str, Any] = {"samples": 4, "progress": False, "apply": False}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "grid": (31, {"batch_size": 4}),
    "bisection": (31, {"batch_size": 4, "recipe": "paper", "tolerance": 0.02}),
    "official": (31, {"batch_size": 10, "recipe": "official"}),
    "fewer batches than ranks": (5, {"batch_size": 5, "method": "root", "tolerance": 0.05}),
    "early stop": (120, {"batch_size": 6, "method": "bisect", "steps": 3, "tolerance": 0.05, "early_stop": 0.9}),
    "depths": (31, {"batch_size": 4, "depth": ["all", 2, 1]}),
    "linear": (31, {"batch_size": 4, "by": "linear", "depth": ["all", 2]}),
    "own metric": (31, {"batch_size": 4, "metric": "own", "tolerance": 0.02}),
}


def own_metric(probabilities: Any, targets: Any) -> Any:
    return 1 - probabilities.gather(1, targets[:, None])[:, 0]


def prepared(items: int) -> tuple[Any, Any]:
    import small_sets
    import zoo

    import tfb_ext

    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"))
    small_sets.sharpen(adapter, 6.0)
    return adapter, small_sets.labelled(adapter, small_sets.encoded(items), 3)


def searched(adapter: Any, anchors: Any, options: dict[str, Any]) -> dict[str, Any]:
    import warnings

    from tfb_ext import search_sigma

    options = options | ({"metric": own_metric} if options.get("metric") == "own" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = search_sigma(adapter, anchors, **OPTIONS, **options)
    found = result.to_dict()
    assert result.records is not None
    values = {f"{first} {sigma}": v.nan_to_num(-1).tolist() for (first, sigma), v in result.records.values.items()}
    return {**{k: found[k] for k in found if k not in ("seconds", "tokens")}, "values": values}


def token_batches() -> list[dict[str, Any]]:
    import zoo

    batches = []
    for rows in (3, 1, 2, 4, 1):
        batch = zoo.inputs(rows)
        batches.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    return batches


def everything() -> dict[str, Any]:
    """All cases with the same anchors on every rank, and token labels in batches of the caller's own."""
    results = {name: searched(*prepared(items), options) for name, (items, options) in CASES.items()}
    adapter, anchors = prepared(13)
    for score in ("sequence", "token"):
        choices = dataclasses.replace(anchors, choice_ids=None, choice_tokens=((7, 8, 9), (7, 11), (5,)), score=score)
        results[f"choices by {score}"] = searched(adapter, choices, {"batch_size": 2, "depth": [2, 1]})
    results["token labels"] = searched(adapter, token_batches(), {"recipe": "paper", "tolerance": 0.5})
    results["token labels of few batches"] = searched(
        adapter, token_batches()[:2], {"recipe": "paper", "tolerance": 0.5}
    )
    unlabelled = [{name: v for name, v in batch.items() if name != "labels"} for batch in token_batches()]
    results["batches without labels"] = searched(adapter, unlabelled, {"recipe": "paper", "tolerance": 0.5})
    return results


def main(out: str, mode: str) -> None:
    """One rank: three start as torch's documentation says, two under accelerate."""
    import torch.distributed as dist

    if mode == "accelerate":
        from accelerate import PartialState

        PartialState(cpu=True)
    else:
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if mode == "die":
        results = dying(rank, out)
    else:
        results = everything() | {"checkpoint": checkpointed(out)}
        if size == 3:
            results["sharded"] = sharded(rank)
    Path(out, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def sharded(rank: int) -> dict[str, Any]:
    """Every rank brings its own part: the first 20 of 31, none at all, the rest."""
    adapter, anchors = prepared(31)
    parts = [range(0, 20), range(0, 0), range(20, 31)]
    batches = []
    for start in range(0, len(parts[rank]), 4):
        part = anchors.select(parts[rank][start : start + 4])
        batch = part.collate(range(len(part)))
        batch.pop("index")
        targets = batch["input_ids"].clone().fill_(-100)
        targets[:, -1] = batch["input_ids"][:, 0]
        batches.append(batch | {"labels": targets})
    return searched(adapter, batches, {"recipe": "paper", "tolerance": 0.5, "sharded": True})


def checkpointed(out: str) -> dict[str, Any]:
    adapter, anchors = prepared(31)
    path = Path(out) / "search.json"
    options = {"batch_size": 4, "recipe": "paper", "tolerance": 0.02, "checkpoint": path}
    first = searched(adapter, anchors, options)
    calls: list[int] = []
    adapter.anatomy.model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = searched(adapter, anchors, options)
    return {"first": first, "again": again, "calls": len(calls)}


def dying(rank: int, out: str) -> dict[str, Any]:
    """The last rank goes without a word in the middle of a search."""
    from tfb_ext.errors import SamplingError

    adapter, anchors = prepared(60)
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls.append(1)
        if rank == 1 and len(calls) == 12:
            Path(out, "died").write_text(str(time.time()))
            os._exit(17)

    adapter.anatomy.model.register_forward_pre_hook(count)
    try:
        searched(adapter, anchors, {"batch_size": 4, "recipe": "paper", "checkpoint": Path(out) / "search.json"})
    except SamplingError as error:
        Path(out, "0.json").write_text(json.dumps({"error": str(error), "at": time.time()}))
        os._exit(0)
    raise AssertionError("nothing was noticed")


def prepare(out: Path, mode: str) -> tuple[Path, dict[str, str]]:
    program = out / "rank.py"
    program.write_text(PROGRAM.format(here=str(HERE), out=str(out), mode=mode))
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    return program, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def ranks(out: Path, size: int, mode: str) -> list[dict[str, Any]]:
    program, environment = prepare(out, mode)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
        str(program),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(json.dumps(everything()))
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("accelerate")
    return ranks(tmp_path_factory.mktemp("two"), 2, "accelerate")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks(tmp_path_factory.mktemp("three"), 3, "plain")


@pytest.fixture(params=["two", "three"])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What two ranks under accelerate found, or three that torch started."""
    found: list[dict[str, Any]] = request.getfixturevalue(request.param)
    return found


def test_every_rank_finds_what_one_process_finds(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name in alone:
        assert all(f[name] == together[0][name] for f in together), name
        mine, one = dict(together[0][name]), dict(alone[name])
        if name == "early stop":  # ranks see anchors in rounds of several batches, so they stop at other places
            assert mine["sigma"] == pytest.approx(one["sigma"], rel=0.5)
            continue
        assert mine == one, name


def test_own_anchors_on_every_rank_and_none_on_one(three: list[dict[str, Any]]) -> None:
    found = [r["sharded"] for r in three]
    assert found[0] == found[1] == found[2] and found[0]["anchors"] == 31


def test_a_checkpoint_serves_all_ranks(together: list[dict[str, Any]]) -> None:
    found = [r["checkpoint"] for r in together]
    assert all(f["again"] == f["first"] == found[0]["first"] for f in found)
    assert [f["calls"] for f in found] == [0] * len(found)


def test_a_rank_that_dies_ends_the_others_with_a_clear_error(tmp_path: Path) -> None:
    # Without torchrun, whose agent would end the other rank itself.
    program, environment = prepare(tmp_path, "die")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [subprocess.Popen([sys.executable, str(program)], env=environment | {"RANK": str(r)}) for r in range(2)]
    assert [process.wait(timeout=600) for process in started] == [0, 17]
    said = json.loads((tmp_path / "0.json").read_text())
    assert "rank 0 of 2 lost another rank during the search for sigma" in said["error"]
    assert "Start all of them again, with checkpoint=" in said["error"]
    assert said["at"] - float((tmp_path / "died").read_text()) < 60
