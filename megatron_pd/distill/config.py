"""What pre-training distillation does in a run: one frozen, validated PDConfig.

It is the one place that names an option, says what it does, gives its default and refuses what does
not fit; the --pd-* flags are made from its fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron_pd.distill.losses import LOSSES, Loss
from megatron_pd.distill.recipes import RECIPES
from megatron_pd.distill.schedules import ALPHA_SCHEDULES, DECAY_STYLES
from megatron_pd.distill.tails import TAILS, TailPolicy
from megatron_pd.distill.targets import check_truncation
from megatron_pd.errors import UserError
from megatron_pd.options import flag_name, option
from megatron_pd.registry import Registry

__all__ = ["ADAPTIVE_TEMPERATURES", "PDConfig", "flag_of"]

_DEFAULT_TAIL = "renormalize"
ADAPTIVE_TEMPERATURES = ("normkd", "wttm", "adakd-sd", "adakd-h")

# τ = temperature + slope · statistic: a peaked row (large std, small entropy) is softened more.
_ADAPTIVE_SLOPES = {"adakd-sd": 0.5, "adakd-h": -0.25}
_ADAPTIVE_BOUNDS = (0.5, 4.0)

# Of the --pd-alpha-* that an α curve may read; None follows the learning rate.
_PHASE_DEFAULTS = {"warmup": None, "decay": None, "decay_style": None, "period": 0.1}


def _described[Thing](registry: Registry[Thing], words: Callable[[Thing], str]) -> str:
    """All built-ins with `words` on each, for a flag's help."""
    return "; ".join(f"{name}: {words(registry.get(name))}" for name in registry) + "."


def _those[Thing](registry: Registry[Thing], fit: Callable[[Thing], bool]) -> str:
    """The built-ins that `fit`: "nll or kld"."""
    return " or ".join(name for name in registry if fit(registry.get(name)))


def _number_or_word(text: str) -> int | str:
    """PDConfig refuses the wrong words, with a sentence; argparse would name this function."""
    return int(text) if text.removeprefix("-").isdigit() else text


