"""What a run promised and did not keep is named."""

from trihybrid.recipe.measure import missed_targets
from trihybrid.recipe.schema import Recipe


def row(stage: str, bpb: float, kl: float, recall: float = 0.5) -> dict:
    return {"stage": stage, "bpb": bpb, "kl": kl, "recall": recall}


def test_broken_promises_are_named_one_by_one() -> None:
    def missed(targets: dict, rows: list[dict], seconds: float = 10.0) -> list[str]:
        fields = {"name": "a", "teacher": {"folder": "a"}, "stages": [], "targets": targets}
        return missed_targets(Recipe.model_validate(fields), rows, seconds)

    rows = [
        row("teacher", 2.0, 0.0),
        row("operated", 3.0, 0.9),
        row("aligned", 2.5, 0.9),
        row("matched", 2.2, 0.1),
    ]
    kept = {"bpb_gap": 0.25, "teacher_recall": 0.5, "seconds": 10.0}
    assert missed(kept, rows) == []
    assert missed({"bpb_gap": 0.1}, rows) == ["matched is 0.2000 bpb above the teacher, wanted 0.1"]
    assert missed({"seconds": 9.0}, rows) == ["the run took 10 s, wanted at most 9"]
    assert missed({"improvement": True}, rows) == [
        "aligned is not better than operated in kl: 0.9000 against 0.9000"
    ]
    (line,) = missed({"teacher_recall": 0.6}, rows)
    assert line.startswith("the teacher's recall beyond its window is 0.50, wanted 0.60")
