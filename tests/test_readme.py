"""What README.md and CONTRIBUTING.md tell a reader to type is real."""

import contextlib
import io
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

from trihybrid.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="ascii")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TABLE = re.findall(r"^\| `trihybrid ([^`]+)` \| (.+) \|$", README, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_table_names_every_command_but_version() -> None:
    assert [usage.split()[0] for usage, _ in TABLE] == [
        "demo", "plan", "convert", "distill", "data", "train", "budget", "submit", "eval", "generate", "chat",
        "serve", "bench", "export", "import", "vectors", "report", "doctor",
    ]  # fmt: skip
    assert {usage.split()[0] for usage, _ in TABLE} == set(COMMANDS) - {"version"}


@pytest.mark.parametrize(("usage", "meaning"), TABLE)
def test_a_command_takes_what_the_table_says(usage: str, meaning: str) -> None:
    name, *arguments = usage.split()
    parameters = COMMANDS[name].params
    positional = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    assert len([item for item in positional if item.required]) <= len(arguments) <= len(positional)
    options = {option for parameter in parameters for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", meaning)) <= options


def test_commands_in_running_text_work(micro: ModuleType) -> None:
    commands = set(re.findall(r"`(?:\.venv/bin/)?trihybrid ([a-z0-9-]+(?: [a-z0-9.-]+)*)`", README))
    assert "plan gemma-4-e2b" in commands
    for command in commands:
        assert command.split()[0] in COMMANDS
    result = micro.trihybrid("plan", "gemma-4-e2b")
    assert result.code == 0
    # What the README says that this command prints.
    text = " ".join(result.stdout.split())
    for part in ("6,144", "7,168", "need only the last token of a prompt"):
        assert part in README + text and part in text


def test_the_python_example_runs(micro_run: Path) -> None:
    (example,) = blocks("python")
    assert example.count('"runs/demo/matched"') == 2
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(
            compile(example.replace("runs/demo/matched", str(micro_run / "matched")), "README.md", "exec"), {}
        )
    assert printed.getvalue().startswith("<bos>Return a new ")
    assert len(printed.getvalue()) > len("<bos>Return a new \n")
    assert "from trihybrid.models.families import register" in example


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="ascii"), re.MULTILINE))
    named = set(
        re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / document).read_text(encoding="ascii"), re.MULTILINE)
    )
    assert {"test"} <= named <= targets


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_and_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="ascii")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
