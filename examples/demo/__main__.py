"""`make demo`: a real language model's knowledge into a small student, on two CPU processes.

    python examples/demo [--seed N] [--cut]

SmolLM2-135M into Megatron → text that every Python carries (the standard library's sources) by its
tokenizer → its logit store → the same student twice, LM only and PD* → all three on files that
neither student saw → both exported, and a line of Python by each. Every stage is a command that a
user would type; its output is under build/demo/seed-N/logs. An interrupted demo goes on at the
stage where it was stopped.

--cut (`make demo-cut`): the student is SmolLM2 without every second layer, and LM only has its
learning rate chosen first.
"""

import argparse
import sys
from pathlib import Path

import torch

if not __package__:  # started as `python examples/demo`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from demo import cut, report
from demo.runner import Runner, run_to_exit_status
from demo.stages import Demo


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cut", action="store_true", help="the longer one")
    options = parser.parse_args()
    demo = (cut.CutDemo if options.cut else Demo)(options.seed, bf16=multiplies_bf16())
    runner = Runner(demo.folder, demo.settings)

    def run() -> None:
        if isinstance(demo, cut.CutDemo):
            cut.run(demo, runner)
        else:
            runner.run(demo.stages())
            report.write_report(demo, runner)
        runner.forget()

    name = "demo-cut" if options.cut else "demo"
    again = f"`make {name} SEED={demo.seed}` goes on at the unfinished stage"
    return run_to_exit_status(run, runner, again)


def multiplies_bf16() -> bool:
    """Whether this CPU does; where it doesn't, float32 is faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


if __name__ == "__main__":
    sys.exit(main())
