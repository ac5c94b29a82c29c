"""HTML by hand: escaping, numbers, tables, figures and the shell of the page. Every text passes through `escape` once.

`Markup` is text that is HTML already; a plain str given to a table or a caption is escaped.
"""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trihybrid.report.stages import stage_style

NOT_MEASURED = "not measured"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --pale: #f6f8fa; --link: #0b5394; }
* { box-sizing: border-box; }
body { margin: 0; background: #ffffff; color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 44px 0 10px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p { margin: 8px 0; max-width: 76ch; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 0.92rem; margin: 10px 0 18px; }
a { color: var(--link); text-underline-offset: 2px; }
.soft, figcaption, .missing { color: var(--soft); }
.missing { font-style: italic; }
.lead { font-size: 1.06rem; }
.verdict { border-left: 4px solid #d55e00; background: var(--pale); padding: 8px 14px; margin: 14px 0;
  max-width: 76ch; }
.verdict.met { border-left-color: #0072b2; }
.verdict.none { border-left-color: var(--line); }
.verdict ul, .warnings { margin: 4px 0; padding-left: 20px; }
.wide { overflow-x: auto; margin: 12px 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; }
td.number { white-space: nowrap; }
td.number .missing { white-space: normal; }
tbody th { position: sticky; left: 0; background: #ffffff; }
tbody tr.changed > * { background: var(--pale); }
.swatch { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 2px; margin-right: 0.5em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px 28px; }
figure { margin: 12px 0; max-width: 480px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 0.88rem; margin-top: 6px; }
@media (min-width: 860px) {
  .figures > figure:only-child { display: grid; grid-template-columns: 480px 1fr; gap: 28px; max-width: none; }
  .figures > figure:only-child figcaption { align-self: center; }
  .figures:has(> figure:only-child) { grid-template-columns: 1fr; }
  tbody th .stage { white-space: nowrap; }
}
pre, code { font-size: 0.86rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--pale); border: 1px solid var(--line); padding: 12px; overflow-x: auto; }
code { overflow-wrap: anywhere; }
summary { cursor: pointer; }
td details ul { margin: 4px 0; padding-left: 18px; }
.sample { border: 1px solid var(--line); border-radius: 4px; margin: 16px 0; overflow: hidden; }
.prompt { background: var(--pale); padding: 10px 14px; border-bottom: 1px solid var(--line); }
.sample dl { margin: 0; display: grid; grid-template-columns: 13rem 1fr; }
.sample dt, .sample dd { margin: 0; padding: 8px 14px; }
.sample dt { color: var(--soft); font-size: 0.92rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 16px 14px 40px; }
  .sample dl { grid-template-columns: 1fr; }
  .sample dd { padding-top: 0; }
  th, td { padding: 5px 7px; }
}
@media print { details:not([open]) { display: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


class Markup(str):
    """HTML that is safe to place in the page as it stands."""


def escape(text: str) -> Markup:
    """`text` as HTML text or attribute value; what is Markup already stays."""
    return text if isinstance(text, Markup) else Markup(html.escape(text, quote=True))


def element(name: str, content: str, classes: str = "") -> Markup:
    """`<name class="classes">content</name>`, the content escaped unless it is Markup."""
    attribute = f' class="{escape(classes)}"' if classes else ""
    return Markup(f"<{name}{attribute}>{escape(content)}</{name}>")


def join(parts: Sequence[str], separator: str = "") -> Markup:
    """The parts, each escaped unless it is Markup, with the separator between them."""
    return Markup(escape(separator).join(escape(part) for part in parts))


def missing(what: str) -> Markup:
    """A paragraph that names what is not there, and why."""
    return element("p", f"{what}: {NOT_MEASURED}.", "missing")


def decimal(value: float | None, digits: int, signed: bool = False) -> str | Markup:
    """`value` with `digits` decimals and thousands separated; names what is absent or not finite."""
    if value is None:
        return element("span", NOT_MEASURED, "missing")
    if not math.isfinite(value):
        return element("span", "not finite", "missing")
    return f"{value:{'+' if signed else ''},.{digits}f}"


def percent(value: float | None, digits: int = 1, signed: bool = False) -> str | Markup:
    """A fraction as per cent."""
    if value is None or not math.isfinite(value):
        return decimal(value, digits)
    return f"{decimal(100 * value, digits, signed)} %"


def duration(seconds: float | None) -> str | Markup:
    """Seconds as "42.0 s", "3 min 5 s" or "2 h 4 min"."""
    if seconds is None or not math.isfinite(seconds) or seconds < 60:
        text = decimal(seconds, 1)
        return text if isinstance(text, Markup) else f"{text} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def change(before: float | None, after: float | None) -> list[str]:
    """Three cells: before, after, and what `after` is above or below `before` in per cent of it."""
    if before is None or after is None:
        difference: str = decimal(None, 1)
    elif before == after:
        difference = "none"
    elif before == 0:
        difference = "new"
    else:
        share = after / before - 1
        difference = percent(share, 2 if abs(share) < 0.1 else 1, signed=True)
    return [decimal(before, 0), decimal(after, 0), difference]


def stage_name(stage: str, training: bool = False) -> Markup:
    """The name of a stage (of its training, on request) behind a square of its colour."""
    style = stage_style(stage)
    title = escape(style.training if training else style.title)
    swatch = f'<span class="swatch" style="background:{style.colour}"></span>'
    return Markup(f'<span class="stage">{swatch}{title}</span>')


@dataclass(frozen=True)
class Table:
    """heads: one a column. rows: cells, the first of each row being its head. numbers: columns that are right-aligned.
    changed: rows (from 0) that are set off."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    changed: frozenset[int] = frozenset()

    def html(self) -> Markup:
        """The table in a box that scrolls by itself on a narrow screen."""
        head = join([self._cell("th", text, column, "col") for column, text in enumerate(self.heads)])
        body = join([self._row(place, row) for place, row in enumerate(self.rows)])
        table = join([element("thead", element("tr", head)), element("tbody", body)])
        return element("div", element("table", table), "wide")

    def _row(self, place: int, row: Sequence[str]) -> Markup:
        cells = [self._cell("td" if column else "th", text, column, "row") for column, text in enumerate(row)]
        return element("tr", join(cells), "changed" if place in self.changed else "")

    def _cell(self, name: str, text: str, column: int, scope: str) -> Markup:
        scope_attribute = f' scope="{scope}"' if name == "th" else ""
        class_attribute = ' class="number"' if column in self.numbers else ""
        return Markup(f"<{name}{scope_attribute}{class_attribute}>{escape(text)}</{name}>")


def figure(png: bytes, alternative: str, caption: str) -> Markup:
    """A PNG inside the page, with its text for those who cannot see it and a caption that says how to read it."""
    data = base64.b64encode(png).decode("ascii")
    return Markup(
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def figures(parts: Sequence[Markup]) -> Markup:
    """Figures side by side where the screen is wide enough."""
    return element("div", join(parts), "figures")


def document(title: str, sections: Sequence[tuple[str, str, Markup]], opening: Markup) -> str:
    """The whole page. sections: (anchor, heading, content). Its policy forbids scripts and every outside address."""
    links = join([Markup(f'<a href="#{anchor}">{escape(heading)}</a>') for anchor, heading, _ in sections])
    parts = [
        Markup(f'<section id="{anchor}">{element("h2", heading)}{content}</section>')
        for anchor, heading, content in sections
    ]
    lines = (
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        element("h1", title),
        opening,
        element("nav", links),
        *parts,
        "</main>",
        "</body>",
        "</html>",
        "",
    )
    return "\n".join(lines)
