"""The student that is written as a stream is the one that is made in memory, and nothing of an attempt is left."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_published import AUDIO, IMAGE, TOWERS, VIDEO, write_published
from trihybrid.models import digest, tensor_writer
from trihybrid.models.checkpoint import check_folder, load_model, load_teacher, open_teacher
from trihybrid.models.digest import matches
from trihybrid.models.published import PublishedTeacher
from trihybrid.models.tensor_files import TensorRange, read_header
from trihybrid.surgery import stream
from trihybrid.surgery.operate import operate, read_plan, save_student
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.stream import stream_student
from trihybrid.surgery.tensors import TensorReport

FOLDER = "student"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: options of `write_published` -> its folder, one for all tests; do not change it."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("published") / "teacher"
            write_published(made[key], **options)
        return made[key]

    return make


@pytest.fixture
def plan_of(make_section: Callable) -> Callable[..., dict]:
    def make(folder: Path, gate: str = "unit", start: str = "fresh", **fields: Any) -> dict:
        section = make_section(gate, start, **({"calibration_tokens": 0} | fields))
        return make_plan(open_teacher(folder).base, section, "tiny", contexts=(64,))

    return make


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in pieces of 5,000 bytes: some tensors span several, some pieces hold several tensors."""
    for module in (digest, tensor_writer):
        monkeypatch.setattr(module, "PIECE", 5_000)


def write(folder: Path, plan: dict, out: Path, **options: Any) -> TensorReport:
    return stream_student(open_teacher(folder), plan, out, **options)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in wanted.items()
    )


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    "layout", [{}, {"shards": 3}, {"text_only": True}], ids=["one file", "shards", "text"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", [False, True], ids=["noise", "text"])
def test_the_stream_is_the_operation_in_memory_to_the_bit(
    published, plan_of, calibration, tmp_path, layout, dtype, text
) -> None:
    folder = published(dtype=dtype, **layout)
    plan = plan_of(folder, calibration_tokens=256 * text)
    tokens = [calibration] if text else []
    write(folder, plan, tmp_path / FOLDER, tokens=tokens)
    student = operate(load_teacher(folder), plan, tokens)
    save_student(student, plan, tmp_path / "memory")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in (FOLDER, "memory"))
    assert same(found, wanted)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in (FOLDER, "memory")]
    assert configs[0] == configs[1]
    assert configs[0]["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_model(tmp_path / FOLDER)
    assert same(loaded.state_dict(), student.state_dict())
    assert read_plan(tmp_path / FOLDER) == plan
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    told = loaded.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert told.shape == (1, 15)


@pytest.mark.parametrize(
    "fields",
    [
        {"donor_keys_values": "ridge", "calibration_tokens": 256},
        {"donor_keys_values": "share", "share_kv": "teacher"},
        {"start": "inherited", "heads": "plain", "gate": "published"},
        {"pattern": "SSRSSFSSF"},
        {"pattern": "SSFSSFSSF"},
    ],
    ids=lambda fields: str(fields.get("pattern", fields.get("donor_keys_values", fields.get("start")))),
)
def test_every_kind_of_plan_is_the_same_in_memory(published, plan_of, calibration, tmp_path, fields) -> None:
    folder = published()
    plan = plan_of(folder, **fields)
    tokens = [calibration] if fields.get("calibration_tokens") else []
    write(folder, plan, tmp_path / FOLDER, tokens=tokens, seed=3)
    student = operate(load_teacher(folder), plan, tokens, seed=3)
    assert same(load_model(tmp_path / FOLDER).state_dict(), student.state_dict())


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": False, "text_only": True},
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "text_only": True},
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
        },
    ],
    ids=["untied", "without per-layer inputs", "experts, keys are values"],
)
def test_other_shapes_of_the_family(published, plan_of, calibration, tmp_path, shape) -> None:
    folder = published(**shape)
    for name, plan, tokens in (
        ("noise", plan_of(folder), []),
        ("text", plan_of(folder, calibration_tokens=256), [calibration]),
    ):
        write(folder, plan, tmp_path / name, tokens=tokens)
        student = operate(load_teacher(folder), plan, tokens)
        assert same(load_model(tmp_path / name).state_dict(), student.state_dict())


