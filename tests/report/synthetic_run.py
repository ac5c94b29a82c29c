"""A small made-up run folder with every part in it, for the tests of the report. Nothing here was measured."""

import json
import math
from itertools import pairwise
from pathlib import Path

HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)> & \"quoted\" 'text' $x_{"
CONVERTED = (4, 9, 14)
RESULTS = {
    # stage: bits per byte, KL, agreement, recall at the longest distance
    "teacher": (1.2500, 0.0, 1.0, 0.96),
    "operated": (3.1000, 2.4321, 0.2345, 0.03),
    "aligned": (1.5000, 0.4567, 0.7012, 0.55),
    "matched": (1.2625, 0.0432, 0.9321, 0.91),
}


def write_run(folder: Path) -> Path:
    """Write all parts into `folder` (made when missing) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(f"name: tiny\nnote: {HOSTILE!r}\nsteps: 300\n", encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _log()), encoding="utf-8")
    parts = {
        "lineage.json": {"version": 1, "records": _lineage()},
        "plan.json": _plan(),
        "results.json": [_result(stage, *row) for stage, row in RESULTS.items()],
        "samples.json": _samples(),
        "summary.json": {
            "seconds": 125.0,
            "threads": 2,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "window": 64,
            "devices": ["cpu"],
            "targets": {"bpb_gap": 0.02, "recall": 0.95},
        },
    }
    for name, value in parts.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def _log() -> list[dict]:
    rows = []
    for stage, steps, high, low in (
        ("teacher", 120, 5.5, 2.1),
        ("aligned", 60, 0.9, 0.04),
        ("matched", 40, 0.9, 0.06),
    ):
        for step in range(steps):
            decline = low + (high - low) * math.exp(-5 * step / steps)
            row = {
                "kind": "train",
                "stage": stage,
                "step": step,
                "steps": steps,
                "loss": decline * (1 + 0.06 * math.sin(2.4 * step)),
                "learning_rate": 1e-3,
                "gradient_norm": 1.0,
                "tokens": 4096 * (step + 1),
                "tokens_per_second": 20000.0 + step % 7,
                "seconds": 0.2 * (step + 1),
                "memory_bytes": (800 + step) * 2**20,
            }
            if stage == "aligned":
                row |= {f"alignment/{layer}": decline * (0.6 + 0.05 * layer) for layer in CONVERTED}
            if stage == "matched":
                row["kl"] = 0.9 * decline
            rows.append(row)
    rows.append({"kind": "event", "event": "done", "stage": "matched"})
    return rows


def _lineage() -> list[dict]:
    stages = ("teacher", "operated", "aligned", "matched")
    digests = ["", *(f"{place}" * 64 for place in range(1, 5))]
    return [
        {
            "stage": stage,
            "parent": digests[place],
            "recipe": "a" * 64,
            "output": digests[place + 1],
            "seconds": 30.5,
            "hash": f"{place}b" * 32,
        }
        for place, stage in enumerate(stages)
    ]


def _plan() -> dict:
    layers = []
    for index in range(15):
        full = index % 5 == 4
        before = "full" if full else "sliding"
        sources = {"rwkv7.receptance": f"layer {index} q_proj, rows permuted", "rwkv7.value": HOSTILE}
        layers.append(
            {
                "index": index,
                "before": before,
                "after": ["rwkv7", "tica"] if full else ["sliding"],
                "parameters_before": 65_536,
                "parameters_after": 81_920 if full else 65_536,
                "sources": sources if full else {},
                "keys_values": "from layer 9" if index == 14 else "own",
            }
        )
    return {
        "teacher": "a made-up transformer",
        "before": _side(1_234_567, 6144, 0, 196_608, 4096, 1.0),
        "after": _side(1_283_719, 3072, 98_304, 196_608, 512, 0.9),
        "warnings": ["layers 10 to 14 lose the fast prefill", "TICA keeps keys and values: " + HOSTILE],
        "layers": layers,
    }


def _side(parameters: int, per_token: int, recurrent: int, sliding: int, score: int, factor: float) -> dict:
    return {
        "parameters": parameters,
        "global_kv_bytes_per_token": per_token,
        "recurrent_state_bytes": recurrent,
        "sliding_cache_bytes": sliding,
        "score_flops_per_pair": score,
        "flops_per_token": {
            str(context): int(factor * (2_000_000 + 100 * context)) for context in (512, 4096, 32768)
        },
        "layers": [],
    }


def _result(stage: str, bits: float, divergence: float, agreement: float, recall: float) -> dict:
    edges = (16, 32, 64, 128, 256, 512)
    bins = []
    for place, (low, high) in enumerate(pairwise(edges)):
        accuracy = 0.97 + (recall - 0.97) * place / 4
        bins.append({"low": low, "high": high, "accuracy": accuracy, "count": 100 + place})
    positions = [
        {"position": position, "loss": 2.3 * bits * (1 + 0.4 / (1 + position / 8)), "count": 500}
        for position in (0, 16, 32, 64, 128, 256)
    ]
    return {
        "stage": stage,
        "bpb": bits,
        "raw_bpb": bits * 0.9976,
        "kl": divergence,
        "agreement": agreement,
        "recall": recall,
        "recall_by_distance": bins,
        "loss_by_position": positions,
    }


def _samples() -> list[dict]:
    rows = []
    for prompt in ("def read(path):", HOSTILE):
        for stage, text in (
            ("teacher", "\n    with open(path) as file:\n        return file.read()"),
            ("matched", HOSTILE),
        ):
            rows.append({"stage": stage, "prompt": prompt, "text": text})
    return rows
