"""``tfb generate`` and its page: every token is there, coloured by what is known about it, and a browser shows it so."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch
from typer.testing import CliRunner

from tfb_ext.app.cli import app
from tfb_ext.app.pages import generation_page
from tfb_ext.generation import Generation

pytest.importorskip("jinja2", reason="the page needs jinja2")

WORDS = small_folders.WORDS
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def generation() -> Generation:
    """Two rows of three and two tokens; of the second token the samples are sure, of the third not at all."""
    per_sample = torch.tensor([[[-0.1, -0.5, -2.0], [-1.0, -0.2, float("nan")]]] * 2)
    epistemic = torch.tensor([[0.1, 0.0, 0.9], [0.25, 0.02, float("nan")]])
    aleatoric = torch.tensor([[0.3, 0.2, 1.0], [0.4, 0.1, float("nan")]])
    return Generation(
        sequences=torch.tensor([[5, 6, 3, 4, 7], [5, 6, 4, 2, 0]]),
        prompt_length=2,
        lengths=torch.tensor([3, 2]),
        texts=("no yes wins", "yes"),
        pieces=(("no", " yes\n", " <b>wins"), ("yes", " <end>")),
        sample_log_probabilities=per_sample,
        log_probabilities=per_sample[0],
        total=epistemic + aleatoric,
        aleatoric=aleatoric,
        alternatives=torch.tensor([[[3, 4], [4, 3], [5, 6]], [[4, 3], [2, 3], [0, 0]]]),
        alternative_probabilities=torch.tensor(
            [[[0.9, 0.05], [0.6, 0.3], [0.3, 0.2]], [[0.4, 0.3], [0.8, 0.1], [0.0, 0.0]]]
        ),
        sigma=0.3,
        samples=(0, 1),
        seconds=1.0,
        scoring_seconds=0.1,
    )


class Tokens(HTMLParser):
    """(share, text of the token, text of its card) of every token, and all references to other files."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[Any]] = []
        self.depth = 0
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.references += [v or "" for n, v in attributes if n in ("src", "href")]
        if tag != "span":
            return
        if named.get("class") == "token":
            self.found.append([float((named["style"] or "").split(":")[1]), "", ""])
            self.depth = 1
        elif named.get("class") == "card":
            self.depth = 2

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self.depth:
            self.depth -= 1

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.found[-1][self.depth] += data


def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    generation_page(generation(), ["area man", "area man"], small_folders.tokenizer(), path)
    return path


def test_page_has_every_token_with_its_uncertainty(tmp_path: Path) -> None:
    parser = Tokens()
    parser.feed(page(tmp_path).read_text())
    assert [token[1] for token in parser.found] == ["no", " yes\n", " <b>wins", "yes", " <end>"]
    assert [token[0] for token in parser.found] == [0.2, 0.0, 1.0, 0.5, 0.04]
    assert parser.references == []  # nothing beside the file
    first, third = parser.found[0][2], parser.found[2][2]
    assert "no90.0 %" in first and "yes5.0 %" in first and "total 0.400, aleatoric 0.300, epistemic 0.100 nats" in first
    # A token that is none of the most probable ones is listed with its own probability.
    assert f"{WORDS[7]}13.5 %" in third and f"{WORDS[5]}30.0 %" in third


def test_page_needs_texts_and_prompts(tmp_path: Path) -> None:
    for prompts in ([], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=f"2 texts for {len(prompts)} prompts"):
            generation_page(generation(), prompts, small_folders.tokenizer(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_colours_the_uncertain_token(tmp_path: Path) -> None:
    image_module = pytest.importorskip("matplotlib.image", reason="reads the screenshot")
    path, shot = page(tmp_path), tmp_path / "shot.png"
    assert BROWSER is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,700"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    subprocess.run([BROWSER, *options, path.as_uri()], check=True, timeout=120, capture_output=True)
    # A browser that found the nesting wrong would have moved the cards out of their tokens.
    seen = subprocess.run(
        [BROWSER, *options[:-1], "--dump-dom", path.as_uri()], check=True, timeout=120, capture_output=True
    )
    sent, shown = Tokens(), Tokens()
    sent.feed(path.read_text())
    shown.feed(seen.stdout.decode())
    assert shown.found == sent.found
    pixels = torch.from_numpy(image_module.imread(shot))[..., :3]
    assert pixels.shape[1] == 900
    red, green, blue = pixels.unbind(-1)
    # The legend's ramp is the only other place of this colour, and is 0.9 rem high.
    full = (red > 0.8) & (green < 0.5) & (blue < 0.5)
    rows = full.any(dim=1).nonzero().flatten()
    assert full.sum() > 300 and int(rows.max()) - int(rows.min()) > 60
    pale = (red > 0.85) & (green > 0.7) & (green < 0.95) & ((green - blue).abs() < 0.05) & (red - green > 0.05)
    assert pale.sum() > 100


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> small_folders.Folders:
    return small_folders.write(tmp_path_factory.mktemp("llama"))


def tfb(folders: small_folders.Folders, *arguments: str) -> Any:
    fixed = ["-a", str(folders.adapter), "--sigma", "0.3", "-n", "2", "--max-new-tokens", "4", "--device", "cpu"]
    return CliRunner().invoke(app, ["generate", *fixed, *arguments])


@pytest.mark.slow
def test_command_answers(llama: small_folders.Folders, tmp_path: Path) -> None:
    found = tfb(llama, "-p", "area man", "-p", "senate votes", "--json", "--html", str(tmp_path / "page.html"))
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["prompts"] == ["area man", "senate votes"] and document["samples"] == [0, 1]
    assert [len(item["tokens"]) for item in document["items"]] == [len(item["epistemic"]) for item in document["items"]]
    assert all(value >= 0 for item in document["items"] for value in item["epistemic"])
    assert (tmp_path / "page.html").read_text().count('class="token"') == sum(
        len(i["tokens"]) for i in document["items"]
    )
    static = json.loads(tfb(llama, "-p", "area man", "-p", "senate votes", "--json", "--static").stdout)
    assert [item["tokens"] for item in static["items"]] == [item["tokens"] for item in document["items"]]
    table = tfb(llama, "-p", "area man")
    assert table.exit_code == 0 and "epistemic uncertainty, nats: below 0.02" in table.stdout


def test_command_reads_standard_input(llama: small_folders.Folders) -> None:
    fixed = ["generate", "-a", str(llama.adapter), "--sigma", "0.3", "-n", "2", "--max-new-tokens", "2", "--json"]
    found = CliRunner().invoke(app, fixed, input="area man\n")
    assert json.loads(found.stdout)["prompts"] == ["area man"]


def test_command_refuses(llama: small_folders.Folders) -> None:
    assert tfb(llama, "-p", "area man", "--system", "be brief").exit_code == 2
    for arguments, message in (
        (("-p", ""), "prompt 0 is empty"),
        (("-p", "area", "--chat"), "no chat template"),
        (("-p", "area", "--temperature", "0"), "temperature"),
        (("-p", "area", "--top-p=-0.5"), "top_p"),
    ):
        found = tfb(llama, *arguments)
        assert isinstance(found.exception, ValueError) and message in str(found.exception)
