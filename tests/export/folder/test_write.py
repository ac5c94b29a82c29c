"""An exported folder: complete, what the bundler makes now, and loadable where there is no trihybrid."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trihybrid.export.folder.code import auto_map, changed_files, code_files
from trihybrid.export.folder.write import export_folder
from trihybrid.export.incoming import import_folder
from trihybrid.models.checkpoint import load_model
from trihybrid.storage.folder import MANIFEST, Written, check_folder, save_folder

TYPE = "trihybrid_gemma4"
LOAD = """
import json, os, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
folder, again, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
with torch.no_grad():
    saved = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    print(json.dumps({
        "module": type(model).__module__, "config": type(config).__name__,
        "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
        "logits": model(ids).logits[0].tolist(), "saved": saved(ids).logits[0].tolist(),
        "generated": model.generate(ids, max_new_tokens=9, do_sample=False)[0].tolist(),
        "trihybrid": [name for name in sys.modules if name.partition(".")[0] == "trihybrid"],
        "kernels": next(
            backend.available(torch.device("cpu"))
            for backend in sys.modules[type(model).__module__.rpartition(".")[0] + ".trihybrid_ops_backend"]
                .backends("wkv7")
            if backend.name == "triton"
        ),
    }))
"""


def test_a_folder_loads_and_generates_without_trihybrid(
    exported: Path, student: Path, bare_python: Callable[..., dict], tmp_path: Path
) -> None:
    """In a process of its own whose path has no trihybrid: the same logits to the bit, the same tokens; and what such a
    process saves loads there again."""
    ids = [3, 7, 50, 12, 9, 9, 31, 4]
    found = bare_python(LOAD, exported, tmp_path / "again", json.dumps(ids))
    assert found["module"].startswith("transformers_modules.") and found["trihybrid"] == []
    assert (found["missing"], found["unexpected"]) == ([], [])
    assert found["kernels"] == "they are trihybrid's, which is not installed"
    model = load_model(student)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        generated = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0]
    assert torch.equal(torch.tensor(found["logits"]), logits)
    assert found["saved"] == found["logits"]
    assert found["generated"] == generated.tolist()


def test_a_folder_holds_what_the_bundler_makes_now(exported: Path) -> None:
    """Rebuilt and compared by hash: the manifest in the folder, its files, and the bundler agree."""
    code_files.cache_clear()
    rebuilt = code_files(TYPE)
    listed = json.loads((exported / MANIFEST).read_text())["files"]
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in rebuilt.items()}
    assert {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".py")} == hashes
    assert changed_files(exported, TYPE) == []
    assert json.loads((exported / "config.json").read_text())["auto_map"] == auto_map(TYPE)
    for target in auto_map(TYPE).values():
        file, name = target.split(".")
        assert f"\nclass {name}(" in rebuilt[f"{file}.py"]


def test_all_else_is_the_student(exported: Path, student: Path) -> None:
    check_folder(exported)
    for name in ("model.safetensors", "generation_config.json"):
        assert (exported / name).read_bytes() == (student / name).read_bytes()
    fields = json.loads((exported / "config.json").read_text())
    fields.pop("auto_map")
    assert fields == json.loads((student / "config.json").read_text())


def test_our_own_code_reads_a_folder_and_runs_none_of_its(exported: Path, tmp_path: Path) -> None:
    """Without trust: by the registered classes, also where the folder's files would not even compile."""
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit(1) (\n")
    model = load_model(folder)
    assert type(model).__module__.startswith("trihybrid.")
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(model)


def test_there_and_back_is_the_same_student(exported: Path, student: Path, tmp_path: Path) -> None:
    taken = import_folder(exported, tmp_path / "back")
    assert (taken.source, taken.notes) == ("export", ())
    files = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert files == {path.name: path.read_bytes() for path in student.iterdir()}


def test_the_record_of_a_conversion_goes_along_and_its_card_does_not(student: Path, tmp_path: Path) -> None:
    def write(partial: Path) -> Written:
        shutil.copytree(student, partial, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        (partial / "README.md").write_text("converted\n")
        return Written(facts={"tensors": {"copied": 3}})

    save_folder(tmp_path / "converted", write)
    export_folder(tmp_path / "converted", tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "back")
    before, out, back = (
        json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("converted", "out", "back")
    )
    assert out["tensors"] == {"copied": 3}
    del before["files"]["README.md"]
    assert back == before and not (tmp_path / "back" / "README.md").exists()


def test_a_student_without_code_is_taken_without_a_word(student: Path, tmp_path: Path) -> None:
    assert import_folder(student, tmp_path / "back").notes == ()
    files = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert files == {path.name: path.read_bytes() for path in student.iterdir()}


def test_changed_code_is_said_once_and_does_not_count(
    exported: Path, student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    (folder / "trihybrid_ops_wkv7.py").write_text("# mine\n")
    (folder / "more.py").write_text("")
    assert changed_files(folder, TYPE) == ["more.py", "trihybrid_ops_wkv7.py"]
    taken = import_folder(folder, tmp_path / "back")
    (note,) = taken.notes
    assert note.startswith(
        "2 code files of the folder are not what this version of trihybrid writes, first more.py"
    )
    assert not caplog.records  # the caller shows the notes
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        student / "model.safetensors"
    ).read_bytes()


def test_tensors_that_do_not_fit_are_refused(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / "model.safetensors")
    taken = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 tensors do not fit config.json, first: model.norm.weight \[16\] is missing"
    ):
        export_folder(folder, tmp_path / "out")
    save_file(
        tensors | {"model.norm.weight": taken, "extra": taken[:3].clone()}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"first: extra \[3\] belongs to nothing"):
        export_folder(folder, tmp_path / "out")
    save_file(tensors | {"model.norm.weight": taken[:3].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is \[3\], wanted \[16\]"):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists; name a folder that does not exist yet"):
        export_folder(student, tmp_path)
    folder = Path(shutil.copytree(student, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
    with pytest.raises(
        ValueError, match=r'model_type is "gemma4_text"; converted students are trihybrid_gemma4,'
    ):
        export_folder(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r'model_type is "trihybrid_none"; converted students are'):
        code_files("trihybrid_none")
    assert not (tmp_path / "out").exists()
