"""Online capture: a teacher's rows from the forward passes of its own training (arXiv 2410.16215,
§3.5).

The logits that training computes anyway are also cut to rows, on every rank of the last pipeline
stage; its first TP rank writes them to a journal, beside the next steps. What was captured up to a
checkpoint is durable before the checkpoint is. At the end of the run the journal becomes one store
per corpus.

Axes: S sequence, B micro-batch, V this rank's vocabulary.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from torch import Tensor

from megatron_pd.data.addresses import ADDRESSES
from megatron_pd.data.corpus import MegatronCorpus, training_prefixes
from megatron_pd.data.tokenizer import tokenizer_fingerprint
from megatron_pd.errors import UserError
from megatron_pd.options import add_options, given_options
from megatron_pd.store import TeacherRows
from megatron_pd.teacher.beside import Beside
from megatron_pd.teacher.capture import CapturedRows, capture_rows
from megatron_pd.teacher.dump_config import RowsConfig
from megatron_pd.teacher.journal.collect import (
    captured_stores,
    collect_beside_others,
    collections_of,
    journal_in,
)
from megatron_pd.teacher.journal.segments import (
    Journal,
    fingerprint_of,
    segment_name,
    write_segment,
)

__all__ = ["OnlineCapture", "add_capture_arguments", "capture_config_of"]

_SEGMENT_ROWS = 1 << 18  # in memory at once, and written when there are so many


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(RowsConfig):
    """What is captured of a run. Creating one validates it (UserError)."""

    flag_prefix: ClassVar[str] = "pd_capture"

    directory: Path
    first: int
    """The first iteration that is captured, as Megatron's log counts them."""
    last: int | None
    """The last one; None: that of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 1 or (self.last is not None and self.last < self.first):
            raise UserError(
                f"--pd-capture-from {self.first} and --pd-capture-until {self.last}: the first "
                "iteration is 1, and the last to capture isn't before the first to capture."
            )


def add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of the `--pd-capture*` flags."""
    group = parser.add_argument_group(title="online capture of a teacher's logits")
    group.add_argument(
        "--pd-capture",
        metavar="DIR",
        help="Keep the logits of this run, of which the model is a teacher: in a journal as "
        "training goes on, and at its end in a store DIR/<name>.pd of every corpus, by the name of "
        "its prefix.",
    )
    group.add_argument(
        "--pd-capture-from",
        type=int,
        metavar="ITERATION",
        help="The first iteration whose logits are kept. Default: 1.",
    )
    group.add_argument(
        "--pd-capture-until",
        type=int,
        metavar="ITERATION",
        help="The last one. Default: the run's.",
    )
    add_options(group, RowsConfig, OnlineConfig.flag_prefix)


def capture_config_of(args: argparse.Namespace, *, distils: bool) -> OnlineConfig | None:
    """The configuration that the flags ask for, None without `--pd-capture`.

    Args:
        args: parsed, not yet validated.
        distils: whether there are other --pd-* flags.
    Raises:
        UserError: naming the flag that does not fit and what to give instead.
    """
    rows = given_options(args, RowsConfig, OnlineConfig.flag_prefix)
    if args.pd_capture is None:
        if rows or args.pd_capture_from is not None or args.pd_capture_until is not None:
            raise UserError(
                "There are --pd-capture-* flags, and no --pd-capture, the folder to capture to: "
                "give it, or leave them out."
            )
        return None
    if distils:
        raise UserError(
            "--pd-capture keeps the logits of a teacher's pre-training, and the other --pd-* flags "
            "train a student: do one of the two in a run."
        )
    modules = args.cuda_graph_modules or []
    if args.cuda_graph_impl == "full_iteration" or "full_iteration" in map(str, modules):
        raise UserError(
            "--cuda-graph-impl full_iteration records one iteration and repeats it, and "
            "--pd-capture would keep that one's logits: use local or transformer_engine."
        )
    if args.mock_data:
        raise UserError("--pd-capture: the rows of --mock-data belong to no corpus: drop one.")
    return OnlineConfig(
        directory=Path(args.pd_capture),
        first=1 if args.pd_capture_from is None else args.pd_capture_from,
        last=args.pd_capture_until,
        **rows,
    )


