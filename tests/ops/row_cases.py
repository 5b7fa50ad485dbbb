"""Teacher rows, students and configurations for tests of `row_divergence`."""

from dataclasses import dataclass

import torch
from agreement import DEVICE
from hypothesis import strategies as st
from torch import Tensor

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.losses import LOSSES
from megatron_pd.distill.tails import TAILS
from megatron_pd.distill.targets import TeacherTargets, sample, top_p_k
from megatron_pd.ops import FUSED_LOSSES, FUSED_TAILS


@dataclass(repr=False)
class RowCase:
    """One call of the loss: rows [T, K], the student's log-probabilities in float64."""

    config: PDConfig
    teacher: TeacherTargets
    log_q_TK: Tensor
    label_log_q_T: Tensor
    labels_T: Tensor


@st.composite
def configs(draw: st.DrawFn) -> PDConfig:
    """Any configuration of a student at temperature 1 that the operator knows."""
    tail = draw(st.sampled_from(FUSED_TAILS), label="tail")
    if TAILS.get(tail).of_draws:
        linear = [name for name in FUSED_LOSSES if LOSSES.get(name).linear_in_teacher]
        return PDConfig(tail=tail, loss=draw(st.sampled_from(linear), label="loss"))
    loss = draw(st.sampled_from(FUSED_LOSSES), label="loss")
    uses_beta = LOSSES.get(loss).uses_beta
    beta = draw(st.sampled_from([0.1, 0.5, 0.8]), label="β") if uses_beta else None
    temperature = draw(st.sampled_from([1.0, 0.5, 2.0, 1.3]), label="τ")
    method = draw(st.sampled_from([None, None, "normkd", "wttm", "adakd-h"]), label="adaptive")
    squared = method is None and draw(st.booleans(), label="τ²")
    return PDConfig(
        tail=tail,
        loss=loss,
        jsd_beta=beta,
        temperature=temperature,
        adaptive_temperature=method,
        tau_squared=squared,
    )


@st.composite
def row_cases(draw: st.DrawFn) -> RowCase:
    """Rows of any length up to 70, some of them empty, some labels on them."""
    config = draw(configs())
    torch.manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    leading = draw(st.sampled_from([(), (5,), (3, 2), (0,)]), label="leading")
    columns = draw(st.integers(0, 70), label="K")
    spread = draw(st.sampled_from([0.5, 2.0, 6.0]), label="spread")
    vocab_size = columns + draw(st.integers(1, 50), label="off the row")
    teacher = random_rows(leading, vocab_size, columns, spread, config.tail_policy.of_draws)
    log_q_V = torch.log_softmax(torch.randn(*leading, vocab_size).double() * spread, dim=-1)
    labels = torch.randint(vocab_size, leading)
    if columns and draw(st.booleans(), label="labels on the row"):
        labels = teacher.ids[..., 0].long().clamp(min=0)
    log_q = log_q_V.gather(-1, teacher.ids.long().clamp(min=0))
    # Whatever padding holds has to be ignored.
    log_q = torch.where(teacher.mask, log_q, -3.0)
    label_log_q = log_q_V.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return RowCase(config, teacher, log_q, label_log_q, labels)


def random_rows(
    leading: tuple[int, ...], vocab_size: int, columns: int, spread: float, sampled: bool
) -> TeacherTargets:
    logits = torch.randn(*leading, vocab_size) * spread
    if columns == 0:
        rows = top_p_k(logits, 0.9, 1).map(lambda x: x[..., :0] if x.dim() > len(leading) else x)
    else:
        rows = sample(logits, columns) if sampled else top_p_k(logits, 0.95, columns)
    keep = (torch.rand(leading) > 0.2) & (columns > 0)
    return TeacherTargets(
        torch.where(keep.unsqueeze(-1), rows.ids, -1),
        torch.where(keep.unsqueeze(-1), rows.logprobs, 0.0),
        torch.where(keep, rows.counts, 0),
        entropy=torch.rand(leading) * 4,
        std=torch.rand(leading) + 1,
    ).to(DEVICE)
