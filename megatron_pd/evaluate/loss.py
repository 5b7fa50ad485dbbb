"""Loss and calibration of a checkpoint on held-out documents.

    megatron-pd evaluate --load CHECKPOINT --data-path PREFIX [--evaluate-output FILE.json]

Every token but the first of each document is predicted once.
"""

import argparse
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_pd.data.corpus import MegatronCorpus, training_prefixes
from megatron_pd.data.windows import Batch, batches_of, document_groups, windows_of
from megatron_pd.errors import UserError
from megatron_pd.evaluate.calibration import BINS, confidence_bins, expected_calibration_error
from megatron_pd.megatron.inference import ForwardOnlyModel, load_model
from megatron_pd.teacher.capture import CapturedRows, capture_rows

__all__ = ["evaluate", "main"]

_GROUP_TOKENS = 1 << 22  # whose windows are sorted by length at once


def main() -> int:
    """Entry point: print the figures, and write them to --evaluate-output."""
    model = load_model(_add_evaluate_arguments)
    result = evaluate(model, training_prefixes(model.args))
    if torch.distributed.get_rank() == 0:
        print(json.dumps(result, indent=2), flush=True)
        if model.args.evaluate_output:
            Path(model.args.evaluate_output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="evaluation")
    group.add_argument("--evaluate-output", default=None, help="JSON file for the figures.")
    group.add_argument(
        "--evaluate-overlap",
        type=int,
        default=0,
        help="Tokens of context that a window shares with the one before it.",
    )
    return parser


def evaluate(model: ForwardOnlyModel, prefixes: list[str]) -> dict[str, Any]:
    """Mean loss in nats per token, perplexity, top-1 accuracy, ECE and the number of tokens.

    Raises:
        UserError: --evaluate-overlap out of range, nothing to predict, or a loss that is no number.
    """
    args = model.args
    if not 0 <= args.evaluate_overlap < args.seq_length:
        raise UserError(
            f"--evaluate-overlap is {args.evaluate_overlap}; it must be at least 0 and less than "
            f"--seq-length ({args.seq_length})."
        )
    # The replicas' shares take unequal time, which the usual time-out would cut short.
    everyone = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    loss_sum = 0.0
    bins = np.zeros((3, BINS))  # tokens, correct, confidence

    def capture(logits: torch.Tensor, labels: torch.Tensor) -> CapturedRows:
        return capture_rows(
            logits,
            labels,
            top_p=1.0,
            top_k=1,
            vocab_size=model.tokenizer.vocab_size,
            tp_group=model.tp_group,
        )

    for prefix in prefixes:
        corpus = MegatronCorpus(prefix)
        share = np.arange(model.replica, len(corpus), model.replicas)
        with tqdm(
            total=int(np.maximum(corpus.document_lengths[share] - 1, 0).sum()),
            desc=f"evaluate {Path(prefix).name}",
            unit=" tokens",
            unit_scale=True,
            disable=not (model.writes and model.replica == 0),
        ) as progress:
            for batch in _batches(model, corpus, share):
                captured = model.run(batch, capture)
                if model.writes:
                    loss, found = _figures(batch, captured)
                    loss_sum += loss
                    bins += found
                progress.update(int(batch.kept.sum()))
    totals = torch.tensor([loss_sum, *bins.flatten()], dtype=torch.float64)
    torch.distributed.all_reduce(totals, group=everyone)
    loss_sum, bins = totals[0].item(), totals[1:].numpy().reshape(3, BINS)
    tokens = bins[0].sum()
    if tokens == 0:
        raise UserError(
            f"{', '.join(prefixes)}: no document has a second token, so there is nothing to "
            "predict; give --data-path a corpus of longer documents."
        )
    if not np.isfinite(loss_sum):
        raise UserError(
            f"{args.load}: the loss is {loss_sum}, so some logits are not finite. Check the "
            "checkpoint's weights, and the precision that it runs in."
        )
    return {
        "lm_loss": loss_sum / tokens,
        "perplexity": float(np.exp(loss_sum / tokens)),
        "accuracy": bins[1].sum() / tokens,
        "ece": expected_calibration_error(bins),
        "tokens": int(tokens),
    }


def _batches(
    model: ForwardOnlyModel, corpus: MegatronCorpus, documents: np.ndarray
) -> Iterator[Batch]:
    """Of these documents, int64."""
    args = model.args
    lengths = corpus.document_lengths[documents]
    for group in document_groups(lengths, _GROUP_TOKENS):
        yield from batches_of(
            corpus,
            windows_of(documents[group], lengths[group], args.seq_length, args.evaluate_overlap),
            batch_size=args.micro_batch_size,
            sequence_length=args.seq_length,
            length_multiple=args.tensor_model_parallel_size,
        )


def _figures(batch: Batch, captured: CapturedRows) -> tuple[float, np.ndarray]:
    """The summed loss of the tokens that the windows keep, and their confidence bins."""
    kept = batch.kept.to(captured.lse.device)
    top = captured.targets
    confidence = top.logprobs[kept][:, 0].double().exp()
    correct = top.ids[kept][:, 0] == batch.labels.to(kept.device)[kept]
    return (
        -captured.label_logprob[kept].double().sum().item(),
        confidence_bins(confidence.cpu().numpy(), correct.cpu().numpy()),
    )
