"""The page of a made-up run, read back with an HTML parser: complete, right, self-contained, and safe."""

import base64
import json
import runpy
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trihybrid.report import build_report

SYNTHETIC = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags with their attributes, tables as rows of cell texts, text by the section's anchor."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.text: dict[str, str] = {}
        self.section = "opening"
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("th", "td"):
            self.tables[self.section][-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if "th" in self.open or "td" in self.open:
            self.tables[self.section][-1][-1][-1] += data


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = build_report(SYNTHETIC["write_run"](tmp_path_factory.mktemp("runs") / "tiny"))
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_comes_from_outside(source, page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:40])
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "//" not in style
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_tags_are_closed_in_order_and_anchors_lead_somewhere(page):
    assert page.open == []
    anchors = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert anchors == [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert len(anchors) == 10


def test_every_figure_is_a_png_with_its_text(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 + 1 + 1 + 1 + 1  # loss curves, alignment, recall, position, cache
    for attributes in images:
        assert len(attributes["alt"]) > 40
        data = base64.b64decode(attributes["src"].partition(",")[2], validate=True)
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert data[-8:-4] == b"IEND"
        assert struct.unpack(">II", data[16:24]) == (960, 740)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(images)


def test_quality_table(page):
    (table,) = page.tables["quality"]
    assert table[1:] == [
        ["Teacher", "1.2500", "", "1.2470", "0.0000", "100.0 %", "96.0 %", ""],
        ["Just operated", "3.1000", "+1.8500", "3.0926", "2.4321", "23.4 %", "3.0 %", "-93.0"],
        ["After stage 1 (aligned)", "1.5000", "+0.2500", "1.4964", "0.4567", "70.1 %", "55.0 %", "-41.0"],
        ["After stage 2 (matched)", "1.2625", "+0.0125", "1.2595", "0.0432", "93.2 %", "91.0 %", "-5.0"],
    ]
    assert all(len(row) == len(table[0]) for row in table)


def test_plan_tables(page):
    quantities, layers = page.tables["plan"]
    assert quantities[1] == ["Parameters", "1,234,567", "1,283,719", "+3.98 %"]
    assert quantities[2] == ["Global keys and values, bytes a token", "6,144", "3,072", "-50.0 %"]
    assert quantities[3] == ["Recurrent states, bytes", "0", "98,304", "new"]
    assert quantities[4] == ["Sliding-window caches, bytes", "196,608", "196,608", "none"]
    assert quantities[6] == ["FLOPs a token at 512 tokens of context", "2,051,200", "1,846,080", "-10.00 %"]
    assert len(quantities) == 1 + 5 + 3
    assert layers[1] == ["0", "sliding", "sliding", "65,536", "65,536", "own", "unchanged"]
    assert layers[15][:6] == ["14", "full", "rwkv7 + tica", "65,536", "81,920", "from layer 9"]
    assert "rwkv7.receptance: layer 14 q_proj, rows permuted" in layers[15][6]
    assert len(layers) == 1 + 15
    assert "layers 10 to 14 lose the fast prefill" in page.text["plan"]


def test_training_recall_and_cache_tables(page):
    (training,), (recall,), (cache,) = (page.tables[name] for name in ("training", "recall", "cache"))
    assert [row[:3] for row in training[1:]] == [
        ["Teacher pretraining", "120", "120"],
        ["Stage 1 (alignment)", "60", "60"],
        ["Stage 2 (matching)", "40", "40"],
    ]
    assert training[1][5:] == ["491,520", "20,003", "24.0 s", "919"]
    assert recall[1] == ["16 to 31", *["97.0 % of 100"] * 4]
    assert recall[5] == ["256 to 511", "96.0 % of 104", "3.0 % of 104", "55.0 % of 104", "91.0 % of 104"]
    # 4,096 tokens: 6144 * 4096 + 196608 and 3072 * 4096 + 98304 + 196608.
    assert cache[2] == ["4,096", "25,362,432", "12,877,824", "-49.2 %"]
    assert len(cache) == 1 + 4


def test_lineage_and_headline(page):
    (lineage,) = page.tables["lineage"]
    assert lineage[1] == ["teacher", "none", "a" * 12, "1" * 12, "0b0b0b0b0b0b", "30.5 s"]
    assert [row[1] for row in lineage[2:]] == ["1" * 12, "2" * 12, "3" * 12]
    for text in (
        "converts 3 of 15 layers of a made-up transformer, from full to rwkv7 + tica.",
        "1.2625 bits per byte, 0.0125 above the teacher, 91.0 % recall beyond the window (teacher 96.0 %).",
        "cost 1.8500 bits per byte; training won back 99.3 % of that.",
        "fewer bytes than the teacher beyond 32 tokens of context (break-even).",
        "1 of 2 targets missed",
        "missed: recall beyond the window 91.0 %, promised at least 95.0 %",
        "met: bits per byte above the teacher 0.0125, promised at most 0.0200",
        "time 2 min 5 s | threads 2 | devices cpu | torch 2.13.0 | transformers 5.23.0 | window 64",
    ):
        assert text in page.text["opening"]


def test_hostile_text_is_text(source, page):
    hostile = SYNTHETIC["HOSTILE"]
    assert hostile in page.text["samples"]
    assert hostile in page.text["plan"]
    assert "</pre><script>alert(1)</script>" in page.text["recipe"]
    assert "<script" not in source
    assert "evil.example/x.png onerror=alert(2)&gt;" in source
    assert sum(tag == "pre" for tag, _ in page.tags) == 1


def test_same_run_same_page(source, tmp_path):
    assert build_report(SYNTHETIC["write_run"](tmp_path / "tiny")).read_text(encoding="utf-8") == source


def test_missing_parts_are_named(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([{"stage": "operated", "bpb": 2.5, "kl": None}]))
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    (table,) = page.tables["quality"]
    assert table[1] == ["Teacher", *["not measured"] * 1, "", *["not measured"] * 4, ""]
    assert table[2] == ["Just operated", "2.5000", *["not measured"] * 6]
    assert table[4] == ["After stage 2 (matched)", *["not measured"] * 7]
    for section in (
        "plan",
        "training",
        "alignment",
        "recall",
        "position",
        "cache",
        "samples",
        "lineage",
        "recipe",
    ):
        assert "not measured" in page.text[section], section
    assert "recall beyond the window not measured" in page.text["opening"]
    assert "2.5000 bits per byte (teacher not measured)" in page.text["opening"]
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_a_run_without_surgery_has_no_student_rows(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([{"stage": "pretrained", "bpb": 1.5}]))
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables["quality"][0]] == ["Stage", "pretrained"]
    assert "pretrained: 1.5000 bits per byte" in page.text["opening"]


def test_a_loss_that_is_not_finite_is_counted_not_drawn(tmp_path):
    rows = [{"kind": "train", "stage": "aligned", "step": step, "loss": 1.0} for step in range(3)]
    rows[1]["loss"] = None
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert "1 logged steps have no finite loss" in page.text["training"]
    assert "not measured" in page.text["alignment"]


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    (tmp_path / "samples.json").write_text('[{"stage": "teacher", "prompt": "a", "text": "b\\ud800c"}]')
    assert "b?c" in Page(build_report(tmp_path).read_text(encoding="utf-8")).text["samples"]
