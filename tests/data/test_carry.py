"""Carried tokenizers, as transformers loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny_published import TEMPLATE, write_tokenizer
from trihybrid.data import Tokenizer, carry_tokenizer

BOS = 2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tokenizer that leaves BOS to its chat template."""
    (tmp_path / "source").mkdir()
    write_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def change(folder: Path, name: str, **fields: Any) -> None:
    known = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(known | fields))


def test_bos_is_put_before_a_text_and_not_twice_before_a_chat(source: Path, target: Path) -> None:
    assert AutoTokenizer.from_pretrained(source)("a").input_ids == [101]
    assert carry_tokenizer(source, target) == "<bos>"
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("a").input_ids == [BOS, 101]
    assert tokenizer.chat_template == TEMPLATE
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=True)
    assert chat["input_ids"] == [BOS, *Tokenizer.bytes().encode("<a>")]
    # All else is as it was.
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (source, target))
    assert (
        before.pop("post_processor") is None and after.pop("post_processor")["type"] == "TemplateProcessing"
    )
    assert before == after
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}


def test_a_tokenizer_that_begins_with_bos_is_carried_byte_for_byte(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_tokenizer(source, begins=True)
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "other.json").write_text("{}")
    carry_tokenizer(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir() if path.name != "other.json"
    }


def test_a_setting_against_bos_is_turned(source: Path, target: Path) -> None:
    change(source, "tokenizer_config.json", add_bos_token=False)
    carry_tokenizer(source, target)
    assert AutoTokenizer.from_pretrained(target)("a").input_ids == [BOS, 101]


def test_bos_inside_a_sequence_of_processors_counts(source: Path, target: Path) -> None:
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    template["single"] = [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template["pair"] = [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    template["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}
    whole = {"type": "Sequence", "processors": [template]}
    change(source, "tokenizer.json", post_processor=whole)
    carry_tokenizer(source, target)
    assert json.loads((target / "tokenizer.json").read_text())["post_processor"] == whole
    assert AutoTokenizer.from_pretrained(target)("a").input_ids == [BOS, 101]


@pytest.mark.parametrize("name", ["<eos>", {"__type": "AddedToken", "content": "<eos>", "special": True}])
def test_bos_has_the_name_that_the_settings_give_it(source: Path, target: Path, name: Any) -> None:
    change(source, "tokenizer_config.json", bos_token=name)
    assert carry_tokenizer(source, target) == "<eos>"
    assert AutoTokenizer.from_pretrained(target)("a").input_ids == [1, 101]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: missing; copy the teacher's tokenizer files"),
        ("tokenizer.json", "{", r"tokenizer\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json is not a JSON object"),
        (
            "tokenizer_config.json",
            '{"bos_token": "<s>"}',
            r"bos_token '<s>' is not among the tokenizer's added",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    source: Path, target: Path, name: str, text: str | None, message: str
) -> None:
    if text is None:
        (source / name).unlink()
    else:
        (source / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        carry_tokenizer(source, target)
    assert list(target.iterdir()) == []
