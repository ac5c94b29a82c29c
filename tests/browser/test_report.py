"""The report in a real browser: it is drawn, it is not blank, and it neither asks for anything nor complains."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
from matplotlib import image

from trihybrid.report import build_report

pytestmark = pytest.mark.browser

WRITE_RUN = runpy.run_path(str(Path(__file__).parents[1] / "report" / "synthetic_run.py"))["write_run"]


def screenshot(page: Path, target: Path, width: int, height: int) -> list[str]:
    """Draw `page` into the PNG `target`; returns what the page wrote to the console.

    A refused or failed load of a page's part is written there by the browser itself.
    """
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("chromium is not installed; install Debian's package chromium")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={target.with_suffix('.profile')}",
        f"--window-size={width},{height}",
        f"--screenshot={target}",
        page.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if re.search(r"\bCONSOLE\b|net_error|ERR_", line)]


@pytest.mark.parametrize(("width", "height"), [(1000, 6000), (500, 7000)])
def test_the_report_is_drawn_and_quiet(tmp_path, width, height):
    report = build_report(WRITE_RUN(tmp_path / "tiny"))
    target = tmp_path / "screenshot.png"
    console = screenshot(report, target, width, height)
    assert console == []
    assert target.is_file()
    pixels = image.imread(target)[:, :, :3]
    assert pixels.shape == (height, width, 3)
    dark = pixels.mean(axis=2) < 0.5
    assert 0.005 < dark.mean() < 0.3
    # Text and figures down the whole page: of twelve bands, all but the last ones hold ink.
    assert all(band.any() for band in numpy.array_split(dark, 12)[:9])
    # The teacher's near-black and the two blues and the vermilion of the other stages are on the page.
    for colour in ("d55e00", "56b4e9", "0072b2"):
        wanted = numpy.array(list(bytes.fromhex(colour))) / 255
        assert (numpy.abs(pixels - wanted).max(axis=2) < 0.02).sum() > 100, colour


def test_a_page_that_asks_for_more_is_noticed(tmp_path):
    # The control for the test above: a script and an outside picture in a page with the same policy are written down.
    report = build_report(WRITE_RUN(tmp_path / "tiny"))
    spoiled = tmp_path / "spoiled.html"
    extra = '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png" alt="">'
    spoiled.write_text(
        report.read_text(encoding="utf-8").replace("<main>", f"<main>{extra}"), encoding="utf-8"
    )
    console = "\n".join(screenshot(spoiled, tmp_path / "screenshot.png", 800, 600))
    assert "script" in console
    assert "http://127.0.0.1:9/x.png" in console
