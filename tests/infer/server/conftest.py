"""A tiny student in a folder, a server of it for tests that leave it as it was, and what it writes alone."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from running_server import Running, run
from small_student import make_student
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.complete import pieces
from trihybrid.infer.engine import Engine
from trihybrid.infer.sampling import Sampling
from trihybrid.models.checkpoint import load_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student over bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "student"
    make_student(vocabulary=260).save_pretrained(folder)
    Tokenizer.bytes().save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def shared(served_folder: Path) -> Iterator[Running]:
    """A server for tests that leave it as it was."""
    with run(served_folder, rows=3, queue=32) as running:
        yield running


@pytest.fixture(scope="session")
def alone(served_folder: Path) -> Callable[..., str]:
    """What the engine writes for one prompt, alone."""
    engine = Engine(load_model(served_folder), chunk=16)
    tokenizer = Tokenizer.from_file(served_folder)

    @cache
    def text(prompt: str, most: int, sampling: Sampling, stops: tuple[str, ...] = ()) -> str:
        return "".join(pieces(engine, tokenizer, prompt, most, sampling, stops))

    return text
