"""Gemma-4 E2B at full size, as teacher and as converted student: what it says with a cache is what it says without.

    python benchmarks/e2b_generate.py [--contexts 512,4096,32768] [--tokens 32] [--json FOLDER] [--limit 190]
    python benchmarks/e2b_generate.py --tiny [--json FOLDER]

Weights are random and made on the GPU in bfloat16: matrices by their fan-in, norms near one, query and key norms so
that scores have a spread of two, logits with a spread of three. The student has the card's plan (RWKV-7 and TICA, with
keys and values of its own, in all seven global layers); all else is the teacher's own memory.

Each model samples with `generate`, which fills the cache in blocks of 4,096 tokens and then takes one token at a time:
one prompt, and four of different lengths that are padded on the left. `context` counts prompt and new tokens. Every row
is then read anew, alone, without padding and without a cache, and the logits of its new tokens are compared; the logits
of earlier positions are never made. `error` is the relative rms, the worst of a batch. `halved` is the same distance
for a reading without the first half of the context: how far the logits depend on what the cache has to carry. `spread`
is the rms of the logits, `kinds` how many different tokens were drawn.

A student's error may be 2e-2, or twice its teacher's. Exits with 1 where it is more, or where something is not finite,
out of memory or left out for `--limit` seconds. --json writes the rows as e2b_generate.json into FOLDER, as they come.
--tiny has the same parts in float32 on the CPU, with 1e-5 for everybody.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4TextConfig, PreTrainedModel
from transformers import initialization as init

from trihybrid.mixers.contract import Mixer, copy_into
from trihybrid.models.families import register
from trihybrid.models.shapes import load_shape
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.section import Rwkv7Section, SurgerySection, TicaSection

BOUND, TINY_BOUND = 2e-2, 1e-5
SPREAD, SCORES = 3.0, 2.0
BATCHES = (1, 4)
CHUNK = 4096
BLOCK = 1 << 14  # rows of a matrix that are drawn at a time


@dataclass
class Row:
    """One measurement; None where it was not made, for the reason in `problem`."""

    model: str
    context: int
    batch: int
    error: float | None = None
    halved: float | None = None
    spread: float | None = None
    kinds: int | None = None
    generate_seconds: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    problem: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Build both models, measure, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default=None, help="tokens, with commas between")
    parser.add_argument("--tokens", type=int, default=None, help="new tokens of each")
    parser.add_argument("--limit", type=float, default=190.0, help="seconds after which nothing new begins")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FOLDER", default=None)
    options = parser.parse_args(arguments)
    tiny = options.tiny
    if not tiny and not torch.cuda.is_available():
        parser.error("the full size needs a GPU; --tiny runs on the CPU")
    contexts = [int(c) for c in (options.contexts or ("24,48" if tiny else "512,4096,32768")).split(",")]
    tokens, chunk = options.tokens or (6 if tiny else 32), 16 if tiny else CHUNK
    if min(contexts) < 4 * tokens:
        parser.error(f"--contexts has {min(contexts)}; the least is four times --tokens, {4 * tokens}")
    began = time.perf_counter()
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    models = build(tiny_base() if tiny else load_shape("gemma-4-e2b"), section(tiny), device, dtype)
    size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    print(
        f"{device}, {dtype}, torch {torch.__version__}: {size['teacher']:,} parameters, student "
        f"{size['student']:,}, built in {time.perf_counter() - began:.1f} s\n"
    )
    print(
        "model    context  batch     error    halved  spread  kinds  generate s  all s  peak GiB", flush=True
    )
    rows: list[Row] = []
    for context in contexts:
        for name, model in models.items():
            for batch in BATCHES:
                row = Row(name, context, batch)
                if time.perf_counter() - began > options.limit:
                    row.problem = f"left out: {options.limit:.0f} s are over"
                else:
                    measure(model, row, tokens, chunk)
                rows.append(row)
                show(row)
                if options.json is not None:
                    options.json.mkdir(parents=True, exist_ok=True)
                    text = json.dumps([asdict(row) for row in rows], indent=2) + "\n"
                    (options.json / "e2b_generate.json").write_text(text)
    missed = list(misses(rows, tiny))
    print(f"\n{time.perf_counter() - began:.0f} s in all" + "".join(f"\nmissed: {line}" for line in missed))
    return 1 if missed else 0


def tiny_base() -> Gemma4TextConfig:
    """All that the real one has, small: sliding and global layers, a sharing end, per-layer inputs."""
    return Gemma4TextConfig(
        vocab_size=300,
        vocab_size_per_layer_input=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=4,
        final_logit_softcapping=30.0,
        max_position_embeddings=128,
    )


def section(tiny: bool) -> SurgerySection:
    """The card's plan; small sizes of our mixers where the teacher is small."""
    if not tiny:
        return SurgerySection()
    return SurgerySection(
        rwkv7=Rwkv7Section(head_dim=8, decay_rank=4, iclr_rank=4, gate_rank=4),
        tica=TicaSection(heads=2, kv_heads=1, head_dim=8, gate_rank=4),
    )


