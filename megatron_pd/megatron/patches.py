"""The few places where Megatron has no hook for what is needed. One adapter each, with its reason.

Written against megatron-core 0.19.2.
"""

import functools
import multiprocessing.util
import signal
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import Timers
from megatron.core.datasets import utils as datasets_utils
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer.moe import token_dispatcher
from megatron.training import checkpointing, training

from megatron_pd.megatron import cpu
from megatron_pd.megatron.arguments import LearningRate

__all__ = [
    "before_checkpoints",
    "count_experts_tokens_on_cpu",
    "end_with_children",
    "keep_checkpoint_writer",
    "keep_scheduler",
    "print_timer",
    "resume_distributed_optimizer",
    "skip_helpers_compilation",
    "take_model_from_checkpoint",
]


def skip_helpers_compilation() -> None:
    """Let Megatron start from its wheel.

    `pretrain()` runs `make` in megatron/core/datasets to compile `helpers_cpp`, and exits where
    that fails. The wheel ships the compiled module but not the Makefile.
    """
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    datasets_utils.compile_helpers = lambda: None


_MODEL_ARGUMENTS = """
    layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
    fp32_residual_connection
    qk_layernorm qk_l2_norm softmax_type attention_output_gate window_size window_attn_skip_freq
    quick_geglu glu_linear_offset activation_func_clamp_value
    no_rope_freq use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor
    rope_type rotary_scaling_factor mscale mscale_all_dim mrope_section
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
    yarn_correction_range_round_to_int
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    experimental_attention_variant linear_attention_freq linear_conv_kernel_dim
    linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
    moe_router_load_balancing_type moe_router_num_groups moe_router_group_topk
    moe_shared_expert_gate moe_apply_probs_on_input
    use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
    mup_base_head_dim mup_attn_scale_power
""".split()


def take_model_from_checkpoint() -> None:
    """Let `--use-checkpoint-args` take all that a GPT's forward pass depends on.

    Megatron 0.19.2 takes sizes and leaves these at the flags' values, by default another model: the
    weights load, and the logits are wrong.
    """
    original = checkpointing.load_args_from_checkpoint
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load_args_from_checkpoint(args: Any, *arguments: Any, **options: Any) -> Any:
        found = original(args, *arguments, **options)
        if isinstance(found, tuple):
            for name in _MODEL_ARGUMENTS:
                if (saved := getattr(found[1], name, None)) is not None:
                    setattr(args, name, saved)
        return found

    checkpointing.load_args_from_checkpoint = load_args_from_checkpoint


def print_timer(timers: Timers, name: str) -> None:
    """Let Megatron's log print one more timer of level 2, after `batch-generator` and the others.

    The training loop has a fixed list of names.
    """
    original = timers.log

    @functools.wraps(original)
    def log(names: list[str], *args: Any, **options: Any) -> None:
        belongs = "batch-generator" in names and name not in names
        original([*names, name] if belongs else names, *args, **options)

    timers.log = log


def count_experts_tokens_on_cpu() -> None:
    """Let `--moe-token-dispatcher-type alltoall` send its tokens where "cuda" is the CPU.

    The numbers that it sends to each rank become Python's on their way from the GPU, and stay
    tensors, which the collective refuses, where they are on the CPU already.
    """
    if cpu.is_cpu():
        token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def before_checkpoints(do: Callable[[], None]) -> None:
    """Let `do` run on every rank whenever Megatron begins to save a checkpoint.

    The training loop tells nobody.
    """
    original = training.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(*args: Any, **options: Any) -> Any:
        do()
        return original(*args, **options)

    training.save_checkpoint = save_checkpoint


def keep_checkpoint_writer() -> None:
    """Let `--use-persistent-ckpt-worker` live through the SIGTERM that asks for a last checkpoint.

    Slurm sends it to all processes of a job, and Megatron waits for ever for a writer that died of
    it. A process that is started while its parent ignores a signal ignores it, too;
    `end_with_children` ends it.
    """
    original = PersistentAsyncCaller._get_process
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_process(cls: Any, *args: Any, **options: Any) -> Any:
        if cls._persistent_process is not None:
            return cls._persistent_process
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return original(*args, **options)
        finally:
            signal.signal(signal.SIGTERM, handler)

    PersistentAsyncCaller._get_process = classmethod(get_process)


def end_with_children() -> None:
    """Let a run that failed end.

    At its end Python asks the processes beside it to end by SIGTERM, and waits for them. With
    `--exit-signal-handler` Megatron's data workers take that for the run's, and go on for ever.
    """
    multiprocessing.util.Finalize(None, _kill_children, exitpriority=1)


def _kill_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that a data worker died
    for child in multiprocessing.active_children():
        child.kill()


def keep_scheduler() -> Callable[[], LearningRate | None]:
    """Let the learning rate's scheduler be known outside of Megatron's training loop.

    `pretrain()` hands it to nobody, and what a checkpoint makes of it
    (`--use-checkpoint-opt-param-scheduler`) stands there alone.

    Returns:
        what gives the scheduler that Megatron made last; None before it has made one.
    """
    made: list[LearningRate] = []
    original = training.get_optimizer_param_scheduler

    @functools.wraps(original)
    def get_optimizer_param_scheduler(optimizer: Any) -> LearningRate:
        made[:] = [original(optimizer)]
        return made[0]

    training.get_optimizer_param_scheduler = get_optimizer_param_scheduler
    return lambda: made[0] if made else None


def resume_distributed_optimizer() -> None:
    """Let `--use-distributed-optimizer` load its checkpoint without Apex and Transformer Engine.

    With torch's own Adam, every parameter's state has a tensor "step", which Apex and Transformer
    Engine keep in the parameter groups. Megatron (1) reads it from the state before that exists,
    and stops at an assertion; it fills the state with dummies itself in other places, and what is
    loaded overwrites them. It (2) looks for it among a parameter's loaded tensors, where most
    formats have none (KeyError), and one has that of the dummies. It (3) gives one step tensor to
    all parameters, each of which would count it up. It (4) copies loaded values into views of the
    parameters, which autograd refuses for float32 parameters unless it is off.
    """
    optimizer = distrib_optimizer.DistributedOptimizer
    original = optimizer.sharded_state_dict
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, **options: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_sharded_state_dict, is_loading, **options)

    load = optimizer.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    set_states = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        # What is no tensor is left as it is: the step, which load_state_dict has set by now.
        set_states(self, model_param, {**tensors, "step": None})

    optimizer.sharded_state_dict = sharded_state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
