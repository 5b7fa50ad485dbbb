"""Named combinations of distillation options: the paper's, and ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What a choice of --pd-recipe fills in."""

    options: Mapping[str, Any]
    """PDConfig fields."""

    lr_decay_style: str
    """The learning rate's schedule that goes with them, by Megatron's name."""


RECIPES: Mapping[str, Recipe] = {
    # arXiv 2410.16215, appendix A.6.
    "pd-star": Recipe(
        {
            "loss": "kld",
            "tail": "renormalize",
            "top_p": 0.95,
            "top_k": 50,
            "temperature": 2.0,
            "alpha": 0.9,
            "alpha_schedule": "wsd",
        },
        "WSD",
    ),
    # §3.1, the starting point of the paper's exploration.
    "vanilla": Recipe(
        {
            "loss": "nll",
            "tail": "renormalize",
            "top_p": 0.95,
            "top_k": 100,
            "temperature": 1.0,
            "alpha": 1.0,
            "alpha_schedule": "constant",
        },
        "cosine",
    ),
    # §3.5, logits kept while the teacher itself was trained (Online-100B*).
    "online": Recipe(
        {
            "loss": "nll",
            "tail": "renormalize",
            "top_p": 0.95,
            "top_k": 50,
            "temperature": 1.0,
            "alpha": 0.1,
            "alpha_schedule": "constant",
        },
        "cosine",
    ),
    # Ours: the best of the tail policies and α measured in docs/losses.md.
    "robust": Recipe(
        {
            "loss": "kld",
            "tail": "to-label",
            "top_p": 0.95,
            "top_k": 50,
            "temperature": 1.0,
            "alpha": 0.9,
            "alpha_schedule": "wsd",
        },
        "WSD",
    ),
}
