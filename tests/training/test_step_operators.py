"""What PyTorch is asked to do around the kernels, from the hidden states to their gradient.

On a GPU each operator is a launch, and one that looks at a value waits for all before it.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import mix_gradient
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.train.output_processor import DistillationContext, distillation_output_processor

S, B, H, V = 16, 2, 8, 64
# What reads a tensor's values on the host, or gives a tensor whose shape depends on them.
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}
# Views are no launch.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"expand", "detach", "alias", "unbind", "split_with_sizes", "permute", "as_strided"}


class Operators(TorchDispatchMode):
    """Counts all operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def losses_and_gradient(
    config: PDConfig, columns: int, device: str = "cpu"
) -> tuple[Callable[[], Tensor], Tensor]:
    """What gives the per-token losses [2, B, S], and the gradient that they expect."""
    weight = torch.randn(V, H, device=device, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(S, B, H, device=device, dtype=torch.bfloat16, requires_grad=True)
    teacher = TeacherTargets(
        torch.ones(B, S, columns, dtype=torch.int32, device=device),
        torch.full((B, S, columns), -2.0, device=device),
        torch.full((B, S), columns, dtype=torch.int32, device=device),
    )
    expected = mix_gradient(0.9, teacher.counts)
    group: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    class Layer:
        gradient_accumulation_fusion = False

        def __call__(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden @ weight.t(), None

    losses = partial(
        distillation_output_processor,
        hidden_states=hidden,
        output_layer=Layer(),
        output_weight=weight,
        labels=torch.zeros(B, S, dtype=torch.long, device=device),
        context=DistillationContext(config, teacher, group, False, expected),
        scale_logits=lambda logits: logits,
        runtime_gather_output=None,
    )
    return losses, expected


# name: (configuration, columns of a teacher's row, launches forward and backward)
CASES: dict[str, tuple[PDConfig, int, int]] = {
    "LM only": (PDConfig(), 0, 21),
    "distilled": (PDConfig(), 5, 30),
    "student temperature": (PDConfig(student_temperature=2.0), 5, 36),
    "four chunks": (PDConfig(loss_chunk_tokens=8), 5, 156),
}


@pytest.mark.parametrize("case", CASES)
def test_few_operators_and_none_that_waits(case: str) -> None:
    config, columns, most = CASES[case]
    losses, gradient = losses_and_gradient(config, columns)
    with Operators() as operators:
        losses().backward(gradient)
    assert not WAITS & set(operators.counts)
    launches = Counter({name: n for name, n in operators.counts.items() if name not in VIEWS})
    assert launches.total() <= most, launches


def test_on_a_gpu_nothing_is_made_elsewhere() -> None:
    """The forward pass on fake CUDA tensors, which have no values and refuse another device's."""
    script = (
        "import sys, torch, test_step_operators as step\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "sys.modules['megatron_pd.ops.sparse_log_softmax'].has_cuda_kernels = lambda: True\n"
        "for case, (config, columns, _) in step.CASES.items():\n"
        "    with FakeTensorMode(), torch.set_grad_enabled('chunks' not in case):\n"
        "        found = step.losses_and_gradient(config, columns, 'cuda')[0]()\n"
        "    assert found.device.type == 'cuda' and found.dtype == torch.float32, case\n"
        "print('all', len(step.CASES))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.stdout.endswith(f"all {len(CASES)}\n"), done.stderr