@dataclass(frozen=True)
class PDConfig:
    """What pre-training distillation does in this run; creating one validates it (UserError).

    A field that only some choices use (`jsd_beta`, the `alpha_*` lengths, the `adaptive_*`
    constants) is None unless it is in effect, so a setting that would do nothing is refused.
    """

    store: tuple[str, ...] | None = option(
        None,
        "Logit store of each --data-path prefix, in the same order. Default: <prefix>.pd beside "
        "each corpus.",
        nargs="+",
        metavar="PATH",
    )
    loss: str = option(
        "kld",
        "Divergence between the measures t of the teacher and q of the student, on the outcomes "
        "that --pd-tail defines. " + _described(LOSSES, lambda loss: loss.formula),
        choices=LOSSES,
    )
    tail: str = option(
        _DEFAULT_TAIL,
        "What becomes of the teacher's mass outside its row: the student's target, for a row of "
        "the tokens K, with log-probabilities ℓ and mass a. "
        + _described(TAILS, lambda tail: tail.target),
        choices=TAILS,
    )
    top_p: float | None = option(
        None,
        "Cut the stored rows to the smallest set with this full-vocabulary mass, in (0, 1]; the "
        "token that crosses it is kept. Default: all that is stored.",
        type=float,
    )
    top_k: int | None = option(
        None, "Then keep the top k entries. Default: all that is stored.", type=int
    )
    temperature: float = option(
        1.0,
        "Temperature τ of the teacher's row, applied after truncation (Eq. 4); the constant of "
        "--pd-adaptive-temperature.",
        type=float,
    )
    student_temperature: float = option(
        1.0, "Temperature of the student in the distillation loss (the paper's is 1).", type=float
    )
    tau_squared: bool = option(
        False, "Multiply the distillation loss, and so its gradient, by τ² of the teacher."
    )
    adaptive_temperature: str | None = option(
        None,
        "A temperature for each row: NormKD, WTTM, or AdaKD from the standard deviation (adakd-sd) "
        "or the entropy (adakd-h) of the teacher's distribution. All but wttm need that statistic "
        "in the store.",
        choices=ADAPTIVE_TEMPERATURES,
    )
    adaptive_slope: float | None = option(
        None,
        "adakd-*: τ = --pd-temperature + slope · statistic. Default: "
        f"{_ADAPTIVE_SLOPES['adakd-sd']} for adakd-sd, {_ADAPTIVE_SLOPES['adakd-h']} for adakd-h.",
        type=float,
    )
    adaptive_min: float | None = option(
        None,
        f"Lowest temperature of a row under normkd and adakd-*. Default: {_ADAPTIVE_BOUNDS[0]}.",
        type=float,
    )
    adaptive_max: float | None = option(
        None,
        f"Highest temperature of a row under normkd and adakd-*. Default: {_ADAPTIVE_BOUNDS[1]}.",
        type=float,
    )
    jsd_beta: float | None = option(
        None, "jsd: the teacher's weight β in the mixture, in (0, 1). Default: 0.5.", type=float
    )
    alpha: float = option(
        0.9,
        "Weight α of the distillation loss, L = (1 − α)·L_lm + α·L_kd; the highest one where it "
        "follows a schedule.",
        type=float,
    )
    alpha_schedule: str = option(
        "constant",
        "How α moves over the run. " + _described(ALPHA_SCHEDULES, lambda curve: curve.summary),
        choices=ALPHA_SCHEDULES,
    )
    alpha_min: float | None = option(None, "Lowest α of a schedule. Default: 0.", type=float)
    alpha_warmup: float | None = option(
        None,
        "wsd: length of α's rise; below 1 a share of the run, else a number of samples. Default: "
        "the warmup of a WSD learning rate, else 0.1.",
        type=float,
    )
    alpha_decay: float | None = option(
        None,
        "wsd: length of α's fall, likewise. Default: the decay of a WSD learning rate, else 0.01.",
        type=float,
    )
    alpha_decay_style: str | None = option(
        None,
        "wsd: curve of α's fall. Default: --lr-wsd-decay-style of a WSD learning rate, else "
        "cosine.",
        choices=DECAY_STYLES,
    )
    alpha_period: float | None = option(
        None,
        "period: length of one cycle, a cosine from the lowest α up and back; below 1 a share of "
        "the run, else a number of samples. Default: 0.1.",
        type=float,
    )
    recipe: str | None = option(
        None,
        "A combination that fills in whatever the command line leaves open: the paper's pd-star, "
        "vanilla and online, or robust, which did best in our own runs (docs/losses.md).",
        choices=tuple(RECIPES),
    )
    loss_chunk_tokens: int | Literal["auto"] | None = option(
        None,
        "Compute the output layer, the losses and their gradient for so many tokens at a time, so "
        "that the logits of the rest never exist; a float32 gradient of the layer's weight does. "
        "auto: 2048 where that takes less memory, by the sizes of the micro-batch and the model, "
        "else all at once. Default: all at once.",
        type=_number_or_word,
    )

    def __post_init__(self) -> None:
        if self.store is not None:
            object.__setattr__(self, "store", tuple(self.store))
        _check_choices(self)
        _fill_dependent_fields(self)
        check_truncation(self.top_p, self.top_k)
        _check_temperatures(self)
        _check_alpha(self)
        _check_combinations(self)

    @property
    def divergence(self) -> Loss:
        """The loss that `loss` names."""
        return LOSSES.get(self.loss)

    @property
    def tail_policy(self) -> TailPolicy:
        """The policy that `tail` names."""
        return TAILS.get(self.tail)

    @property
    def row_statistic(self) -> str | None:
        """The per-row statistic that the adaptive temperature reads, if it reads one."""
        return {"normkd": "std", "adakd-sd": "std", "adakd-h": "entropy"}.get(
            self.adaptive_temperature or ""
        )

    @property
    def needs_tempered_student(self) -> bool:
        """Whether the loss needs the student's full-vocabulary log-softmax at
        `student_temperature` beside the one at 1: not where only the row is tempered."""
        return (
            self.student_temperature != 1.0
            and self.tail_policy.tempers_vocabulary
            and self.divergence.uses_tail
        )


def flag_of(name: str) -> str:
    """The command-line flag of a PDConfig field."""
    return flag_name("pd", name)


# ------------------------------------------------------------------------------ validation


def _check_choices(config: PDConfig) -> None:
    for chosen in fields(config):
        choices = chosen.metadata["flag"].get("choices")
        value = getattr(config, chosen.name)
        if not choices or value is None:
            continue
        if value not in choices:
            raise UserError(
                f"{flag_of(chosen.name)} is {value!r}; it must be one of {', '.join(choices)}"
                + (", or your own as package.module:attribute." if _is_open(choices) else ".")
            )
        if _is_open(choices):
            try:
                choices.get(value)
            except UserError as error:
                raise UserError(f"{flag_of(chosen.name)}: {error}") from error


def _is_open(choices: Any) -> bool:
    """Whether what can be imported is a choice too."""
    return isinstance(choices, Registry)


def _fill_dependent_fields(config: PDConfig) -> None:
    """Give each field that is in effect its default; refuse one that is set and is not."""
    adaptive = config.adaptive_temperature
    phases = ALPHA_SCHEDULES.get(config.alpha_schedule).phases
    losses_with_beta = _those(LOSSES, lambda loss: loss.uses_beta)
    in_effect: dict[str, tuple[bool, str, Any]] = {
        "jsd_beta": (config.divergence.uses_beta, f"--pd-loss {losses_with_beta}", 0.5),
        "alpha_min": (
            config.alpha_schedule != "constant",
            "an --pd-alpha-schedule that moves",
            0.0,
        ),
        "adaptive_slope": (
            adaptive in _ADAPTIVE_SLOPES,
            "--pd-adaptive-temperature adakd-sd or adakd-h",
            _ADAPTIVE_SLOPES.get(adaptive or ""),
        ),
    }
    for phase, default in _PHASE_DEFAULTS.items():
        curves = f"--pd-alpha-schedule {_curves_reading(phase)}"
        in_effect[f"alpha_{phase}"] = (phase in phases, curves, default)
    for bound, default in zip(("adaptive_min", "adaptive_max"), _ADAPTIVE_BOUNDS, strict=True):
        in_effect[bound] = (
            adaptive not in (None, "wttm"),
            "--pd-adaptive-temperature normkd, adakd-sd or adakd-h",
            default,
        )
    for name, (used, user, default) in in_effect.items():
        value = getattr(config, name)
        if value is not None and not used:
            raise UserError(
                f"{flag_of(name)} is {value}, which nothing uses: it belongs to {user}. Leave it "
                "out or choose that."
            )
        if value is None and used:
            object.__setattr__(config, name, default)


