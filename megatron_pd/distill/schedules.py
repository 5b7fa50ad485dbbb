"""The weight α of the distillation loss over a run, L = (1 − α)·L_lm + α·L_kd.

α is a pure function of the share of the run that is done, step / total_steps. Megatron counts both
in consumed samples, so a resumed run, batch-size ramp-up or another parallel layout meets the same
α at the same sample. The learning rate's schedule is Megatron's own; `wsd` has its four decay
curves, so that α can follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_pd.errors import UserError
from megatron_pd.registry import Registry

__all__ = ["ALPHA_SCHEDULES", "DECAY_STYLES", "PHASES", "AlphaCurve", "AlphaSchedule", "alpha_at"]

PHASES = ("warmup", "decay", "decay_style", "end", "period")
"""The fields of AlphaSchedule that shape a curve between `min` and `max`."""

DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


@dataclass(frozen=True)
class AlphaSchedule:
    """An α curve; lengths are shares of the run, so that it fits any unit of steps."""

    kind: str
    """A name in ALPHA_SCHEDULES, or the `package.module:attribute` of an AlphaCurve."""

    max: float
    """The highest α, in [0, 1]; the value of `constant`."""

    min: float = 0.0
    """The lowest α: where `wsd` starts and ends, and the other end of the linear schedules."""

    warmup: float = 0.0
    """`wsd`: share of the run over which α rises linearly from min to max."""

    decay: float = 0.0
    """`wsd`: share of the run over which α falls back to min."""

    decay_style: str = "cosine"
    """`wsd`: one of DECAY_STYLES, the curves of Megatron's --lr-wsd-decay-style."""

    end: float = 1.0
    """`wsd`: share of the run at which the decay is over (below 1 where --lr-decay-iters is below
    --train-iters)."""

    period: float = 0.1
    """`period`: share of the run that one cycle takes."""

    @property
    def phases(self) -> dict[str, float | str]:
        """The fields that shape this kind of curve, beside max and min."""
        return {name: getattr(self, name) for name in ALPHA_SCHEDULES.get(self.kind).phases}

    def __post_init__(self) -> None:
        if self.warmup + self.decay > self.end + 1e-12:
            raise UserError(
                f"The α schedule needs more steps than there are: its warmup takes "
                f"{self.warmup:.4g} of the run and its decay {self.decay:.4g}, together more than "
                f"the {self.end:.4g} that it has. Give a smaller --pd-alpha-warmup or "
                "--pd-alpha-decay (or the --lr-warmup-* and --lr-wsd-decay-* that they follow), "
                "or train longer."
            )


def alpha_at(schedule: AlphaSchedule, step: int, total_steps: int) -> float:
    """α after `step` of `total_steps`, both in consumed samples (or both in iterations).

    Beyond the end of the run the last value holds.

    Raises:
        UserError: a run without steps, or a kind of schedule that there isn't.
    """
    if total_steps < 1:
        raise UserError(f"The run has {total_steps} steps; α needs a run of at least one.")
    done = min(max(step, 0) / total_steps, 1.0)
    height = ALPHA_SCHEDULES.get(schedule.kind).height(schedule, done)
    return schedule.min + (schedule.max - schedule.min) * height


@dataclass(frozen=True)
class AlphaCurve:
    """A choice of --pd-alpha-schedule."""

    height: Callable[[AlphaSchedule, float], float]
    """(schedule, share of the run that is done, in [0, 1]) → where α stands between its lowest (0)
    and its highest value (1)."""

    summary: str
    """The curve in words, for the help and the docs."""

    phases: tuple[str, ...] = ()
    """The PHASES that it reads: their --pd-alpha-* flags are refused where a curve doesn't, and
    those of `wsd` follow the learning rate's WSD schedule."""

    def __post_init__(self) -> None:
        if unknown := set(self.phases) - set(PHASES):
            raise UserError(
                f"An α curve reads the phases {', '.join(sorted(unknown))}, and there are only "
                f"{', '.join(PHASES)}."
            )


def _period_height(schedule: AlphaSchedule, done: float) -> float:
    return 0.5 * (1.0 - math.cos(2.0 * math.pi * done / schedule.period))


def _wsd_height(schedule: AlphaSchedule, done: float) -> float:
    if done < schedule.warmup:
        return done / schedule.warmup
    decay_start = schedule.end - schedule.decay
    if done <= decay_start:
        return 1.0
    if done >= schedule.end:
        return 0.0
    return _decay_height(schedule.decay_style, (done - decay_start) / schedule.decay)


def _decay_height(style: str, ratio: float) -> float:
    """Megatron 0.19's WSD curves (core/optimizer_param_scheduler.py, get_lr)."""
    match style:
        case "linear":
            return 1.0 - ratio
        case "cosine":
            return 0.5 * (math.cos(math.pi * ratio) + 1.0)
        case "exponential":
            return 2.0 * math.pow(0.5, ratio) - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(ratio)
    raise UserError(f"There is no decay style {style!r}; choose one of {', '.join(DECAY_STYLES)}.")


ALPHA_SCHEDULES: Registry[AlphaCurve] = Registry("α schedule", AlphaCurve)
ALPHA_SCHEDULES.add("constant", AlphaCurve(lambda schedule, done: 1.0, "the highest α throughout"))
ALPHA_SCHEDULES.add(
    "linear-increase", AlphaCurve(lambda schedule, done: done, "from the lowest to the highest α")
)
ALPHA_SCHEDULES.add(
    "linear-decrease",
    AlphaCurve(lambda schedule, done: 1.0 - done, "from the highest to the lowest α"),
)
ALPHA_SCHEDULES.add(
    "period",
    AlphaCurve(
        _period_height,
        "cosine cycles, from the lowest α up and back in `--pd-alpha-period`",
        ("period",),
    ),
)
ALPHA_SCHEDULES.add(
    "wsd",
    AlphaCurve(
        _wsd_height,
        "linear warmup, stable, decay, with the phases of the learning rate's own WSD schedule "
        "where it has one",
        ("warmup", "decay", "decay_style", "end"),
    ),
)
