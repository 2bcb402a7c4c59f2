"""The report of an evaluation: files, tables, rules, several merged, and a real browser."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import re
import resource
import shutil
import signal
import subprocess
from base64 import b64decode, b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from usam.evaluation import merge as merged_report
from usam.evaluation import report
from usam.evaluation.case_metrics import METRICS, score_class
from usam.evaluation.cases import CaseScores
from usam.evaluation.metrics import ClassCounts
from usam.evaluation.report import cases_csv, write_report
from usam.evaluation.report_tables import CaseReport, rules

CLASSES = ["background", "normal <rectum>", "tumour | T3"]
COLORS = ["#000000", "#00ff00", "#ff0000"]
FACTS = {
    "checkpoint": "best.pth", "dataset": "phantom", "split": "test", "slices": 12, "cases": 4,
    "prompts": "none",
}  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def png(value: int) -> str:
    """A picture of 40 x 30 pixels of one gray, as base64."""
    return b64encode(cv2.imencode(".png", np.full((30, 40, 3), value, np.uint8))[1]).decode()


def scores(*names: str, in_mm: bool = True) -> CaseScores:
    """Cases of a cube each class, predicted more or less askew; the last class is missed once."""
    rows = {}
    for number, name in enumerate(names):
        truth = np.zeros((4, 20, 20), bool)
        truth[1:3, 5:12, 5:12] = True
        moved = np.roll(truth, number, 2)
        how = {"diagonal": 30.0, "in_mm": in_mm}
        second = truth & (number > 0)
        masks = [(moved, truth, (2, 1, 1))], [(second, truth, (2, 1, 1))]
        rows[name] = [score_class(of_class, **how) for of_class in masks]
    worst = [{"case": names[0], "slice": f"{names[0]}_slice1", "dice": 0.5, "png": png(200)}]
    return CaseScores(rows, dict.fromkeys(names, 3), in_mm, worst)


def made(*names: str, **changes: Any) -> CaseReport:
    counts = ClassCounts(3)
    truth = torch.arange(3).repeat(4)[None]
    counts.update(truth.roll(len(names)), truth)
    cases = scores(*names, in_mm=changes.pop("in_mm", True))
    return CaseReport(FACTS, [*CLASSES], COLORS, counts, cases, seed=1, **changes)


class Page(HTMLParser):
    """Addresses, pictures and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if tag == "img" and name == "src":
                self.pictures.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


# ------------------------------------------------------------------------------------ one report


