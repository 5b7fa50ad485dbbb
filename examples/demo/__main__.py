"""`make demo`: pre-training distillation from text to result, on two CPU processes.

    python examples/demo [--seed N]

Real text that every Python carries (the standard library's sources) → tokenizer → corpora → a
small teacher → its logit store → the same student twice, LM only and PD* → all three on files that
none was trained on. Every stage is a command that a user would type; its output is under
build/demo/seed-N/logs. An interrupted demo goes on at the stage where it was stopped.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started as `python examples/demo`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from demo.report import write_report
from demo.runner import Runner, run_to_exit_status
from demo.stages import Demo


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    demo = Demo(parser.parse_args().seed)
    runner = Runner(demo.folder, demo.settings)

    def run() -> None:
        runner.run(demo.stages())
        write_report(demo, runner)
        runner.forget()

    again = f"`make demo SEED={demo.seed}` goes on at the unfinished stage"
    return run_to_exit_status(run, runner, again)


if __name__ == "__main__":
    sys.exit(main())
