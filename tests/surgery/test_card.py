import yaml

from trihybrid.models.shapes import load_shape
from trihybrid.surgery.card import student_card
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.tensors import TensorReport, folded

REPORT = TensorReport(3, ["a"], ["b"], ["model.vision_tower.x", "model.audio_tower.y"], [], [])


def card(name: str = "google/gemma-4-E2B-it", report: TensorReport = REPORT, **fields) -> str:
    plan = make_plan(load_shape("gemma-4-e2b"), SurgerySection(**fields), name)
    return student_card(plan, report, "my-student")


def test_the_front_matter_is_the_hubs() -> None:
    _, matter, text = card().split("---\n", 2)
    assert yaml.safe_load(matter) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "google/gemma-4-E2B-it",
        "tags": ["trihybrid", "rwkv7", "tica"],
    }
    assert text.lstrip().startswith("# my-student\n")


def test_a_folder_is_named_and_its_path_is_not() -> None:
    text = card("/home/somebody/gemma-4-E2B-it")
    assert "somebody" not in text and "base_model" not in text
    assert "A hybrid made from gemma-4-E2B-it by trihybrid" in text


def test_the_numbers_are_the_plans() -> None:
    text = card()
    for line in (
        "Layers 4, 9, 14, 19, 24, 29, 34 of 35 mix over time by rwkv7 and tica now",
        "| parameters | 4,628,569,344 | 4,683,544,320 |",
        "| keys and values that grow, bytes a token | 6,144 | 7,168 |",
        "- keys and values that grow with context rise from 6,144 to 7,168 bytes a token",
        "| 19 | full | rwkv7 + tica | rwkv7.receptance: layer 19 q_proj rows permuted",
        "**It is only a start: it was converted and not trained.**",
        'AutoModelForCausalLM.from_pretrained("my-student")',
    ):
        assert line in text


def test_towers_are_said_to_be_there_or_not() -> None:
    assert "2 tensors for images and sound lie untouched in `towers/`" in card()
    left = TensorReport(3, [], [], [], REPORT.carried, [])
    assert "tensors for images and sound were left out" in card(report=left)
    assert "image" not in card(report=TensorReport(3, [], [], [], [], []))


def test_a_plan_that_converts_nothing_has_a_card_too() -> None:
    text = card(pattern="SSSSF * 7")
    assert "Layers none of 35 mix over time by the same attention now" in text


def test_reports_fold_names_that_differ_by_numbers() -> None:
    assert folded([]) == "none"
    assert folded(["a.1.b", "a.22.b", "a.b2", "c.3.d.4.e"]) == "a.*.b (2), a.b2 (1), c.*.d.*.e (1)"
    lines = TensorReport(
        1234, ["m"], [], ["model.vision_tower.a.1"] * 1, ["model.audio_tower.b"], ["u.1.v"]
    ).lines()
    assert lines == [
        "1,234 tensors copied byte for byte, 1 made from the teacher's",
        "not filled by the teacher, 0: none",
        "not used, 1: u.*.v (1)",
        "carried along in towers/, 1: model.vision_tower.* (1)",
        "left out, 1: model.audio_tower.* (1)",
    ]
