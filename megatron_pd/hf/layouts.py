"""How Megatron lays one tensor out of several: attention's queries, keys and values, and SwiGLU's.

R rows of a part, along its first axis; G query groups.
"""

from collections.abc import Sequence

import torch

__all__ = ["join", "split"]


def join(parts: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """[R_i, …] each → [Σ R_i, …]: the first group of every part, then the second of every part, ….

    For attention a group is some query heads, their key head and their value head. With one group,
    the parts lie one after another.
    """
    if len(parts) == 1:
        return parts[0]
    by_group = [part.unflatten(0, (groups, part.shape[0] // groups)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def split(whole: torch.Tensor, rows: Sequence[int], groups: int) -> list[torch.Tensor]:
    """What `join` was given, of `rows` rows each."""
    by_group = whole.unflatten(0, (groups, sum(rows) // groups))
    parts = by_group.split([count // groups for count in rows], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]
