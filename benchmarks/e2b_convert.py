"""Converting a checkpoint of Gemma-4 E2B's true size, beside a plain copy of its file in the same run.

    python benchmarks/e2b_convert.py FOLDER [--repetitions 1] [--json ROWS] [--set FIELD=VALUE ...]

Makes a random checkpoint in the published layout in FOLDER (about 10 GB: one model.safetensors with language model,
vision and audio towers, keys and values of layers 15 to 34 that no layer reads, and a tokenizer of 262,144 pieces),
then copies its file and converts it with `trihybrid convert`, each in a process of its own and with a cold cache, and
copies it again. Every file that is written is synced before the clock stops; the source is dropped from the cache
(fsync and POSIX_FADV_DONTNEED) before it starts. About 31 GB must be free; all of it is removed afterwards.

Prints seconds of whole processes, seconds of all cores, peak resident memory (VmHWM) and bytes from and to the disk.
Exits with 1 when memory is above 3 GiB or the time above 1.5 times the mean of the copies. --set goes to `convert`.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEMORY, RATIO = 3 << 30, 1.5
BLOCK = 1 << 24
WEIGHTS = "model.safetensors"
PARTS = ("model.language_model.", "model.vision_tower.", "model.audio_tower.", "model.embed_")


def published_shapes() -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Name -> shape of every tensor of the published E2B, and its configuration."""
    import torch
    from transformers import (
        Gemma4AudioConfig,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4VisionConfig,
    )
    from transformers import initialization as init

    from trihybrid.models.shapes import load_shape

    base = load_shape("gemma-4-e2b")
    config = Gemma4Config(
        text_config=base.to_dict(), vision_config=Gemma4VisionConfig(), audio_config=Gemma4AudioConfig()
    )
    with torch.device("meta"), init.no_init_weights():
        model = Gemma4ForConditionalGeneration(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name.startswith(PARTS)}
    for index in range(base.num_hidden_layers - base.num_kv_shared_layers, base.num_hidden_layers):
        width = base.per_layer_config[index].head_dim
        prefix = f"model.language_model.layers.{index}.self_attn."
        shapes |= {f"{prefix}{part}.weight": (width, base.hidden_size) for part in ("k_proj", "v_proj")}
        shapes[f"{prefix}k_norm.weight"] = (width,)
    fields = config.to_dict() | {"architectures": ["Gemma4ForConditionalGeneration"], "dtype": "bfloat16"}
    return dict(sorted(shapes.items())), fields


def make_checkpoint(folder: Path) -> int:
    """Write the folder; returns the size of its weights."""
    import torch

    from trihybrid.storage.tensor_writer import TensorShape, header_bytes

    shapes, fields = published_shapes()
    tensors = {name: TensorShape.of(torch.bfloat16, shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(BLOCK // 2, generator=generator)).bfloat16().view(torch.uint8).numpy().data
    ones = torch.ones(BLOCK // 2, dtype=torch.bfloat16).view(torch.uint8).numpy().data
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header_bytes(tensors))
        for name, tensor in tensors.items():
            block = ones if len(tensor.shape) < 2 or name.endswith("layer_scalar") else noise
            for start in range(0, tensor.length, BLOCK):
                file.write(block[: min(BLOCK, tensor.length - start)])
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": [1, 106]}))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    make_tokenizer(folder, fields["text_config"]["vocab_size"])
    return (folder / WEIGHTS).stat().st_size


def make_tokenizer(folder: Path, size: int) -> None:
    """A BPE of `size` pieces: some hundred characters, and all pairs of them that there is room for."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = [chr(0x61 + i) for i in range(26)]
    letters += [chr(0x4E00 + i) for i in range(math.isqrt(size) + 1 - len(letters))]
    pairs = [(first, second) for first in letters for second in letters]
    pairs = pairs[: size - len(specials) - len(letters)]
    pieces = [*specials, *letters, *(first + second for first, second in pairs)]
    added = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(specials)
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False,
        "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": pairs,
    }  # fmt: skip
    parts = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    fields = {"version": "1.0", "added_tokens": added, **parts, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    )


def drop_from_cache(path: Path) -> None:
    """Let the next reader of a file read the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def run(*arguments: str) -> dict[str, float]:
    """Run this file in a process of its own; seconds of the whole process and what it says of itself."""
    began = time.perf_counter()
    process = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": seconds, **json.loads(process.stdout.splitlines()[-1])}


def copy(source: str, target: str) -> None:
    """Read a file and write it, in blocks, and sync."""
    buffer = memoryview(bytearray(BLOCK))
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while count := reader.readinto(buffer):
            writer.write(buffer[:count])
        os.fsync(writer.fileno())


def convert(source: str, target: str, *overrides: str) -> None:
    """What `trihybrid convert` does, in this process."""
    from trihybrid.cli import main

    sys.argv = ["trihybrid", "convert", source, target, *overrides]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def about_itself() -> str:
    """Peak resident memory, seconds of all cores, and bytes from and to the disk, of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    moved = {"read": int(counts["read_bytes"]), "written": int(counts["write_bytes"])}
    return json.dumps({"peak": peak, "cpu": used.ru_utime + used.ru_stime, **moved})


def show(name: str, row: dict[str, float]) -> None:
    """One line of the table."""
    figures = [f"{row['seconds']:>9.1f}{row['cpu']:>9.1f}{row['peak'] / (1 << 30):>10.2f}"]
    figures += [f"{row[field] / 1e9:8.2f}" for field in ("read", "written")]
    print(f"{name:<8}{'   '.join(figures)}", flush=True)


def main() -> int:
    """Make, copy, convert, copy, compare."""
    if sys.argv[1:2] == ["copy"]:
        copy(*sys.argv[2:4])
        print(about_itself())
        return 0
    if sys.argv[1:2] == ["convert"]:
        convert(*sys.argv[2:])
        print(about_itself())
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        return measure(options)
    finally:
        shutil.rmtree(options.folder)


def measure(options: argparse.Namespace) -> int:
    """The rows in an empty folder."""
    teacher, student, twin = (options.folder / name for name in ("teacher", "student", "twin"))
    teacher.mkdir()
    size = make_checkpoint(teacher)
    print(f"{WEIGHTS}: {size:,} bytes, {os.cpu_count()} cores\n")
    print(f"{'':<8}{'seconds':>9}{'cpu s':>9}{'peak GiB':>10}   GB read   GB written")
    overrides = [part for override in options.overrides for part in ("--set", override)]
    rows: dict[str, list[dict[str, float]]] = {"copy": [], "convert": []}
    for name in [*["copy", "convert"] * options.repetitions, "copy"]:
        drop_from_cache(teacher / WEIGHTS)
        if name == "copy":
            row = run("copy", str(teacher / WEIGHTS), str(twin))
            twin.unlink()
        else:
            row = run("convert", str(teacher), str(student), *overrides)
            shutil.rmtree(student)
        rows[name].append(row)
        show(name, row)
    means = {name: sum(row["seconds"] for row in found) / len(found) for name, found in rows.items()}
    peak, ratio = max(row["peak"] for row in rows["convert"]), means["convert"] / means["copy"]
    print(
        f"\npeak {peak / (1 << 30):.2f} GiB (at most {MEMORY >> 30}), time {ratio:.2f} copies (at most {RATIO})"
    )
    if options.json is not None:
        options.json.mkdir(parents=True, exist_ok=True)
        (options.json / "e2b_convert.json").write_text(json.dumps({"bytes": size, **rows}, indent=2) + "\n")
    return int(peak > MEMORY or ratio > RATIO)


if __name__ == "__main__":
    sys.exit(main())