def test_keys_and_values_that_no_layer_reads_change_nothing(published, plan_of, tmp_path) -> None:
    """A checkpoint with them (and garbage in them) and one without give the same student."""
    with_them, without = published(), published(unused=False)
    plan = plan_of(with_them)
    reports = [
        write(folder, plan, tmp_path / name) for folder, name in ((with_them, "with"), (without, "without"))
    ]
    assert same(*(load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")))
    assert reports[0].unused == sorted(
        f"model.language_model.layers.{layer}.self_attn.{part}.weight"
        for layer in (6, 7, 8)
        for part in ("k_proj", "v_proj", "k_norm")
    )
    assert reports[1].unused == []


def test_every_tensor_is_accounted_for(published, plan_of, tmp_path) -> None:
    folder = published(shards=3)
    report = write(folder, plan_of(folder), tmp_path / FOLDER)
    student = load_file(tmp_path / FOLDER / "model.safetensors")
    theirs = open_teacher(folder)
    retained = {
        name
        for name in student
        if name in theirs.text and torch.equal(student[name], theirs.text[name].read())
    }
    # The student's tensors: copied, made or fresh, and each once.
    assert report.copied == len(retained)
    parts = [retained, set(report.made), set(report.fresh)]
    assert set().union(*parts) == set(student) and sum(map(len, parts)) == len(student)
    assert all(".rwkv7." in name for name in report.made)
    # The teacher's: copied, made something of, unused, or carried, and each once.
    sources = {
        theirs.names[f"model.layers.{layer}.self_attn.{part}.weight"]
        for layer, parts in ((2, "qkvo"), (5, "qkvo"), (8, "qo"))
        for part in [f"{letter}_proj" for letter in parts]
        + [f"{letter}_norm" for letter in parts if letter in "qk"]
    }
    parts = [
        {theirs.names[name] for name in retained},
        sources,
        set(report.unused),
        set(report.carried),
    ]
    everything = set(theirs.names.values()) | set(theirs.towers)
    assert set().union(*parts) == everything and sum(map(len, parts)) == len(everything)
    manifest = json.loads((tmp_path / FOLDER / "trihybrid.json").read_text())
    assert manifest["tensors"] == vars(report)


def test_a_stranger_and_an_inherited_owner_that_is_retained(published, plan_of, tmp_path) -> None:
    """Layer 5 stays and lends to a converted layer 8: its tensors are copied and made something of."""
    folder = shutil.copytree(published(), tmp_path / "teacher")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.surprise": torch.zeros(3)}, path)
    plan = plan_of(folder, pattern="SSFSSFSSR")
    report = write(folder, plan, tmp_path / FOLDER)
    assert [name for name in report.unused if "self_attn" not in name] == ["model.surprise"]
    assert "not used, 10: model.language_model.layers.*.self_attn.k_norm.weight (3)" in report.lines()[2]
    assert "model.surprise (1)" in report.lines()[2]
    student = load_file(tmp_path / FOLDER / "model.safetensors")
    assert "model.layers.5.self_attn.k_proj.weight" in student


@pytest.mark.usefixtures("pieces")
def test_towers_are_carried_untouched_or_left_out(published, plan_of, tmp_path) -> None:
    folder = published()
    plan = plan_of(folder)
    kept = write(folder, plan, tmp_path / "kept")
    left = write(folder, plan, tmp_path / "left", towers=False)
    before = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(TOWERS)
    }
    assert len(before) > 10
    assert same(load_file(tmp_path / "kept" / "towers" / "model.safetensors"), before)
    assert sorted(path.name for path in (tmp_path / "kept" / "towers").iterdir()) == [
        "config.json",
        "model.safetensors",
        "processor_config.json",
    ]
    for name in ("config.json", "processor_config.json"):
        assert (tmp_path / "kept" / "towers" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "left" / "towers").exists()
    assert (kept.carried, kept.left_out) == (sorted(before), [])
    assert (left.carried, left.left_out) == ([], sorted(before))
    # Both are the same model, and the towers are no part of it.
    assert same(load_model(tmp_path / "kept").state_dict(), load_model(tmp_path / "left").state_dict())
    text = write(published(text_only=True), plan, tmp_path / "text")
    assert (text.carried, text.left_out) == ([], []) and not (tmp_path / "text" / "towers").exists()


def test_digests_of_the_stream_are_those_of_the_files(published, plan_of, tmp_path) -> None:
    write(published(), plan_of(published()), tmp_path / FOLDER)
    manifest = json.loads((tmp_path / FOLDER / "trihybrid.json").read_text())
    on_disk = {str(p.relative_to(tmp_path / FOLDER)) for p in (tmp_path / FOLDER).rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {"trihybrid.json"}
    assert "towers/model.safetensors" in on_disk
    assert all(matches(tmp_path / FOLDER / name, wanted) for name, wanted in manifest["files"].items())


def test_tokens_for_media_stay_in_the_configuration_and_are_refused(published, plan_of, tmp_path) -> None:
    write(published(), plan_of(published()), tmp_path / FOLDER)
    fields = json.loads((tmp_path / FOLDER / "config.json").read_text())
    tokens = {"image_token_id": IMAGE, "audio_token_id": AUDIO, "video_token_id": VIDEO}
    assert {name: fields[name] for name in tokens} == tokens
    assert {name: fields["base_config"][name] for name in tokens} == tokens
    student = load_model(tmp_path / FOLDER)
    for name, token in tokens.items():
        ids = torch.tensor([[2, 40, 41], [2, 42, token]])
        with pytest.raises(
            ValueError, match=rf"input_ids hold {token}, the {name}: .* leave them out of the prompt"
        ):
            student(ids)
        with pytest.raises(ValueError, match=rf"input_ids hold {token}, the {name}"):
            student.generate(ids, max_new_tokens=2)


def test_a_generation_configuration_is_the_teachers_or_follows_from_its_configuration(
    published, plan_of, tmp_path
) -> None:
    multimodal = published()
    write(multimodal, plan_of(multimodal), tmp_path / "published")
    name = "generation_config.json"
    assert (tmp_path / "published" / name).read_bytes() == (multimodal / name).read_bytes()
    bare = shutil.copytree(published(text_only=True), tmp_path / "bare")
    (bare / name).unlink()
    write(bare, plan_of(bare), tmp_path / "made")
    made = json.loads((tmp_path / "made" / name).read_text())
    assert (made["bos_token_id"], made["eos_token_id"], made["pad_token_id"]) == (2, 1, 0)


# Memory


def test_no_retained_tensor_is_read_into_memory(
    published, plan_of, calibration, tmp_path, monkeypatch
) -> None:
    """On noise: attentions of converted layers and two norms. On text: layers too, but of the tables only rows."""
    folder = published()
    place_of = {place: name for name, place in open_teacher(folder).text.items()}
    read: set[str] = set()
    plain = TensorRange.read

    def note(self: TensorRange) -> Tensor:
        read.add(place_of[self])
        return plain(self)

    monkeypatch.setattr(TensorRange, "read", note)
    write(folder, plan_of(folder), tmp_path / "noise")
    allowed = tuple(f"model.layers.{layer}.self_attn." for layer in (2, 5, 8))
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in (2, 5, 8)} | {"model.norm.weight"}
    assert {name for name in read if not name.startswith(allowed)} == norms
    read.clear()
    write(folder, plan_of(folder, calibration_tokens=256), tmp_path / "text", tokens=[calibration])
    assert not {name for name in read if "embed" in name}


def test_slots_wait_in_the_memory_that_is_set_aside(published, plan_of, tmp_path, monkeypatch) -> None:
    """One at least; with room for all of them the same file comes out."""
    folder = published()
    plan = plan_of(folder)
    waiting: list[int] = []
    plain = stream._Ahead.__init__

    def init(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        waiting.append(len(self._pending))

    monkeypatch.setattr(stream._Ahead, "__init__", init)
    for room in (0, 1 << 40):
        monkeypatch.setattr(stream, "AHEAD_BYTES", room)
        write(folder, plan, tmp_path / str(room))
    assert waiting == [1, 3]
    assert same(*(load_file(tmp_path / str(room) / "model.safetensors") for room in (0, 1 << 40)))


# Nothing half-written


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_disk_without_room_is_refused_before_anything_is_written(
    published, plan_of, tmp_path, monkeypatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return usage._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    out = tmp_path / "new" / "deeper" / FOLDER
    with pytest.raises(
        ValueError, match=r"student: needs 0\.3 GB, its disk has 0\.0 GB; free some, or name a folder"
    ):
        write(published(), plan_of(published()), out)
    assert asked == [tmp_path] and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("room", [0, 7_000, 100_000, 380_000])
def test_a_disk_that_becomes_full_leaves_nothing(published, plan_of, tmp_path, monkeypatch, room) -> None:
    """At the first piece, among the retained tensors, among the slots, in the towers."""
    left, lock = [room], threading.Lock()
    plain = os.pwrite

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        with lock:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = threading.active_count()
    with pytest.raises(
        ValueError, match=r"student: No space left on device while it was written; nothing of it"
    ):
        write(published(), plan_of(published()), tmp_path / FOLDER)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == before


def test_a_limit_of_the_file_system_is_said_in_one_line(micro, published, tmp_path) -> None:
    """In a real process that may write no file of more than 200,000 bytes."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from trihybrid.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "convert", published(), tmp_path / FOLDER, *SURGERY]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=300
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / FOLDER}: File too large while it was written; nothing of it is left; free space, or "
        "name a folder on another disk"
    ]
    assert list(tmp_path.iterdir()) == []


SURGERY = (
    "--set", "rwkv7={head_dim: 16, decay_rank: 6, iclr_rank: 5, gate_rank: 7}",
    "--set", "tica={heads: 4, kv_heads: 2, head_dim: 8, gate_rank: 3}",
)  # fmt: skip
KILL = """
import os, signal, sys
from trihybrid.models import tensor_writer
from trihybrid.models.tensor_writer import TensorWriter
tensor_writer.PIECE = 5_000
where, count = {where!r}, {count}
for name in ("copy", "put"):
    def call(self, *arguments, plain=getattr(TensorWriter, name), name=name):
        global count
        if name == where:
            count -= 1
            if not count:
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *arguments)
    setattr(TensorWriter, name, call)
if where == "manifest":
    import trihybrid.models.checkpoint as checkpoint
    checkpoint._add_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from trihybrid.cli import main
main()
"""


def environment() -> dict[str, str]:
    import trihybrid

    return os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
    }


@pytest.mark.parametrize(
    ("where", "count"), [("copy", 1), ("copy", 100), ("copy", 140), ("put", 30), ("manifest", 0)]
)
def test_a_kill_leaves_nothing_that_is_taken_for_a_model(published, plan_of, tmp_path, where, count) -> None:
    """Among retained tensors, in the towers, among the slots, before the manifest. The next attempt succeeds."""
    folder, out = published(), tmp_path / FOLDER
    command = [sys.executable, "-c", KILL.format(where=where, count=count), "convert", folder, out, *SURGERY]
    process = subprocess.run(list(map(str, command)), capture_output=True, env=environment(), timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name == f"{FOLDER}.partial"
    if where == "manifest":
        # All but the manifest is there, so what is there is whole.
        assert check_folder(left)["model_type"] == "trihybrid_gemma4"
    else:
        with pytest.raises(ValueError, match=r"no config\.json; this is not a model folder"):
            check_folder(left)
    plan = plan_of(folder)
    write(folder, plan, out)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    write(folder, plan, tmp_path / "undisturbed")
    assert digests(out) == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize("where", ["beside", "finish", "build"])
def test_an_error_of_any_part_leaves_nothing(published, plan_of, tmp_path, monkeypatch, where) -> None:
    def fail(*_: object) -> None:
        raise KeyError(where)

    options = {where: fail} if where != "build" else {}
    if where == "build":
        monkeypatch.setattr("trihybrid.surgery.slots._Builder.build", fail)
    before = threading.active_count()
    with pytest.raises(KeyError, match=where):
        write(published(), plan_of(published()), tmp_path / FOLDER, **options)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == before


def test_files_of_the_caller_are_in_the_manifest(published, plan_of, tmp_path) -> None:
    seen: list[TensorReport] = []

    def finish(folder: Path, report: TensorReport) -> None:
        seen.append(report)
        (folder / "README.md").write_text("card")

    def beside(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    report = write(published(), plan_of(published()), tmp_path / FOLDER, beside=beside, finish=finish)
    assert seen == [report]
    files = json.loads((tmp_path / FOLDER / "trihybrid.json").read_text())["files"]
    assert {"README.md", "tokenizer.json"} <= set(files)


# Bad teachers


def spoiled(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> PublishedTeacher:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return open_teacher(target)


def test_tensors_that_are_missing_or_misshapen_are_named(published, plan_of, tmp_path) -> None:
    plan = plan_of(published())
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def wider(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(49, 32, dtype=torch.bfloat16)

    for number, change in enumerate((lambda tensors: tensors.pop(name), wider)):
        teacher = spoiled(published(), tmp_path / f"teacher{number}", change)
        with pytest.raises(
            ValueError, match=r"1 tensors are missing or have another shape .* model\.layers\.1\.mlp"
        ):
            stream_student(teacher, plan, tmp_path / FOLDER)
    lost = "model.language_model.layers.5.self_attn.q_norm.weight"
    teacher = spoiled(published(), tmp_path / "teacher2", lambda tensors: tensors.pop(lost))
    with pytest.raises(
        ValueError, match=r"the teacher has no tensor model\.layers\.5\.self_attn\.q_norm\.weight"
    ):
        stream_student(teacher, plan, tmp_path / FOLDER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher0", "teacher1", "teacher2"]


def test_the_plan_of_another_teacher_is_refused(published, plan_of, tmp_path) -> None:
    plan = plan_of(published(text_only=True, global_head_dim=64))
    with pytest.raises(
        ValueError, match=r'made for teacher "tiny", which has another shape; make a new plan'
    ):
        write(published(), plan, tmp_path / FOLDER)
    assert list(tmp_path.iterdir()) == []


def test_wide_tensors_come_first(published, plan_of, tmp_path) -> None:
    """A reader that maps the file finds each tensor at a multiple of its own width."""
    folder = shutil.copytree(published(), tmp_path / "teacher")
    path = folder / "model.safetensors"
    mixed = {
        name: tensor.float() if "norm" in name and "language_model" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(mixed, path)
    teacher = open_teacher(folder)
    write(folder, plan_of(folder), tmp_path / FOLDER)
    found = load_file(tmp_path / FOLDER / "model.safetensors")
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["model.layers.5.self_attn.rwkv7.w1"].dtype == torch.bfloat16
    assert torch.equal(found["model.norm.weight"], teacher.text["model.norm.weight"].read())
    places = read_header(tmp_path / FOLDER / "model.safetensors").values()
    assert all(place.start % (4 if place.dtype == "F32" else 2) == 0 for place in places)
