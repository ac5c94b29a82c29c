"""The page of a compact run says the numbers that the run measured, and names what it has not."""

import json
import re
import shutil
from pathlib import Path

import pytest

from trihybrid.report import build_report, plots


@pytest.fixture
def run(compact_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(compact_run, tmp_path / "run"))


def page_of(run: Path) -> str:
    return build_report(run).read_text()


def text_of(page: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", page).split())


def test_the_page_says_what_was_measured(run: Path) -> None:
    results, text = json.loads((run / "results.json").read_text()), text_of(page_of(run))
    for name in ("parameters", "total_bytes", "steps", "tokens"):
        assert f"{results[name]:,}" in text, name
    for name, score in results["bpb"].items():
        assert f"{score['decoded']:.4f}" in text, name
    assert f"{results['gap']:+.4f} by quantisation" in text
    left = results["limit_bytes"] - results["total_bytes"]
    assert f"All targets met; {left:,} bytes below the limit." in text
    assert results["config_hash"] in text and results["code_hash"] in text
    sample = json.loads((run / "samples.json").read_text())[0]
    assert sample["prompt"].strip() in text and "Artifact, reloaded" in text
    for absent in ("Alignment by layer", "Recall by distance", "Cache against context"):
        assert absent not in text


def test_the_bytes_add_up_by_role(run: Path) -> None:
    ledger, page = json.loads((run / "ledger.json").read_text()), page_of(run)
    section = page.split('<section id="bytes">')[1].split("</section>")[0]
    table = section.split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in table.split("<tr")[2:]]
    sizes = {row[0]: int(row[3].replace(",", "")) for row in rows}
    total = sizes.pop("total")
    assert total == ledger["total_bytes"] == sum(sizes.values())
    assert {"matrix int6", "embedding int8", "vector float16", "code", "header and ledger"} <= sizes.keys()
    weights = {row[0]: int(row[2].replace(",", "")) for row in rows if row[2]}
    assert weights["total"] == ledger["configuration"]["parameters"]
    assert section.count("<img ") == 1


def test_a_run_that_is_still_training_has_a_page(run: Path) -> None:
    for name in ("results.json", "ledger.json", "samples.json", "summary.json"):
        (run / name).unlink()
    text = text_of(page_of(run))
    assert "has not measured it yet" in text and "so no target is called met or missed" in text
    assert "Quality (results.json)" in text and "Bytes (ledger.json)" in text


def test_broken_promises_come_first(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"missed": ["too <slow>"]}))
    page = page_of(run)
    assert "1 targets missed" in text_of(page) and "too &lt;slow&gt;" in page
    (run / "summary.json").write_text(json.dumps(summary | {"missed": "all"}))
    with pytest.raises(ValueError, match=r"summary\.json: missed is 'all', must be a list"):
        build_report(run)


def test_a_misshapen_ledger_is_named(run: Path) -> None:
    ledger = json.loads((run / "ledger.json").read_text())
    (run / "ledger.json").write_text(json.dumps(ledger | {"total_bytes": "many"}))
    with pytest.raises(ValueError, match=r"ledger\.json: total_bytes: .*; restore the file or remove it"):
        build_report(run)


def test_bars_are_the_same_bytes_each_time() -> None:
    parts = [("matrix int6", 370_000), ("code", 90_000), ("header and ledger", 1)]
    first = plots.byte_bars(parts, 16_000_000)
    assert first == plots.byte_bars(parts, 16_000_000) != plots.byte_bars(parts, None)
    assert first.startswith(b"\x89PNG")
