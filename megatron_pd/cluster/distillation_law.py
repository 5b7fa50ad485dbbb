"""The scaling laws of supervised learning and distillation of arXiv 2502.08606, as an estimate.

They were fitted to dense models of 0.1 to 13 billion parameters, English web text and a vocabulary
of 32,000: differences between two of their losses say more than the losses. N is parameters
without the embeddings, D tokens, a loss nats per token. The distillation law is of full
distributions and of the KD loss alone (α = 1, τ = 1): truncated rows give up some of it.
"""

from collections.abc import Iterable

__all__ = ["distilled_loss", "students_that_pay", "supervised_loss"]


def supervised_loss(parameters: float, tokens: float) -> float:
    """Equation 1: of a model trained on text alone."""
    model_term = 3355 / parameters**0.408
    data_term = 18186 / tokens**0.431
    return float(1.220 + (model_term + data_term) ** 0.452)


def distilled_loss(parameters: float, tokens: float, teacher_loss: float) -> float:
    """Equation 8: of a student that sees `tokens` of a teacher whose own loss is `teacher_loss`."""
    ratio = teacher_loss / (supervised_loss(parameters, tokens) * 1.315)
    gap = teacher_loss**-2.549 * (1 + ratio ** (1 / 0.090)) ** (-522.61 * 0.090)
    student_term = (2243 / parameters**0.321 + 24181 / tokens**0.637) ** 0.764
    return float(teacher_loss + gap * student_term)


def students_that_pay(
    parameters: float,
    tokens: float,
    teacher_loss: float,
    teacher_cost: float,
    candidates: Iterable[int] = range(1, 1001),
) -> int | None:
    """How many students have to share one teacher pass for distillation to be the better use of
    the same compute: a student alone would train on text for as many FLOPs as distilling it takes.

    Args:
        teacher_cost: FLOPs of the teacher's pass over the tokens, in those of training one student
            on them.
    Returns:
        the smallest of `candidates` that does, or None.
    """
    distilled = distilled_loss(parameters, tokens, teacher_loss)
    for students in candidates:
        if distilled < supervised_loss(parameters, tokens * (1 + teacher_cost / students)):
            return students
    return None
