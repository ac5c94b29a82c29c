"""Names of the parts, and files that are replaced whole."""

import os
import stat
from pathlib import Path

import pytest

import trihybrid.run.directory as directory_module
from trihybrid.run import RunDirectory, write_json, write_text


def test_parts_have_their_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "deep" / "run")
    parts = [run.recipe, run.lineage, run.log, run.results, run.samples, run.plan, run.report, run.data]
    names = ["recipe.yaml", "lineage.json", "log.jsonl", "results.json", "samples.json", "plan.json"]
    assert [part.relative_to(run.path).as_posix() for part in parts] == [*names, "report.html", "data"]
    assert run.checkpoints("align") == run.path / "checkpoints" / "align"
    assert run.model("operated") == run.path / "operated"
    assert sorted(item.name for item in run.path.iterdir()) == ["checkpoints", "data"]


def test_reading_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        RunDirectory(tmp_path / "absent", create=False)
    RunDirectory(tmp_path, create=False)
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("name", ["", "../teacher", "a/b", ".hidden", "a\\b", "a\n"])
def test_names_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    for part in (run.model, run.checkpoints):
        with pytest.raises(ValueError, match="is not a plain name"):
            part(name)


@pytest.mark.parametrize("name", ["data", "checkpoints"])
def test_model_cannot_take_the_name_of_a_part(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="belongs to another part"):
        RunDirectory(tmp_path).model(name)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"bpb": 1.5})
    before = path.read_bytes()

    def failing_sync(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(directory_module.os, "fsync", failing_sync)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"bpb": 9.0})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {"a": {1, 2}}, [Path("x")]])
def test_only_plain_json_is_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "results.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match=r"results\.json: not plain JSON"):
        write_json(path, value)
    assert path.read_text() == "[\n  1\n]\n"


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text\n")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert (tmp_path / "a.txt").read_bytes() == b"text\n"