def test_the_page_holds_all_of_the_report_and_asks_for_nothing_else(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report", made("a", "b", "c"))
    page = Page(path)
    assert all(address.startswith("data:") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in path.read_text(encoding="utf-8")
    assert len(page.pictures) == 2  # box plots, one worst case
    for picture in page.pictures:
        content = b64decode(picture.removeprefix("data:image/png;base64,"))
        assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None
    for part in (*CLASSES, *FACTS.values(), "HD95 (mm)", "NSD at 2 mm", "false alarm", "missed"):
        assert str(part) in page.text
    for rule in rules(in_mm=True):
        assert rule in page.text
    (link,) = [address for address in page.addresses if address.startswith("data:text/csv")]
    content = b64decode(link.partition(",")[2]).decode()
    assert content == (tmp_path / "report" / "cases.csv").read_text(encoding="utf-8")


def test_files_of_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "worst").mkdir(parents=True)
    (folder / "worst" / "1_of an earlier report.png").touch()
    write_report(folder, made("../a b", "b"))
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert found == ["boxes.png", "cases.csv", "classes.md", "report.html", "worst/1_.._a_b.png"]
    assert (folder / "worst" / "1_.._a_b.png").read_bytes() == b64decode(png(200))
    assert cv2.imread(str(folder / "boxes.png")) is not None


def test_cases_are_listed_with_full_precision_and_gaps_where_undefined() -> None:
    described = made("a", "b", "c")
    rows = list(csv.DictReader(cases_csv(described).splitlines()))
    assert [(row["case"], row["class"]) for row in rows] == [
        (case, name) for case in "abc" for name in CLASSES[1:]
    ]
    wanted = described.cases.rows["b"][0]
    assert {name: float(rows[2][name]) for name in METRICS} == {n: wanted[n] for n in METRICS}
    assert (rows[1]["empty"], rows[1]["dice"], rows[1]["hd95"]) == ("missed", "0.0", "30.0")
    assert {row["unit"] for row in rows} == {"mm, ml"}
    absent = score_class([], diagonal=1.0)
    described.cases.rows["a"][0] = absent
    row = next(csv.DictReader(cases_csv(described).splitlines()))
    assert (row["empty"], row["dice"], row["detection_rate"]) == ("absent", "", "")


def test_the_markdown_tables_hold_every_class_in_as_many_columns_as_their_head(
    tmp_path: Path,
) -> None:
    write_report(tmp_path, made("a", "b", "c"))
    text = (tmp_path / "classes.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 1 + 3 + 1  # classes; each of them and their mean; all pixels
    for table in tables:
        lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(lengths) == 1, table
    assert "tumour \\| T3" in tables[0]
    assert "95 % interval" in text


def test_without_mm_tables_and_rules_say_pixels(tmp_path: Path) -> None:
    described = made("a", "b", in_mm=False)
    page = Page(write_report(tmp_path, described))
    assert "HD95 (pixels)" in page.text
    assert "volume difference (voxels)" in page.text
    assert "--spacing" in page.text
    assert "(mm)" not in page.text + (tmp_path / "classes.md").read_text(encoding="utf-8")
    assert "pixels, voxels" in (tmp_path / "cases.csv").read_text(encoding="utf-8")


def test_what_is_printed_names_the_source_of_the_prompts() -> None:
    lines = made("a", "b").text.splitlines()
    assert lines[0] == "by case (2 cases), mean ± standard deviation; prompts: none"
    assert len({len(line) for line in lines[1:]}) == 1


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    bad = '<img src="http://example.org/x.png" onerror="alert(1)">'
    described = made(bad, extra={bad: ([bad], [[bad]])})
    described.cases.worst[0]["slice"] = described.classes[1] = bad
    facts = dict(described.facts) | {bad: bad}
    text = write_report(tmp_path, dataclasses.replace(described, facts=facts)).read_text("utf-8")
    assert text.count("<img") == 2  # box plots, one worst case
    assert 'src="http' not in text
    assert text.count("&lt;img src=") > 10


def test_names_reach_neither_terminal_nor_spreadsheet_as_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Escape codes are written out, cells that start a formula get an apostrophe."""
    described = made("=1+2", "\x1b[2J")
    described.classes[1:] = ["@cmd|'/c calc'!A0", "\x1b]0;title\x07"]
    folder = tmp_path / "0"
    report.save_report(folder, described)
    page = Page(folder / "report" / "report.html")
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
    assert all(c.isprintable() or c == "\n" for c in page.text)
    text = (folder / "report" / "cases.csv").read_text(encoding="utf-8")
    assert all(c.isprintable() or c == "\n" for c in text)
    for row in csv.reader(text.splitlines()):
        assert not any(cell.startswith(("=", "+", "@")) for cell in row)
    found = merged_report.merged([folder], seed=1)
    assert found.cases.rows["=1+2"] == described.cases.rows["=1+2"]


# -------------------------------------------------------------------------------- several merged


def evaluated(folder: Path, *names: str, **changes: Any) -> Path:
    """A folder as --eval leaves it."""
    described = made(*names, **changes)
    report.save_report(folder, described)
    return folder


def test_folds_merge_into_the_report_of_all_their_cases(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / "0", "a", "b"), evaluated(tmp_path / "1", "c", "d", "e")]
    found = merged_report.merged(folders, seed=1)
    parts = scores("a", "b").rows | scores("c", "d", "e").rows
    assert found.cases.rows == parts
    wanted = made("a", "b").counts.tensors + made("c", "d", "e").counts.tensors
    assert torch.equal(found.counts.tensors, wanted)
    assert found.facts["cases"] == 8  # 4 in each of the facts above
    assert found.facts["split"] == "test"
    assert found.sources == dict.fromkeys("ab", str(folders[0])) | dict.fromkeys(
        "cde", str(folders[1])
    )
    assert [one["case"] for one in found.cases.worst] == ["a", "c"]
    head, rows = found.extra[merged_report.FOLDERS]
    assert [row[1] for row in rows] == ["2", "3", "5"]
    means = [float(row[head.index("Dice")].split(" ")[0]) for row in rows]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2, abs=1e-4)
    page = Page(write_report(tmp_path / "all", found))
    assert len(page.pictures) == 3
    first = next(csv.DictReader((tmp_path / "all" / "cases.csv").open()))
    assert (first["from"], first["case"]) == (str(folders[0]), "a")


def test_a_merged_report_can_be_merged_again(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / "0", "a"), evaluated(tmp_path / "1", "b")]
    found = merged_report.merged(folders, seed=1)
    report.save_report(tmp_path / "2", found)
    again = merged_report.merged([tmp_path / "2", evaluated(tmp_path / "3", "c")], seed=1)
    assert list(again.cases.rows) == ["a", "b", "c"]


def test_folders_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "0", "a", "b")
    twice, pixels = evaluated(tmp_path / "1", "b"), evaluated(tmp_path / "2", "c", in_mm=False)
    with pytest.raises(ValueError, match=f"case b is in {first} and in {twice}"):
        merged_report.merged([first, twice], seed=1)
    with pytest.raises(ValueError, match=f"{pixels} has units pixels"):
        merged_report.merged([first, pixels], seed=1)
    for key, other in (("prompts", "boxes"), ("dataset", "word"), ("views", "flip: 4 averaged")):
        asked = evaluated(tmp_path / key, "c")
        metrics = json.loads((asked / "metrics.json").read_text(encoding="utf-8"))
        (asked / "metrics.json").write_text(json.dumps(metrics | {key: other}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{asked} has {key} {other}, {first} has"):
            merged_report.merged([first, asked], seed=1)
    with pytest.raises(FileNotFoundError, match="--output_dir of an --eval"):
        merged_report.merged([first, tmp_path], seed=1)
    old = json.loads((twice / "metrics.json").read_text(encoding="utf-8"))
    del old["counts"]
    (twice / "metrics.json").write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{twice} holds no complete report"):
        merged_report.merged([twice], seed=1)


def test_a_table_of_another_evaluation_is_not_merged(tmp_path: Path) -> None:
    """An interruption between the two files leaves them apart."""
    folder = evaluated(tmp_path / "0", "a", "b")
    write_report(folder / "report", made("c"))
    with pytest.raises(ValueError, match=f"{folder} .*different evaluations.*--eval again"):
        merged_report.merged([folder], seed=1)


@pytest.mark.parametrize("limit", [100, 3000, 20_000])
def test_a_full_disk_leaves_the_old_scores_or_the_new_ones_whole(
    tmp_path: Path, limit: int
) -> None:
    """A second --eval into the folder whose files may not grow beyond a limit."""
    folder = evaluated(tmp_path / "0", "a", "b")
    old = (folder / "metrics.json").read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(OSError):
            report.save_report(folder, made("a", "b", "c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    assert (folder / "metrics.json").read_bytes() == old
    for path in (folder / "report").glob("*.csv"):
        assert len(list(csv.reader(path.read_text(encoding="utf-8").splitlines()))) in (5, 7)
    assert Page(folder / "report" / "report.html").text.count("Rules") == 1


def test_a_merged_report_never_overwrites_what_it_is_made_of(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    merged_report.check_output(folders, tmp_path)
    folders[1].mkdir()
    (tmp_path / "link").symlink_to(folders[1])
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path / 'link'} is {folders[1]}"):
        merged_report.check_output(folders, tmp_path / "link")


# ------------------------------------------------------------------------------------ a browser


@pytest.fixture(scope="module")
def browser() -> str:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser; looked for {', '.join(BROWSERS)}")
    return found[0]


def open_page(browser: str, page: Path, *flags: str) -> str:
    """What a browser without any network says to a page.

    A browser that falls over by itself, as a busy machine's does once in a while, is started anew.
    """
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--no-first-run", "--disable-background-networking",
        "--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'browser'}", *flags, page.as_uri(),
    ]  # fmt: skip
    for _ in range(3):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if not ended.returncode:
            return ended.stdout
    raise AssertionError(f"{browser} ended with {ended.returncode}: {ended.stderr}")


def test_a_browser_without_network_shows_every_figure(tmp_path: Path, browser: str) -> None:
    page = write_report(tmp_path / "report", made("a", "b", "c"))
    asked = page.with_name("asked.html")  # the page, and a question to the browser
    asked.write_text(page.read_text(encoding="utf-8") + (
        "<script>addEventListener('load', () => { document.title = 'shown: ' + "
        "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 0); "
        "})</script>"
    ), encoding="utf-8")  # fmt: skip
    dumped = open_page(browser, asked, "--dump-dom")
    shown = re.search("<title>shown: (.*?)</title>", dumped)
    assert shown, dumped[-2000:]
    assert shown[1].split(",") == ["true"] * len(Page(page).pictures)


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_the_window(tmp_path: Path, browser: str, width: int) -> None:
    """Neither the page nor a table of it is wider than its place."""
    described = made(
        "a case with a long name of many words", "another_with_a_name_of_one_long_word"
    )
    page = write_report(tmp_path / "report", dataclasses.replace(described, notes=["a note"]))
    page.write_text(page.read_text(encoding="utf-8") + (
        "<script>addEventListener('load', () => { document.title = 'too wide: ' + "
        "[...document.querySelectorAll('html, .wide')].filter(e => e.scrollWidth > e.clientWidth)"
        ".length + ' of ' + document.querySelectorAll('html, .wide').length "
        "+ ' at ' + innerWidth; })</script>"
    ), encoding="utf-8")  # fmt: skip
    dumped = open_page(browser, page, f"--window-size={width},900", "--dump-dom")
    assert f"<title>too wide: 0 of 7 at {width}</title>" in dumped, dumped[-800:]


def test_a_screenshot_holds_the_figures_pixels(tmp_path: Path, browser: str) -> None:
    described = made("a", "b", "c")
    described.cases.worst[0]["png"] = b64encode(
        cv2.imencode(".png", np.full((200, 300, 3), (13, 77, 201), np.uint8))[1]
    ).decode()
    page = write_report(tmp_path / "report", described)
    target = tmp_path / "page.png"
    open_page(browser, page, "--window-size=1200,3000", f"--screenshot={target}")
    picture = cv2.imread(str(target))
    assert picture.shape == (3000, 1200, 3)
    assert (picture == (13, 77, 201)).all(axis=-1).sum() == 200 * 300
    assert (picture == (255, 255, 255)).all(axis=-1).mean() < 0.97
