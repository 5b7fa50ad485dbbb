"""One micro-batch through a pipeline stage, and its loss: Megatron's forward step.

L = (1 − α)·L_lm + α·L_kd (arXiv 2410.16215, Eq. 1), per token, summed over the micro-batch's valid
tokens; Megatron divides by their number.

Axes: S sequence, B micro-batch.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers

from megatron_pd.data.batch import get_batch
from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import mix, mix_gradient
from megatron_pd.distill.schedules import AlphaSchedule, alpha_at
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.megatron.arguments import LearningRate, resolve_schedule
from megatron_pd.train.online_capture import OnlineCapture
from megatron_pd.train.output_processor import DistillationContext, distillation_output_processor
from megatron_pd.train.resolved_config import ResolvedConfig, resolved_config
from megatron_pd.train.teacher_data import TeacherData

__all__ = ["Distillation", "forward_step", "lm_loss", "pd_loss"]


@dataclass
class Distillation:
    """All that distils in this run."""

    config: PDConfig
    data: TeacherData
    total_samples: int

    learning_rate: LearningRate
    """Where training stands. It is that of the flags until Megatron has made and loaded its own."""

    @property
    def schedule(self) -> AlphaSchedule:
        return resolve_schedule(self.config, self.learning_rate, self.total_samples)

    @property
    def alpha(self) -> float:
        """α of the samples that the learning rate's schedule has counted."""
        return alpha_at(self.schedule, self.learning_rate.num_steps, self.total_samples)

    def resolved(self) -> ResolvedConfig:
        """What it does, for the log and the checkpoints."""
        return resolved_config(self.config, self.schedule, self.total_samples)


_SPIKE = 10
"""A loss so many times the largest one so far is a spike (`--check-for-spiky-loss`)."""

_straggler = StragglerDetector()
"""Megatron's one detector of slow ranks. Asking for it again would switch it off."""


