"""Pre-train a GPT student with Megatron, with or without distillation.

    torchrun --nproc-per-node N -m megatron_pd.pretrain <Megatron flags> [--pd-* flags]
    python -m megatron_pd.pretrain …     # the same in one process

Megatron's own `pretrain()` is the training loop. What is added to it: the `--pd-*` flags, a GPT
dataset that carries the teacher's rows, and a forward step that hands them to the output processor.
Without a PD flag the run is plain language-model pre-training with Megatron's own loss.
"""

import sys

from megatron_pd.errors import reporting_errors
from megatron_pd.megatron import cpu

with reporting_errors():
    cpu.install()  # before Megatron is imported

from megatron_pd.train.run import main

__all__ = ["main"]

if __name__ == "__main__":
    with reporting_errors():
        sys.exit(main())
