"""What a dump keeps of every distribution: one frozen, validated DumpConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_pd.distill.targets import check_truncation
from megatron_pd.errors import UserError
from megatron_pd.options import option
from megatron_pd.store._logit_codec import MAX_VALUE_BITS, MIN_VALUE_BITS
from megatron_pd.store.codecs import CODECS, codec_named

__all__ = ["DumpConfig"]

_TOP_P, _TOP_K = 0.95, 50  # PD*, arXiv 2410.16215, appendix A.6


@dataclass(frozen=True)
class DumpConfig:
    """Creating one validates it (UserError) and fills in the defaults that depend on others."""

    sequence_length: int
    """Tokens of a window, the most that the teacher sees at once."""

    batch_size: int
    """Windows that the teacher runs at once; it doesn't change what is stored."""

    seed: int = 1234
    """Of the random draws."""

    top_p: float | None = option(
        None,
        "Keep the smallest set of tokens with this full-vocabulary mass, in (0, 1]. "
        f"Default: {_TOP_P}.",
        type=float,
    )
    top_k: int | None = option(None, f"Then the top k of it. Default: {_TOP_K}.", type=int)
    sampled: int | None = option(
        None,
        "Store N random draws from every full distribution, seeded by --seed, instead of its top "
        "tokens: the rows that --pd-tail sampled reads (arXiv 2503.16870 draws 50).",
        type=int,
        metavar="N",
    )
    overlap: int | None = option(
        None,
        "Tokens of context that a window shares with the one before it in a document longer than "
        "--seq-length. Default: a quarter of --seq-length.",
        type=int,
    )
    statistics: bool = option(
        False,
        "Store entropy and standard deviation of every full distribution, which the adaptive "
        "temperatures read.",
    )
    codec: str = option(
        "compact",
        "compact: about a fifth of the bytes, at most 3e-4 nats off per row of 50 entries (at 10 "
        "value bits); exact: float32 log-probabilities; or your own as package.module:attribute.",
        choices=CODECS,
    )
    value_bits: int = option(
        10,
        "Resolution of compact log-probabilities: each bit more quarters their error and costs "
        "about an eighth of a byte per entry.",
        type=int,
        choices=range(MIN_VALUE_BITS, MAX_VALUE_BITS + 1),
    )

    def __post_init__(self) -> None:
        codec_named(self.codec)  # said before the teacher is loaded
        check_truncation(self.top_p, self.top_k, "--dump-top-p", "--dump-top-k")
        if self.sampled is None:
            object.__setattr__(self, "top_p", _TOP_P if self.top_p is None else self.top_p)
            object.__setattr__(self, "top_k", _TOP_K if self.top_k is None else self.top_k)
        elif self.sampled < 1:
            raise UserError(f"--dump-sampled is {self.sampled}; a row needs 1 draw or more.")
        elif self.top_p is not None or self.top_k is not None:
            raise UserError(
                "--dump-sampled draws from the full distribution, which --dump-top-p and "
                "--dump-top-k would cut: leave them out, or dump a second store with another "
                "--dump-store."
            )
        if self.overlap is None:
            object.__setattr__(self, "overlap", self.sequence_length // 4)
        if not 0 <= self.overlap < self.sequence_length:  # type: ignore[operator]
            raise UserError(
                f"--dump-overlap is {self.overlap}; it must be at least 0 and less than "
                f"--seq-length ({self.sequence_length})."
            )

    @property
    def row_statistics(self) -> tuple[str, ...]:
        """The statistics that every row of the store has."""
        return ("label_logprob", *(("entropy", "std") if self.statistics else ()))

    @property
    def identity(self) -> Mapping[str, Any]:
        """What shapes a row, as plain JSON, for the store's manifest."""
        cut = {"seed": self.seed} if self.sampled else {"top_p": self.top_p, "top_k": self.top_k}
        return {
            **cut,
            "sequence_length": self.sequence_length,
            "overlap": self.overlap,
            "statistics": self.statistics,
            "codec": codec_named(self.codec).name,
            "value_bits": self.value_bits,
        }
