"""Commands about compact models as a user calls them, and what they print."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from trihybrid.data import TokenShards
from trihybrid.export.bundle import bundle_size
from trihybrid.recipe.load import dump_recipe, load_compact


def figures(text: str) -> list[str]:
    return re.findall(r"\d+\.\d{4}", text)


def test_training_prints_what_it_made(micro: ModuleType, compact_recipe: Path, tmp_path: Path) -> None:
    """Code counts as the single-file program does; a promise that is broken fails the command."""
    command = ("train", compact_recipe, "--out", tmp_path / "run", "--set", "targets.bpb=0.001")
    result = micro.trihybrid(*command)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result.code == 1
    assert f"missed: the artifact has {results['bpb']['chunked']['decoded']:.4f} bits per byte" in " ".join(
        result.stderr.split()
    )
    for number in ("parameters", "total_bytes", "code_bytes", "limit_bytes"):
        assert f"{results[number]:,}" in result.stdout, number
    assert f"{results['limit_bytes'] - results['total_bytes']:,} left" in result.stdout
    for score in results["bpb"].values():
        assert f"{score['decoded']:.4f}" in result.stdout
    recipe = load_compact(compact_recipe, ["targets.bpb=0.001"])
    assert results["code_bytes"] == bundle_size(dump_recipe(recipe))
    assert (tmp_path / "run" / "report.html").is_file()
    again = micro.trihybrid(*command, "--resume")
    assert again.code == 1, again.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["artifact"] == results["artifact"]


def test_a_dry_run_writes_nothing(micro: ModuleType, compact_recipe: Path, tmp_path: Path) -> None:
    result = micro.trihybrid(
        "train", compact_recipe, "--dry-run", "--out", tmp_path / "run", "--set", "model.hidden_size=48"
    )
    assert (result.code, result.stderr) == (0, "")
    assert yaml.safe_load(result.stdout)["model"]["hidden_size"] == 48
    assert list(tmp_path.iterdir()) == []


def test_each_command_takes_its_own_recipes(
    micro: ModuleType, compact_recipe: Path, micro_recipe: Path
) -> None:
    line = micro.refusal(micro.trihybrid("distill", compact_recipe))
    assert line == f"error: {compact_recipe}: trains a compact model; use `trihybrid train`"
    for command in ("train", "budget"):
        line = micro.refusal(micro.trihybrid(command, micro_recipe))
        assert line == f"error: {micro_recipe}: converts a teacher; use `trihybrid distill`"


def test_eval_of_an_artifact_is_the_run_s_own_score(micro: ModuleType, compact_run: Path) -> None:
    results = json.loads((compact_run / "results.json").read_text())
    command = (
        "eval",
        compact_run / "model.artifact",
        "--text",
        compact_run / "data" / "validation",
        "--length",
        64,
    )
    result = micro.trihybrid(*command, "--sliding", "--stride", 32, "--json")
    assert (result.code, result.stderr) == (0, "")
    row = json.loads(result.stdout)
    for name in ("chunked", "sliding"):
        assert row["bpb"][name]["decoded"] == pytest.approx(results["bpb"][name]["decoded"], rel=1e-6)
    table = micro.trihybrid(*command)
    assert f"{row['bpb']['chunked']['decoded']:.4f}" in figures(table.stdout)
    assert "sliding" not in table.stdout
    fewer = json.loads(micro.trihybrid(*command, "--tokens", 300, "--json").stdout)
    assert (fewer["bpb"]["chunked"]["tokens"], fewer["bpb"]["chunked"]["raw"]) == (299, None)


def test_generate_from_an_artifact_follows_its_seed(
    micro: ModuleType, compact_run: Path, tmp_path: Path
) -> None:
    artifact = shutil.copy(compact_run / "model.artifact", tmp_path)
    command = ("generate", artifact, "the slow ", "--tokens", 12, "--temperature", 2)
    first, again, other = (micro.trihybrid(*command, "--seed", seed) for seed in (1, 1, 2))
    assert (first.code, first.stderr) == (0, "")
    assert first.stdout.startswith("the slow ") and first.stdout.endswith("\n")
    assert first == again != other


def test_a_damaged_artifact_is_refused(micro: ModuleType, compact_run: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copy(compact_run / "model.artifact", tmp_path))
    micro.flip_byte(artifact)
    for command in (("eval", artifact), ("generate", artifact, "a")):
        line = micro.refusal(micro.trihybrid(*command))
        assert line.startswith(f"error: {artifact}: ") and "sha256" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "ARTIFACT", "--teacher", "."), "--teacher: an artifact has none"),
        (("eval", "ARTIFACT", "--tokenizer", "no-such"), "tokenizer no-such does not exist"),
        (
            ("eval", "ARTIFACT", "--sliding", "--stride", "70", "--length", "64"),
            "stride is 70, must not exceed length (64)",
        ),
        (("eval", "ARTIFACT", "--stride", "20"), "--stride is for --sliding; give that too"),
        (("eval", ".", "--stride", "3"), "are for the file of an artifact"),
        (("eval", "ARTIFACT", "--text", "no-such"), "no-such does not exist"),
        (("eval", ".", "--sliding"), "are for the file of an artifact"),
        (("generate", ".", "a", "--tokenizer", "bytes"), "is for the file of an artifact"),
        (("data", "no-such", "out"), "no-such does not exist"),
        (("train", "no-such"), "no-such: no such recipe file"),
        (("submit", "no-such", "--out", "out", "--author", "a", "--name", "b"), "no-such"),
    ],
)
def test_bad_options_are_refused(
    micro: ModuleType,
    compact_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (str(compact_run / "model.artifact") if word == "ARTIFACT" else word for word in arguments)
    assert message in micro.refusal(micro.trihybrid(*words))
    assert list(tmp_path.iterdir()) == []


def test_data_becomes_shards_that_a_recipe_reads(
    micro: ModuleType, micro_texts: Path, compact_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    result = micro.trihybrid("data", micro_texts, out, "--format", "challenge")
    assert (result.code, result.stderr) == (0, "")
    for name in ("train", "validation"):
        manifest = TokenShards(out / name).manifest
        assert f"{name}: {manifest.documents} documents, {manifest.tokens:,} tokens" in " ".join(
            result.stdout.split()
        )
    assert sorted(path.name for path in (out / "challenge").iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    run = tmp_path / "run"
    trained = micro.trihybrid(
        "train", compact_recipe, "--out", run, "--set", f"data.train={out}", "--set", f"data.tokenizer={out}",
        "--set", "train.loop.steps=1",
    )  # fmt: skip
    assert trained.code == 0, trained.stderr
    assert list((run / "data").iterdir()) == []


def test_budget_names_the_largest_of_what_it_tried(micro: ModuleType, compact_recipe: Path) -> None:
    # Room for the weights of 64 channels, however long the code becomes.
    limit = f"compress.limit_bytes={bundle_size(dump_recipe(load_compact(compact_recipe))) + 90_000}"
    code = bundle_size(dump_recipe(load_compact(compact_recipe, [limit])))
    result = micro.trihybrid(
        "budget", compact_recipe, "--field", "hidden_size", "--try", "32", "--try", "64", "--try", "1024",
        "--set", limit,
    )  # fmt: skip
    assert (result.code, result.stderr) == (0, "")
    assert f"{code:,} of them code" in " ".join(result.stdout.split())
    lines = {line.split()[1]: line for line in result.stdout.splitlines() if re.match(r"\W+\d", line)}
    assert "of these" in result.stdout and "largest that fits" in lines["64"] and "too large" in lines["1024"]
    assert "fits" not in lines["32"] and "not tried" not in result.stdout
    below = micro.trihybrid("budget", compact_recipe, "--try", "64", "--try", "32", "--set", limit)
    assert below.stdout.endswith(
        "hidden_size 64, the largest of these, fits; larger ones were not tried: name some with --try\n"
    )


def test_the_report_of_a_compact_run_is_written_again(
    micro: ModuleType, compact_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(compact_run, tmp_path / "run")
    (run / "report.html").unlink()
    assert micro.trihybrid("report", run).code == 0
    page = (run / "report.html").read_text()
    results = json.loads((run / "results.json").read_text())
    assert f"{results['total_bytes']:,}" in page and results["code_hash"] in page
