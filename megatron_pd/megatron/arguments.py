"""The --pd-* flags in Megatron's argument system, and what a run's arguments make of them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from types import SimpleNamespace
from typing import Any, Protocol

from megatron_pd.distill.config import PDConfig, flag_of
from megatron_pd.distill.schedules import ALPHA_SCHEDULES, AlphaSchedule
from megatron_pd.errors import UserError
from megatron_pd.megatron.recipe_parser import RecipeParser
from megatron_pd.options import add_options, given_options

__all__ = [
    "HelpFormatter",
    "LearningRate",
    "add_pd_arguments",
    "learning_rate_of_flags",
    "lm_config_from_args",
    "pd_config_from_args",
    "resolve_schedule",
    "total_samples",
]


_LM_OPTIONS = ("loss_chunk_tokens",)


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
    group.add_argument(
        "--pd-lm-only",
        action="store_true",
        help="Train on the LM loss alone, without teacher and store, by the kernels that distil: "
        "the baseline of a comparison like with like. Of the other --pd-* flags it takes "
        "--pd-loss-chunk-tokens.",
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
    if getattr(args, "pd_lm_only", False):
        others = [flag_of(name) for name in given if name not in _LM_OPTIONS]
        others += ["--pd"] * bool(args.pd)
        if others:
            raise UserError(
                f"--pd-lm-only trains without a teacher, and {', '.join(others)} would distil from "
                "one: drop --pd-lm-only or the rest."
            )
        return None
    if not given and not getattr(args, "pd", False):
        return None
    return PDConfig(**given)


def lm_config_from_args(args: argparse.Namespace) -> PDConfig | None:
    """How a micro-batch without a teacher gets its LM loss here; None where Megatron gives it."""
    if not args.pd_lm_only and pd_config_from_args(args) is None:
        return None
    given = given_options(args, PDConfig, "pd")
    return PDConfig(**{name: given[name] for name in _LM_OPTIONS if name in given})


# ------------------------------------------------------------------------------ α over a run


class LearningRate(Protocol):
    """Megatron's OptimizerParamScheduler, whose steps are samples."""

    num_steps: int
    lr_decay_style: str
    lr_warmup_steps: float
    lr_decay_steps: int
    wsd_decay_steps: int | None
    lr_wsd_decay_style: str | None


def learning_rate_of_flags(args: argparse.Namespace) -> LearningRate:
    """The learning rate's schedule that Megatron makes of validated arguments, before any step.

    A checkpoint may replace its phases: see `--use-checkpoint-opt-param-scheduler`.

    Raises:
        UserError: WSD without the length of its decay, or a run without a length.
    """
    # Importing Megatron needs a prepared device (megatron/cpu.py), which the rest here does not.
    from megatron.training import training
    from megatron.training.global_vars import set_args

    total_samples(args)
    unit = "iters" if args.train_iters else "samples"
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise UserError(
            f"--lr-decay-style is WSD and the length of its decay is not given: give "
            f"--lr-wsd-decay-{unit}, which goes with --train-{unit}."
        )
    own = copy.copy(args)  # Megatron fills in what is left open, and would not do it twice alike
    set_args(own)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    finally:
        set_args(args)


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


def resolve_schedule(config: PDConfig, scheduler: LearningRate, total: int) -> AlphaSchedule:
    """The α schedule of a run of `total` samples.

    Use it as `alpha_at(schedule, scheduler.num_steps, total)`.

    Args:
        scheduler: the learning rate's; where it is on WSD, an α on "wsd" has its phases.
    Raises:
        UserError: where warmup and decay need more samples than the run has.
    """
    reads = set(ALPHA_SCHEDULES.get(config.alpha_schedule).phases)
    phases = _lr_phases(scheduler, total) if reads - {"period"} else {}
    for name in ("warmup", "decay", "period"):
        length = getattr(config, f"alpha_{name}")
        if length is not None:
            phases[name] = length if length < 1 else length / total
    if config.alpha_decay_style is not None:
        phases["decay_style"] = config.alpha_decay_style
    return AlphaSchedule(
        config.alpha_schedule,
        max=config.alpha,
        min=config.alpha_min or 0.0,
        **{name: value for name, value in phases.items() if name in reads},
    )


def _lr_phases(scheduler: LearningRate, total: int) -> dict[str, Any]:
    """The phases of a WSD learning rate; else the paper's, 10% warmup and 1% decay."""
    if scheduler.lr_decay_style != "WSD":
        return {"warmup": 0.1, "decay": 0.01, "decay_style": "cosine", "end": 1.0}
    assert scheduler.wsd_decay_steps is not None
    return {
        "warmup": scheduler.lr_warmup_steps / total,
        "decay": scheduler.wsd_decay_steps / total,
        "decay_style": scheduler.lr_wsd_decay_style,
        "end": scheduler.lr_decay_steps / total,
    }
