"""Commands that hand models over and take them in, as a user types them."""

import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

import published_checkpoint
from trihybrid.models.checkpoint import load_model


def test_there_and_back_by_commands(micro: ModuleType, micro_run: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "exported", tmp_path / "back"
    result = micro.trihybrid("export", micro_run / "matched", out)
    assert result.code == 0, result.stderr
    weights = (out / "model.safetensors").stat().st_size
    code = list(out.glob("*.py"))
    said = " ".join(result.stdout.split())
    size = sum(path.stat().st_size for path in code)
    assert f"{weights:,} bytes of weights, {size:,} of code in {len(code)} files" in said
    assert (out / "tokenizer.json").read_bytes() == (micro_run / "matched" / "tokenizer.json").read_bytes()
    result = micro.trihybrid("import", out, back)
    assert (result.code, result.stdout) == (0, f"{back}: read as export\n")
    assert micro.listing(back) == micro.listing(micro_run / "matched")


def test_a_published_student_is_read(micro: ModuleType, tmp_path: Path) -> None:
    source = published_checkpoint.write(tmp_path / "in", *published_checkpoint.qwen3("hxa07b"))
    result = micro.trihybrid("import", source, tmp_path / "out")
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("read as hxa07b on qwen3")
    assert lines[1:] == ["note: 6 tensors left out: declared and not used by hxa07b"]
    assert load_model(tmp_path / "out").config.rwkv7["key_scale"] == "log_log_decay"


def test_a_revision_can_be_named(micro: ModuleType, tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa07a")
    silent = {name: value for name, value in fields.items() if name not in ("rwkv_architecture", "auto_map")}
    silent |= {"model_type": "mine", "architectures": ["Mine"]}
    source = published_checkpoint.write(tmp_path / "in", silent, tensors)
    before = micro.listing(tmp_path)
    line = micro.refusal(micro.trihybrid("import", source, tmp_path / "out"))
    assert "names no revision; give one of hxa079, hxa07a" in line and "with --revision" in line
    assert micro.listing(tmp_path) == before
    result = micro.trihybrid("import", source, tmp_path / "out", "--revision", "hxa07a")
    assert result.code == 0 and "read as hxa07a on qwen3" in result.stdout
    line = micro.refusal(
        micro.trihybrid("import", tmp_path / "out", tmp_path / "again", "--revision", "hxa07a")
    )
    assert "is a student of ours; leave it away" in line


def test_vectors_of_named_tokens(micro: ModuleType, micro_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    command = ("vectors", micro_run / "matched", out, "--prompt", 3, "--steps", 1, "--tokens", "2,40,41,42")
    result = micro.trihybrid(*command)
    assert result.code == 0, result.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokens"] == [2, 40, 41, 42] and manifest["model"]["name"] == "matched"
    tensors = sum(len(step["tensors"]) for step in manifest["steps"])
    assert f"{tensors} tensors of 2 steps" in " ".join(result.stdout.split())
    with torch.no_grad():
        logits = load_model(micro_run / "matched", torch.float32)(torch.tensor([[2, 40, 41, 42]])).logits
    last = load_file(out / "decode-1.safetensors")["logits"]
    assert torch.allclose(last[0, 0], logits[0, -1], atol=1e-4)


def test_bad_input_is_one_line_and_nothing_is_written(
    micro: ModuleType, micro_run: Path, tmp_path: Path
) -> None:
    student, teacher, out = micro_run / "matched", micro_run / "teacher", tmp_path / "out"
    for command, message in (
        (("export", tmp_path / "none", out), "no such model folder"),
        (("export", teacher, out), 'model_type is "gemma4_text"; converted students are trihybrid_gemma4'),
        (("export", student, tmp_path), "exists; name a folder that does not exist yet"),
        (("import", teacher, out), 'model_type is "gemma4_text", a teacher; it needs no import'),
        (("import", student, tmp_path), "exists; name a folder that does not exist yet"),
        (("vectors", student, out, "--tokens", "2,x"), '--tokens: "2,x"; give token ids with commas'),
        (
            ("vectors", student, out, "--prompt", 2, "--steps", 1, "--tokens", "2,3,999"),
            "outside of the vocabulary",
        ),
        (("vectors", tmp_path / "none", out), "no such model folder"),
    ):
        before = micro.listing(tmp_path)
        assert message in micro.refusal(micro.trihybrid(*command)), command
        assert micro.listing(tmp_path) == before
