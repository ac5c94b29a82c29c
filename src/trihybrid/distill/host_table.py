"""Frozen tables that stay in host memory: the rows of a batch's tokens are looked up where the batch is made, and sent.

    rows_BTD = table[ids_BT]                  on the host, while the device is busy with other steps
    finish(rows_BTD) = embedding(ids_BT)      on the device, to the bit

Ids are on the host when a batch is made, and nowhere else without waiting for the device. Rows are gathered into
page-locked memory and copied without waiting; torch's allocator of such memory hands it out again only when the copies
from it are done. A table that was loaded from a file is the pages of that file: the processes of a machine share them,
and none has a copy.
Legend: B batch, T tokens, D width of a row, N = B T, L layers, P width of the per-layer input.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trihybrid.data.packing import Batch
from trihybrid.models.arguments import refuse_media
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.model import HybridModel, Stream
from trihybrid.models.shapes import TeacherConfig
from trihybrid.ops.part import Part

_logger = logging.getLogger(__name__)

EMBEDDING, PER_LAYER = "embed_tokens", "embed_tokens_per_layer"


class HostTable(nn.Module):
    """What stands in for an embedding whose table is on the host.

    Args:
        table: an embedding of any class; its table is taken from it, and moves with no module any more.
        device: where its rows will be sent.

    Raises:
        ValueError: the table trains.
    """

    def __init__(self, table: nn.Embedding, device: torch.device) -> None:
        super().__init__()
        if table.weight.requires_grad:
            raise ValueError("tables: host for a table that trains; freeze it, or give tables: device")
        self.weight: Tensor = table.weight.detach().cpu()
        self._page_locked = device.type == "cuda"
        table.weight = nn.Parameter(table.weight.detach().new_empty(0, self.weight.shape[1]), False)
        # It would point behind the rows that are here, and matters to gradients only.
        table.padding_idx = None
        self.table = table

    def look_up(self, ids_BT: Tensor) -> Tensor:
        """Rows of the table [B, T, D] on the host for int64 ids [B, T] there."""
        rows_ND = torch.empty(
            ids_BT.numel(), self.weight.shape[1], dtype=self.weight.dtype, pin_memory=self._page_locked
        )
        torch.index_select(self.weight, 0, ids_BT.flatten(), out=rows_ND)
        return rows_ND.view(*ids_BT.shape, -1)

    def finish(self, rows_BTD: Tensor) -> Tensor:
        """What the module makes of the ids that these rows [B, T, D] were looked up for: scaled where it scales."""
        places_BT = torch.arange(rows_BTD[..., 0].numel(), device=rows_BTD.device).view(rows_BTD.shape[:-1])
        return functional_call(self.table, {"weight": rows_BTD.flatten(0, -2)}, (places_BT,))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Refuses: ids that come here would have to be read back from the device."""
        raise ValueError(
            "tables: host, but no rows came with these ids; make the batch with the task's `complete`"
        )


@dataclass(frozen=True, eq=False)
class LookedUpBatch(Batch):
    """A batch with rows of tables.

    rows: name of the table -> [B, T, D], what it has for the inputs. They stay on the host wherever the ids go, so that
        the device has them only while it reads them.
    """

    rows: Mapping[str, Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "LookedUpBatch":
        moved = super().to(device, non_blocking)
        return LookedUpBatch(moved.tokens_BT, moved.positions_BT, self.rows)

    def pin_memory(self) -> "LookedUpBatch":
        # The rows are where they should be since they were looked up.
        pinned = super().pin_memory()
        return LookedUpBatch(pinned.tokens_BT, pinned.positions_BT, self.rows)

    def part(self, index: int, count: int) -> "LookedUpBatch":
        own = super().part(index, count)
        rows = {name: table_BTD.chunk(count, 1)[index] for name, table_BTD in self.rows.items()}
        return LookedUpBatch(own.tokens_BT, own.positions_BT, rows)

    def split(self, parts: int) -> list[Batch]:
        whole = super().split(parts)
        rows = {name: table_BTD.chunk(parts) for name, table_BTD in self.rows.items()}
        return [
            LookedUpBatch(
                part.tokens_BT, part.positions_BT, {name: tables[index] for name, tables in rows.items()}
            )
            for index, part in enumerate(whole)
        ]


def check_apart(config: TeacherConfig) -> None:
    """See that a teacher has tables to leave on the host.

    Raises:
        ValueError: its embedding is its head too, and it has no table of per-layer inputs.
    """
    if config.tie_word_embeddings and not getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(
            "tables: host, but this model's only table is its head too, and the head is needed on the device; "
            "give tables: device"
        )


def leave_tables(student: HybridForCausalLM, device: torch.device) -> None:
    """Let a student's tables stay in host memory, in place; all but one that is the head too.

    Args:
        student: with frozen tables. What is not a table of its own may move afterwards.
        device: where it will compute.

    Raises:
        ValueError: see `check_apart` and `HostTable`.
    """
    check_apart(student.config.base())
    held = 0
    for name, module in list(student.model.named_children()):
        if isinstance(module, nn.Embedding) and module.weight is not student.lm_head.weight:
            assert name in (EMBEDDING, PER_LAYER)
            table = HostTable(module, device)
            setattr(student.model, name, table)
            held += table.weight.nbytes
    _logger.info("tables: %d bytes stay in host memory; a step's rows are sent to %s", held, device.type)


def host_tables(model: HybridModel) -> dict[str, HostTable]:
    """The tables of a model that are on the host, by name."""
    return {name: module for name, module in model.named_children() if isinstance(module, HostTable)}


def look_up(model: HybridModel, batch: Batch) -> Batch:
    """The batch, ids on the host, with the rows of all tables of the model that are there."""
    tables = host_tables(model)
    if not tables:
        return batch
    rows = {name: table.look_up(batch.inputs) for name, table in tables.items()}
    return LookedUpBatch(batch.tokens_BT, batch.positions_BT, rows)


def prepare(
    model: HybridModel,
    input_ids: Tensor,
    position_ids: Tensor,
    rows: Mapping[str, Tensor] | None,
    layer_types: Iterable[str] = (),
    part: Part | None = None,
) -> tuple[Tensor, Stream]:
    """`HybridModel.prepare` with the rows of tables that are on the host, by name; None where none are.

    Raises:
        ValueError: as there; tables are on the host and no rows are given.
    """
    tables = host_tables(model)
    made = {
        name: tables[name].finish(rows_BTD.to(input_ids.device, non_blocking=True))
        for name, rows_BTD in (rows or {}).items()
    }
    embedded_BTD, per_layer_BTD = made.get(EMBEDDING), made.get(PER_LAYER)
    if embedded_BTD is not None:
        refuse_media(input_ids, model.config.media_tokens())
    per_layer_BTLP = None
    if per_layer_BTD is not None:
        per_layer_BTLP = per_layer_BTD.unflatten(-1, (model.config.num_hidden_layers, -1))
    return model.prepare(
        input_ids if embedded_BTD is None else None,
        position_ids=position_ids,
        inputs_embeds=embedded_BTD,
        per_layer_inputs=per_layer_BTLP,
        layer_types=layer_types,
        part=part,
    )
