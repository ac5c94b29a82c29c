import errno
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from trihybrid.models.checkpoint import load_model, load_teacher, load_teacher_config
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM
from trihybrid.storage.folder import MANIFEST, Written, check_folder, save_folder


def tiny_config() -> Gemma4TextConfig:
    return Gemma4TextConfig(
        vocab_size=31,
        vocab_size_per_layer_input=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=4,
    )


def tiny_student() -> TrihybridGemma4ForCausalLM:
    config = TrihybridGemma4Config(
        base_config=tiny_config().to_dict(),
        slots=[{"mixers": ["sliding"]}, {"mixers": ["rwkv7"]}],
        rwkv7={"heads": 2, "kv_heads": 1, "head_dim": 8, "decay_rank": 2, "iclr_rank": 2, "gate_rank": 2},
    )
    return TrihybridGemma4ForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(tmp_path / "model", Gemma4ForCausalLM(tiny_config()).save_pretrained)
    return tmp_path / "model"


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_config(folder: Path, **fields: object) -> None:
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("build", [lambda: Gemma4ForCausalLM(tiny_config()), tiny_student])
def test_a_saved_model_loads_to_the_bit(tmp_path: Path, build: Callable) -> None:
    model = build()
    save_folder(tmp_path / "model", model.save_pretrained)
    loaded = load_model(str(tmp_path / "model"))
    assert type(loaded) is type(model) and not loaded.training
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert tensors.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_model(tmp_path / "model", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_manifest_lists_every_file(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == 2
    assert set(manifest["files"]) == set(everything(folder)) - {MANIFEST}
    assert manifest["files"]["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size


def test_an_exception_while_writing_leaves_the_old_folder(folder: Path) -> None:
    before = everything(folder)

    def write(partial: Path) -> None:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder(folder, write)
    assert everything(folder) == before
    assert check_folder(folder)["model_type"] == "gemma4_text"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    # What a kill leaves is removed by the next call, and the new folder holds nothing of the old.
    (folder.parent / "model.partial").mkdir()
    (folder.parent / "model.partial" / "config.json").write_text("{}")
    save_folder(folder, tiny_student().save_pretrained)
    assert load_model(folder).config.model_type == "trihybrid_gemma4"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_and_leaves_nothing(folder: Path, number: int) -> None:
    before = everything(folder)

    def write(partial: Path) -> None:
        (partial / "model.safetensors").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(
        ValueError, match=rf"model: {os.strerror(number)} while it was written; nothing of it is left"
    ):
        save_folder(folder, write)
    assert everything(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_manifest_takes_a_writers_word_and_reads_the_rest(tmp_path: Path) -> None:
    """What was hashed while it was written is not read again; files of folders inside are listed too."""

    def write(partial: Path) -> Written:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_bytes(b"a")
        (partial / "b").write_bytes(b"b")
        return Written({"inner/a": {"bytes": 1, "sha256": "said"}}, {"tensors": {"copied": 3}})

    save_folder(tmp_path / "model", write)
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert manifest == {
        "format": 2,
        "files": {
            "b": {"bytes": 1, "sha256": hashlib.sha256(b"b").hexdigest()},
            "inner/a": {"bytes": 1, "sha256": "said"},
        },
        "tensors": {"copied": 3},
    }


def test_a_damaged_file_of_an_inner_folder_is_found(folder: Path) -> None:
    def write(partial: Path) -> None:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / MANIFEST).unlink()
        (partial / "towers").mkdir()
        (partial / "towers" / "model.safetensors").write_bytes(b"bytes")

    save_folder(folder.with_name("other"), write)
    other = folder.with_name("other")
    assert check_folder(other)["model_type"] == "gemma4_text"
    (other / "towers" / "model.safetensors").write_bytes(b"Bytes")
    with pytest.raises(
        ValueError, match=r"towers/model\.safetensors: its sha256 is not the one in trihybrid\.json"
    ):
        check_folder(other)


def test_a_manifest_of_format_1_is_read(folder: Path) -> None:
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in everything(folder).items()
        if name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    assert check_folder(folder)["model_type"] == "gemma4_text"
    files["config.json"]["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(ValueError, match=r"config\.json: its sha256"):
        check_folder(folder)


def test_a_kill_between_the_renames_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(folder)
    rename, calls = Path.rename, []

    def die_at_the_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save_folder(folder, tiny_student().save_pretrained)
    assert everything(folder.with_name("model.old.partial")) == before
    assert check_folder(folder.with_name("model.partial"))["model_type"] == "trihybrid_gemma4"


def test_a_partial_folder_is_not_read(folder: Path) -> None:
    folder.rename(folder.with_name("model.partial"))
    for read in (check_folder, load_model, load_teacher):
        with pytest.raises(ValueError, match=r"model: no such model folder; give a folder with config.json"):
            read(folder)


def test_a_manifest_is_not_demanded_of_foreign_folders(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert load_teacher(folder).config.model_type == "gemma4_text"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def header(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: cut(f, f.stat().st_size - 1),
            r"model.safetensors: \d+ bytes, its header describes \d+; .*cut short",
        ),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), r"bytes, its header describes"),
        (lambda f: cut(f, 100), r"truncated: 100 bytes, its header alone needs \d+; fetch it again"),
        (lambda f: cut(f, 3), r"truncated: 3 bytes"),
        (lambda f: cut(f, 0), r"truncated: 0 bytes"),
        (lambda f: header(f, b"not JSON"), r"the header is not safetensors; fetch it again"),
        (lambda f: header(f, b"[1]"), r"the header is not safetensors"),
        (lambda f: header(f, b'{"a": {"dtype": "F32"}}'), r"the header is not safetensors"),
        (lambda f: header(f, b"\xff\xfe"), r"the header is not safetensors"),
    ],
)
def test_damaged_weights_are_found_by_their_size(
    folder: Path, damage: Callable, message: str, manifest: bool
) -> None:
    damage(folder / "model.safetensors")
    if not manifest:
        (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_flipped_byte_is_found_by_its_hash(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: its sha256 is not the one in trihybrid.json"):
        load_model(folder)


def test_a_file_that_is_gone_or_longer_is_found(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match=r"config.json: \d+ bytes, trihybrid.json says \d+; copy it again"):
        check_folder(folder)
    (folder / "generation_config.json").unlink()
    config.write_text(config.read_text()[:-1])
    with pytest.raises(
        ValueError, match=r"generation_config.json: missing, but trihybrid.json lists it; copy the whole"
    ):
        check_folder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"config.json": {}}}'])
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(
        ValueError, match=r"trihybrid.json: not a manifest of this version; copy the whole folder"
    ):
        check_folder(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"no such model folder; give a folder with config.json and \*.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"no config.json; this is not a model folder"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: not JSON \("),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), r"config.json: not JSON \("),
        (lambda f: (f / "config.json").write_text("[]"), r"config.json: holds a list, not an object"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            r"no \*.safetensors; weights in other formats are not read",
        ),
        (
            lambda f: change_config(f, model_type="gpt2"),
            r'model_type is "gpt2"; this version reads teachers .*: gemma4_text, gemma3_text, llama,',
        ),
        (lambda f: change_config(f, model_type=None), r'model_type is "None"; this version reads'),
    ],
)
def test_folders_that_are_no_models_are_refused(folder: Path, spoil: Callable, message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_missing_and_misshapen_tensors_are_refused(folder: Path) -> None:
    """transformers would initialise a missing tensor at random and say so in its log alone."""
    path = folder / "model.safetensors"
    (folder / MANIFEST).unlink()
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors are missing or have another shape, first {name}"):
        load_model(folder)
    save_file(tensors | {name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=str(folder)):
        load_model(folder)


def test_tensors_that_the_model_has_no_place_for_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "model.safetensors"
    (folder / MANIFEST).unlink()
    save_file(load_file(path) | {"model.extra": torch.zeros(2)}, path, {"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="trihybrid"):
        load_model(folder)
    (line,) = [record.message for record in caplog.records if record.name.startswith("trihybrid")]
    assert line == f"{folder}: 1 tensors are not used, first model.extra"


def test_a_student_is_no_teacher(tmp_path: Path) -> None:
    save_folder(tmp_path / "student", tiny_student().save_pretrained)
    with pytest.raises(
        ValueError, match=r"a converted student, not a teacher; give the folder of the model that it was made"
    ):
        load_teacher(tmp_path / "student")
    with pytest.raises(
        ValueError, match=r'model_type is "trihybrid_gemma4"; a teacher is one of gemma4_text,'
    ):
        load_teacher_config(str(tmp_path / "student"))


def test_teacher_config_from_a_shape_or_a_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    assert load_teacher_config("google/gemma-4-E2B").num_hidden_layers == 35
    (folder / "model.safetensors").unlink()
    assert load_teacher_config(str(folder)).to_dict() == load_config(folder).to_dict()
    # A multimodal checkpoint keeps the text configuration inside.
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma4", "text_config": tiny_config().to_dict()})
    )
    assert load_teacher_config(str(folder)).to_dict() == tiny_config().to_dict()
    for text, message in (
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ('{"model_type": "gpt2"}', 'is "gpt2"; a teacher'),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_teacher_config(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_teacher_config(str(folder))
    with pytest.raises(
        ValueError, match=r'no built-in shape "nowhere"; known: .*; or give a folder with a config.json'
    ):
        load_teacher_config("nowhere")


def load_config(folder: Path) -> Gemma4TextConfig:
    return Gemma4TextConfig.from_dict(json.loads((folder / "config.json").read_text()))
