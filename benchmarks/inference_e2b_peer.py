"""The peer of inference_e2b.py, which starts it: the teacher in transformers, in a process that can be stopped.

python benchmarks/inference_e2b_peer.py [--tiny] [--seconds 230]
"""

import argparse
import sys
import time
from typing import Any

import torch
from inference_e2b_common import TINY, TRUE, Row, Run, build, shape, synchronise, timed
from torch import Tensor
from transformers import StaticCache

from trihybrid.models.cache import CACHE

ROOM = 64
"""Tokens of a static cache behind its prompt: more than steps are timed."""


def main() -> int:
    """Measure and print rows."""
    parser = argparse.ArgumentParser(description="Gemma-4 E2B's shape in transformers.")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=230.0, help="what does not fit is left out")
    given = parser.parse_args()
    measure_peer(Run(TINY if given.tiny else TRUE, time.monotonic() + given.seconds, None))
    return 0


def measure_peer(run: Run) -> None:
    """The teacher in transformers: prefill at its default, decoding with a static cache and a compiled step. Rows of
    a context stand together, since a compiler that takes too long is stopped from outside."""
    scale = run.scale
    model = build(scale, "teacher")
    generator = torch.Generator().manual_seed(0)
    longest = max(scale.contexts)
    ids = torch.randint(3, shape(scale).vocab_size, (1, longest), generator=generator).to(scale.device)
    with torch.inference_mode():
        # Kernels are chosen and loaded at the first call.
        model(ids[:, : min(scale.contexts)], use_cache=True, logits_to_keep=1)
        for context in scale.contexts:
            long = context > 100_000
            if run.fits(50 if long else 5, "transformers", f"prefill of {context} tokens"):
                as_it_comes(run, model, ids[:, :context])
            if run.fits(100 if long else 60, "transformers", f"compiled step, {context} tokens"):
                compiled(run, model, ids[:, :context])


def as_it_comes(run: Run, model: Any, ids_1T: Tensor) -> None:
    """Prefill into a dynamic cache, and a loop of steps behind it."""
    cuda, context = run.scale.device == "cuda", ids_1T.shape[1]
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    synchronise(run.scale.device)
    began = time.perf_counter()
    cache = model(ids_1T, use_cache=True, logits_to_keep=1)[CACHE]
    synchronise(run.scale.device)
    seconds = time.perf_counter() - began
    extra = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else 0.0
    run.note(
        {
            "model": "transformers", "execution": "default", "what": "prefill", "batch": 1,
            "context": context, "value": round(context / seconds, 1), "unit": "tokens/s",
            "extra_GiB": round(extra, 3),
        }
    )  # fmt: skip
    step = timed(lambda: model(ids_1T[:, :1], **{CACHE: cache}), run.scale.device, 12)
    run.note({"model": "transformers", "execution": "eager loop", **decode_row(context, step)})


def compiled(run: Run, model: Any, ids_1T: Tensor) -> None:
    """A compiled step over a static cache.

    The prompt is read in pieces: at once, a static cache asks for a mask of all pairs of tokens, 16 GiB at 131,072. A
    sliding layer counts its tokens as a number that the compiled step is specialised to, so before each step the count
    is put back; what a step costs does not depend on it.
    """
    context, piece = ids_1T.shape[1], run.scale.chunk
    cache = StaticCache(config=model.config, max_cache_len=context + ROOM)
    for start in range(0, context, piece):
        model(ids_1T[:, start : start + piece], **{CACHE: cache}, logits_to_keep=1)
    counts = {
        layer: layer.cumulative_length_int
        for layer in cache.layers
        if hasattr(layer, "cumulative_length_int")
    }
    step = model.forward
    if run.scale.device == "cuda":
        step = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    position = torch.tensor([[context]], device=run.scale.device)

    def call() -> int:
        for layer, count in counts.items():
            layer.cumulative_length_int = count
        output = step(input_ids=ids_1T[:, :1], position_ids=position, **{CACHE: cache})
        return int(output.logits[0, -1].argmax())

    row = decode_row(context, timed(call, run.scale.device, 24))
    run.note({"model": "transformers", "execution": "static cache, compiled step", **row})


def decode_row(context: int, seconds: float) -> Row:
    """What a row of decoding at batch 1 says beside its model."""
    return {
        "what": "decode", "batch": 1, "context": context, "value": round(1000 * seconds, 3), "unit": "ms/step",
        "tokens_per_s": round(1 / seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
