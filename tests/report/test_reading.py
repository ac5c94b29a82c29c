"""A run folder that is missing, empty or misshapen is refused with the file's name."""

import json

import pytest

from trihybrid.report.page import build_report
from trihybrid.report.reading import read_run


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        build_report(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"holds none of recipe\.yaml"):
        build_report(tmp_path)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ValueError, match="holds none of"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{", "results.json: not JSON"),
        ("results.json", "{}", "results.json: must be a list of objects"),
        ("results.json", '[{"stage": "<b>"}]', "results.json, row 1: stage '<b>'"),
        ("results.json", '[{"stage": "teacher", "bpb": "low"}]', "bpb: 'low' is not a number"),
        ("results.json", '[{"stage": "a", "recall_by_distance": [{"low": 1}]}]', "recall_by_distance entry"),
        ("plan.json", "[]", "plan.json: holds a list"),
        ("plan.json", '{"before": 3}', "before: 3 is not an object"),
        ("plan.json", '{"before": {"flops_per_token": {"long": 1}}}', "context 'long'"),
        ("plan.json", '{"warnings": "many"}', "warnings: 'many' is not a list"),
        ("lineage.json", "[]", "lineage.json: holds a list"),
        ("lineage.json", '{"version": 1}', "lineage.json: records: must be a list of objects"),
        ("samples.json", '[{"stage": "teacher", "prompt": 1}]', "samples.json, row 1: prompt and text"),
        ("log.jsonl", '{"kind": "train"}\n', "log.jsonl, row 1: step None"),
        ("log.jsonl", 'x\n{"kind": "event"}\n', "log.jsonl:1: not a JSON object"),
        ("summary.json", '{"targets": {"speed": 1}}', r"targets \['speed'\] are unknown"),
        ("summary.json", '{"targets": {"bpb": null}}', "target bpb is None"),
    ],
)
def test_a_misshapen_part_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_not_utf8(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not UTF-8"):
        read_run(tmp_path)


def test_steps_are_put_in_order_and_a_torn_last_line_is_left_out(tmp_path):
    rows = [{"kind": "train", "stage": "matched", "step": step, "loss": 1.0} for step in (2, 0, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    assert [row["step"] for row in read_run(tmp_path).training["matched"]] == [0, 1, 2]


def test_a_stage_measured_again_shows_its_later_row(tmp_path):
    (tmp_path / "results.json").write_text('[{"stage": "matched", "bpb": 2}, {"stage": "matched", "bpb": 1}]')
    assert read_run(tmp_path).results == {"matched": {"stage": "matched", "bpb": 1}}
