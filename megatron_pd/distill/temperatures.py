"""The teacher's temperature of each row, fixed or adaptive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.errors import UserError

if TYPE_CHECKING:
    from megatron_pd.distill.config import PDConfig

__all__ = ["row_temperature"]


def row_temperature(config: PDConfig, teacher: TeacherTargets) -> Tensor:
    """The teacher's temperature of each row, float32 [T, 1].

    The paper reports adaptive temperatures (Table 3) without its own formulas. Here, with c for
    `--pd-temperature` and the result of all but wttm held in [`--pd-adaptive-min`, `-max`]:

    - normkd: c · std of the teacher's logits (NormKD, arXiv 2308.00520), and the loss is multiplied
      by τ². That paper tempers the student by its own std too; the student here keeps
      `--pd-student-temperature`, as in this paper's Eq. 3 and 4.
    - wttm: c everywhere, and the loss is multiplied by U = Σ t^(1/c) over the row (WTTM, arXiv
      2402.11148, whose β is α / (1 − α) here).
    - adakd-sd, adakd-h: c + slope · std, and c + slope · entropy in nats. The formula is ours: only
      the statistics are known from the paper, by the methods' names.
    """
    constant = config.temperature
    match config.adaptive_temperature:
        case None | "wttm":
            return torch.full_like(teacher.counts, constant, dtype=torch.float32).unsqueeze(-1)
        case "normkd":
            tau_T = constant * _statistic(teacher.std, "standard deviation", config)
        case "adakd-sd":
            tau_T = constant + _slope(config) * _statistic(
                teacher.std, "standard deviation", config
            )
        case _:
            tau_T = constant + _slope(config) * _statistic(teacher.entropy, "entropy", config)
    return tau_T.float().clamp(config.adaptive_min, config.adaptive_max).unsqueeze(-1)


def _slope(config: PDConfig) -> float:
    assert config.adaptive_slope is not None
    return config.adaptive_slope


def _statistic(statistic_T: Tensor | None, name: str, config: PDConfig) -> Tensor:
    if statistic_T is None:
        raise UserError(
            f"--pd-adaptive-temperature {config.adaptive_temperature} needs the {name} of the "
            "teacher's distribution for each row, and the logit store has none. Dump the teacher "
            "again with its row statistics, or choose another temperature."
        )
    return statistic_T
