"""Cutting work into pieces that stay in a core's cache, so that several plain torch operations in a row run from it."""

from __future__ import annotations

import torch

CPU_BLOCK, GPU_BLOCK = 1 << 19, 1 << 25
"""Elements worked on together: what the cores' shared cache holds a few times; what keeps a GPU busy."""


def runs(total: int, elements: int, device: torch.device) -> list[slice]:
    """Cut range(total) into runs, given how many elements each item has."""
    size = max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // max(elements, 1))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def tiles(rows: int, columns: int, elements: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Cut rows x columns, of `elements` each, into tiles: several whole rows, or parts of one."""
    if rows and len(groups := runs(rows, columns * elements, device)) < rows:
        return [(group, slice(0, columns)) for group in groups]
    parts = runs(columns, elements, device)
    return [(slice(row, row + 1), part) for row in range(rows) for part in parts]
