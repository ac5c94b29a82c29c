"""Many clients at a time: each gets what it would get alone, and the metrics are the sum of their answers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from running_server import NAME, run
from trihybrid.infer.sampling import Sampling

PROMPTS = [f"client {place} " * (1 + place % 3) for place in range(8)]


def test_nothing_is_mixed_up_and_everything_is_counted(
    served_folder: Path, alone: Callable[..., str]
) -> None:
    """8 streams over 3 rows, of prompts shorter and longer than a chunk, greedy and sampled."""
    settings = [Sampling(temperature=place % 2, seed=place) for place in range(8)]
    with run(served_folder, rows=3, queue=8) as running:
        client = running.client()

        def stream(place: int) -> tuple[str, int, int]:
            chunks = list(
                client.completions.create(
                    model=NAME,
                    prompt=PROMPTS[place],
                    max_tokens=4 + place,
                    temperature=settings[place].temperature,
                    seed=place,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
            return text, chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(stream, range(8)))
        wanted = [alone(PROMPTS[place], 4 + place, settings[place]) for place in range(8)]
        assert [text for text, _, _ in answers] == wanted
        assert len(set(wanted)) == 8
        samples = running.samples()
        assert samples["trihybrid_prompt_tokens_total"] == sum(prompt for _, prompt, _ in answers)
        assert samples["trihybrid_chosen_tokens_total"] == sum(chosen for _, _, chosen in answers)
        assert samples["trihybrid_requests_total /v1/completions 200"] == 8
        ended = sum(samples.get(f"trihybrid_ended_total {end}", 0) for end in ("stop", "length"))
        assert ended == samples["trihybrid_request_seconds_count"] == 8
        assert samples["trihybrid_first_token_seconds_count"] == 8
        assert samples["trihybrid_running"] == samples["trihybrid_waiting"] == 0
        assert running.gate.free_rows == 3
