"""The page of a run that trained a compact model: what it scores, where its bytes go, how it was trained."""

import torch
from pydantic import ValidationError

from trihybrid.compress.ledger import Ledger, LedgerRow, ledger_rows
from trihybrid.models.compact import CompactModel, CompactSection
from trihybrid.report import plots
from trihybrid.report.charts import training_section
from trihybrid.report.markup import Markup, Table, decimal, duration, element, figure, figures, join, missing
from trihybrid.report.reading import Row, RunRecord, number, object_of

SCORE_HEADS = (
    "Weights",
    "Windows",
    "Bits per byte",
    "Bits per raw byte",
    "Nats a token",
    "Tokens",
    "Bytes",
)
SCORE_NOTE = (
    "Bits per byte count the decoded bytes of the validation text, bits per raw byte those of its file, where all of "
    "it was scored; lower is better. Plain windows stand side by side; sliding ones overlap, so that nearly every "
    "token has a long context; stateful ones go on from each other. The artifact is what was read back from its file."
)
LEDGER_HEADS = ("Part", "Tensors", "Weights", "Bytes", "Share", "Bits a weight")


def is_compact(run: RunRecord) -> bool:
    """Whether a run trained a compact model, finished or not."""
    return run.compact is not None or "train" in run.training


def headline(run: RunRecord) -> Markup:
    """What was made and how good it is, one paragraph."""
    results = run.compact
    if results is None:
        return element("p", "This run has trained a compact model, and has not measured it yet.", "lead")
    chunked = object_of(object_of(results, "bpb"), "chunked")
    text = join(
        [
            decimal(number(results, "parameters"), 0),
            " parameters in ",
            decimal(number(results, "total_bytes"), 0),
            " bytes, code included: ",
            decimal(number(chunked, "decoded"), 4),
            " bits per byte after reloading, ",
            decimal(number(results, "gap"), 4, signed=True),
            " by quantisation. Trained on ",
            decimal(number(results, "tokens"), 0),
            " tokens in ",
            decimal(number(results, "steps"), 0),
            " steps and ",
            duration(number(results, "train_seconds")),
            " (",
            decimal(number(results, "ms_per_step"), 1),
            " ms a step).",
        ]
    )
    return element("p", text, "lead")


def verdict(run: RunRecord) -> Markup:
    """The promises that the run broke, its byte limit included; or that it broke none."""
    if run.compact is None:
        return element(
            "p", "Nothing has been measured, so no target is called met or missed.", "verdict none"
        )
    missed = run.summary.get("missed")
    if missed is None:
        return missing("Targets (summary.json)")
    if not isinstance(missed, list):
        raise ValueError(f"summary.json: missed is {missed!r}, must be a list; correct it")
    if not missed:
        margin = (number(run.compact, "limit_bytes") or 0) - (number(run.compact, "total_bytes") or 0)
        return element("div", f"All targets met; {margin:,.0f} bytes below the limit.", "verdict met")
    lines = [element("li", str(line)) for line in missed]
    title = element("strong", f"{len(missed)} targets missed")
    return element("div", join([title, element("ul", join(lines))]), "verdict")


def sections(run: RunRecord) -> list[tuple[str, str, Markup]]:
    """The sections of the page that a conversion does not have, or has otherwise: (anchor, heading, content)."""
    return [
        ("quality", "Quality", _quality(run)),
        ("bytes", "Bytes", _bytes(run)),
        ("training", "Training", training_section(run)),
    ]


def _quality(run: RunRecord) -> Markup:
    if run.compact is None:
        return missing("Quality (results.json)")
    scores = object_of(run.compact, "bpb")
    rows = [
        _score("Trained", "plain", object_of(scores, "chunked_before_quantisation")),
        _score("Artifact", "plain", object_of(scores, "chunked")),
    ]
    for way in ("sliding", "stateful"):
        if scores.get(way) is not None:
            rows.append(_score("Artifact", way, object_of(scores, way)))
    adaptation = object_of(run.compact, "adaptation")
    if adaptation:
        rows.append(_score(f"Artifact, {adaptation.get('label')}", "plain", adaptation))
    table = Table(SCORE_HEADS, rows, frozenset(range(2, len(SCORE_HEADS))))
    facts = [
        (name, str(run.compact.get(name)))
        for name in ("seed", "config_hash", "code_hash")
        if run.compact.get(name) is not None
    ]
    told = element("p", "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts), "soft")
    return join([table.html(), element("p", SCORE_NOTE, "soft"), told])


def _score(weights: str, windows: str, score: Row) -> list[str]:
    nats, tokens = number(score, "nats"), number(score, "tokens")
    return [
        weights,
        windows,
        decimal(number(score, "decoded"), 4),
        decimal(number(score, "raw"), 4),
        decimal(None if nats is None or not tokens else nats / tokens, 4),
        decimal(tokens, 0),
        decimal(number(score, "bytes"), 0),
    ]


def _bytes(run: RunRecord) -> Markup:
    if run.ledger is None:
        return missing("Bytes (ledger.json)")
    try:
        ledger = Ledger.model_validate(run.ledger)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"ledger.json: {field}: {first['msg']}; restore the file or remove it") from None
    rows = ledger_rows(ledger, _roles(ledger))
    parts, total = rows[:-1], rows[-1]
    cells = [
        [
            row.label,
            f"{row.tensors:,}" if row.tensors else "",
            f"{row.elements:,}" if row.elements else "",
            f"{row.bytes:,}",
            f"{100 * row.bytes / max(total.bytes, 1):.1f} %",
            "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
        ]
        for row in rows
    ]
    table = Table(LEDGER_HEADS, cells, frozenset(range(1, len(LEDGER_HEADS))), frozenset({len(rows) - 1}))
    return join([table.html(), figures([_bars(run, parts), _codecs(ledger)])])


def _bars(run: RunRecord, parts: list[LedgerRow]) -> Markup:
    shown = [(row.label, row.bytes) for row in parts if row.bytes]
    limit = None if run.compact is None else number(run.compact, "limit_bytes")
    png = plots.byte_bars(shown, None if limit is None else int(limit))
    listed = ", ".join(f"{name} {size:,}" for name, size in shown)
    return figure(png, f"Bar chart, bytes: {listed}.", "Where the bytes of artifact and code go.")


def _codecs(ledger: Ledger) -> Markup:
    """How many parts, and bytes, each coder got."""
    found: dict[str, tuple[int, int]] = {}
    for entry in ledger.tensors:
        for part in entry.parts:
            count, size = found.get(part.codec, (0, 0))
            found[part.codec] = count + 1, size + part.bytes
    rows = [
        [name, f"{count:,}", f"{size:,}"]
        for name, (count, size) in sorted(found.items(), key=lambda item: -item[1][1])
    ]
    return Table(("Coder", "Parts", "Bytes"), rows, frozenset({1, 2})).html()


def _roles(ledger: Ledger) -> dict[str, str]:
    """Parameter -> role, from the shape in the ledger; empty where this version cannot read it."""
    shape, vocabulary = ledger.configuration.get("section"), ledger.configuration.get("vocabulary")
    if not isinstance(shape, dict) or not isinstance(vocabulary, int) or vocabulary < 1:
        return {}
    try:
        section = CompactSection.model_validate(shape)
    except ValidationError:
        return {}
    with torch.device("meta"):
        return CompactModel(section, vocabulary).roles()
