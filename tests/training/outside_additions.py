"""A loss, tail policies and α schedules as someone else's package would bring them."""

import math

import torch

from megatron_pd.distill.losses import Loss, sum_of
from megatron_pd.distill.rows import Outcomes, Parts, Rows
from megatron_pd.distill.schedules import AlphaCurve
from megatron_pd.distill.tails import TailPolicy


def kl_terms(outcomes: Outcomes) -> torch.Tensor:
    return outcomes.log_t.exp() * (outcomes.log_t - outcomes.log_q)


def half_of_raw(rows: Rows) -> Parts:
    """The row with half of the mass that `raw` gives it."""
    shift = rows.tempered_log_mass - rows.log_mass + math.log(2)
    log_t = torch.where(rows.mask, rows.tempered_log_t - shift, 0.0)
    return (Outcomes(log_t, rows.tempered_log_q, rows.mask),)


def half_of_draws(rows: Rows) -> Parts:
    """The shares of the draws, halved."""
    return (Outcomes(torch.where(rows.mask, rows.log_t - math.log(2), 0.0), rows.log_q, rows.mask),)


my_kld = Loss(sum_of(kl_terms), "Σ t·log(t/q)", linear_in_teacher=True)
my_tail = TailPolicy(half_of_raw, "half of raw", "a·p/2 − t/2", "nothing", tempers_vocabulary=True)
my_draws = TailPolicy(half_of_draws, "half of the shares", "p/2 − t/2", "nothing", of_draws=True)
my_curve = AlphaCurve(lambda schedule, done: done**2, "the square of the share")
