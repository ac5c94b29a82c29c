"""The peer of inference_e2b.py, which starts it: the teacher in transformers, in a process that can be stopped.

python benchmarks/inference_e2b_peer.py [--tiny] [--seconds 230]
"""

import argparse
import sys
import time
from typing import Any

import torch
from inference_e2b_common import TINY, TRUE, Row, Run, build, shape, synchronise, timed
from transformers import StaticCache

from trihybrid.models.cache import CACHE


def main() -> int:
    """Measure and print rows."""
    parser = argparse.ArgumentParser(description="Gemma-4 E2B's shape in transformers.")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=230.0, help="what does not fit is left out")
    given = parser.parse_args()
    measure_peer(Run(TINY if given.tiny else TRUE, time.monotonic() + given.seconds, None))
    return 0


def measure_peer(run: Run) -> None:
    """The teacher in transformers: prefill at its default, decoding with a static cache and a compiled step."""
    scale = run.scale
    model = build(scale, "teacher")
    generator = torch.Generator().manual_seed(0)
    longest = max(scale.contexts)
    ids = torch.randint(3, shape(scale).vocab_size, (1, longest), generator=generator).to(scale.device)
    named = {"model": "transformers", "execution": "static cache, compiled step"}
    with torch.inference_mode():
        for context in scale.contexts:
            if scale.device == "cuda":
                model(ids[:, :context], use_cache=True, logits_to_keep=1)
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if scale.device == "cuda" else 0
            synchronise(scale.device)
            began = time.perf_counter()
            cache = model(ids[:, :context], use_cache=True, logits_to_keep=1)[CACHE]
            synchronise(scale.device)
            seconds = time.perf_counter() - began
            extra = (torch.cuda.max_memory_allocated() - held) / 2**30 if scale.device == "cuda" else 0.0
            row = {
                "model": "transformers", "execution": "default", "what": "prefill", "batch": 1,
                "context": context, "value": round(context / seconds, 1), "unit": "tokens/s",
                "extra_GiB": round(extra, 3),
            }  # fmt: skip
            run.note(row)
            step = timed(lambda cache=cache: model(ids[:, :1], **{CACHE: cache}), scale.device, 12)
            run.note(named | {"execution": "eager loop", **decode_row(context, step)})
            del cache
        for context in scale.contexts:
            if not run.fits(30, "transformers", f"compiled, {context} tokens"):
                return
            cache = StaticCache(config=model.config, max_cache_len=context + 64)
            model(ids[:, :context], **{CACHE: cache}, logits_to_keep=1)
            step = model.forward
            if scale.device == "cuda":
                step = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
            position = torch.tensor([[context]], device=scale.device)

            def call(step: Any = step, position: Any = position, cache: Any = cache) -> int:
                output = step(input_ids=ids[:, :1], position_ids=position, **{CACHE: cache})
                return int(output.logits[0, -1].argmax())

            run.note(named | decode_row(context, timed(call, scale.device, 24)))
            del cache


def decode_row(context: int, seconds: float) -> Row:
    """What a row of decoding at batch 1 says beside its model."""
    return {
        "what": "decode", "batch": 1, "context": context, "value": round(1000 * seconds, 3), "unit": "ms/step",
        "tokens_per_s": round(1 / seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