def forward_step(
    iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
    *,
    distillation: Distillation | None,
    lm_config: PDConfig | None = None,
    capture: OnlineCapture | None = None,
) -> tuple[Any, Any]:
    """One micro-batch through this pipeline stage (Megatron's forward step).

    Args:
        lm_config: of the output processor for micro-batches without a teacher, with
            `--pd-lm-only` or in validation; None leaves their loss to Megatron.
        return_schedule_plan: give the plan of the forward pass, which Megatron interleaves with
            another micro-batch's backward pass, instead of its output
            (`--overlap-moe-expert-parallel-comm`).
    """
    args, timers = get_args(), get_timers()
    # Validation measures the language model alone, with or without distillation in training.
    distils = distillation if model.training else None
    captures = capture if capture is not None and model.training and capture.wants() else None
    timers("batch-generator", log_level=2).start()
    with _watched(args, bdata=True):
        batch = get_batch(
            iterator,
            vp_stage=get_attr_wrapped_model(model, "vp_stage"),
            config=get_attr_wrapped_model(model, "config"),
            teacher_columns=distils.data.columns if distils else 0,
            teacher_statistic=distils.data.statistic if distils else None,
            addressed=captures is not None,
        )
    timers("batch-generator").stop()
    inputs = {
        "input_ids": batch["tokens"],
        "position_ids": batch["position_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["labels"],
        "loss_mask": batch["loss_mask"],
    }
    loss: Callable[..., Any] = functools.partial(lm_loss, batch["loss_mask"])
    teacher = TeacherTargets.from_batch(batch)
    if distils is not None and teacher is not None:
        inputs |= _processor_inputs(model, distils.config, teacher, distils.alpha, batch)
        loss = functools.partial(pd_loss, batch["loss_mask"], teacher.counts, distils.alpha)
    elif lm_config is not None and distils is None and batch["labels"] is not None:
        labels_BS = batch["labels"]
        nobody = TeacherTargets.empty(tuple(labels_BS.shape), 0, device=labels_BS.device)
        inputs |= _processor_inputs(model, lm_config, nobody, 0.0, batch)
        loss = functools.partial(_lm_loss_of_both, batch["loss_mask"])
    if captures is not None:
        inputs |= captures.inputs(batch, get_attr_wrapped_model(model, "tp_group"))
    run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
    with _watched(args, bdata=False):
        return run(**inputs), loss


def _processor_inputs(
    model: torch.nn.Module,
    config: PDConfig,
    teacher: TeacherTargets,
    alpha: float,
    batch: dict[str, Any],
) -> dict[str, Any]:
    """Inputs of the model that make it end in our losses instead of Megatron's."""
    model_config = get_attr_wrapped_model(model, "config")
    expected_gradient = None
    if config.loss_chunk_tokens is not None:
        expected_gradient = _expected_gradient(
            alpha, teacher.counts, batch["loss_mask"], model_config
        )
    context = DistillationContext(
        config,
        teacher,
        tp_group=get_attr_wrapped_model(model, "tp_group"),
        sequence_parallel=model_config.sequence_parallel,
        expected_gradient=expected_gradient,
    )
    return {
        "output_processor": distillation_output_processor,
        "output_processor_context": context,
    }


def _watched(args: Any, *, bdata: bool) -> AbstractContextManager[Any]:
    """What runs in it is timed under `--log-straggler`.

    Without it, the detector would still log what is raised, with a traceback.
    """
    return _straggler(bdata=bdata) if args.log_straggler else nullcontext()


Metrics = dict[str, torch.Tensor]
"""What a micro-batch gives to the log: name → [sum, count]. Megatron adds both up over
micro-batches and data-parallel ranks, and logs sum / count."""


def lm_loss(
    loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Megatron's language-model loss: the sum over the micro-batch's valid tokens.

    Returns:
        the sum, the number of valid tokens (int32), and what is logged.
    """
    loss = (losses_BS.float() * loss_mask_BS).sum()
    tokens = loss_mask_BS.sum()
    _check(loss)
    return loss, tokens.int(), {"lm loss": _ratio(loss, tokens)}


def _lm_loss_of_both(
    loss_mask_BS: torch.Tensor, losses_2BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """`lm_loss` of what the output processor gives."""
    return lm_loss(loss_mask_BS, losses_2BS[0])


def pd_loss(
    loss_mask_BS: torch.Tensor,
    counts_BS: torch.Tensor,
    alpha: float,
    losses_2BS: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """L = (1 − α)·L_lm + α·L_kd (Eq. 1), summed over the micro-batch's valid tokens.

    Args:
        counts_BS: entries in the teacher's row of each token; 0 where there is no teacher.
    Returns:
        the sum, the number of valid tokens (int32), and what is logged.
    """
    lm_BS, kd_BS = losses_2BS.float().unbind(0)
    taught_BS = (counts_BS > 0) * loss_mask_BS
    loss = (mix(alpha, lm_BS, kd_BS, counts_BS) * loss_mask_BS).sum()
    tokens = loss_mask_BS.sum()
    _check(loss)
    return (
        loss,
        tokens.int(),
        {
            "lm loss": _ratio((lm_BS * loss_mask_BS).sum(), tokens),
            "kd loss": _ratio((kd_BS * taught_BS).sum(), taught_BS.sum()),
            "alpha": _ratio(torch.full_like(tokens, alpha), torch.ones_like(tokens)),
            "teacher tokens": _ratio(taught_BS.sum(), tokens),
        },
    )


def _expected_gradient(
    alpha: float, counts_BS: torch.Tensor, loss_mask_BS: torch.Tensor, model_config: Any
) -> torch.Tensor:
    """[2, B, S], the gradient of what Megatron makes of `pd_loss` by the two losses of each token.

    It is right up to a factor, and in size as well, for fp16: a loss scale that overflows has to
    overflow here too, so that Megatron lowers it.
    """
    gradient = mix_gradient(alpha, counts_BS) * loss_mask_BS
    if not model_config.calculate_per_token_loss:
        gradient = gradient / (loss_mask_BS.sum().clamp(min=1) * get_num_microbatches())
    scale = model_config.grad_scale_func
    return gradient if scale is None else scale(gradient)


def _ratio(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[sum, count] for Megatron's log; the least positive float keeps 0 / 0 at 0."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([total.detach().float(), count.detach().float() + tiny])


def _check(loss: torch.Tensor) -> None:
    """As Megatron's own loss function does: its rerun machine tells a bad node from bad maths."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejection, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=rejection,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=_SPIKE, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
