"""A conversation reads what is new alone and answers as if it had read everything again."""

import json
import shutil
from pathlib import Path

import pytest

from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.chat import Chat, end_tokens
from trihybrid.infer.chat_prompt import ChatPrompt, Message, has_chat_template
from trihybrid.infer.engine import Engine
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.session import Identity, identity
from trihybrid.models.checkpoint import load_model

TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}\
{{ raise_exception('no role ' + message.role) }}{% endif %}[{{ message.role }}] {{ message.content }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
MADE_BY = Identity("a" * 64, "b" * 64)


@pytest.fixture(scope="module")
def folder(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The matched student of the micro run, with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "student"
    shutil.copytree(micro_run / "matched", path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(load_model(folder))


@pytest.fixture
def talk(engine: Engine, folder: Path) -> Chat:
    return make(engine, folder)


def make(engine: Engine, folder: Path, template: bool = True, most: int = 9) -> Chat:
    prompt = ChatPrompt(folder) if template else None
    return Chat(engine, Tokenizer.from_file(folder), prompt, {1, 2}, most, Sampling(0.8, seed=3))


def test_a_prompt_is_the_template(folder: Path) -> None:
    tokenizer, prompt = Tokenizer.from_file(folder), ChatPrompt(folder)
    messages = [Message(role="user", content="hi"), Message(role="assistant", content="yes")]
    text = "[user] hi\n[assistant] yes\n[assistant] "
    assert prompt.encode(messages) == [tokenizer.bos_id, *tokenizer.encode(text)]
    with pytest.raises(ValueError, match="the chat template refuses the messages: no role system"):
        prompt.encode([Message(role="system", content="be brief")])


def test_a_folder_without_a_template_is_told_apart(micro_run: Path, folder: Path, tmp_path: Path) -> None:
    assert has_chat_template(folder) and not has_chat_template(micro_run / "matched")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert has_chat_template(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        ChatPrompt(micro_run / "matched")


@pytest.mark.parametrize("template", [True, False])
def test_a_turn_reads_what_is_new_and_answers_as_from_the_start(
    engine: Engine, folder: Path, template: bool
) -> None:
    talk = make(engine, folder, template)
    first = "".join(talk.say("the slow river"))
    seen = len(talk.tokens) - 1
    answer = "".join(talk.say("under bridges"))
    reused = [part.tokens for part in (talk._snapshot,) if part is not None]
    assert [message["content"] for message in talk.messages] == [
        "the slow river", first, "under bridges", answer,
    ]  # fmt: skip
    prompt = reused[0][: len(talk.tokens) - talk.speed.chosen]
    # What broken bytes decode to is encoded otherwise, and then everything is read again.
    assert talk.speed.read in (len(prompt) - seen, len(prompt))
    alone = Engine(load_model(folder))
    sequence = alone.add(prompt, most=9, sampling=Sampling(0.8, seed=3), stops={1, 2})
    while alone.busy:
        alone.step()
    assert alone.tokens_of(sequence) == talk.tokens


def test_plain_text_reads_nothing_twice(engine: Engine, folder: Path) -> None:
    talk = make(engine, folder, template=False)
    list(talk.say("the slow river"))
    list(talk.say("abc"))
    # The last token of the first answer, which nothing had read, and three bytes.
    assert talk.speed.read == 4


def test_a_saved_conversation_goes_on_as_it_would_have(engine: Engine, folder: Path, tmp_path: Path) -> None:
    talk, path = make(engine, folder, template=False), tmp_path / "talk.session"
    list(talk.say("the slow river"))
    stated = talk.state_bytes
    size = talk.save(path, MADE_BY)
    assert 0 < size - stated < 10_000
    wanted = "".join(talk.say("more"))
    talk.reset()
    assert (talk.tokens, talk.messages, talk.state_bytes) == ([], [], 0)
    talk.load(path, MADE_BY)
    assert "".join(talk.say("more")) == wanted
    tokens = list(talk.tokens)
    with pytest.raises(ValueError, match="another model"):
        talk.load(path, Identity("c" * 64, MADE_BY.tokenizer))
    assert talk.tokens == tokens


def test_nothing_is_held_after_a_reset(engine: Engine, folder: Path) -> None:
    before = engine.memory()["used"]
    talk = make(engine, folder)
    with pytest.raises(ValueError, match="nothing was said yet"):
        talk.save("never", MADE_BY)
    for text in ("a", "b", "c"):
        list(talk.say(text))
    talk.reset()
    assert engine.memory()["used"] == before and engine.free_rows == 1


def test_an_interrupted_answer_counts_as_far_as_it_came(engine: Engine, folder: Path) -> None:
    talk = make(engine, folder, template=False, most=60)
    pieces = []
    for piece in talk.say("the slow"):
        pieces.append(piece)
        talk.interrupt()
    assert talk.messages[-1]["content"] == "".join(pieces)
    assert talk.speed.chosen < 60 and engine.free_rows == 1


def test_ends_are_those_of_tokenizer_and_model(folder: Path) -> None:
    model, tokenizer = load_model(folder), Tokenizer.from_file(folder)
    for named, more in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
        model.generation_config.eos_token_id = named
        assert end_tokens(model, tokenizer) == {tokenizer.eos_id, tokenizer.bos_id, *more}


def test_the_identity_of_a_folder_with_a_manifest_is_that_without(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(folder)
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "trihybrid.json").unlink()
    assert identity(plain, tokenizer) == identity(folder, tokenizer)


@pytest.mark.parametrize("template", [True, False])
def test_what_is_refused_was_not_said(engine: Engine, folder: Path, template: bool) -> None:
    talk = make(engine, folder, template=template)
    list(talk.say("the slow"))
    before = list(talk.messages)
    with pytest.raises(ValueError, match="no UTF-8"):
        list(talk.say("half a pair: \ud800"))
    assert talk.messages == before
    list(talk.say("river"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
