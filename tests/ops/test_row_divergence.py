"""row_divergence against the loss that PyTorch composes, and against finite differences."""

import pytest
import torch
from agreement import ON_GPU
from hypothesis import given, settings
from row_cases import RowCase, random_rows, row_cases
from torch import Tensor

from megatron_pd.distill.objective import composed_loss, distillation_loss
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.ops import FUSED_LOSSES, FUSED_TAILS, row_divergence
from megatron_pd.ops.library import operators


def solve(loss_of, case: RowCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row and the two gradients of a random combination of them."""
    log_q = case.log_q_TK.detach().to(dtype).requires_grad_()
    label_log_q = case.label_log_q_T.detach().to(dtype).requires_grad_()
    loss = loss_of(case.config, case.teacher, log_q, label_log_q, case.labels_T)
    assert loss.dtype == dtype and loss.shape == case.labels_T.shape
    weights = torch.linspace(0.5, 2.0, loss.numel(), dtype=dtype).view(loss.shape)
    (loss * weights).sum().backward()
    zero = torch.zeros_like(label_log_q)
    return loss.detach(), log_q.grad, zero if label_log_q.grad is None else label_log_q.grad


def has_next_to_no_tail(case: RowCase) -> Tensor:
    """bool [T], where the rounding of the student's tail 1 − P is what float32 results show.

    tests/distill/test_losses.py has such rows: test_a_student_without_a_tail_is_pushed_off_the_row.
    """
    uses_tail = case.config.tail in ("ghost", "decoupled")
    mass_T = torch.where(case.teacher.mask, case.log_q_TK.exp(), 0.0).sum(-1)
    return (1 - mass_T < 0.05) & uses_tail


@given(row_cases())
@settings(max_examples=300, deadline=None)
def test_is_what_pytorch_composes(case: RowCase) -> None:
    expected = solve(composed_loss, case, torch.float64)
    if not ON_GPU:
        got = solve(distillation_loss, case, torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    got = solve(distillation_loss, case, torch.float32)
    # The teacher's tail 1 − a is exact to float32's rounding of 1, however small it is.
    rtol = 2e-4 + 2e-7 / smallest_tail(case.teacher)
    keep = ~has_next_to_no_tail(case)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double()[keep], other[keep], rtol=rtol, atol=2e-5)


def smallest_tail(teacher: TeacherTargets) -> float:
    """Of the rows whose tail counts: below 1e-5 it is taken for rounding."""
    masses = torch.where(teacher.mask, teacher.logprobs.double().exp(), 0.0).sum(-1)
    tails = 1 - masses[teacher.counts > 0]
    return min([float(tail) for tail in tails.flatten() if tail > 9e-6], default=1.0)


@pytest.mark.skipif(ON_GPU, reason="float64 is the CPU's")
@pytest.mark.parametrize("tail", FUSED_TAILS)
@pytest.mark.parametrize("loss", FUSED_LOSSES)
def test_gradcheck(tail: str, loss: str) -> None:
    teacher = random_rows((6,), 30, 7, 2.0, sampled=False)
    log_q_TV = torch.log_softmax(torch.randn(6, 30, dtype=torch.float64), dim=-1)
    labels = torch.randint(30, (6,))
    labels[:2] = teacher.ids[:2, 0].clamp(min=0)
    tau = torch.rand(6, dtype=torch.float64) + 0.5

    def loss_of(log_q: Tensor, label_log_q: Tensor) -> Tensor:
        rows = teacher.ids, teacher.logprobs.double(), teacher.counts, labels, tau
        return row_divergence(log_q, label_log_q, *rows, tail=tail, loss=loss, jsd_beta=0.3)

    inputs = (
        log_q_TV.gather(-1, teacher.ids.long().clamp(min=0)).requires_grad_(),
        log_q_TV.gather(-1, labels.unsqueeze(-1)).squeeze(-1).requires_grad_(),
    )
    assert torch.autograd.gradcheck(loss_of, inputs)


def arguments(**changed) -> tuple:
    rows = random_rows((4,), 20, 5, 2.0, sampled=False)
    named = dict(
        log_q=-torch.rand(4, 5),
        label_log_q=-torch.rand(4),
        ids=rows.ids,
        log_t=rows.logprobs,
        counts=rows.counts,
        labels=torch.zeros(4, dtype=torch.long),
        temperature=torch.ones(4),
        tail="ghost",
        loss="kld",
        weight="one",
        beta=0.5,
    )
    return tuple((named | changed).values())


def test_opcheck() -> None:
    torch.library.opcheck(operators.row_divergence, arguments())
    wide = -torch.rand(4, 9)
    torch.library.opcheck(operators.row_divergence, arguments(log_q=wide[:, 3:8]))


SUPPORTED = "The fused kernel supports {}[.]$"
KNOWN_LOSSES = SUPPORTED.format(", ".join(FUSED_LOSSES))
KNOWN_TAILS = SUPPORTED.format(", ".join(FUSED_TAILS))
KNOWN_WEIGHTS = SUPPORTED.format("one, tau-squared, tempered-mass")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(log_q=torch.zeros(4, 5).half()), TypeError, "float32 or float64; got Half"),
        (dict(log_q=torch.zeros(5, 4).t()), ValueError, r"last stride of 1"),
        (dict(log_q=torch.zeros(4, 6)), ValueError, r"ids must be .* shape \[4, 6\]"),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), ValueError, r"labels must be .* Long"),
        (dict(temperature=torch.ones(1)), ValueError, r"temperature must be .* shape \[4\]"),
        (dict(counts=torch.zeros(4)), ValueError, r"counts must be .* Int"),
        (dict(tail="ghosts"), ValueError, f"^Unknown tail policy 'ghosts'. {KNOWN_TAILS}"),
        (dict(loss="mse-logit"), ValueError, f"^Unknown loss 'mse-logit'. {KNOWN_LOSSES}"),
        (dict(weight=""), ValueError, f"^Unknown weight ''. {KNOWN_WEIGHTS}"),
    ],
)
def test_mistakes_are_named(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operators.row_divergence(*arguments(**changed))


def test_torch_compile_traces_through() -> None:
    def loss(log_q: Tensor, *rows: Tensor) -> Tensor:
        return row_divergence(log_q * 2, *rows, tail="to-label", loss="jsd").sum()

    log_q, *rows = arguments()[:7]
    log_q.requires_grad_()
    expected = loss(log_q, *rows)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(log_q, *rows)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, log_q), torch.autograd.grad(expected, log_q)
    )
