"""A load on `trihybrid serve`: many streaming clients for minutes, checked answer by answer.

    python benchmarks/serve_load.py [--clients 64] [--seconds 120] [--json FOLDER]

Makes a tiny random student, starts the server on it in a process of its own, asks every client's request once alone,
then lets all clients repeat theirs at once, each with a text, length and seed of its own, now from kept states. Every
stream must be what it was alone, with its counts; the server's own metrics must be the sum of all answers; its resident
memory (the mean of ten seconds) must be within 2 % at the end of the first half and at the end. Then SIGTERM must end
it with exit code 0. Prints throughput, time to the first piece of text and time between pieces (p50 and p95). Exits
with 1 when something was lost, mixed up or left.
--json writes the row as serve_load.json into FOLDER. Linux only: memory is read from /proc.
"""

import argparse
import asyncio
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import Gemma4TextConfig

from trihybrid.data.tokens import Tokenizer
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM

VOCABULARY = 260
MOST_GROWTH = 0.02
WORDS = (
    "river", "stone", "bridge", "summer", "children", "houses", "slow", "under", "past", "fish", "in", "and", "the",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a stream gave."""

    text: str
    finish: str | None
    usage: dict[str, int] | None
    error: str | None = None


@dataclass
class Load:
    """What the clients saw."""

    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    chosen_tokens: int = 0
    answers: int = 0


def make_student(folder: Path) -> None:
    """Sliding layers, RWKV-7 and RWKV-7 with TICA, over bytes, random."""
    base = Gemma4TextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        final_logit_softcapping=30.0,
        initializer_range=0.3,
    )
    slots = [
        {"mixers": ["sliding"]},
        {"mixers": ["rwkv7", "tica"]},
        {"mixers": ["sliding"]},
        {"mixers": ["rwkv7"]},
    ]
    ranks = {"decay_rank": 4, "iclr_rank": 4, "gate_rank": 4}
    config = TrihybridGemma4Config(
        base_config=base.to_dict(),
        slots=slots,
        rwkv7={"heads": 4, "kv_heads": 2, "head_dim": 16, **ranks},
        tica={"heads": 2, "kv_heads": 1, "head_dim": 16, "gate_rank": 4},
    )
    torch.manual_seed(0)
    TrihybridGemma4ForCausalLM(config).save_pretrained(folder)
    Tokenizer.bytes().save(folder)


def request(client: int) -> dict[str, Any]:
    """The request of a client: no two are the same."""
    prompt = " ".join(WORDS[(client * (place + 1) + place) % len(WORDS)] for place in range(2 + client % 23))
    return {
        "model": "tiny", "prompt": f"{client}: {prompt}", "max_tokens": 16 + client % 33, "seed": client,
        "temperature": client % 3 / 2, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def ask(port: int, body: dict[str, Any], arrivals: list[float]) -> Answer:
    """One stream over a connection of its own; `arrivals` gets the time of every piece of text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        parts, finish, usage, done = [], None, None, False
        status = (await reader.readline()).split()[1:2]
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return Answer("", None, None, event["error"]["message"])
            for choice in event["choices"]:
                arrivals.append(time.monotonic())
                parts.append(choice["text"])
                finish = choice["finish_reason"] or finish
            if event.get("usage"):
                # How much of a prompt was kept from before differs; the answer must not.
                usage = {name: count for name, count in event["usage"].items() if isinstance(count, int)}
        return Answer("".join(parts), finish, usage, None if done else f"status {status}, no [DONE]")
    finally:
        writer.close()


async def repeat(port: int, client: int, alone: Answer, end: float, load: Load) -> None:
    """One client's whole life."""
    while time.monotonic() < end:
        start, arrivals = time.monotonic(), []
        try:
            answer = await ask(port, request(client), arrivals)
        except (OSError, ValueError) as error:
            answer = Answer("", None, None, repr(error))
        if answer.error is not None or answer.usage is None:
            load.lost.append(f"client {client}: {answer.error}")
            continue
        if answer != alone:
            load.mixed.append(f"client {client}: {answer} in place of {alone}")
        load.answers += 1
        load.prompt_tokens += answer.usage["prompt_tokens"]
        load.chosen_tokens += answer.usage["completion_tokens"]
        load.first.append(arrivals[0] - start)
        load.between += [later - sooner for sooner, later in itertools.pairwise(arrivals)]


async def watch(pid: int, end: float, resident: list[tuple[float, int]]) -> None:
    """The server's resident bytes, every half second."""
    while (now := time.monotonic()) < end:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (kib,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        resident.append((now, kib * 1024))
        await asyncio.sleep(0.5)


async def metrics(port: int) -> dict[str, float]:
    """Name and labels -> value, of the server's own count."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).partition(b"\r\n\r\n")[2].decode()
    writer.close()
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def run(port: int, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """All requests alone, then all clients at once; the row."""
    alone = [await ask(port, request(client), []) for client in range(clients)]
    assert all(answer.error is None for answer in alone), alone
    assert len({answer.text for answer in alone}) == clients, "two requests have one answer"
    before = await metrics(port)
    load, resident = Load(), []
    start = time.monotonic()
    end = start + seconds
    await asyncio.gather(
        watch(pid, end, resident),
        *(repeat(port, client, alone[client], end, load) for client in range(clients)),
    )
    wall = time.monotonic() - start
    after = await metrics(port)
    counted = {
        "trihybrid_prompt_tokens_total": load.prompt_tokens,
        "trihybrid_chosen_tokens_total": load.chosen_tokens,
        "trihybrid_request_seconds_count": load.answers,
        "trihybrid_requests_total /v1/completions 200": load.answers,
    }
    uncounted = {name: after[name] - before[name] - seen for name, seen in counted.items()}
    window = min(10, seconds / 4)
    half, full = (
        statistics.mean(size for moment, size in resident if until - window <= moment - start < until)
        for until in (seconds / 2, seconds)
    )
    first, between = (statistics.quantiles(times, n=20) for times in (load.first, load.between))
    return {
        "clients": clients,
        "seconds": round(wall, 1),
        "answers": load.answers,
        "tokens": load.chosen_tokens,
        "tokens_per_second": round(load.chosen_tokens / wall, 1),
        "first_ms": [round(1000 * first[place], 1) for place in (9, 18)],
        "between_ms": [round(1000 * between[place], 1) for place in (9, 18)],
        "resident_mib": [round(size / 2**20, 1) for size in (half, full)],
        "resident_growth": round(full / half - 1, 4),
        "lost": load.lost,
        "mixed_up": load.mixed,
        "not_counted": {name: gap for name, gap in uncounted.items() if gap},
        "torch": torch.__version__,
    }


def serve(folder: Path, clients: int) -> tuple[subprocess.Popen[str], int]:
    """The server in a process of its own, and its port."""
    command = [sys.executable, "-m", "trihybrid.cli", "serve", str(folder), "--port", "0", "--name", "tiny"]
    options = ["--rows", str(clients), "--queue", str(clients), "--context", "512"]
    options += ["--threads", "1"]
    process = subprocess.Popen([*command, *options], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the server did not start: exit code {process.wait()}")
    return process, int(line.rsplit(":", 1)[1].removesuffix("/v1\n"))


def main() -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description="Many streaming clients on trihybrid serve.")
    parser.add_argument("--clients", type=int, default=64, help="at a time (default 64)")
    parser.add_argument("--seconds", type=float, default=120, help="of load (default 120)")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write serve_load.json into this folder")
    arguments = parser.parse_args()
    if arguments.clients < 1 or arguments.seconds < 4:
        parser.error("--clients must be at least 1 and --seconds at least 4")
    with tempfile.TemporaryDirectory() as folder:
        make_student(Path(folder) / "student")
        process, port = serve(Path(folder) / "student", arguments.clients)
        try:
            row = asyncio.run(run(port, process.pid, arguments.clients, arguments.seconds))
            process.send_signal(signal.SIGTERM)
            row["exit_code"] = process.wait(60)
        finally:
            process.kill()
            process.wait()
    heads = ("clients", "s", "answers", "tokens", "tokens/s", "first ms p50, p95", "between ms p50, p95")
    print(f"| {' | '.join(heads)} | MiB half, end | growth |")
    print("|---|---|---|---|---|---|---|---|---|")
    pairs = {name: ", ".join(map(str, row[name])) for name in ("first_ms", "between_ms", "resident_mib")}
    print(
        f"| {row['clients']} | {row['seconds']} | {row['answers']:,} | {row['tokens']:,} | {row['tokens_per_second']} "
        f"| {pairs['first_ms']} | {pairs['between_ms']} | {pairs['resident_mib']} | {row['resident_growth']:.2%} |"
    )
    print(f"lost {len(row['lost'])}, mixed up {len(row['mixed_up'])}, exit code {row['exit_code']}")
    if arguments.json is not None:
        arguments.json.mkdir(parents=True, exist_ok=True)
        (arguments.json / "serve_load.json").write_text(json.dumps([row], indent=2) + "\n")
    wrong = [
        *row["lost"][:3],
        *row["mixed_up"][:3],
        *(f"{name}: {gap:+g}" for name, gap in row["not_counted"].items()),
    ]
    if abs(row["resident_growth"]) > MOST_GROWTH:
        wrong.append(
            f"resident memory changed by {row['resident_growth']:.2%}; at most {MOST_GROWTH:.0%} is allowed"
        )
    if row["exit_code"] != 0:
        wrong.append(f"the server ended with exit code {row['exit_code']}")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
