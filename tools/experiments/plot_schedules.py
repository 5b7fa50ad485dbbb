"""α over real runs, whole and stopped and resumed: docs/alpha-schedules.png.

    python tools/experiments/plot_schedules.py [FILE.png]

For every --pd-alpha-schedule a very small student trains for 50 iterations on the teacher of
compare_tails.py, and once more with a stop after 20 and a new process that goes on from the
checkpoint. What is plotted is what TensorBoard got.
"""

import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
from compare_tails import ENVIRONMENT, Comparison
from demo import ModelSize, _scalars

from megatron_pd.distill.schedules import ALPHA_SCHEDULES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = ModelSize(layers=1, hidden=32, iterations=50, lr=3e-3, decay_iterations=10)
STOP = 20
FLAGS = {"period": "--pd-alpha-period 0.25 --pd-alpha-min 0.1"}


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/alpha-schedules.png")
    comparison = Comparison(seed=1)
    comparison.run()
    os.environ.update(ENVIRONMENT)
    figure, axes = plt.subplots(
        1, len(ALPHA_SCHEDULES), figsize=(16, 3.2), sharey=True, layout="constrained"
    )
    for axis, kind in zip(axes, ALPHA_SCHEDULES, strict=True):
        whole = train(comparison, kind, "whole")
        stopped = train(comparison, kind, "stopped", f"--exit-interval {STOP}")
        checkpoint = comparison.path(f"checkpoints/schedule-{kind}-stopped")
        resumed = train(comparison, kind, "resumed", f"--load {checkpoint}")
        axis.plot(*whole["alpha"], color="gray", linewidth=5, alpha=0.4, label="α, whole run")
        axis.plot(*stopped["alpha"], label=f"α, stopped after {STOP}")
        axis.plot(*resumed["alpha"], label="α, resumed")
        steps, rate = whole["learning-rate"]
        axis.plot(steps, rate / SIZE.lr, "k:", linewidth=1, label="learning rate / its highest")
        axis.set(title=kind, xlabel="iteration", ylim=(-0.03, 1.03))
        for tag in ("alpha", "lm loss"):
            both = np.concatenate([stopped[tag][1], resumed[tag][1]])
            gap = np.abs(both - whole[tag][1]).max()
            print(f"{kind}: {tag} of the resumed run is within {gap:.1e} of the whole run's")
    axes[0].legend(loc="lower center", fontsize="small")
    figure.savefig(path, dpi=90)


def train(comparison: Comparison, kind: str, name: str, more: str = "") -> dict:
    """The scalars of one run."""
    model = f"schedule-{kind}-{name}"
    command = comparison._train(model, "student", SIZE)
    argv = [
        *command[command.index("megatron_pd.pretrain") + 1 :],
        *"--micro-batch-size 8 --global-batch-size 8".split(),
        *("--save-interval", str(STOP), "--pd-alpha-schedule", kind),
        *FLAGS.get(kind, "").split(),
        *more.split(),
    ]
    comparison.run_forked("megatron_pd.pretrain", argv, model)
    return _scalars(comparison.path(f"tensorboard/{model}"))


if __name__ == "__main__":
    main()
