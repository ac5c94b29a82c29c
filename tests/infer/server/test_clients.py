"""OpenAI's own client gets what the engine writes, whole and in a stream, with exact counts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from running_server import NAME, Running, run
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.sampling import Sampling

SETTINGS = [
    ({"temperature": 0.0}, Sampling()),
    (
        {"temperature": 0.9, "seed": 5, "top_p": 0.9, "extra_body": {"top_k": 40, "repetition_penalty": 1.2}},
        Sampling(temperature=0.9, seed=5, top_p=0.9, top_k=40, repetition_penalty=1.2),
    ),
]
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what flows?"}]
# By the template, without its BOS.
WRITTEN = "system: be brief\nuser: what flows?\nassistant: "
MOST = 12


@pytest.fixture(scope="module")
def client(shared: Running) -> openai.OpenAI:
    return shared.client()


def counts(usage: Any) -> tuple[int, int, int]:
    """Of the prompt, of the answer, of both; how much of the prompt was kept from before is another matter."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


@pytest.mark.parametrize(("fields", "sampling"), SETTINGS)
def test_completions_whole_and_in_a_stream(
    client: openai.OpenAI, alone: Callable[..., str], fields: dict, sampling: Sampling
) -> None:
    asked = {"model": NAME, "prompt": "the river ", "max_tokens": MOST, **fields}
    whole = client.completions.create(**asked)
    wanted = alone("the river ", MOST, sampling)
    assert whole.object == "text_completion" and whole.model == NAME and whole.id.startswith("cmpl-")
    assert whole.choices[0].text == wanted != ""
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert len(chunks) > 3 and len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(("fields", "sampling"), SETTINGS)
def test_chat_whole_and_in_a_stream(
    client: openai.OpenAI, alone: Callable[..., str], fields: dict, sampling: Sampling
) -> None:
    asked = {"model": NAME, "messages": TALK, "max_completion_tokens": MOST, **fields}
    whole = client.chat.completions.create(**asked)
    wanted = alone(WRITTEN, MOST, sampling)
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", wanted)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *text, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert text[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in text) == wanted
    assert text[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and counts(last.usage) == counts(whole.usage)
    # The same prompt again: all but its last token were read before.
    assert last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_parts_of_a_message_are_its_text(client: openai.OpenAI) -> None:
    def ask(content: object) -> str | None:
        turn = {"role": "user", "content": content}
        answer = client.chat.completions.create(
            model=NAME,
            messages=[turn],
            temperature=0,
            max_tokens=6,  # type: ignore[list-item]
        )
        return answer.choices[0].message.content

    assert ask([{"type": "text", "text": "what "}, {"type": "text", "text": "flows?"}]) == ask("what flows?")


def test_counts_are_exact(client: openai.OpenAI, shared: Running) -> None:
    """A token is a byte: BOS and the prompt; the answer's length where it does not end by itself."""
    before = shared.samples()
    whole = client.completions.create(model=NAME, prompt="gr\u00fc\u00df", max_tokens=5, temperature=0)
    ids = Tokenizer.bytes().encode("gr\u00fc\u00df")
    assert len(ids) == 6
    assert whole.choices[0].finish_reason == "length"
    assert counts(whole.usage) == (7, 5, 12)
    again = client.completions.create(
        model=NAME, prompt=[Tokenizer.bytes().bos_id, *ids], max_tokens=5, temperature=0
    )
    assert (again.choices[0].text, counts(again.usage)) == (whole.choices[0].text, (7, 5, 12))
    after = shared.samples()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["trihybrid_prompt_tokens_total"] == 14 and gained["trihybrid_chosen_tokens_total"] == 10


def test_a_stop_string_ends_the_answer_and_is_not_in_it(
    client: openai.OpenAI, alone: Callable[..., str]
) -> None:
    asked = {"model": NAME, "prompt": "the river ", "temperature": 0, "max_tokens": MOST}
    text = alone("the river ", MOST, Sampling())
    stop = next(
        text[place : place + 2]
        for place in range(4, len(text) - 2)
        if "\ufffd" not in text[: place + 2] and text.index(text[place : place + 2]) == place
    )
    whole = client.completions.create(**asked, stop=["never there", stop])
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    # A token is a byte; those of the stop string were chosen too.
    assert whole.usage.completion_tokens == len(text[: text.index(stop) + 2].encode())
    chunks = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_end_tokens_of_the_generation_settings_end_an_answer(
    served_folder: Path, alone: Callable[..., str], tmp_path: Path
) -> None:
    """Counted and not shown. Here a byte that the greedy answer meets is one."""
    text = alone("the river ", MOST, Sampling())
    place = next(
        place for place in range(3, MOST) if text.index(text[place]) == place and text[place] < "\x7f"
    )
    folder = Path(shutil.copytree(served_folder, tmp_path / "student"))
    settings = json.loads((folder / "generation_config.json").read_text())
    end = Tokenizer.bytes().encode(text[place])[0]
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, end]}))
    with run(folder) as running:
        whole = running.client().completions.create(
            model=NAME, prompt="the river ", max_tokens=MOST, temperature=0
        )
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[:place], "stop")
    assert whole.usage.completion_tokens == len(text[:place].encode()) + 1


def test_seeds_repeat_and_without_one_answers_differ(client: openai.OpenAI) -> None:
    def ask(**fields: int) -> str:
        return client.completions.create(model=NAME, prompt="x", max_tokens=6, **fields).choices[0].text

    assert ask(seed=3) == ask(seed=3)
    assert len({ask() for _ in range(3)}) == 3


def test_an_answer_is_as_long_as_allowed_where_nobody_says(client: openai.OpenAI, shared: Running) -> None:
    """512 tokens of context, 500 of which are the prompt."""
    whole = client.completions.create(model=NAME, prompt="x" * 499, temperature=0)
    assert whole.usage.total_tokens == 512 or whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens <= 12


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match='model is "other"; this server has "tiny"'):
        client.models.retrieve("other")


def test_health(shared: Running) -> None:
    assert shared.send("GET", "/health") == (200, {"status": "ok", "model": NAME})
