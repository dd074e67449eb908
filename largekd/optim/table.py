"""The learning-rate groups as a table for people and as records for files."""

from collections.abc import Sequence
from typing import Any

from largekd.optim.groups import ParameterGroup


def describe_groups(groups: Sequence[ParameterGroup], *, state_bytes: int) -> str:
    """A table for the log; `state_bytes` is the optimizer's state per element that learns."""
    rows = [("group", "lr x", "decay", "betas", "tensors", "elements", "share", "optimizer bytes")]
    for record in group_records(groups, state_bytes=state_bytes):
        betas = "/".join(f"{beta:g}" for beta in record["betas"])
        rows.append(
            (
                record["group"],
                "frozen" if record["lr_multiplier"] == 0 else f"{record['lr_multiplier']:.4g}",
                f"{record['weight_decay']:g}" if record["lr_multiplier"] else "-",
                betas if record["lr_multiplier"] else "-",
                str(record["tensors"]),
                f"{record['elements']:,}",
                f"{100 * record['share']:.2f} %",
                f"{record['optimizer_bytes']:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def group_records(groups: Sequence[ParameterGroup], *, state_bytes: int) -> list[dict[str, Any]]:
    """One JSON value per group, with the names of its parameters; bytes are over all ranks."""
    total = sum(group.numel for group in groups)
    return [
        {
            "group": group.name,
            "lr_multiplier": group.lr_multiplier,
            "weight_decay": group.weight_decay,
            "betas": list(group.betas),
            "eps": group.eps,
            "tensors": len(group.parameters),
            "elements": group.numel,
            "share": group.numel / total,
            "optimizer_bytes": 0 if group.is_frozen else group.numel * state_bytes,
            "parameters": list(group.parameter_names),
        }
        for group in groups
    ]


def group_differences(earlier: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """What differs between two lists of records, one line each."""
    old, new = ({record["group"]: record for record in records} for records in (earlier, now))
    lines = [f"{name}: is new" for name in new if name not in old]
    lines += [f"{name}: is gone" for name in old if name not in new]
    for name in (name for name in new if name in old):
        for key in ("lr_multiplier", "weight_decay", "betas", "eps"):
            if old[name][key] != new[name][key]:
                lines.append(f"{name}.{key}: {old[name][key]} -> {new[name][key]}")
        moved = sorted(set(old[name]["parameters"]) ^ set(new[name]["parameters"]))
        if moved:
            lines.append(f"{name}: {len(moved)} parameters came or went, such as {moved[0]}")
    return lines
