"""An artifact alone: what it takes to load, score and continue with it, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trihybrid.compress.artifact import read_artifact, write_artifact
from trihybrid.compress.tensors import PlainTensor
from trihybrid.data import Tokenizer
from trihybrid.recipe.artifact import (
    compute_dtype,
    evaluate_artifact,
    find_tokenizer,
    load_artifact,
    tokenizer_kind,
)
from trihybrid.recipe.compact import CompactEvaluationSection


def rewritten(run: Path, folder: Path, **changes: Any) -> Path:
    """The artifact of a run with another configuration, whole otherwise."""
    artifact = read_artifact(run / "model.artifact")
    tensors = [PlainTensor(name, values) for name, values in artifact.tensors.items()]
    path = folder / "model.artifact"
    write_artifact(path, tensors, artifact.configuration | changes, 0, "zlib")
    return path


def test_the_model_holds_what_the_file_holds(compact_run: Path) -> None:
    artifact = read_artifact(compact_run / "model.artifact")
    loaded = load_artifact(compact_run / "model.artifact")
    assert not loaded.model.training
    parameters = dict(loaded.model.named_parameters())
    assert parameters.keys() == artifact.tensors.keys()
    for name, values in artifact.tensors.items():
        assert torch.equal(parameters[name], values), name


@pytest.mark.parametrize(
    ("precision", "device", "wanted"),
    [
        ("auto", "cpu", None),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", None),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_activations_are_narrow_where_a_gpu_computes(
    precision: str, device: str, wanted: torch.dtype | None
) -> None:
    assert compute_dtype(precision, device) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "configuration format 2, this version reads 1"),
        ({"vocabulary": 0}, "vocabulary is 0, must be a number of tokens"),
        ({"vocabulary": True}, "vocabulary is True"),
        ({"vocabulary": 10**12}, "vocabulary is 1000000000000, must be"),
        ({"vocabulary": 10**6}, "tensors are not those of its shape"),
        ({"section": {"depth": 3}}, "depth: Extra inputs are not permitted"),
        ({"section": {"pattern": "T * 300"}}, "tensors are not those of its shape, first blocks"),
        ({"section": []}, "section must be an object"),
    ],
)
def test_another_configuration_is_refused(
    compact_run: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = rewritten(compact_run, tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_artifact(path)
    assert str(error.value).startswith(str(path))


def test_bytes_need_no_tokenizer_and_another_one_is_refused(compact_run: Path, tmp_path: Path) -> None:
    artifact = load_artifact(shutil.copy(compact_run / "model.artifact", tmp_path))
    assert find_tokenizer(artifact)[0] == "bytes"
    other = json.loads((compact_run / "model" / "tokenizer.json").read_text())
    other["added_tokens"].append(dict(other["added_tokens"][0], id=260, content="<more>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        find_tokenizer(artifact, str(tmp_path))
    with pytest.raises(ValueError, match="no-such does not exist"):
        find_tokenizer(artifact, "no-such")


def test_a_tokenizer_is_found_beside_the_file_or_in_its_run(compact_run: Path, tmp_path: Path) -> None:
    wanted = {"kind": "tokenizers", "hash": Tokenizer.bytes().hash}
    artifact = load_artifact(rewritten(compact_run, tmp_path, tokenizer=wanted))
    with pytest.raises(
        ValueError, match=r"no tokenizer\.model or tokenizer\.json beside it; name its tokenizer"
    ):
        find_tokenizer(artifact)
    Tokenizer.bytes().save(tmp_path / "model")
    assert find_tokenizer(artifact)[0] == str(tmp_path / "model" / "tokenizer.json")
    Tokenizer.bytes().save(tmp_path)
    assert find_tokenizer(artifact)[0] == str(tmp_path / "tokenizer.json")
    for record in (None, {"kind": "bytes"}, {"kind": 1, "hash": ""}):
        broken = load_artifact(rewritten(compact_run, tmp_path, tokenizer=record))
        with pytest.raises(ValueError, match="does not say which tokenizer"):
            find_tokenizer(broken)


def test_kinds_of_tokenizers() -> None:
    assert tokenizer_kind(Tokenizer.bytes()) == "bytes"


def test_scoring_the_run_s_own_shards_gives_the_run_s_own_score(compact_run: Path) -> None:
    results = json.loads((compact_run / "results.json").read_text())
    section = CompactEvaluationSection(length=64, stride=32, sliding=True, stateful=True, batch_size=4)
    row = evaluate_artifact(compact_run / "model.artifact", str(compact_run / "data" / "validation"), section)
    assert row["bpb"] == {name: results["bpb"][name] for name in ("chunked", "sliding", "stateful")}
    assert (row["parameters"], row["bytes"]) == (results["parameters"], results["artifact"]["bytes"])
    assert row["recipe_hash"] == results["config_hash"]


def test_scoring_a_text_scores_all_of_it(compact_run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the slow river runs past stone houses, " * 20)
    section = CompactEvaluationSection(length=64)
    score = evaluate_artifact(compact_run / "model.artifact", str(text), section)["bpb"]["chunked"]
    assert (score["bytes"], score["tokens"]) == (len(text.read_text()), len(text.read_text()))
    assert score["raw"] == score["decoded"]


def test_a_model_that_looks_ahead_is_not_scored(
    compact_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trihybrid.models.compact import CompactModel

    plain = CompactModel.hidden

    def ahead(self: CompactModel, *arguments: Any) -> Any:
        hidden_BTD, state = plain(self, *arguments)
        return hidden_BTD + 0.1 * hidden_BTD.mean(1, keepdim=True), state

    monkeypatch.setattr(CompactModel, "hidden", ahead)
    with pytest.raises(ValueError, match="is not causal"):
        evaluate_artifact(
            compact_run / "model.artifact",
            str(compact_run / "data" / "validation"),
            CompactEvaluationSection(length=64),
        )
