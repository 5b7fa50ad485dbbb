"""What a launch line doesn't say, and a plan needs."""

from dataclasses import dataclass

from megatron_pd.options import option

__all__ = ["Assumptions"]


@dataclass(frozen=True)
class Assumptions:
    vocab_size: int | None = option(
        None, "Instead of opening the tokenizer: its size, without padding.", type=int
    )
    entries: float = option(
        37.0, "Teacher entries per token. The paper's top-0.95-100 keeps about 37.", type=float
    )
    tflops: float = option(
        400.0, "TFLOP/s that a GPU reaches in training, for all times below.", type=float
    )
    teacher_parameters: float = option(
        9.4e9, "Of the teacher, for its pass and its loss (GLM-4-9B).", type=float
    )
    teacher_tokens: float = option(10e12, "That the teacher was trained on.", type=float)
    teacher_tokens_per_second: float | None = option(
        None,
        "That the teacher reads on one GPU, measured; without it, its forward FLOPs at the TFLOP/s "
        "above.",
        type=float,
        metavar="RATE",
    )
