"""The command that converts: text for calibration, the folder that it leaves, and names on the hub."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from tiny_published import TEMPLATE, write_published, write_tokenizer
from trihybrid.data import Tokenizer, read_documents
from trihybrid.models.checkpoint import load_model, load_teacher
from trihybrid.recipe.convert import ROW, check_bos, text_blocks
from trihybrid.storage import hub
from trihybrid.surgery.operate import operate, read_plan

SURGERY = (
    "--set", "rwkv7={head_dim: 16, decay_rank: 6, iclr_rank: 5, gate_rank: 7}",
    "--set", "tica={heads: 4, kv_heads: 2, head_dim: 8, gate_rank: 3}",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "teacher"
    write_published(folder, shards=2)
    return folder


def test_the_folder_is_a_model_with_all_that_belongs_to_it(
    micro: ModuleType, published: Path, tmp_path: Path
) -> None:
    result = micro.trihybrid("convert", published, tmp_path / "student", *SURGERY)
    assert (result.code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    count = sum(parameter.numel() for parameter in load_model(tmp_path / "student").parameters())
    assert lines[0].endswith(f"student: layers [2, 5, 8] converted; {count:,} parameters")
    assert lines[1] == "134 tensors copied byte for byte, 18 made from the teacher's"
    assert lines[2].startswith("not filled by the teacher, 48: model.layers.*.self_attn.rwkv7.a0 (3), ")
    assert lines[3].startswith("not used, 9: model.language_model.layers.*.self_attn.k_norm.weight (3), ")
    assert lines[4].startswith("carried along in towers/, ") and "model.vision_tower.* (" in lines[4]
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "plan.json", "tokenizer.json", "tokenizer_config.json", "towers", "trihybrid.json",
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("ab").input_ids == [2, 101, 102] and tokenizer.chat_template == TEMPLATE
    told = micro.trihybrid("generate", tmp_path / "student", "a", "--tokens", 2)
    assert (told.code, told.stderr) == (0, "")


def test_towers_are_left_out_on_request(micro: ModuleType, published: Path, tmp_path: Path) -> None:
    result = micro.trihybrid("convert", published, tmp_path / "student", "--no-towers", *SURGERY)
    assert result.code == 0 and "left out, " in result.stdout.splitlines()[4]
    assert not (tmp_path / "student" / "towers").exists()
    assert "were left out" in (tmp_path / "student" / "README.md").read_text()


def test_ridge_regression_and_scales_on_text_through_the_command(
    micro: ModuleType, published: Path, micro_texts: Path, tmp_path: Path
) -> None:
    options = ("--set", "donor_keys_values=ridge", "--set", "calibration_tokens=512", "--text", micro_texts)
    result = micro.trihybrid("convert", published, tmp_path / "student", *SURGERY, *options)
    assert (result.code, result.stderr) == (0, "")
    blocks = text_blocks(read_documents(str(micro_texts)), Tokenizer.from_file(published), 512)
    student = operate(load_teacher(published), read_plan(tmp_path / "student"), blocks)
    found = load_model(tmp_path / "student").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in student.state_dict().items())


def test_a_name_on_the_hub_is_looked_up_and_named(
    micro: ModuleType, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, revision)) or published,
    )
    out = tmp_path / "student"
    result = micro.trihybrid("convert", "google/gemma-4-E2B-it", out, "--revision", "abc", *SURGERY)
    assert (result.code, result.stderr) == (0, "")
    assert asked == [("google/gemma-4-E2B-it", "abc")]
    assert read_plan(out)["teacher"] == "google/gemma-4-E2B-it"
    assert "\nbase_model: google/gemma-4-E2B-it\n" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (
            "nowhere",
            (),
            "nowhere: no such model folder; give a folder, or the name of a model as owner/model",
        ),
        (None, ("--revision", "x"), "is a folder; leave the revision away"),
        (
            None,
            ("--set", "donor_keys_values=ridge", "--set", "calibration_tokens=0"),
            "which is fitted on text; set calibration_tokens",
        ),
        (None, ("--set", "calibration_tokens=9"), "calibration_tokens is 9; it must be 0 or at least 256"),
    ],
)
def test_what_does_not_serve_is_refused_in_one_line(
    micro: ModuleType, published: Path, tmp_path: Path, teacher: str | None, options: tuple, message: str
) -> None:
    result = micro.trihybrid("convert", teacher or published, tmp_path / "student", *SURGERY, *options)
    assert message in micro.refusal(result)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_files_or_without_bos_leaves_nothing(micro: ModuleType, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    write_published(teacher)
    (teacher / "tokenizer.json").unlink()
    line = micro.refusal(micro.trihybrid("convert", teacher, tmp_path / "student", *SURGERY))
    assert "tokenizer.json: missing; copy the teacher's tokenizer files beside its weights" in line
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_bos_once_is_demanded(tmp_path: Path) -> None:
    for name, begins in (("without", False), ("with", True)):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, begins)
    check_bos(tmp_path / "with", "<bos>")
    with pytest.raises(ValueError, match=r"makes \['a'\] of \"a\", which must begin with one <bos>"):
        check_bos(tmp_path / "without", "<bos>")
    path = tmp_path / "with" / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["post_processor"]["single"].insert(0, fields["post_processor"]["single"][0])
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"makes \['<bos>', '<bos>', 'a'\]"):
        check_bos(tmp_path / "with", "<bos>")


# Calibration text


def test_documents_are_packed_into_rows() -> None:
    """Beginnings of at most ROW tokens, each with a BOS; a row begins at 0, and so does every document in it."""
    tokenizer = Tokenizer.bytes()
    documents = ["a" * 100, "b" * 1000, "c" * 60, "d" * 1000]
    ((tokens_BT, positions_BT),) = text_blocks(documents, tokenizer, 512)
    assert tokens_BT.shape == positions_BT.shape == (2, ROW)
    stream = [
        2,
        *tokenizer.encode("a" * 100),
        2,
        *tokenizer.encode("b" * 255),
        2,
        *tokenizer.encode("c" * 60),
    ]
    stream += [2, *tokenizer.encode("d" * 255)]
    assert tokens_BT.flatten().tolist() == stream[:512]
    assert positions_BT[0].tolist() == [*range(101), *range(155)]
    # The second row cuts the second document: what is left of it counts from 0 again.
    assert positions_BT[1].tolist() == [*range(101), *range(61), *range(94)]


@pytest.mark.parametrize(
    ("lengths", "tokens", "shapes"),
    [
        ([10], 8192, [(1, 11)]),
        ([300, 300], 256, [(1, 256)]),
        ([300, 300, 300], 700, [(2, 256)]),
        ([100] * 4, 300, [(1, 256)]),
        ([300] * 30, 4700, [(8, 256), (8, 256), (2, 256)]),
    ],
)
def test_as_many_tokens_as_there_are(lengths: list[int], tokens: int, shapes: list[tuple[int, int]]) -> None:
    blocks = text_blocks(["x" * length for length in lengths], Tokenizer.bytes(), tokens)
    assert [block[0].shape for block in blocks] == [block[1].shape for block in blocks] == shapes
