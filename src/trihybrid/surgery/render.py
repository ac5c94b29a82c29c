"""The plan as tables for a terminal."""

from typing import Any

from rich.table import Table

TOTALS = (
    ("parameters", "parameters"),
    ("active_parameters", "parameters that a token uses"),
    ("global_kv_bytes_per_token", "keys and values that grow, bytes a token"),
    ("recurrent_state_bytes", "recurrent state, bytes"),
    ("sliding_cache_bytes", "sliding windows, bytes"),
    ("score_flops_per_pair", "score FLOPs a query-key pair"),
)


def plan_tables(plan: dict[str, Any]) -> list[Table | str]:
    """Layer by layer, sources of new tensors, totals before and after, warnings."""
    return [_layers(plan), _sources(plan), _totals(plan), *(f"note: {line}" for line in plan["warnings"])]


def _layers(plan: dict[str, Any]) -> Table:
    table = Table(title=f"Plan for {plan['teacher']}")
    for name in ("layer", "before", "after"):
        table.add_column(name)
    for name in (
        "mixer parameters",
        "keys, values",
        "KV B/token",
        "state bytes",
        "window bytes",
        "FLOPs a token",
    ):
        table.add_column(name, justify="right")
    for layer, after in zip(plan["layers"], plan["after"]["layers"], strict=True):
        context, flops = next(iter(after["flops"].items()))
        table.add_row(
            str(layer["index"]),
            layer["before"],
            " + ".join(layer["after"]),
            f"{layer['parameters_after']:,}",
            layer["keys_values"],
            f"{after['kv_bytes_per_token']:,}",
            f"{after['recurrent_state_bytes']:,}",
            f"{after['sliding_cache_bytes']:,}",
            f"{flops:,}",
        )
    table.caption = f"FLOPs of matrix products at a context of {int(context):,}"
    return table


def _sources(plan: dict[str, Any]) -> Table:
    table = Table(title="What new tensors are made from")
    for name in ("layer", "tensor", "source"):
        table.add_column(name)
    for layer in plan["layers"]:
        for tensor, source in layer["sources"].items():
            table.add_row(str(layer["index"]), tensor, source)
    return table


def _totals(plan: dict[str, Any]) -> Table:
    table = Table(title="Totals")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for key, label in TOTALS:
        table.add_row(label, f"{plan['before'][key]:,}", f"{plan['after'][key]:,}")
    for context, before in plan["before"]["flops_per_token"].items():
        after = plan["after"]["flops_per_token"][context]
        table.add_row(f"FLOPs a token at {int(context):,}", f"{before:,}", f"{after:,}")
    for context, before in plan["before"]["bytes_read_per_token"].items():
        after = plan["after"]["bytes_read_per_token"][context]
        table.add_row(f"bytes read a token at {int(context):,}", f"{before:,}", f"{after:,}")
    return table
