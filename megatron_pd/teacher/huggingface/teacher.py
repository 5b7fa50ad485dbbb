"""A model of transformers as a `Teacher`: every process is a replica.

Axes: B windows of a batch, L their length, V the vocabulary.

A batch's windows are padded on the right and run without an attention mask: in a causal model a
token sees those before it alone, all of its own window. Whether the model is causal is tried before
its first batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pd.data.windows import Batch
from megatron_pd.errors import UserError
from megatron_pd.megatron.cpu import chosen_device
from megatron_pd.store import TeacherRows
from megatron_pd.teacher.capture import capture_for, rows_of_windows
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.huggingface.source import Source

__all__ = ["HuggingFaceTeacher"]

_PROBE_TOKENS = 8


class HuggingFaceTeacher:
    """A loaded model (`Teacher`), on this process's GPU or the CPU.

    Args:
        source: of the weights; `config` is its configuration.
        dtype: "float32", "bfloat16" or "float16"; None: that of the weights.
        vocab_size: of the tokenizer. Logits beyond it belong to no token and are left out.
        tokenizer: `tokenizer_fingerprint` of the corpus's tokenizer.
    Raises:
        UserError: a model that can't be loaded, that is not causal, or with fewer logits.
    """

    length_multiple = 1
    writes = True

    def __init__(
        self, source: Source, config: Any, *, dtype: str | None, vocab_size: int, tokenizer: str
    ) -> None:
        import transformers

        self.vocab_size = vocab_size
        self.replica = int(os.environ.get("RANK", "0"))
        self.replicas = int(os.environ.get("WORLD_SIZE", "1"))
        self._source = source
        self._device = torch.device(
            f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if chosen_device() == "cuda" else "cpu"
        )
        model = source.model(config, None if dtype is None else getattr(torch, dtype))
        self._model = model.to(self._device)
        self.identity: Mapping[str, Any] = {
            "teacher": os.path.abspath(str(source)),
            "fingerprint": source.fingerprint(),
            "precision": str(model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer,
            "library": f"transformers {transformers.__version__}",
        }
        self._check_model()

    def run(self, batch: Batch, config: DumpConfig) -> TeacherRows:
        """See `Teacher.run`.

        Raises:
            UserError: a token that the vocabulary doesn't have, logits that are not finite, or too
                little memory on the GPU; with document and offset of the first two.
        """
        self._check_tokens(batch)
        capture = capture_for(batch, config, vocab_size=self.vocab_size, device=self._device)
        try:
            captured = capture(self._logits(batch.tokens), batch.labels.to(self._device))
            return rows_of_windows(batch, captured)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self._source}: a batch of {batch.tokens.numel():,} tokens takes more memory "
                f"than {self._device} has: give a lower --batch-tokens, or --dtype bfloat16."
            ) from None
        except UserError as error:
            raise UserError(f"{self.identity['teacher']}: {error}") from None

    def share(self, values: np.ndarray | None) -> np.ndarray:
        """See `Teacher.share`: a replica is one rank."""
        assert values is not None
        return values

    @torch.no_grad()
    def _logits(self, tokens_BL: Tensor) -> Tensor:
        return self._model(input_ids=tokens_BL.to(self._device), use_cache=False).logits

    def _check_tokens(self, batch: Batch) -> None:
        wrong = (torch.maximum(batch.tokens, batch.labels) >= self.vocab_size)[batch.filled]
        if wrong.any():
            documents, offsets, _ = batch.windows.rows
            first = int(wrong.int().argmax())
            raise UserError(
                f"{self._source} has a vocabulary of {self.vocab_size:,}, and document "
                f"{documents[first]}, offset {offsets[first]} or the one after it, has a token "
                "beyond it: the corpus was made with another tokenizer."
            )

    def _check_model(self) -> None:
        """By two texts that differ in their second half."""
        ids = torch.arange(2 * _PROBE_TOKENS) % self.vocab_size
        both = torch.stack([ids, ids])
        both[1, _PROBE_TOKENS:] = both[1, _PROBE_TOKENS:].flip(0)
        logits = self._logits(both).float()
        if logits.shape[-1] < self.vocab_size:
            raise UserError(
                f"{self._source}: the model has {logits.shape[-1]:,} logits, the tokenizer "
                f"{self.vocab_size:,} tokens: they are not of one model."
            )
        first, second = logits[:, :_PROBE_TOKENS]
        # Rounding may differ where tokens share a matrix product, as in a mixture of experts.
        tolerance = max(1e-3, 8 * torch.finfo(self._model.dtype).eps) * float(first.abs().max())
        if float((first - second).abs().max()) > tolerance:
            raise UserError(
                f"{self._source}: its logits depend on later tokens, so they are no distributions "
                "of the next one: a teacher is a causal language model."
            )
