"""`build_report`: from a run folder to report.html, one file that needs nothing else.

No script, no outside address, figures as data URIs. A part that the run does not have is named as not measured.
"""

from pathlib import Path

from trihybrid.report import charts, compact, tables
from trihybrid.report.headline import headline, verdict
from trihybrid.report.markup import (
    Markup,
    Table,
    document,
    duration,
    element,
    escape,
    join,
    missing,
    stage_name,
)
from trihybrid.report.reading import Row, RunRecord, number, read_run
from trihybrid.run import RunDirectory, write_text


def build_report(run_folder: Path) -> Path:
    """Write report.html into `run_folder` and return its path.

    Read, each if it exists: recipe.yaml, lineage.json, log.jsonl, plan.json, results.json, samples.json, summary.json.
    results.json is a list of rows, one a stage; plan.json the plan of the surgery; samples.json a list of {stage,
    prompt, text}; summary.json an object of seconds, threads, devices, torch, transformers, window (tokens) and
    targets (see `headline`). A run that trained a compact model has ledger.json besides, and other sections.

    Raises ValueError when the folder is missing, holds none of these, or one is malformed.
    """
    run = read_run(run_folder)
    if compact.is_compact(run):
        first, own = [compact.headline(run), compact.verdict(run)], compact.sections(run)
    else:
        first = [headline(run), verdict(run)]
        own = [
            ("quality", "Quality", tables.quality_section(run)),
            ("plan", "Plan", tables.plan_section(run)),
            ("training", "Training", charts.training_section(run)),
            ("alignment", "Alignment by layer", charts.alignment_section(run)),
            ("recall", "Recall by distance", charts.recall_section(run)),
            ("position", "Loss by position", charts.position_section(run)),
            ("cache", "Cache against context", charts.cache_section(run)),
        ]
    opening = join([*first, _machine(run)], Markup("\n"))
    sections = [
        *own,
        ("samples", "Samples", _samples(run)),
        ("lineage", "Lineage", _lineage(run)),
        ("recipe", "Recipe", _recipe(run)),
    ]
    page = document(f"Run {run_folder.resolve().name}", sections, opening)
    report = RunDirectory(run_folder, create=False).report
    # A sample may hold half of a surrogate pair, which UTF-8 cannot.
    write_text(report, page.encode("utf-8", errors="replace").decode("utf-8"))
    return report


def _machine(run: RunRecord) -> Markup:
    names = ("threads", "devices", "torch", "transformers", "window")
    facts = [f"{name} {_plain(run.summary[name])}" for name in names if run.summary.get(name) is not None]
    seconds = number(run.summary, "seconds")
    if seconds is not None:
        facts.insert(0, f"time {duration(seconds)}")
    if not facts:
        return missing("Machine and time (summary.json)")
    return element("p", " | ".join(facts), "soft")


def _plain(value: object) -> str:
    return ", ".join(_plain(part) for part in value) if isinstance(value, list) else str(value)


def _samples(run: RunRecord) -> Markup:
    if not run.samples:
        return missing("Samples (samples.json)")
    prompts = dict.fromkeys(row["prompt"] for row in run.samples)
    return join(
        [_sample(prompt, [row for row in run.samples if row["prompt"] == prompt]) for prompt in prompts]
    )


def _sample(prompt: str, rows: list[Row]) -> Markup:
    answers = [
        join([element("dt", stage_name(row["stage"])), element("dd", row["text"], "text")]) for row in rows
    ]
    title = join([element("strong", "Prompt: "), element("span", prompt, "text")])
    return element("div", join([element("div", title, "prompt"), element("dl", join(answers))]), "sample")


def _lineage(run: RunRecord) -> Markup:
    if not run.lineage:
        return missing("Lineage (lineage.json)")
    names = ("parent", "recipe", "output", "hash")
    rows = [
        [
            str(record.get("stage")),
            *(_digest(record.get(name)) for name in names),
            duration(number(record, "seconds")),
        ]
        for record in run.lineage
    ]
    table = Table(("Stage", "Parent", "Recipe", "Output", "Record", "Time"), rows, frozenset((5,)))
    note = "Hashes of what each stage started from, its recipe, its output and its record. Hovering shows all digits."
    return join([table.html(), element("p", note, "soft")])


def _digest(value: object) -> str:
    if not value:
        return "none"
    return Markup(f'<code title="{escape(str(value))}">{escape(str(value)[:12])}</code>')


def _recipe(run: RunRecord) -> Markup:
    if run.recipe is None:
        return missing("Recipe (recipe.yaml)")
    lines = element("summary", f"recipe.yaml, {len(run.recipe.splitlines()):,} lines")
    return element("details", join([lines, element("pre", run.recipe)]))
