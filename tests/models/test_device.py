"""A device is one that is here, or named in one line beside those that are."""

import pytest
import torch

from trihybrid.models.device import present_device


@pytest.mark.parametrize(
    ("count", "present"),
    [(0, ["cpu"]), (1, ["cpu", "cuda", "cuda:0"]), (2, ["cpu", "cuda", "cuda:0", "cuda:1"])],
)
def test_only_devices_that_are_here_pass(
    monkeypatch: pytest.MonkeyPatch, count: int, present: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "cuda:2", "meta", "foo", "cuda:x", ""):
        if name in present:
            assert str(present_device(name)) == name
        else:
            with pytest.raises(ValueError, match=f'device is "{name}", here it may be {", ".join(present)}'):
                present_device(name)
