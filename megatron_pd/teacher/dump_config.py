"""What is kept of every distribution, and how a dump goes through a corpus: frozen, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_pd.distill.targets import check_truncation
from megatron_pd.errors import UserError
from megatron_pd.options import flag_name, option
from megatron_pd.store._logit_codec import MAX_VALUE_BITS, MIN_VALUE_BITS
from megatron_pd.store.codecs import CODECS, codec_named

__all__ = ["DumpConfig", "RowsConfig"]

_TOP_P, _TOP_K = 0.95, 50  # PD*, arXiv 2410.16215, appendix A.6


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """What is kept of every distribution, and how it is coded.

    Creating one validates it (UserError) and fills in the defaults that depend on others.
    """

    flag_prefix: ClassVar[str]

    top_p: float | None = option(
        None,
        "Keep the smallest set of tokens with this full-vocabulary mass, in (0, 1]. "
        f"Default: {_TOP_P}.",
        type=float,
    )
    top_k: int | None = option(None, f"Then the top k of it. Default: {_TOP_K}.", type=int)
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
        check_truncation(self.top_p, self.top_k, self._flag("top_p"), self._flag("top_k"))
        object.__setattr__(self, "top_p", _TOP_P if self.top_p is None else self.top_p)
        object.__setattr__(self, "top_k", _TOP_K if self.top_k is None else self.top_k)

    @property
    def row_statistics(self) -> tuple[str, ...]:
        """The statistics that every row of the store has."""
        return ("label_logprob", *(("entropy", "std") if self.statistics else ()))

    @property
    def identity(self) -> Mapping[str, Any]:
        """What shapes a row, as plain JSON, for the store's manifest."""
        return {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "statistics": self.statistics,
            "codec": codec_named(self.codec).name,
            "value_bits": self.value_bits,
        }

    def _flag(self, name: str) -> str:
        return flag_name(self.flag_prefix, name)


@dataclass(frozen=True, kw_only=True)
class DumpConfig(RowsConfig):
    """The rows of a dump, and how it goes through a corpus."""

    flag_prefix: ClassVar[str] = "dump"

    sequence_length: int
    """Tokens of a window, the most that the teacher sees at once."""

    batch_size: int
    """Windows that the teacher runs at once; it doesn't change what is stored."""

    seed: int = 1234
    """Of the random draws."""

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
    context: str = option(
        "document",
        "What the teacher sees before a token. document: the token's document, in windows. packed: "
        "the sequence that training packs around it, by the --seed, --split and --data-path of the "
        "training run, from several documents; needs --dump-samples.",
        choices=("document", "packed"),
    )
    samples: int | None = option(
        None,
        "With --dump-context packed: samples of the training run, --train-samples or --train-iters "
        "× --global-batch-size, on which their order depends.",
        type=int,
        metavar="N",
    )

    def __post_init__(self) -> None:
        if self.sampled is None:
            super().__post_init__()
        else:
            self._check_sampled(self.sampled)
        if self.context == "packed":
            self._check_packed()
        elif self.samples is not None:
            raise UserError(
                "--dump-samples belongs to --dump-context packed: give that too, or leave it out."
            )
        if self.overlap is None:
            object.__setattr__(self, "overlap", self.sequence_length // 4)
        if not 0 <= self.overlap < self.sequence_length:  # type: ignore[operator]
            raise UserError(
                f"--dump-overlap is {self.overlap}; it must be at least 0 and less than "
                f"--seq-length ({self.sequence_length})."
            )

    def _check_sampled(self, draws: int) -> None:
        codec_named(self.codec)
        if draws < 1:
            raise UserError(f"--dump-sampled is {draws}; a row needs 1 draw or more.")
        if self.top_p is not None or self.top_k is not None:
            raise UserError(
                "--dump-sampled draws from the full distribution, which --dump-top-p and "
                "--dump-top-k would cut: leave them out, or dump a second store with another "
                "--dump-store."
            )

    def _check_packed(self) -> None:
        if self.overlap is not None:
            raise UserError(
                "--dump-overlap is of windows, and --dump-context packed has training's sequences: "
                "leave one of them out."
            )
        if self.samples is None or self.samples < 1:
            raise UserError(
                "--dump-context packed needs --dump-samples, of 1 or more: the training run's "
                "--train-samples, or --train-iters × --global-batch-size."
            )
        object.__setattr__(self, "overlap", 0)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `RowsConfig.identity`."""
        identity = {
            **super().identity,
            "sequence_length": self.sequence_length,
            "overlap": self.overlap,
        }
        if self.sampled:
            del identity["top_p"], identity["top_k"]
            identity["seed"] = self.seed
        if self.context == "packed":
            identity |= {"context": self.context, "samples": self.samples}
        return identity
