"""``pi2 report`` on a toy model: the page, its pictures, the numbers, and what can go wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from command_line import assert_error, pi2

PICTURES = ["coactivation", "cumulative", "density", "hot"]


@pytest.fixture(scope="module")
def counted(toy, tmp_path_factory):
    """A model with statistics, and two files of statistics of it."""
    home = tmp_path_factory.mktemp("report")
    model = shutil.copytree(toy, home / "copy.pi2")
    for name, prose in (("rain", "Rain falls from clouds. "), ("sun", "THE SUN, 93 million miles; ")):
        (home / f"{name}.txt").write_text(prose * 60)
        place = home / f"{name}.safetensors"
        assert pi2("collect", model, home / f"{name}.txt", "--output", place).exit_code == 0
    assert pi2("collect", model, home / "rain.txt").exit_code == 0
    return home


class Page(HTMLParser):
    """Checks that elements are closed in order; gathers attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.labels = [], [], [], 0
        self.feed(text)
        assert self.open == ["html"][: len(self.open)]

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        self._look(attributes)

    def handle_startendtag(self, tag, attributes):
        self._look(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _look(self, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.refs += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.labels += "aria-label" in found


def test_the_page_needs_no_other_file_and_every_picture_has_words(counted, tmp_path):
    out = tmp_path / "deep" / "out"
    result = pi2("report", counted / "rain.safetensors", counted / "sun.safetensors", "--out", out)
    assert result.exit_code == 0
    assert "wrote" in result.stderr
    names = sorted([*PICTURES, "overlap"])
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["index.html", *(f"{n}.{end}" for n in names for end in ("svg", "png"))]
    )
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "index.html").read_text()
    page = Page(text)
    assert page.labels == 5
    assert len(set(page.ids)) == len(page.ids)
    assert all(ref.startswith("#") and ref[1:] in page.ids for ref in page.refs)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert "rain" in text
    assert str(counted) not in text


def test_the_same_statistics_make_the_same_page(counted, tmp_path):
    for name in ("a", "b"):
        assert pi2("report", counted / "copy.pi2", "--out", tmp_path / name).exit_code == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert not (tmp_path / "a" / "overlap.svg").exists()


def test_the_table_has_a_row_for_each_corpus(counted):
    result = pi2("report", counted / "copy.pi2", counted / "sun.safetensors")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["corpus", "copy.pi2", "sun"]
    assert re.search(r"copy.pi2 and sun share \d+\.\d% of their 20 % most active neurons", lines[-1])


def test_json_is_one_object_with_the_numbers(counted):
    found = json.loads(
        pi2("report", counted / "rain.safetensors", counted / "sun.safetensors", "--json").stdout
    )
    assert list(found["corpora"]) == ["rain", "sun"]
    assert found["corpora"]["rain"]["tokens"] == 1408
    (shares,) = found["overlap"].values()
    assert all(0.2 < share <= 1 for share in shares)


def test_what_thresholds_cost_is_shown_where_they_were_calibrated(counted, tmp_path):
    model = shutil.copytree(counted / "copy.pi2", tmp_path / "calibrated.pi2")
    assert pi2("collect", model, counted / "rain.txt", "--thresholds", "--tokens", 768).exit_code == 0
    result = pi2("report", model, "--out", tmp_path / "out", "--json")
    costs = json.loads(result.stdout)["corpora"]["calibrated.pi2"]["thresholds"]
    assert [point["density"] for point in costs["product"]][:2] == [0.9, 0.8]
    assert (tmp_path / "out" / "thresholds.png").is_file()
    text = (tmp_path / "out" / "index.html").read_text()
    Page(text)
    assert "What thresholds cost" in text
    assert not (tmp_path / "out" / "overlap.png").exists()


def test_without_matplotlib_there_are_numbers_but_no_page(counted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pi2("report", counted / "copy.pi2").exit_code == 0
    result = pi2("report", counted / "copy.pi2", "--out", tmp_path / "out")
    assert_error_at_end(result, "matplotlib, which is not installed", 'pip install "pi2[report]"')


def assert_error_at_end(result, message, hint):
    assert result.exit_code == 1
    assert message in result.stderr
    assert hint in result.stderr.partition("\nhint: ")[2]


def test_report_says_what_is_wrong(toy, counted, tmp_path):
    statistics = counted / "rain.safetensors"
    assert_error(pi2("report", toy), "has no statistics", f"pi2 collect {toy}")
    assert_error(pi2("report", statistics, statistics), "is given twice", "once")
    assert_error(pi2("report", tmp_path / "none"), "there is no model")
    assert_error(pi2("report", statistics, "--out", statistics), "File exists", "--out")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk")
    assert_error(pi2("report", junk), "cannot be a safetensors file")
    assert pi2("report").exit_code == 2


def test_a_directory_that_cannot_be_written_into_is_named(counted, tmp_path):
    (tmp_path / "out" / "density.svg").mkdir(parents=True)
    result = pi2("report", counted / "copy.pi2", "--out", tmp_path / "out")
    assert_error_at_end(result, f"{tmp_path / 'out'}: Is a directory", "--out")