class OnlineCapture:
    """The capture of this run, on every rank; a context manager around the training.

    Args:
        args: validated.
    Raises:
        UserError: the corpora can't be told apart, or the folder has other rows.
    """

    def __init__(self, config: OnlineConfig, args: Any) -> None:
        self._config, self._args = config, args
        if args.train_iters and config.first > args.train_iters:
            raise UserError(
                f"--pd-capture-from {config.first} is after the run's end, --train-iters "
                f"{args.train_iters}: nothing would be captured."
            )
        tokenizer = build_tokenizer(args)
        self._vocab_size: int = tokenizer.vocab_size
        self.corpora = tuple(dict.fromkeys(training_prefixes(args)))
        self._stores = captured_stores(config.directory, self.corpora)
        self._journal = journal_in(config.directory)
        if args.rank == 0:
            Journal.begin(self._journal, self._described(args, tokenizer))
        self._run: Path | None = None
        self._segments = 0
        self._waiting: list[_Part] = []
        self._waiting_rows = 0
        self._beside = Beside()

    def _described(self, args: Any, tokenizer: Any) -> dict[str, Any]:
        config = self._config
        return {
            "corpora": list(self.corpora),
            "fingerprints": [fingerprint_of(MegatronCorpus(prefix)) for prefix in self.corpora],
            "vocab_size": self._vocab_size,
            "draws": 0,
            "codec": config.codec,
            "value_bits": config.value_bits,
            "row_statistics": list(config.row_statistics),
            "teacher": {
                "teacher": "captured while it was trained",
                "precision": str(args.params_dtype).removeprefix("torch."),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "sequence_length": args.seq_length,
                **config.identity,
            },
        }

    def begin(self, iteration: int) -> None:
        """Every rank calls it when the run goes on from `iteration`."""
        run: list[Path | None] = [None]
        if torch.distributed.get_rank() == 0:
            run = [Journal(self._journal).begin_run(iteration)]
        torch.distributed.broadcast_object_list(run, src=0)
        self._run = run[0]

    @property
    def _iteration(self) -> int:
        """The one that runs, as Megatron's log counts them."""
        return self._args.curr_iteration + 1

    def wants(self) -> bool:
        """Whether the iteration that runs is captured."""
        last = self._config.last
        return self._config.first <= self._iteration and (last is None or self._iteration <= last)

    def inputs(
        self, batch: dict[str, Any], tp_group: torch.distributed.ProcessGroup
    ) -> dict[str, Any]:
        """What a model is given beside a micro-batch: an output processor that captures."""
        iteration = self._iteration

        def capture(logits_SBV: Tensor, labels_BS: Tensor) -> None:
            captured = capture_rows(
                logits_SBV,
                labels_BS.transpose(0, 1),
                top_p=self._config.top_p or 1.0,
                top_k=self._config.top_k or 1,
                vocab_size=self._vocab_size,
                tp_group=tp_group,
                statistics=self._config.statistics,
            )
            if (addresses := batch.get(ADDRESSES)) is not None:
                self._keep(_Part(addresses, iteration, captured))

        return {
            "output_processor": _capturing_output_processor,
            "output_processor_context": capture,
        }

    def flush(self) -> None:
        """When it returns, no crash can lose what was captured before."""
        self._hand_over()
        self._beside.wait()

    def __enter__(self) -> Self:
        self._beside.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Megatron ends a run early (--exit-interval and its like) by SystemExit.
        stopped = isinstance(error, SystemExit)
        try:
            if kind is None or stopped:
                self.flush()
        finally:
            self._beside.__exit__(kind, error, trace)
        if stopped and torch.distributed.get_rank() == 0:
            print(
                f"--pd-capture: the rows so far are in {self._journal}. The run goes on with them; "
                f"`megatron-pd collect {self._config.directory}` makes stores of them now.",
                flush=True,
            )

    def collect(self) -> None:
        """Make the stores, at the end of the run; every rank calls it."""
        torch.distributed.barrier()  # now all have written all of theirs
        collections = collections_of(Journal(self._journal), self._stores)
        ranks = torch.distributed.get_world_size()
        if collect_beside_others(collections, torch.distributed.get_rank(), ranks):
            stores = ", ".join(map(str, self._stores.values()))
            print(
                f"--pd-capture: {stores} of iterations {collections[0].metadata['iterations']}. "
                f"{self._journal} is no longer needed.",
                flush=True,
            )

    def _keep(self, part: "_Part") -> None:
        self._waiting.append(part)
        self._waiting_rows += part.rows
        if self._waiting_rows >= _SEGMENT_ROWS:
            self._hand_over()

    def _hand_over(self) -> None:
        if not self._waiting:
            return
        assert self._run is not None
        path = self._run / segment_name(f"rank{torch.distributed.get_rank()}", self._segments)
        parts, self._waiting, self._waiting_rows = self._waiting, [], 0
        self._segments += 1
        self._beside.run(_write, path, parts, Journal(self._journal).description)