@torch.no_grad()
def build(
    base: Gemma4TextConfig, plan: SurgerySection, device: str, dtype: torch.dtype
) -> dict[str, PreTrainedModel]:
    """The teacher, and the student that holds the teacher's own tensors wherever it retains them."""
    register()
    torch.manual_seed(0)
    with torch.device(device), init.no_init_weights():
        models = {
            name: AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            for name, config in (("teacher", base), ("student", student_config(base, plan)))
        }
    teacher, student = models.values()
    generator = torch.Generator(device).manual_seed(0)
    draw(teacher, generator)
    given = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    for index, slot in enumerate(student.config.slot_list()):
        if slot.converted:
            for name in [name for name in given if name.startswith(f"model.layers.{index}.self_attn.")]:
                del given[name]
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        if name in given:
            tensor.data = given[name].data
    for module in student.modules():
        if isinstance(module, Mixer):
            module.initialise(module.publishes, base.num_hidden_layers, copy_into)
            if module.kind == "tica":
                weight = module.o_proj.weight  # zero at the start: TICA would say nothing
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    for name, buffer in student.named_buffers():
        assert "inv_freq" not in name or buffer.dtype == torch.float32, f"{name} was rounded"
    return models


def draw(teacher: PreTrainedModel, generator: torch.Generator) -> None:
    """Random weights at which every part shows in the logits, and no score or logit is extreme."""
    per_layer = teacher.config.hidden_size_per_layer_input
    for name, tensor in teacher.named_parameters():
        if tensor.dim() == 2:
            # Embeddings are multiplied by the root of their width.
            width = per_layer if "embed_tokens_per_layer" in name else tensor.shape[-1]
            for block in tensor.split(BLOCK):
                block.normal_(std=width**-0.5, generator=generator)
            continue
        tensor.normal_(mean=1.0, std=0.1, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.mul_((SCORES * len(tensor) ** -0.5) ** 0.5)
        elif name == "model.norm.weight":
            tensor.mul_(SPREAD)
    for name, buffer in teacher.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(1)


@torch.inference_mode()
def measure(model: PreTrainedModel, row: Row, tokens: int, chunk: int) -> None:
    """Fill a row."""
    began = time.perf_counter()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        _measure(model, row, tokens, chunk)
    except torch.OutOfMemoryError as error:
        row.problem = str(error).split(". ")[0]
    row.seconds = time.perf_counter() - began
    if on_gpu:
        row.peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()


def _measure(model: PreTrainedModel, row: Row, tokens: int, chunk: int) -> None:
    began = time.perf_counter()
    prompt = row.context - tokens
    lengths = [max(prompt >> place, 1) for place in range(row.batch)]
    torch.manual_seed(row.context)
    ids = torch.randint(3, model.config.vocab_size, (row.batch, prompt)).to(model.device)
    mask = torch.ones_like(ids)
    for place, length in enumerate(lengths):
        ids[place, : prompt - length] = model.config.pad_token_id
        mask[place, : prompt - length] = 0
    said = model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        temperature=1.0,
        eos_token_id=None,
        pad_token_id=model.config.pad_token_id,
        prefill_chunk_size=chunk,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cached = torch.stack(said.logits, 1)
    row.generate_seconds = time.perf_counter() - began
    errors, halves = [], []
    for place, length in enumerate(lengths):
        alone = said.sequences[place : place + 1, prompt - length : -1]
        plain = read(model, alone, tokens)
        errors.append(distance(cached[place], plain))
        halves.append(distance(read(model, alone[:, length // 2 :], tokens), plain))
    row.error, row.halved = max(errors), min(halves)
    row.spread = float(cached.double().pow(2).mean().sqrt())
    row.kinds = len(said.sequences[:, prompt:].unique())


def read(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """Logits [tokens, V] of the last positions, in float32, without a cache."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=tokens).logits[0].float()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative rms; infinite where something is not finite."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return error if error == error else float("inf")


def show(row: Row) -> None:
    """One line of the table."""
    head = f"{row.model:<8} {row.context:>7,}  {row.batch:>5}"
    if row.problem is not None:
        print(f"{head}  {row.problem}", flush=True)
        return
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / (1 << 30):.1f}"
    print(
        f"{head}  {row.error:8.2e}  {row.halved:8.2e}  {row.spread:6.2f}  {row.kinds:>5}  "
        f"{row.generate_seconds:>10.1f}  {row.seconds:>5.1f}  {peak:>8}",
        flush=True,
    )


def misses(rows: list[Row], tiny: bool) -> Iterator[str]:
    """What does not hold, one line each."""
    own = {(row.context, row.batch): row.error for row in rows if row.model == "teacher"}
    for row in rows:
        where = f"{row.model}, context {row.context:,}, batch {row.batch}"
        if row.error is None:
            yield f"{where}: {row.problem}"
            continue
        bound = TINY_BOUND if tiny else BOUND
        if row.model == "student" and not tiny:
            bound = max(bound, 2 * (own[row.context, row.batch] or 0.0))
        if row.error == float("inf") or (row.error > bound and (tiny or row.model == "student")):
            yield f"{where}: error {row.error:.2e}, at most {bound:.2e}"


if __name__ == "__main__":
    sys.exit(main())
