"""The single-file program: what is in it, that it is the same each time, and that it gives what the package gives."""

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from compact_bundle import micro_recipe, run_isolated
from trihybrid.export.bundle import (
    BACKENDS,
    LEFT_OUT,
    REQUIREMENTS,
    build_bundle,
    bundle_size,
    portable_recipe,
    write_bundle,
)
from trihybrid.export.closure import imports
from trihybrid.export.entry import main
from trihybrid.recipe.fields import dump_recipe
from trihybrid.run.code import code_hash


@pytest.fixture(scope="module")
def recipe_text(text_file: Path) -> str:
    return dump_recipe(micro_recipe(text_file))


def test_a_bundle_is_the_same_each_time_and_for_each_seed(
    recipe_text: str, text_file: Path, tmp_path: Path
) -> None:
    content = build_bundle(recipe_text)
    assert content == build_bundle(dump_recipe(micro_recipe(text_file, seed=123456)))
    assert write_bundle(tmp_path / "train_gpt.py", recipe_text) == len(content) == bundle_size(recipe_text)
    assert (tmp_path / "train_gpt.py").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.py"]


def test_a_bundle_holds_what_training_needs_and_no_more(recipe_text: str) -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle(recipe_text))) as archive:
        members = {name: archive.read(name).decode() for name in archive.namelist()}
    assert members["trihybrid/code_hash.txt"].strip() == code_hash()
    assert {"trihybrid/models/compact/model.py", "trihybrid/compress/artifact.py"} <= members.keys()
    for name, text in members.items():
        module = name.removesuffix(".py").replace("/", ".")
        assert not any(f"{module}.".startswith(f"trihybrid.{room}.") for room in LEFT_OUT), name
        if name.endswith(".py"):
            compile(text, name, "exec")
            found = {(item.name.split(".")[0], item.deferred) for item in imports(text, "trihybrid")}
            loaded = {library for library, deferred in found if not deferred}
            assert loaded <= sys.stdlib_module_names | REQUIREMENTS.keys() | BACKENDS | {"trihybrid"}, name
            assert "transformers" not in dict(found), name


def test_the_recipe_inside_tells_nothing_about_the_machine(recipe_text: str, text_file: Path) -> None:
    inside = portable_recipe(recipe_text)
    assert str(text_file.parent) in recipe_text and str(text_file.parent) not in inside
    assert portable_recipe(inside) == inside
    with pytest.raises(ValueError, match="recipe: "):
        portable_recipe("kind: compact\nname: x\n")


def test_the_program_alone_gives_the_artifact_of_the_package(
    recipe_text: str, text_file: Path, finished_runs: list[Path], tmp_path: Path
) -> None:
    """Isolated: only what is in the archive and what pip installs. The package says that it came from the archive, also
    where it is installed besides; its modules lie on its own path."""
    program = tmp_path / "train_gpt.py"
    write_bundle(program, recipe_text)
    done = run_isolated(program, tmp_path, "--data", str(text_file), "--out", "run", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert f"package:{program}/trihybrid/__init__.py\n" in done.stdout
    by_package, by_program = finished_runs[1], tmp_path / "run"
    assert (by_program / "model.artifact").read_bytes() == (by_package / "model.artifact").read_bytes()
    own, other = (json.loads((run / "results.json").read_text()) for run in (by_program, by_package))
    for name in ("bpb", "parameters", "config_hash", "code_hash", "seed", "total_bytes", "gap"):
        assert own[name] == other[name], name
    assert f"final_chunked decoded:{other['bpb']['chunked']['decoded']!r} " in done.stdout
    assert f"code_hash:{code_hash()}\n" in done.stdout
    digest = hashlib.sha256((by_package / "model.artifact").read_bytes()).hexdigest()
    assert f"artifact_sha256:{digest}\n" in done.stdout


def test_a_missing_source_ends_in_one_line(
    recipe_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "train_gpt.py"
    write_bundle(program, recipe_text)
    assert main(program, ["--data", "nothing.jsonl", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nothing.jsonl" in line
    assert not (tmp_path / "run" / "model.artifact").exists()
