"""The report page: complete in itself, escaped, written whole."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sinkjax import files
from sinkjax.diagnose import Report, Section, plots, write_report
from sinkjax.diagnose.report import number

REPORT = Report(
    scalars={"sink_rate": 0.25, "m_act": float("inf")},
    arrays={
        "importance": np.array([[0.1, 0.5], [0.3, 0.2]], np.float32),
        "value_drain": np.array([0.2, 0.9], np.float32),
    },
    metadata={
        "sequences": 3,
        "tokens_per_sequence": 11,
        "settings": {"epsilon": 0.3, "sink_tokens": 7, "position": 0},
        "note": "</pre><script>alert(1)</script>",
    },
)


class Reader(HTMLParser):
    """Collects tags, attributes that load something, and whether the nesting is right."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.cells = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    figures = plots.of_report(REPORT)
    assert list(figures) == ["Importance of the examined token, by layer and head"]
    table = [{"variant": "<b>softmax</b>", "loss": 1.724, "steps": 20000, "ok": None}]
    extra = Section("One & two", "First.\n\nSecond <i>.", table, figures)
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    assert write_report(REPORT, figures, path, [extra], title="A <title>") == path
    return path


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.tags.count("img") == 2
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_text_is_escaped_and_numbers_are_there(page):
    text = page.read_text()
    assert "<title>A &lt;title&gt;</title>" in text and "One &amp; two" in text
    assert "<b>" not in text and "<i>" not in text and "<script>" not in text
    reader = Reader()
    reader.feed(text)
    for expected in ("<b>softmax</b>", "1.724", "20,000", "–", "0.250", "inf", "0.500", "0.900"):
        assert expected in reader.cells, expected
    assert REPORT.definition("sink_rate") in reader.cells


def test_a_page_without_a_report(tmp_path):
    path = write_report(None, {}, tmp_path / "x.html", [Section("Only this")])
    assert "Only this" in path.read_text()


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = write_report(None, {}, tmp_path / "x.html", [Section("old")])
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*x.html"):
        write_report(None, {}, path, [Section("new")])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0000"), (0.98, "0.980"), (3e-4, "0.0003"), (3.14159, "3.142"), (123.45, "123.5"),
     (33510.2, "33,510"), (1.5e-6, "1.50e-06"), (2.5e7, "2.50e+07"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_in_tables(value, text):
    assert number(value) == text
