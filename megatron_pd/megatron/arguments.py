"""The --pd-* flags in Megatron's argument system, and what a run's arguments make of them."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.schedules import ALPHA_SCHEDULES, AlphaSchedule
from megatron_pd.errors import UserError
from megatron_pd.megatron.recipe_parser import RecipeParser
from megatron_pd.options import add_options, given_options

__all__ = [
    "HelpFormatter",
    "add_pd_arguments",
    "pd_config_from_args",
    "resolve_schedule",
    "total_samples",
]


def add_pd_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --pd-* group: Megatron's `extra_args_provider`.

    Returns a parser with all of `parser`'s arguments that also fills in what --pd-recipe says.
    """
    group = parser.add_argument_group(title="pre-training distillation")
    group.add_argument(
        "--pd",
        action="store_true",
        help="Distil with the defaults below; any other --pd-* flag turns it on too.",
    )
    add_options(group, PDConfig, "pd")
    return RecipeParser(
        parents=[parser], add_help=False, allow_abbrev=False, formatter_class=HelpFormatter
    )


class HelpFormatter(argparse.HelpFormatter):
    """Prints help texts of Megatron 0.19 that hold a bare % as they are; argparse would raise."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def pd_config_from_args(args: argparse.Namespace) -> PDConfig | None:
    """The configuration that the flags ask for, or None where there is no --pd flag.

    Raises:
        UserError: naming the flag that does not fit and what to give instead.
    """
    given = given_options(args, PDConfig, "pd")
    if not given and not getattr(args, "pd", False):
        return None
    return PDConfig(**given)


# ------------------------------------------------------------------------------ α over a run


def total_samples(args: argparse.Namespace) -> int:
    """Samples of the whole run, as Megatron 0.19's scheduler counts them."""
    if args.train_samples:
        return args.train_samples
    if args.train_iters:
        return args.train_iters * args.global_batch_size
    raise UserError(
        "The run has no length, and the α schedule needs one: give --train-iters or "
        "--train-samples."
    )


def resolve_schedule(config: PDConfig, args: argparse.Namespace) -> AlphaSchedule:
    """The α schedule of this run, from validated Megatron arguments.

    Use it as `alpha_at(schedule, args.consumed_train_samples, total_samples(args))`.

    Raises:
        UserError: where warmup and decay need more samples than the run has.
    """
    total = total_samples(args)
    schedule: dict[str, Any] = {
        "kind": config.alpha_schedule,
        "max": config.alpha,
        "min": config.alpha_min or 0.0,
    }
    curve = ALPHA_SCHEDULES.get(config.alpha_schedule)
    if "period" in curve.phases:
        schedule["period"] = _share(config.alpha_period, total)
    if {"warmup", "decay"} & set(curve.phases):
        phases = _lr_phases(args, total)
        if config.alpha_warmup is not None:
            phases["warmup"] = _share(config.alpha_warmup, total)
        if config.alpha_decay is not None:
            phases["decay"] = _share(config.alpha_decay, total)
        if config.alpha_decay_style is not None:
            phases["decay_style"] = config.alpha_decay_style
        schedule.update(phases)
    return AlphaSchedule(**schedule)


def _share(length: float | None, total: int) -> float:
    assert length is not None
    return length if length < 1 else length / total


def _lr_phases(args: argparse.Namespace, total: int) -> dict[str, Any]:
    """The phases of a WSD learning rate, by the formulas of Megatron 0.19's
    get_optimizer_param_scheduler; else those reported for the paper (10% warmup, 1% decay)."""
    if args.lr_decay_style != "WSD":
        return {"warmup": 0.1, "decay": 0.01, "decay_style": "cosine", "end": 1.0}
    if args.train_samples:
        unit = 1
        end, decay = args.lr_decay_samples or args.train_samples, args.lr_wsd_decay_samples
        warmup = args.lr_warmup_samples
    else:
        unit = args.global_batch_size
        end, decay = args.lr_decay_iters or args.train_iters, args.lr_wsd_decay_iters
        warmup = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * end
    if decay is None:
        raise UserError(
            "--lr-decay-style is WSD and the length of its decay is not given, so α cannot follow "
            "it: give --lr-wsd-decay-iters (or --lr-wsd-decay-samples with --train-samples)."
        )
    return {
        "warmup": warmup * unit / total,
        "decay": decay * unit / total,
        "decay_style": args.lr_wsd_decay_style,
        "end": end * unit / total,
    }
