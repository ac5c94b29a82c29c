"""The model card says what follows from the configuration and what a run measured, and admits the rest."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from trihybrid.export.folder.card import model_card
from trihybrid.models.checkpoint import load_model
from trihybrid.models.gemma4 import TrihybridGemma4Config


def card(folder: Path, title: str = "name") -> str:
    fields = json.loads((folder / "config.json").read_text())
    return model_card(folder, TrihybridGemma4Config.from_dict(fields), title)


def test_layers_and_costs_are_those_of_the_model(student: Path) -> None:
    text = card(student)
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n# name\n" in text
    assert "3 of the 6 layers of a gemma4_text" in text
    for row in (
        "| 0 | sliding | own |",
        "| 3 | rwkv7 + tica | rwkv7 own, tica slot 1 |",
        "| 5 | rwkv7 | rwkv7 own |",
    ):
        assert row in text
    model = load_model(student)
    count = sum(parameter.numel() for parameter in model.parameters())
    (row,) = (line for line in text.splitlines() if line.startswith("| parameters |"))
    assert row.endswith(f"| {count:,} |")
    # Three recurrences of 4 heads of 8 x 8 in float32; TICA's keys and values in slot 1 alone: 2 x 1 x 8 x 2 bytes.
    assert "| recurrent state, bytes | 0 | 3,072 |" in text
    assert "| keys and values that grow, bytes a token | 128 | 32 |" in text
    assert all(line.isascii() and not line.endswith(" ") for line in text.splitlines())


def test_without_a_run_nothing_was_measured(student: Path) -> None:
    text = card(student)
    assert "Nothing was measured by the tool that wrote this card" in text
    assert "measured on the run's validation text" not in text


def test_a_run_lends_its_figures_to_its_own_weights_alone(micro_run: Path, tmp_path: Path) -> None:
    text = card(micro_run / "matched")
    rows = {row["stage"]: row for row in json.loads((micro_run / "results.json").read_text())}
    assert f"| bits a byte | {rows['matched']['bpb']:.4f} |" in text
    assert f"| KL to the teacher, nats a token | {rows['matched']['kl']:.4f} |" in text
    record = json.loads((micro_run / "lineage.json").read_text())["records"][-1]
    assert record["output"] in text and "align" in text
    teacher = json.loads((micro_run / "matched" / "plan.json").read_text())["teacher"]
    assert f"made from {Path(teacher).name}:" in text
    run = shutil.copytree(micro_run, tmp_path / "run")
    weights = load_file(run / "matched" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, run / "matched" / "model.safetensors", {"format": "pt"})
    assert "Nothing was measured" in card(run / "matched")


def test_a_card_names_no_path_of_this_machine(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "copy"))
    for teacher, shown in (
        ("/home/me/secret/gemma", "gemma"),
        ("google/gemma-4-E2B-it", "google/gemma-4-E2B-it"),
    ):
        (folder / "plan.json").write_text(json.dumps({"teacher": teacher, "warnings": ["one two"]}))
        text = card(folder)
        assert f"made from {shown}:" in text and "secret" not in text
        assert "\n- One two.\n" in text


def test_the_example_in_a_card_is_python(student: Path) -> None:
    (example,) = (part.split("```")[0] for part in card(student).split("```python\n")[1:])
    compile(example, "card", "exec")
    assert "trust_remote_code=True" in example
