"""The chain holds, and tampering with any part of it is noticed."""

import json
from pathlib import Path

import pytest

from trihybrid.run import Lineage, hash_file, hash_folder, hash_json


def three_stages(path: Path) -> Lineage:
    lineage = Lineage(path)
    lineage.append("operate", "teacher", "recipe-1", "operated", 1.0)
    lineage.append("align", "operated", "recipe-2", "aligned", 2.5)
    lineage.append("match", "aligned", "recipe-3", "matched", 3.0)
    return lineage


def test_lineage_survives_its_file(tmp_path: Path) -> None:
    lineage = three_stages(tmp_path / "lineage.json")
    loaded = Lineage(tmp_path / "lineage.json")
    assert loaded.records == lineage.records
    assert [record.stage for record in loaded.records] == ["operate", "align", "match"]
    record = loaded.record("align")
    assert record is not None
    found = (record.parent, record.recipe, record.output, record.seconds)
    assert found == ("operated", "recipe-2", "aligned", 2.5)
    assert loaded.record("export") is None


def test_hash_covers_the_record_and_the_one_before(tmp_path: Path) -> None:
    first, second, _ = three_stages(tmp_path / "lineage.json").records
    body = {"stage": "align", "parent": "operated", "recipe": "recipe-2", "output": "aligned", "seconds": 2.5}
    assert second.hash == hash_json({**body, "previous": first.hash})


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("field", ["stage", "parent", "recipe", "output", "seconds", "hash"])
def test_changed_field_is_noticed(tmp_path: Path, index: int, field: str) -> None:
    path = tmp_path / "lineage.json"
    three_stages(path)
    document = json.loads(path.read_text())
    document["records"][index][field] = 9.0 if field == "seconds" else "changed"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"record {index} \(stage .*broken chain"):
        Lineage(path)


def test_record_rewritten_with_its_own_hash_breaks_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lineage.json"
    three_stages(path)
    document = json.loads(path.read_text())
    record = document["records"][0]
    record["recipe"] = "another"
    body = {key: value for key, value in record.items() if key != "hash"}
    record["hash"] = hash_json({**body, "previous": ""})
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"record 1 \(stage 'align'\): broken chain"):
        Lineage(path)


@pytest.mark.parametrize("order", [[1, 2], [0, 2], [0, 2, 1], [1, 0, 2]])
def test_dropped_or_moved_record_is_noticed(tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "lineage.json"
    three_stages(path)
    document = json.loads(path.read_text())
    document["records"] = [document["records"][index] for index in order]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="broken chain"):
        Lineage(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2, "records": []}', '{"version": 1, "records": [{}]}']
)
def test_other_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lineage.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a lineage file"):
        Lineage(path)


def test_append_refuses_a_wrong_parent_and_a_second_record(tmp_path: Path) -> None:
    path = tmp_path / "lineage.json"
    lineage = three_stages(path)
    with pytest.raises(ValueError, match=r"stage 'export'.*parent teacher is no earlier output"):
        lineage.append("export", "teacher", "r", "o", 1.0)
    with pytest.raises(ValueError, match=r"stage 'align'.*recorded already"):
        lineage.append("align", "operated", "r", "o", 1.0)
    assert len(lineage.records) == len(Lineage(path).records) == 3
    lineage.append("export", "aligned", "r", "o", 1.0)  # a branch: any earlier output may be a parent


def test_require_parent(tmp_path: Path) -> None:
    lineage = three_stages(tmp_path / "lineage.json")
    lineage.require_parent("export", "matched")
    lineage.require_parent("export", "aligned", parent_stage="align")
    lineage.require_parent("align", "operated")  # recorded already: its own parent is wanted
    wrong = r"stage 'export': wrong parent: wanted matched \(output of stage 'match'\), found aligned; rest"
    with pytest.raises(ValueError, match=wrong):
        lineage.require_parent("export", "aligned")
    with pytest.raises(ValueError, match=r"wanted operated \(in its own record\), found matched"):
        lineage.require_parent("align", "matched")
    with pytest.raises(ValueError, match="no record of average to start from"):
        lineage.require_parent("export", "matched", parent_stage="average")
    with pytest.raises(ValueError, match="no record of any stage to start from"):
        Lineage(tmp_path / "empty.json").require_parent("align", "operated")


def test_hashes_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert hash_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match=r"no file matches \*.safetensors, config.json"):
        hash_folder(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(name.encode())
    whole = hash_folder(tmp_path)
    (tmp_path / "README.md").write_text("does not count")
    assert hash_folder(tmp_path) == whole
    (tmp_path / "model.safetensors").write_bytes(b"other")
    changed = hash_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "renamed.safetensors")
    assert len({whole, changed, hash_folder(tmp_path)}) == 3


def test_json_hash_is_canonical() -> None:
    assert hash_json({"a": 1, "b": [1.5, None]}) == hash_json({"b": [1.5, None], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": "1"})
    assert hash_json([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    with pytest.raises(ValueError, match="not JSON compliant"):
        hash_json(float("nan"))
