"""Weights shared out to the workers: FSDP2 for the layers, rows for the tables, the rest whole.

Each `Together` of a loss is one unit of `torch.distributed.fsdp.fully_shard`: its weights, frozen and trained, of both
streams, are gathered where it begins and freed where it ends, forwards and backwards, and the gradients of those that
train are averaged over the workers as they come. Outside of the backward pass, the trainer sees plain tensors, this
worker's rows, so that optimizers, averages and checkpoints need nothing of FSDP. Weights keep their dtypes: float32
masters are gathered as such.

Norms and projections beside the layers stay whole.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn

from trihybrid.distill.table import TableRows
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.train.distributed import Workers
from trihybrid.train.rows import Rows

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Losses(Protocol):
    """A module that computes a loss, layer by layer."""

    layers: nn.ModuleList
    """`Together` of every layer that it runs."""

    @property
    def student(self) -> HybridForCausalLM:
        """Whose weights train."""
        ...

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Those that do, by the student's names."""
        ...

    def __call__(self, *batch: Any) -> Any:
        """The loss, alone or with its parts."""
        ...


class Sharded:
    """A module of losses whose weights are shared out, in place.

    Args:
        module: on the CPU, so that no device ever holds all of it.
        workers: more than one, in a process group; the first one's trained weights count.

    Attributes:
        parameters: this worker's rows of what trains, by the student's names, as plain tensors.
        rows: which they are.
        gathered: bytes of the weights of all layers, as they are when they come together.
    """

    def __init__(self, module: Losses, workers: Workers) -> None:
        assert isinstance(module, nn.Module) and workers.count > 1
        # Seconds of importing, for which only those wait who share weights out.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._workers = workers
        workers.broadcast([parameter.detach() for parameter in module.trained.values()])
        mesh = init_device_mesh(workers.device.type, (workers.count,))
        self.gathered = sum(parameter.nbytes for parameter in module.layers.parameters())
        for layer in module.layers:
            fully_shard(layer, mesh=mesh)
            # gloo has no mean.
            if workers.device.type == "cpu":
                cast("FSDPModule", layer).set_force_sum_reduction_for_comms(True)
        _share_tables(module.student, workers)
        for part in _beside(module.student):
            part.to(workers.device)
        # The root of the units, so that one layer is gathered while another one runs; it has no weights of its own.
        fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))
        self._pieces: dict[str, DTensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.rows: dict[str, Rows] = {}
        for name in module.trained:
            module.trained[name] = parameter = module.student.get_parameter(name)
            self._pieces[name] = piece = cast("DTensor", parameter)
            self.parameters[name] = nn.Parameter(piece.to_local().detach())
            self.rows[name] = Rows(tuple(piece.shape), workers.rank, workers.count)

    def take_gradients(self) -> None:
        """Add the gradients that the backward pass left to those of `parameters`."""
        for name, piece in self._pieces.items():
            if piece.grad is None:
                continue
            own, parameter = cast("DTensor", piece.grad).to_local(), self.parameters[name]
            parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)
            piece.grad = None

    def whole_parameters(self) -> dict[str, Tensor]:
        """What trains, whole and on the CPU of the first worker; nothing on the others."""
        whole = {}
        for name, parameter in self.parameters.items():
            (tensor,) = self.rows[name].join([parameter.detach()], self._workers)
            if self._workers.first:
                whole[name] = tensor.cpu()
        return whole


def _share_tables(student: HybridForCausalLM, workers: Workers) -> None:
    head = student.lm_head
    tied = head.weight is student.model.embed_tokens.weight
    for name, module in student.model.named_children():
        if isinstance(module, nn.Embedding):
            setattr(student.model, name, TableRows(module, workers))
    # Not by assignment: a head is declared to be linear, and to the losses it is a weight.
    student.add_module("lm_head", student.model.embed_tokens if tied else TableRows(head, workers))


def _beside(student: HybridForCausalLM) -> Iterator[nn.Module]:
    """What stands beside layers and tables."""
    for name, module in student.model.named_children():
        if name != "layers" and not isinstance(module, TableRows):
            yield module
