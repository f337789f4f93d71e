from __future__ import annotations

import base64
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tfb_ext.app.pages import Table, html_report
from tfb_ext.app.pictures import (
    reliability,
    reliability_diagram,
    risk_coverage_diagram,
    score_histograms,
    search_trace,
)
from tfb_ext.metrics import evaluate
from tfb_ext.search import DepthResult, Evaluation, SigmaSearch
from tfb_ext.uncertainty import selective

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")


def random_case(items: int = 400, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(items, classes, generator=generator)
    probabilities = logits.softmax(1)
    # Labels drawn from the probabilities: gaps of both signs, so that the bins' edges matter.
    return probabilities, probabilities.multinomial(1, generator=generator).squeeze(1)


def read_png(path: Path) -> torch.Tensor:
    """(height, width, 3) from 0 to 1."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(path))[..., :3]


class TestReliability:
    def test_by_hand(self) -> None:
        probabilities = torch.tensor([[0.75, 0.25], [0.3, 0.7], [1.0, 0.0], [0.5, 0.5]])
        bins = reliability(probabilities, torch.tensor([0, 0, 0, 0]), bins=4)
        assert bins.counts.tolist() == [0, 0, 2, 2]  # an edge belongs to the bin above it, 1.0 to the last
        assert bins.confidence[2:].tolist() == pytest.approx([0.6, 0.875])
        assert bins.accuracy[2:].tolist() == pytest.approx([0.5, 1.0])
        assert bins.confidence[:2].isnan().all() and bins.accuracy[:2].isnan().all()

    def test_gaps_are_the_calibration_error(self) -> None:
        case = random_case()
        bins = reliability(*case)
        gaps = (bins.accuracy - bins.confidence).abs().nan_to_num() * bins.counts / bins.counts.sum()
        # torchmetrics adds its bins up in float32.
        slack = len(case[1]) * torch.finfo(torch.float32).eps
        assert gaps.sum().item() == pytest.approx(evaluate(*case).ece, abs=slack)

    def test_refuses_what_the_metrics_refuse(self) -> None:
        with pytest.raises(ValueError, match="sum of 1"):
            reliability(torch.ones(2, 2), torch.tensor([0, 1]))


class TestReliabilityDiagram:
    def test_panels_stand_side_by_side(self, tmp_path: Path) -> None:
        case = random_case()
        reliability_diagram({"mean": case}, tmp_path / "new" / "one.png")
        reliability_diagram({"mean": case, "TFB": case}, tmp_path / "two.png")
        one, two = read_png(tmp_path / "new" / "one.png"), read_png(tmp_path / "two.png")
        assert 1.7 < two.shape[1] / one.shape[1] < 2.3 and abs(two.shape[0] - one.shape[0]) < 10

    def test_a_gap_is_drawn_only_where_there_is_one(self, tmp_path: Path) -> None:
        probabilities = torch.tensor([[0.6, 0.4]] * 5)
        exact = torch.tensor([0, 0, 0, 1, 1])
        reliability_diagram({"exact": (probabilities, exact)}, tmp_path / "exact.png")
        reliability_diagram({"wrong": (probabilities, 1 - exact)}, tmp_path / "wrong.png")
        red = [
            (image[..., 0] - image[..., 2] > 0.3).sum().item() for image in map(read_png, sorted(tmp_path.iterdir()))
        ]
        assert red[1] > red[0] + 1000

    def test_leaves_pyplot_alone(self, tmp_path: Path) -> None:
        import matplotlib

        before = dict(matplotlib.rcParams)
        reliability_diagram({"mean": random_case()}, tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before

    def test_refuses_no_panels(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="panels"):
            reliability_diagram({}, tmp_path / "a.png")


def evaluated(
    sigma: float, value: float, error: float = 0.0, nll: float | None = None, flips: float = 0.0
) -> Evaluation:
    return Evaluation(sigma, value, error, True, 1.0, value if nll is None else nll, 0.8, flips, 0.3, 0.5, 200, "all")


def make_search(**changes: Any) -> SigmaSearch:
    tried = [(0.01, 0.86), (0.02, 0.7), (0.04, 0.9), (0.08, 1.4)]
    fields: dict[str, Any] = {
        "sigma": 0.02,
        "satisfied": True,
        "confidence": 0.9,
        "interval": (math.nan, math.nan),
        "evaluations": tuple(evaluated(s, v, 0.02) for s, v in tried),
        "baseline": evaluated(0.0, 0.9),
        "recipe": "auto",
        "metric": "nll",
        "tolerance": 0.1,
        "bound": "two-sided",
        "objective": "tolerance",
        "method": "grid",
        "bracket": (0.01, 0.08),
        "reason": "",
        "stop": "",
        "samples": 10,
        "by": "samples",
        "antithetic": True,
        "seed": 0,
        "mode": "weight",
        "depth": "all",
        "span": "all",
        "depths": (),
        "early_stop": None,
        "anchors": 200,
        "labelled": True,
        "seconds": 1.0,
        "tokens": 1000,
    }
    return SigmaSearch(**(fields | changes))


def red_column(path: Path) -> float:
    """Where the chosen sigma's line stands, as a fraction of the width: the column with the most red in it."""
    image = read_png(path)
    return ((image[..., 0] - image[..., 2]) > 0.3).sum(0).argmax().item() / image.shape[1]


class TestSearchTrace:
    def test_line_stands_at_the_chosen_sigma(self, tmp_path: Path) -> None:
        columns = []
        for sigma in (0.01, 0.02, 0.04, 0.08):
            search_trace(make_search(sigma=sigma), tmp_path / f"{sigma}.png")
            columns.append(red_column(tmp_path / f"{sigma}.png"))
        steps = [after - before for before, after in zip(columns, columns[1:], strict=False)]
        assert min(steps) > 0.1 and max(steps) - min(steps) < 0.02  # equal ratios are equal distances

    @pytest.mark.slow
    def test_band_belongs_to_a_tolerance(self, tmp_path: Path) -> None:
        def green(**changes: Any) -> int:
            search_trace(make_search(**changes), tmp_path / "a.png")
            image = read_png(tmp_path / "a.png")
            return ((image[..., 1] - image[..., 0]) > 0.03).logical_and(image[..., 1] > image[..., 2]).sum().item()

        narrow, wide = green(tolerance=0.1), green(tolerance=0.2)
        assert 1.6 < wide / narrow < 2.4
        assert green(tolerance=0.1, bound="one-sided") > narrow  # everything below is within it too
        assert green(objective="minimum") == 0

    def test_one_evaluation_and_an_unknown_error_are_drawn(self, tmp_path: Path) -> None:
        lone = evaluated(0.02, 0.01, math.nan, nll=0.9, flips=0.01)
        start = evaluated(0.0, 0.0, math.nan, nll=0.9)
        search = make_search(metric="flips", tolerance=0.01, evaluations=(lone,), baseline=start)
        search_trace(search, tmp_path / "a.png")
        assert 0 < red_column(tmp_path / "a.png") < 1

    @pytest.mark.slow
    def test_depths_get_a_panel_of_their_own(self, tmp_path: Path) -> None:
        found = DepthResult("all", "all", 0.02, True, (0.01, 0.04), "", 0.7, 0.8, 0.1, 0.5, 0.7, (0.0, 0.0), 10.0)
        other = replace(found, depth=4, sigma=0.1, score=0.75, behind=(0.05, 0.02), forwards=2.1)
        search_trace(make_search(depths=(found, other), interval=(0.015, 0.03)), tmp_path / "two.png")
        search_trace(make_search(), tmp_path / "one.png")
        one, two = read_png(tmp_path / "one.png"), read_png(tmp_path / "two.png")
        assert two.shape[1] > 1.4 * one.shape[1]

    def test_method_of_the_search_draws_it(self, tmp_path: Path) -> None:
        make_search().plot(tmp_path / "a.png")
        search_trace(make_search(), tmp_path / "b.png")
        assert torch.equal(read_png(tmp_path / "a.png"), read_png(tmp_path / "b.png"))

    def test_refuses_an_empty_search(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no evaluations"):
            search_trace(make_search(evaluations=()), tmp_path / "a.png")


class Page(HTMLParser):
    """Everything a test asks of a page: its cells, pictures, attributes and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1], data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for owner, text in self.texts if owner == tag]


class TestHtmlReport:
    TABLE = Table("Test set", ["", "ECE <%>"], [["mean", "16.3"], ["TFB & co", "5.1"]], note="1000 items")

    @pytest.fixture
    def picture(self, tmp_path: Path) -> Path:
        reliability_diagram({"mean": random_case()}, tmp_path / "a.png")
        return tmp_path / "a.png"

    def test_holds_everything_and_loads_nothing(self, tmp_path: Path, picture: Path) -> None:
        path = tmp_path / "new" / "report.html"
        command = "tfb demo --note '<b>&\"'"
        html_report(path, "A <title>", [self.TABLE], {"Reliability": picture}, {"Command": command, "torch": "2.13.0"})
        content = picture.read_bytes()
        picture.unlink()
        page = Page(path.read_text(encoding="utf-8"))
        assert page.of("title") == page.of("h1") == ["A <title>"]
        assert page.of("h2") == ["Test set", "Reliability", "How this was made"]
        assert page.of("th") == ["ECE <%>"] and page.of("td") == ["mean", "16.3", "TFB & co", "5.1"]
        assert page.of("p") == ["1000 items"]
        assert page.of("dt") == ["Command", "torch"] and page.of("dd") == [command, "2.13.0"]
        source = dict(page.attributes)["src"]
        assert source is not None and base64.b64decode(source.removeprefix("data:image/png;base64,")) == content
        assert not {"script", "link", "iframe"} & set(page.tags)
        assert [value for name, value in page.attributes if name in ("src", "href")] == [source]
        assert "url(" not in path.read_text() and "@import" not in path.read_text()
        assert ("name", "viewport") in page.attributes

    def test_parts_may_be_missing(self, tmp_path: Path) -> None:
        html_report(tmp_path / "a.html", "Title", [], {}, {})
        page = Page((tmp_path / "a.html").read_text())
        assert page.of("h1") == ["Title"] and not {"table", "img", "dl", "h2"} & set(page.tags)

    def test_refuses_ragged_tables(self, tmp_path: Path) -> None:
        ragged = Table("Test set", ["", "ECE"], [["mean"]])
        with pytest.raises(ValueError, match=r"'Test set': row \['mean'\] has 1 cells; expected 2"):
            html_report(tmp_path / "a.html", "Title", [ragged], {}, {})
        assert not (tmp_path / "a.html").exists()

    def test_refuses_other_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"GIF89a")
        with pytest.raises(ValueError, match="expected a PNG"):
            html_report(tmp_path / "a.html", "Title", [], {"a": tmp_path / "a.png"}, {})


class TestUncertaintyPictures:
    def test_curves_and_histograms(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        own, strange = torch.rand(300, generator=generator), torch.rand(80, generator=generator) * 1.5
        curve = selective(own, torch.rand(300, generator=generator) < own)
        panels = {"mean": {"total": curve}, "TFB": {"total": curve, "epistemic": curve}}
        risk_coverage_diagram(panels, tmp_path / "new" / "curves.png")
        both = ({"total": own, "epistemic": own}, {"total": strange, "epistemic": strange})
        score_histograms({"mean": ({"total": own}, {"total": strange}), "TFB": both}, tmp_path / "histograms.png")
        curves, histograms = read_png(tmp_path / "new" / "curves.png"), read_png(tmp_path / "histograms.png")
        assert curves.shape[1] > curves.shape[0] and histograms.std() > 0.05
        score_histograms({"mean": ({"epistemic": own * 0}, {"epistemic": own * 0})}, tmp_path / "zero.png")

    @pytest.mark.parametrize("draw", [risk_coverage_diagram, score_histograms])
    def test_refuses_nothing(self, draw: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="panels: {}; expected at least one name"):
            draw({}, tmp_path / "none.png")