def _write(path: Path, parts: list["_Part"], description: Any) -> None:
    write_segment(path, [part.on_host() for part in parts], description)


class _Part:
    """The rows of a micro-batch, on their way to the host while the step goes on.

    Args:
        addresses: int64 [B, S, 3].
        captured: [S, B, ...].
    """

    def __init__(self, addresses: Tensor, iteration: int, captured: CapturedRows) -> None:
        targets = captured.targets
        by_name = {
            "ids": targets.ids,
            "logprobs": targets.logprobs,
            "counts": targets.counts,
            "lse": captured.lse,
            "label_logprob": captured.label_logprob,
            "entropy": targets.entropy,
            "std": targets.std,
        }
        self.rows = captured.lse.numel()
        self._iteration = iteration
        self._copy = _copied_to_host(
            {
                "addresses": addresses.flatten(0, 1),
                **{
                    name: tensor.transpose(0, 1).flatten(0, 1)
                    for name, tensor in by_name.items()
                    if tensor is not None
                },
            }
        )

    def on_host(self) -> tuple[np.ndarray, int, TeacherRows]:
        """(addresses, iteration, rows), as `write_segment` takes them.

        Raises:
            UserError: logits are not finite.
        """
        arrays = self._copy()
        addresses, lse = arrays.pop("addresses"), arrays.pop("lse")
        if (wrong := np.flatnonzero(~np.isfinite(lse) & (addresses[:, 0] >= 0))).size:
            corpus, document, offset = addresses[wrong[0]]
            raise UserError(
                f"--pd-capture: the logits of iteration {self._iteration} at document {document}, "
                f"offset {offset} of corpus {corpus} hold NaN or infinity. The run has diverged: "
                "go on from a checkpoint before it."
            )
        ids, logprobs, counts = (arrays.pop(name) for name in ("ids", "logprobs", "counts"))
        return addresses, self._iteration, TeacherRows(ids, logprobs, counts, arrays)


def _copied_to_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, np.ndarray]]:
    """Begin to copy; what is returned waits for the copies and gives them."""
    if not next(iter(tensors.values())).is_cuda:
        return lambda: {name: tensor.numpy() for name, tensor in tensors.items()}
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
            tensor, non_blocking=True
        )
        for name, tensor in tensors.items()
    }
    done = torch.cuda.Event()
    done.record()

    def wait() -> dict[str, np.ndarray]:
        done.synchronize()
        return {name: tensor.numpy() for name, tensor in copies.items()}

    return wait


def _capturing_output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: Callable[[Tensor, Tensor], None],
    scale_logits: Callable[[Tensor], Tensor],
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    runtime_gather_output: bool | None,
    **_unused: Any,
) -> Tensor:
    """Megatron's own losses, float32 [B, S], as it computes them without an output processor; the
    logits go to `context` in between."""
    logits_SBV, _ = output_layer(
        hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
    )
    logits_SBV = scale_logits(logits_SBV)
    with torch.no_grad():
        context(logits_SBV.detach(), labels)
    return compute_language_model_loss(labels, logits_SBV)
