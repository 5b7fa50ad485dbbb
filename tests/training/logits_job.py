"""Job of the fork server: CHECKPOINT WINDOWS LOGITS, Megatron's flags → the logits of each window.

Megatron's own model, weights and output alone, one process, one window at a time and unpadded:
what anything cleverer has to agree with.

WINDOWS is an .npz of `tokens`, int64, all windows one after another, and `lengths`. LOGITS is an
.npy of float32 [tokens, padded vocabulary].
"""

import sys

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

from megatron_pd.megatron import cpu


@torch.no_grad()
def main() -> int:
    checkpoint, windows_path, logits_path = sys.argv[1:4]
    del sys.argv[1:4]
    args = parse_and_validate_args(lambda parser: cpu.set_cpu_defaults(parser) or parser)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    model = GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type=args.position_embedding_type,
    ).eval()
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
    model.load_state_dict(state["model"])

    windows = np.load(windows_path)
    logits = []
    for tokens in np.split(windows["tokens"], np.cumsum(windows["lengths"])[:-1]):
        positions = torch.arange(len(tokens))[None]
        logits.append(model(torch.from_numpy(tokens)[None], positions, None)[0].float().numpy())
    np.save(logits_path, np.concatenate(logits))
    return 0
