"""What distillation does in a run, for its log and its checkpoints, and what a resumed run changes.

It is kept among Megatron's own arguments, which every checkpoint holds.
"""

import argparse
import contextlib
import copy
import io
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_pd.distill.config import PDConfig, flag_of
from megatron_pd.distill.schedules import AlphaSchedule

__all__ = ["ResolvedConfig", "args_of_checkpoint", "changes", "resolved_config"]

ResolvedConfig = Mapping[str, Any]
"""What is shown → a plain JSON value; flags that are unset are None."""


def resolved_config(
    config: PDConfig, schedule: AlphaSchedule, total_samples: int
) -> ResolvedConfig:
    """The configuration, and what the run's length and learning rate make of the α schedule."""
    resolved: dict[str, Any] = {
        flag_of(option.name): list(value) if isinstance(value, tuple) else value
        for option in fields(config)
        for value in [getattr(config, option.name)]
    }
    resolved["samples of the run"] = total_samples
    for name, value in schedule.phases.items():
        resolved[f"α: {name}"] = value
    return resolved


def args_of_checkpoint(args: argparse.Namespace) -> argparse.Namespace | None:
    """Megatron's arguments as the checkpoint that `args.load` names has them.

    Returns:
        None where this run does not go on from a checkpoint. `pd_resolved` is the resolved config
        of the run that saved it, None where it had no distillation.
    """
    # Importing Megatron needs a prepared device (megatron/cpu.py), which the rest here does not.
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.load is None or args.finetune:
        return None
    own = copy.copy(args)
    own.exit_on_missing_checkpoint = False  # Megatron exits itself, on all ranks, when it loads
    # It also adopts the checkpoint's model sizes into `own`, which it says in 60 lines.
    with contextlib.redirect_stdout(io.StringIO()):
        found = load_args_from_checkpoint(own)
    if not isinstance(found, tuple):
        return None
    saved: argparse.Namespace = found[1]
    saved.pd_resolved = getattr(saved, "pd_resolved", None)
    return saved


def changes(old: ResolvedConfig | None, new: ResolvedConfig | None) -> list[str]:
    """What differs between two resolved configs, one sentence each; None is no distillation."""
    if old is None or new is None:
        if old is None and new is None:
            return []
        return [
            f"Distillation was {'off' if old is None else 'on'} and is now "
            f"{'on' if old is None else 'off'}."
        ]
    return [
        f"{name} was {_shown(old, name)} and is now {_shown(new, name)}."
        for name in [*new, *(name for name in old if name not in new)]
        if old.get(name) != new.get(name)
    ]


def _shown(resolved: ResolvedConfig, name: str) -> str:
    value = resolved.get(name)
    return "unset" if value is None else str(value)
