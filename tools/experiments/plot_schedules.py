"""α over real runs, whole and stopped and resumed: docs/alpha-schedules.png.

    python tools/experiments/plot_schedules.py [FILE.png]

For every --pd-alpha-schedule a very small student trains for 50 iterations on the teacher of
compare_tails.py, and once more with a stop after 20 and a new process that goes on from the
checkpoint. What is plotted is what TensorBoard got.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from small_teacher import (
    ROOT,
    Curves,
    ModelSize,
    Runner,
    SmallTeacher,
    read_scalars,
    run_experiment,
    teacher_stages,
)

from megatron_pd.distill.schedules import ALPHA_SCHEDULES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = ModelSize(layers=1, hidden=32, iterations=50, lr=3e-3, decay_iterations=10)
STOP = 20
FLAGS = {"period": "--pd-alpha-period 0.25 --pd-alpha-min 0.1"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/alpha-schedules.png"))
    file = parser.parse_args().file
    demo = SmallTeacher(seed=1, root=ROOT)
    return run_experiment(demo, lambda runner: plot(demo, runner, file))


def plot(demo: SmallTeacher, runner: Runner, file: Path) -> None:
    """Train three runs of every schedule, compare and plot them."""
    runner.run(teacher_stages(demo))
    figure, axes = plt.subplots(
        1, len(ALPHA_SCHEDULES.names), figsize=(16, 3.2), sharey=True, layout="constrained"
    )
    for axis, kind in zip(axes, ALPHA_SCHEDULES.names, strict=True):
        whole = train(demo, runner, kind, "whole")
        stopped = train(demo, runner, kind, "stopped", "--exit-interval", str(STOP))
        checkpoint = demo.path(f"checkpoints/schedule-{kind}-stopped")
        resumed = train(demo, runner, kind, "resumed", "--load", checkpoint)
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
    figure.savefig(file, dpi=90)


def train(demo: SmallTeacher, runner: Runner, kind: str, name: str, *flags: str) -> Curves:
    """What TensorBoard got of one run."""
    model = f"schedule-{kind}-{name}"
    flags = (
        *"--micro-batch-size 8 --global-batch-size 8".split(),
        *("--save-interval", str(STOP), "--pd-alpha-schedule", kind),
        *FLAGS.get(kind, "").split(),
        *flags,
    )
    runner.run_stage(demo.training_stage(model, model, SIZE, *flags, processes=1))
    return read_scalars(demo.folder / "tensorboard" / model)


if __name__ == "__main__":
    sys.exit(main())
