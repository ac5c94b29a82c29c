"""The paragraph and the verdict say what the numbers say, also when they are bad or absent."""

from trihybrid.report.headline import final_stage, headline, verdict
from trihybrid.report.reading import RunRecord
from trihybrid.report.stages import KNOWN_STAGES, in_stage_order


def record(results: dict[str, dict], summary: dict | None = None) -> RunRecord:
    """A run of which only results and summary exist."""
    return RunRecord(None, None, {}, None, results, None, summary or {})


def test_a_stage_that_makes_it_worse_is_said():
    run = record(
        {"teacher": {"bpb": 1.0}, "operated": {"bpb": 2.0}, "aligned": {"bpb": 1.2}, "matched": {"bpb": 1.3}}
    )
    text = headline(run)
    assert "1.3000 bits per byte, 0.3000 above the teacher" in text
    assert "won back 70.0 % of that" in text
    assert "After stage 2 (matched) the model is worse than before, by 0.1000 bits per byte." in text
    assert "worse" not in headline(record({"operated": {"bpb": 2.0}, "aligned": {"bpb": 1.2}}))


def test_a_student_below_its_teacher():
    run = record({"teacher": {"bpb": 1.0}, "matched": {"bpb": 0.75, "recall": 0.5}})
    assert "0.2500 below the teacher, 50.0 % recall beyond the window (teacher not measured)" in headline(run)


def test_targets():
    results = {"teacher": {"bpb": 1.0, "recall": 0.9}, "matched": {"bpb": 1.1, "recall": 0.8, "kl": 0.5}}
    met = verdict(record(results, {"targets": {"bpb": 1.1, "recall": 0.8, "kl": 0.5, "recall_gap": 0.11}}))
    assert "All targets met (4)" in met
    assert "missed" not in met
    missed = verdict(
        record(results, {"targets": {"bpb": 1.09, "recall": 0.81, "agreement": 0.1, "seconds": 9}})
    )
    assert "4 of 4 targets missed" in missed
    assert missed.count("not measured") == 2
    assert "No target was set" in verdict(record(results))


def test_numbers_that_are_not_finite_meet_nothing():
    run = record({"matched": {"bpb": float("nan")}}, {"targets": {"bpb": 2.0}})
    assert "1 of 1 targets missed" in verdict(run)
    assert "bits per byte not measured" in headline(run)


def test_final_stage():
    assert final_stage(record({})) is None
    assert final_stage(record({"teacher": {}})) is None
    assert final_stage(record({"int8": {}})) == "int8"
    assert final_stage(record({"matched": {}, "aligned": {}, "int8": {}})) == "matched"


def test_a_third_stage_comes_last_and_no_run_misses_it():
    run = record({"matched": {"bpb": 1.2}, "extended": {"bpb": 1.3}})
    assert final_stage(run) == "extended"
    assert "After stage 3 (extended) the model is worse than before, by 0.1000 bits per byte." in headline(
        run
    )
    assert in_stage_order(["extended", "matched", "teacher"]) == ["teacher", "matched", "extended"]
    assert "extended" not in KNOWN_STAGES
