"""The texts of a submission folder: README.md, submission.json and the logs, made from checked runs."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trihybrid.export.bundle import PROGRAM
from trihybrid.export.checked_run import HEAD, CheckedRun
from trihybrid.export.significance import Comparison


@dataclass(frozen=True)
class Credits:
    """Who submits, and under which name.

    Attributes:
        author: name of the person.
        github_id: account of the person.
        name: title of the submission.
        blurb: one or two sentences on what is in it.
        date: ISO 8601, as 2026-04-30.
    """

    author: str
    github_id: str
    name: str
    blurb: str
    date: str


@dataclass(frozen=True)
class Size:
    """Bytes that count under the limit.

    Attributes:
        code: train_gpt.py.
        artifacts: seed -> the model's file.
        further: file name -> bytes of what else the program needs when it is scored.
        limit: most bytes allowed.
    """

    code: int
    artifacts: dict[int, int]
    further: dict[str, int]
    limit: int

    @property
    def total(self) -> int:
        """Code, further files and the largest artifact."""
        return self.code + sum(self.further.values()) + max(self.artifacts.values())


def submission_fields(
    runs: Sequence[CheckedRun], credits: Credits, size: Size, comparison: Comparison | None, rescored: bool
) -> dict[str, Any]:
    """submission.json: the challenge's own fields first (author to bytes_code), then what backs them.

    val_loss is nats a token and val_bpb bits a byte of decoded text, both means over the seeds by the protocol
    `val_protocol`; bytes_total counts the largest artifact.
    """
    losses, bits = [val_loss(run) for run in runs], [run.score["decoded"] for run in runs]
    return {
        **asdict(credits),
        "val_loss": statistics.fmean(losses),
        "val_bpb": statistics.fmean(bits),
        "bytes_total": size.total,
        "bytes_code": size.code,
        "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "val_bpb_std": statistics.stdev(bits) if len(bits) > 1 else None,
        "val_protocol": protocol(runs),
        "track": "A (fixed predictor)",
        "parameters": runs[0].head["parameters"],
        "config_hash": runs[0].head["config_hash"],
        "code_hash": runs[0].head["code_hash"],
        "rescored_from_artifact": rescored,
        "comparison": None if comparison is None else asdict(comparison),
        "seeds": [run.seed for run in runs],
        "seed_results": {
            str(run.seed): {
                "val_loss": val_loss(run),
                "val_bpb": run.score["decoded"],
                "artifact_bytes": size.artifacts[run.seed],
                "artifact_sha256": run.results["artifact"]["sha256"],
                "steps": run.results["steps"],
                "train_seconds": run.results["train_seconds"],
                "ms_per_step": run.results["ms_per_step"],
                "bpb": run.results["bpb"],
                "adaptation": run.results["adaptation"],
            }
            for run in runs
        },
    }


def readme(
    runs: Sequence[CheckedRun], credits: Credits, size: Size, comparison: Comparison | None, rescored: bool
) -> str:
    """README.md of a submission: what it is, its scores by seed, its bytes, how to run it, what was checked."""
    bits = [run.score["decoded"] for run in runs]
    lines = [
        f"# {credits.name}",
        "",
        credits.blurb,
        "",
        f"By {credits.author} ({credits.github_id}), {credits.date}.",
        "",
    ]
    spread = f" (std {statistics.stdev(bits):.6f}, n = {len(bits)})" if len(bits) > 1 else ""
    lines += [
        f"**val_bpb {statistics.fmean(bits):.8f}**{spread}, {protocol(runs)}; {size.total:,} bytes in all.",
        "",
    ]
    if comparison is not None:
        lines += [
            f"Against the baseline that was given: {comparison.difference:+.6f} bpb, t = {comparison.t:.3f}, "
            f"df = {comparison.degrees:.2f}, one-sided p = {comparison.p:.2e}.",
            "",
        ]
    lines += ["## Seeds", "", *_seed_table(runs, size), ""]
    lines += [
        "bpb is bits per byte of the decoded validation tokens, the challenge's count; raw is per byte of the original "
        "text. Chunked windows lie side by side; sliding windows overlap, and each token is scored once. Both are of "
        "the artifact, written, read back and dequantised; the last column is of the weights before quantisation, "
        "chunked.",
        "",
        "Track A: the predictor is fixed while it is scored.",
    ]
    if any(run.results["adaptation"] is not None for run in runs):
        lines += [
            "",
            "Track B, apart from the above: score-first test-time training.",
            "",
            *_adaptation_table(runs),
        ]
    lines += [
        "",
        "## Bytes",
        "",
        *_bytes_table(size),
        "",
        "## Run",
        "",
        "```",
        "pip install -r requirements.txt",
    ]
    data = runs[0].recipe.data
    options = "" if data.tokenizer == "bytes" else " --tokenizer FILE"
    options += "" if data.validation is None else " --validation FOLDER"
    lines += [f"python {PROGRAM} --data FOLDER{options} --out run --seed {runs[0].seed}", "```", ""]
    lines += [
        f"{PROGRAM} is a zip archive that Python runs; `unzip -l {PROGRAM}` lists it. On several GPUs start it with "
        "torchrun.",
        "",
        "## Checked before this folder was written",
        "",
        f"- {len(runs)} logs of one configuration ({runs[0].head['config_hash']}), one a seed, every step in them.",
        f"- The code hash in every log is that of {PROGRAM}: {runs[0].head['code_hash']}.",
        f"- {runs[0].head['parameters']:,} parameters in the logs, counted from the recipe and in each artifact.",
        "- Each artifact has the sha256 and size that its results name; the bytes are those of the files.",
    ]
    if rescored:
        lines.append("- Each chunked score was repeated from the artifact.")
    return "\n".join(lines) + "\n"


def log_text(run: CheckedRun) -> str:
    """The log of one seed: its head, a line for every step, bytes and scores to the last digit."""
    lines = [f"{name}:{run.head[name]}" for name in HEAD]
    lines += [
        f"{name}:{value}" for name, value in run.head.items() if name not in {*HEAD, "kind", "event", "stage"}
    ]
    for row in run.steps:
        lines.append(
            f"step:{row['step'] + 1}/{row['steps']} train_loss:{row['loss']!r} learning_rate:{row['learning_rate']!r} "
            f"gradient_norm:{row['gradient_norm']!r} tokens:{row['tokens']} train_seconds:{row['seconds']:.3f}"
        )
    results = run.results
    lines += [
        f"train_seconds:{results['train_seconds']!r} ms_per_step:{results['ms_per_step']!r}",
        f"artifact_bytes:{results['artifact']['bytes']} code_bytes:{results['code_bytes']} "
        f"total_bytes:{results['total_bytes']}",
        f"artifact_sha256:{results['artifact']['sha256']}",
    ]
    for name, score in results["bpb"].items():
        if score is not None:
            lines.append(f"final_{name} " + " ".join(f"{field}:{value!r}" for field, value in score.items()))
    return "\n".join(lines) + "\n"


def protocol(runs: Sequence[CheckedRun]) -> str:
    """How the score that counts was measured, in words."""
    section = runs[0].recipe.evaluation
    documents = "documents apart" if section.isolated else "one stream"
    if runs[0].results["bpb"]["sliding"] is not None:
        return f"sliding windows of {section.length}, stride {section.stride}, {documents}"
    return f"chunked windows of {section.length}, {documents}"


def val_loss(run: CheckedRun) -> float:
    """Nats a token of the score that counts."""
    return run.score["nats"] / run.score["tokens"]


def _seed_table(runs: Sequence[CheckedRun], size: Size) -> list[str]:
    rows = [
        "| seed | steps | ms/step | train s | bpb chunked | bpb sliding | raw chunked | artifact bytes | total | "
        "before |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        results, bpb = run.results, run.results["bpb"]
        total = size.total - max(size.artifacts.values()) + size.artifacts[run.seed]
        rows.append(
            f"| {run.seed} | {results['steps']:,} | {results['ms_per_step']:.2f} | {results['train_seconds']:.1f} | "
            f"{_digits(bpb['chunked'], 'decoded')} | {_digits(bpb['sliding'], 'decoded')} | "
            f"{_digits(bpb['chunked'], 'raw')} | {size.artifacts[run.seed]:,} | {total:,} | "
            f"{_digits(bpb['chunked_before_quantisation'], 'decoded')} |"
        )
    for label, function in (("mean", statistics.fmean), ("std", statistics.stdev)):
        if label == "std" and len(runs) < 2:
            continue
        chunked = function([run.results["bpb"]["chunked"]["decoded"] for run in runs])
        scores = [run.results["bpb"]["sliding"] for run in runs]
        sliding = f"{function([score['decoded'] for score in scores]):.8f}" if all(scores) else "-"
        rows.append(f"| {label} | | | | {chunked:.8f} | {sliding} | | | | |")
    return rows


def _adaptation_table(runs: Sequence[CheckedRun]) -> list[str]:
    rows = ["| seed | bpb with adaptation |", "|---|---|"]
    return rows + [f"| {run.seed} | {_digits(run.results['adaptation'], 'decoded')} |" for run in runs]


def _bytes_table(size: Size) -> list[str]:
    rows = ["| part | bytes |", "|---|---|", f"| {PROGRAM} | {size.code:,} |"]
    rows += [f"| {name} | {count:,} |" for name, count in size.further.items()]
    rows += [
        f"| largest artifact | {max(size.artifacts.values()):,} |",
        f"| total | {size.total:,} |",
        f"| limit | {size.limit:,} |",
        f"| margin | {size.limit - size.total:,} |",
    ]
    return rows


def _digits(score: dict[str, Any] | None, field: str) -> str:
    return "-" if score is None or score[field] is None else f"{score[field]:.8f}"
