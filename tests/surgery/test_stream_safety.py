"""What is written is whole or not there: full disks, kills, errors, and teachers that do not serve."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trihybrid.models.checkpoint import open_teacher
from trihybrid.models.teacher.published import PublishedTeacher
from trihybrid.storage.folder import check_folder
from trihybrid.storage.tensor_files import read_header
from trihybrid.storage.tensor_writer import TensorWriter
from trihybrid.surgery.stream import stream_student
from trihybrid.surgery.tensors import TensorReport

FOLDER = "student"


def write(folder: Path, plan: dict, out: Path, **options: Any) -> TensorReport:
    return stream_student(open_teacher(folder), plan, out, **options)


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


SURGERY = (
    "--set", "rwkv7={head_dim: 16, decay_rank: 6, iclr_rank: 5, gate_rank: 7}",
    "--set", "tica={heads: 4, kv_heads: 2, head_dim: 8, gate_rank: 3}",
)  # fmt: skip
KILLS = (("copy", 1), ("copy", 100), ("copy", 140), ("put", 30), ("manifest", 0))
"""Among retained tensors, in the towers, among the slots, before the manifest."""
ATTEMPTS = """
import json, os, resource, signal, sys
import trihybrid.recipe.convert, trihybrid.storage.folder
from trihybrid.cli import main
from trihybrid.storage import piece_writer
from trihybrid.storage.tensor_writer import TensorWriter

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die(where, count):
    piece_writer.PIECE = 5_000
    trihybrid.storage.folder._add_manifest = kill
    for name in ("copy", "put"):
        def call(self, *arguments, plain=getattr(TensorWriter, name), name=name):
            nonlocal count
            count -= name == where
            if name == where and not count:
                kill()
            return plain(self, *arguments)
        setattr(TensorWriter, name, call)

def attempt(where, count, out):
    if where == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
    else:
        die(where, count)
    sys.argv = ["trihybrid", "convert", sys.argv[1], out, *sys.argv[3:]]
    main()

for where, count, out in json.loads(sys.argv[2]):
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        attempt(where, count, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([where, count, os.waitstatus_to_exitcode(status)]), flush=True)
"""


@pytest.fixture(scope="module")
def attempts(published, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple, int], list[str]]:
    """Attempts to convert, each in a process of its own, killed or not allowed to write a file of more than 200,000
    bytes: the folder with one folder for each, exit codes, and what all said as errors."""
    folder = tmp_path_factory.mktemp("attempts")
    wanted = [(where, count, str(folder / f"{where}{count}" / FOLDER)) for where, count in KILLS]
    wanted.append(("limit", 200_000, str(folder / "limit200000" / FOLDER)))
    command = [sys.executable, "-c", ATTEMPTS, published(), json.dumps(wanted), *SURGERY]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=300
    )
    codes = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    return folder, {(where, count): code for where, count, code in codes}, result.stderr.splitlines()


def environment() -> dict[str, str]:
    import trihybrid

    return os.environ | {
        "PYTHONPATH": str(Path(trihybrid.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
    }


def test_a_limit_of_the_file_system_is_said_in_one_line(attempts) -> None:
    folder, codes, errors = attempts
    assert codes["limit", 200_000] == 2
    assert errors == [
        f"error: {folder / 'limit200000' / FOLDER}: File too large while it was written; nothing of it is left; free "
        "space, or name a folder on another disk"
    ]
    assert list((folder / "limit200000").iterdir()) == []


@pytest.mark.parametrize(("where", "count"), KILLS)
def test_a_kill_leaves_nothing_that_is_taken_for_a_model(attempts, published, plan_of, where, count) -> None:
    """The next attempt succeeds."""
    folder, codes, _ = attempts
    place = folder / f"{where}{count}"
    assert codes[where, count] == -signal.SIGKILL
    (left,) = place.iterdir()
    assert left.name == f"{FOLDER}.partial"
    if where == "manifest":
        # All but the manifest is there, so what is there is whole.
        assert check_folder(left)["model_type"] == "trihybrid_gemma4"
    else:
        with pytest.raises(ValueError, match=r"no config\.json; this is not a model folder"):
            check_folder(left)
    plan = plan_of(published())
    write(published(), plan, place / FOLDER)
    assert [path.name for path in place.iterdir()] == [FOLDER]
    write(published(), plan, place / "undisturbed")
    assert digests(place / FOLDER) == digests(place / "undisturbed")


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


def test_an_error_beside_the_copying_ends_it(published, plan_of, tmp_path, monkeypatch) -> None:
    """Of 134 tensors the first few are copied at most: the others wait for the thread here."""
    failed = threading.Event()
    copied: list[str] = []
    plain = TensorWriter.copy

    def fail(folder: Path) -> None:
        failed.set()
        raise KeyError("no tokenizer")

    def copy(self: TensorWriter, name: str, place: Any) -> None:
        plain(self, name, place)
        copied.append(name)
        failed.wait(60)
        time.sleep(0.05)

    monkeypatch.setattr(TensorWriter, "copy", copy)
    with pytest.raises(KeyError, match="no tokenizer"):
        write(published(), plan_of(published()), tmp_path / FOLDER, beside=fail)
    assert len(copied) < 20 and list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("name", "kind", "called"),
    [
        ("embed_tokens.weight", torch.int8, "I8"),
        ("layers.1.mlp.up_proj.weight", torch.float8_e4m3fn, "F8_E4M3"),
        ("layers.5.self_attn.q_proj.weight", torch.int8, "I8"),
    ],
)
def test_weights_that_are_no_floating_point_are_named(
    published, plan_of, tmp_path, name, kind, called
) -> None:
    """Of the embedding, of another retained tensor, and of one that a converted slot inherits from."""
    published_name = f"model.language_model.{name}"

    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors[published_name] = tensors[published_name].to(kind)

    teacher = spoiled(published(), tmp_path / "teacher", quantise)
    with pytest.raises(
        ValueError, match=rf"{published_name} is {called}; a teacher's weights are BF16, F16, F32"
    ):
        stream_student(teacher, plan_of(published()), tmp_path / FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


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
