"""Names on the hub. Nothing here goes to the network: what would is replaced."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    Response,
    RevisionNotFoundError,
)

from trihybrid.storage import hub

# The library below huggingface_hub has another name in another release.
HTTP = import_module(Response.__module__.partition(".")[0])
RESPONSE = HTTP.Response(404, request=HTTP.Request("GET", "https://example.org"))


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple]]:
    """Let the hub answer a path or an error; returns the calls that it gets."""

    def install(result: Any) -> list[tuple]:
        calls: list[tuple] = []

        def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((name, revision, allow_patterns))
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        return calls

    return install


def test_a_folder_is_itself_and_asks_nobody(tmp_path: Path, answer: Callable) -> None:
    calls = answer(AssertionError("asked"))
    assert hub.find_model(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"revision is 'main', but .* is a folder; leave the revision away"):
        hub.find_model(str(tmp_path), "main")
    for name in ("/nowhere/at/all", "nowhere", "../model", "a/b/c", "owner/"):
        with pytest.raises(
            ValueError, match="no such model folder; give a folder, or the name of a model as owner"
        ):
            hub.find_model(name)
    assert calls == []


def test_a_name_is_fetched_without_pickles(tmp_path: Path, answer: Callable) -> None:
    calls = answer(tmp_path)
    assert hub.find_model("google/gemma-4-E2B-it", "abc") == tmp_path
    assert calls == [("google/gemma-4-E2B-it", "abc", hub.FILES)]
    assert not any(pattern.endswith((".bin", ".pt", ".pth", "*", ".py")) for pattern in hub.FILES)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("no", response=RESPONSE), r"its licence has to be accepted .* `hf auth login`"),
        (RepositoryNotFoundError("no", response=RESPONSE), "no such folder, and no such model on the hub"),
        (RevisionNotFoundError("no", response=RESPONSE), "the hub has no revision 'x' of it"),
        (
            HfHubHTTPError("500 oh", response=RESPONSE),
            r"cannot be asked \(500 oh\); fetch the model elsewhere",
        ),
        (
            LocalEntryNotFoundError("not cached\nlong story"),
            r"cannot be asked \(not cached\); fetch the model",
        ),
        (OfflineModeIsEnabled("offline"), r"cannot be asked \(offline\)"),
        (OSError("full"), r"cannot be asked \(full\)"),
        (HTTPError("no route"), r"cannot be asked \(no route\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(answer: Callable, error: Exception, message: str) -> None:
    answer(error)
    with pytest.raises(ValueError, match=rf"^owner/model: .*{message}"):
        hub.find_model("owner/model", "x")
