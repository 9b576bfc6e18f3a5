"""What `pi-attention plan --goal` prints."""

from __future__ import annotations

from rich.table import Table

from pi_attention.units import in_flops


def table_of_goals(title: str, costs: dict[str, dict[str, int]], chosen: str) -> Table:
    """What the forms of all goals cost.

    Args:
        title: of the table.
        costs: by goal, as `accounting.stack_cost` has them.
        chosen: the goal that was asked for.
    """
    made = Table("goal", "attention", "of dense", "decoding cache", "of dense", title=title)
    for goal, cost in costs.items():
        made.add_row(
            f"{goal} (chosen)" if goal == chosen else goal,
            in_flops(cost["flops"]),
            f"{cost['flops'] / cost['dense flops']:.2%}",
            f"{cost['cache bytes'] / 2**20:,.1f} MiB",
            f"{cost['cache bytes'] / cost['dense cache bytes']:.2%}",
        )
    return made
