"""Job of the fork server: WINDOWS LOGITS, flags of `megatron-pd dump` → a checkpoint's logits.

By the model that a dump runs, in any layout. WINDOWS is an .npy of int64 [B, L]; LOGITS becomes an
.npy of float32 [B, L, padded vocabulary].
"""

import sys

import numpy as np
import torch

from megatron_pd.data.windows import Batch
from megatron_pd.megatron.inference import load_model


def main() -> int:
    windows, logits = sys.argv[1:3]
    del sys.argv[1:3]
    model = load_model(lambda parser: parser)
    tokens = torch.from_numpy(np.load(windows))

    def gathered(logits_BLV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(logits_BLV) for _ in range(model.tp_group.size())]
        torch.distributed.all_gather(parts, logits_BLV.contiguous(), group=model.tp_group)
        return torch.cat(parts, dim=-1)

    found = model.run(Batch(None, tokens, tokens), gathered)
    if model.writes:
        np.save(logits, found.float().numpy())
    return 0