def _curves_reading(phase: str) -> str:
    return _those(ALPHA_SCHEDULES, lambda curve: phase in curve.phases)


def _check_temperatures(config: PDConfig) -> None:
    for name in ("temperature", "student_temperature", "adaptive_min", "adaptive_max"):
        value = getattr(config, name)
        # adakd-* adds the slope's part to it, so there the constant may be 0 or less.
        is_offset = name == "temperature" and config.adaptive_temperature in _ADAPTIVE_SLOPES
        if value is not None and (not math.isfinite(value) or (value <= 0 and not is_offset)):
            raise UserError(f"{flag_of(name)} is {value}; a temperature must be a number above 0.")
    low, high = config.adaptive_min, config.adaptive_max
    if low is not None and high is not None and low > high:
        raise UserError(
            f"--pd-adaptive-min is {low} and --pd-adaptive-max {high}; the first must not be the "
            "larger one."
        )


def _check_alpha(config: PDConfig) -> None:
    for name in ("alpha", "alpha_min"):
        value = getattr(config, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise UserError(
                f"{flag_of(name)} is {value}; α weighs two losses against each other and must lie "
                "in [0, 1]."
            )
    if config.alpha_min is not None and config.alpha_min > config.alpha:
        raise UserError(
            f"--pd-alpha-min is {config.alpha_min} and --pd-alpha, the highest α, is only "
            f"{config.alpha}; give the smaller one to --pd-alpha-min."
        )
    for name in ("alpha_warmup", "alpha_decay", "alpha_period"):
        value = getattr(config, name)
        if value is not None and (not math.isfinite(value) or value < 0):
            raise UserError(
                f"{flag_of(name)} is {value}; give a share of the run below 1, or a number of "
                "samples."
            )
        if value is not None and value >= 1 and value != int(value):
            raise UserError(
                f"{flag_of(name)} is {value}; from 1 on it is a number of samples and must be "
                "whole. Below 1 it is a share of the run."
            )
    if config.alpha_period == 0:
        raise UserError("--pd-alpha-period is 0; a cycle must take some time.")
    chunk = config.loss_chunk_tokens
    if not (chunk in (None, "auto") or (isinstance(chunk, int) and chunk >= 1)):
        raise UserError(
            f"--pd-loss-chunk-tokens is {chunk}; it is auto, or the tokens of a chunk, 1 or more. "
            "Leave it out to compute all tokens at once."
        )


def _check_combinations(config: PDConfig) -> None:
    if config.jsd_beta is not None and not 0.0 < config.jsd_beta < 1.0:
        raise UserError(
            f"--pd-jsd-beta is {config.jsd_beta}; it must lie in (0, 1). At the ends the "
            "divergence is 0 everywhere: use --pd-loss kld or reverse-kld for what it tends to."
        )
    if config.tail_policy.of_draws:
        _check_sampled(config)
    elif not config.divergence.uses_tail and config.tail != _DEFAULT_TAIL:
        raise UserError(
            f"--pd-tail is {config.tail}, and --pd-loss {config.loss} compares the two sides on "
            "the kept tokens alone, so the tail has no part in it. Leave --pd-tail out."
        )
    if config.tau_squared and config.adaptive_temperature in ("normkd", "wttm"):
        raise UserError(
            f"--pd-tau-squared with --pd-adaptive-temperature {config.adaptive_temperature} would "
            "weigh a row twice: that method has a weight of its own (normkd τ², wttm U). Leave "
            "--pd-tau-squared out."
        )


def _check_sampled(config: PDConfig) -> None:
    reason = (
        f"--pd-tail {config.tail} reads rows of random draws, whose gradient is the dense one on "
        "average only for a loss linear in the draws at temperature 1"
    )
    source = f" (or --pd-recipe {config.recipe}, which may have set them)" if config.recipe else ""
    if not config.divergence.linear_in_teacher:
        linear = _those(LOSSES, lambda loss: loss.linear_in_teacher)
        raise UserError(
            f"{reason}; --pd-loss is {config.loss}. Choose {linear}, or another --pd-tail with a "
            "top-p-k store."
        )
    if config.temperature != 1.0 or config.adaptive_temperature or config.student_temperature != 1:
        raise UserError(
            f"{reason}. Leave out --pd-temperature, --pd-student-temperature and "
            f"--pd-adaptive-temperature{source}."
        )
    if config.top_p not in (None, 1.0) or config.top_k is not None:
        raise UserError(f"{reason}. Leave out --pd-top-p and --pd-top-k{source}.")
