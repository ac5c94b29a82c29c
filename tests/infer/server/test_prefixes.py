"""Prompts that begin alike go on from a kept state, and every answer is what it is without."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from running_server import NAME, run
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.engine import Engine
from trihybrid.infer.sampling import Sampling
from trihybrid.models.checkpoint import load_model

SYSTEM = "a beginning that everybody shares, of some chunks; "
MOST = 4


def cached(answer: Any) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_conversation_goes_on_behind_its_last_answer(served_folder: Path) -> None:
    """By token ids, so that the second turn holds the first answer as it was chosen."""
    tokenizer = Tokenizer.bytes()
    prompt = [tokenizer.bos_id, *tokenizer.encode("what flows? ")]
    engine = Engine(load_model(served_folder), chunk=16)
    first = engine.add(prompt, most=MOST)
    while engine.busy:
        engine.step()
    longer = [*engine.tokens_of(first), *tokenizer.encode("and then? ")]
    engine.remove(first)
    second = engine.add(longer, most=MOST)
    while engine.busy:
        engine.step()
    wanted = tokenizer.decode(engine.tokens_of(second)[len(longer) :])
    with run(served_folder, rows=1) as running:
        _, before = running.ask(prompt=prompt, max_tokens=MOST)
        status, after = running.ask(prompt=longer, max_tokens=MOST)
        assert status == 200 and after["choices"][0]["text"] == wanted
        # The last token of the answer was never read.
        assert (cached(before), cached(after)) == (0, len(prompt) + MOST - 1)
        _, again = running.ask(prompt=longer, max_tokens=MOST)
        assert again["choices"] == after["choices"] and cached(again) == len(longer) - 1
        samples = running.samples()
        assert samples["trihybrid_prefix_hits_total"] == 2
        assert samples["trihybrid_prefix_tokens_total"] == cached(after) + cached(again)
        assert samples["trihybrid_prefix_evicted_total"] == 0 < samples["trihybrid_prefix_states"]


@pytest.mark.parametrize("mib", [0.05, 0.0])
def test_answers_are_the_same_for_many_clients_at_once(
    served_folder: Path, alone: Callable[..., str], mib: float
) -> None:
    """Four clients over three rows, twice each; with room for a few states and for none."""
    prompts = [SYSTEM[: 24 + 9 * place] + f"client {place}" for place in range(4)] * 2
    with run(served_folder, rows=3, queue=16, prefix_mib=mib) as running, ThreadPoolExecutor(4) as pool:

        def ask(place: int) -> tuple[str, int]:
            sampling = {"temperature": place % 2, "seed": place % 4}
            status, answer = running.send(
                "POST",
                "/v1/completions",
                {"model": NAME, "prompt": prompts[place], "max_tokens": MOST, **sampling},
            )
            assert status == 200, answer
            return answer["choices"][0]["text"], cached(answer)

        answers = list(pool.map(ask, range(8)))
        samples = running.samples()
    wanted = [
        alone(prompt, MOST, Sampling(temperature=place % 2, seed=place % 4))
        for place, prompt in enumerate(prompts)
    ]
    assert [text for text, _ in answers] == wanted
    saved = [count for _, count in answers]
    assert samples["trihybrid_prefix_tokens_total"] == sum(saved)
    assert samples["trihybrid_prefix_hits_total"] == sum(count > 0 for count in saved)
    assert samples["trihybrid_prefix_bytes"] <= mib * 2**20
    assert (sum(saved) > 0) == (mib > 0)
    assert (samples["trihybrid_prefix_evicted_total"] > 0) == (mib == 0.05)
