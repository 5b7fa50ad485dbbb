"""The student that each tail policy leads to, for a known teacher: docs/tail-policies.png.

    python tools/experiments/plot_tails.py [FILE.png]

The teacher is Zipf's law on 1,000 tokens. For each policy and K, the distillation loss alone, at
α = 1, is minimised over the student's logits, from a uniform start, with the loss function that
training uses. Policies that depend on the ground truth or on random draws get the mean over them.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import distillation_loss
from megatron_pd.distill.targets import TeacherTargets, rows_of_draws, top_p_k

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VOCAB_SIZE = 1000
COLUMNS = (5, 12, 50)
DRAWS = 400_000  # in all, for `sampled`: K in each row
POLICIES = {
    "renormalize": PDConfig(tail="renormalize"),
    "renormalize, τ = 2": PDConfig(tail="renormalize", temperature=2.0),
    "raw": PDConfig(tail="raw"),
    "ghost": PDConfig(tail="ghost"),
    "decoupled, τ = 2": PDConfig(tail="decoupled", temperature=2.0),
    "to-label": PDConfig(tail="to-label"),
    "sampled": PDConfig(tail="sampled"),
}
STYLES = ["-", "--", ":", "-", "--", "-", "-"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/tail-policies.png"))
    file = parser.parse_args().file
    torch.manual_seed(0)
    teacher_V = zipf(VOCAB_SIZE)
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(15, 5), sharey=True, layout="constrained")
    print("| policy | K | most likely token, over the teacher's | mass on the K | KL(t ‖ p) |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for axis, columns in zip(axes, COLUMNS, strict=True):
        places = range(1, VOCAB_SIZE + 1)
        axis.loglog(places, teacher_V, color="black", linewidth=4, alpha=0.25, label="teacher")
        for (name, config), style in zip(POLICIES.items(), STYLES, strict=True):
            student_V = minimiser(config, teacher_V, columns)
            axis.loglog(places, student_V, style, label=name)
            print(_row(name, columns, teacher_V, student_V))
        kept = teacher_V[:columns].sum()
        axis.axvline(columns + 0.5, color="gray", linewidth=0.5)
        axis.set(title=f"K = {columns}: mass {kept:.2f} kept", xlabel="token, the top one first")
        axis.set_ylim(3e-6, 1)
    axes[0].set_ylabel("probability")
    axes[-1].legend(loc="upper right")
    figure.savefig(file, dpi=90)


def zipf(vocab_size: int) -> Tensor:
    """The teacher's distribution, float64 [V]."""
    weights_V = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return weights_V / weights_V.sum()


def minimiser(config: PDConfig, teacher_V: Tensor, columns: int) -> Tensor:
    """The student distribution, float64 [V], of the least expected loss."""
    rows, labels_T, weights_T = _cases(config, teacher_V, columns)
    logits_V = torch.zeros_like(teacher_V, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits_V],
        max_iter=400,
        history_size=20,
        tolerance_grad=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logq_V = logits_V.log_softmax(-1)
        logq_TK = torch.where(rows.mask, logq_V[rows.ids.long().clamp(min=0)], 0.0)
        loss_T = distillation_loss(config, rows, logq_TK, logq_V[labels_T], labels_T)
        mean = (weights_T * loss_T).sum()
        mean.backward()
        return mean

    optimizer.step(loss)
    return logits_V.detach().softmax(-1)


def _cases(
    config: PDConfig, teacher_V: Tensor, columns: int
) -> tuple[TeacherTargets, Tensor, Tensor]:
    """The teacher's rows, the labels and the weights that the expected loss is a sum over."""
    if config.tail == "sampled":
        count = DRAWS // columns
        draws_N = torch.multinomial(teacher_V, count * columns, replacement=True)
        labels_T = torch.zeros(count, dtype=torch.int64)
        return (
            rows_of_draws(draws_N.view(count, columns)),
            labels_T,
            torch.full((count,), 1 / count),
        )
    rows = top_p_k(teacher_V.log()[None], top_k=columns)
    if config.tail == "to-label":
        labels_T = torch.arange(len(teacher_V))
        return rows.map(lambda x: x.expand(len(labels_T), *x.shape[1:])), labels_T, teacher_V
    return rows, torch.zeros(1, dtype=torch.int64), torch.ones(1)


def _row(name: str, columns: int, teacher_V: Tensor, student_V: Tensor) -> str:
    inflation = student_V[0] / teacher_V[0]
    divergence = (teacher_V * (teacher_V / student_V).log()).sum()
    return (
        f"| {name} | {columns} | {inflation:.2f} | {student_V[:columns].sum():.4f} | "
        f"{divergence:.3f} |"
    )


if __name__ == "__main__":
    main()
