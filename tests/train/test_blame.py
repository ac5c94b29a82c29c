"""A number that is not finite is traced to the module that made it and to its batch."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from trihybrid.run import read_log
from trihybrid.train.blame import first_not_finite
from trihybrid.train.gradients import layer_norms


class Roots(nn.Module):
    """Square roots of all numbers of its input; of a negative one there is none."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 4.0).sqrt()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), Roots()), nn.Linear(3, 1))


def test_the_innermost_module_is_named() -> None:
    layers = network()
    good, bad = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    assert first_not_finite(layers, lambda: layers(good)) is None
    assert first_not_finite(layers, lambda: layers(bad)) == "0"
    layers[1][0] = nn.Hardtanh(-9.0, -5.0)
    assert first_not_finite(layers, lambda: layers(good)) == "1.1"
    assert not any(module._forward_hooks for module in layers.modules())


def test_what_a_module_holds_is_named_too() -> None:
    layers = network()
    with torch.no_grad():
        layers[2].bias.fill_(float("inf"))
    assert first_not_finite(layers, lambda: layers(torch.ones(2, 3))) == "2 (bias not finite)"


def test_a_run_stops_with_the_names_of_layer_and_batch(tiny: ModuleType, tmp_path: Path) -> None:
    class LayeredTask(tiny.SplitTask):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.module = network()

        def loss(self, batch: Tensor) -> tuple[Tensor, dict]:
            loss, metrics = super().loss(batch)
            broken = torch.equal(batch, tiny.batch_of(7))
            self.module[1][0] = nn.Hardtanh(-9.0, -5.0) if broken else nn.Tanh()
            return loss + 0.0 * self.module(torch.ones(1, 3)).sum(), metrics

    with pytest.raises(FloatingPointError, match=r"step 7: .*batch: of step 7; layer: 1\.1; .*finite: none"):
        tiny.run_fit(tmp_path, task=LayeredTask())
    assert (tmp_path / "checkpoints" / "step-000006" / "checkpoint.json").is_file()
    event = read_log(tmp_path / "log.jsonl")[-1]
    assert (event["step"], event["layer"], event["batch"]) == (7, "1.1", "of step 7")


def test_norms_of_layers_are_those_of_their_parameters() -> None:
    names = ["a.layers.10.x", "a.layers.2.x", "a.layers.2.y", "head", "sublayers.3.x"]
    norms = layer_norms(names, torch.tensor([1.0, 3.0, 4.0, 7.0, 8.0]))
    assert norms == {"gradient/2": 5.0, "gradient/10": 1.0}
