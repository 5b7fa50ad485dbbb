"""--pd-recipe: fills in what the command line leaves open.

A recipe sets --pd-* flags and Megatron's own learning-rate flags, between parsing and Megatron's
validation; a flag that the user gives wins.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from megatron_pd.distill.recipes import RECIPES, Recipe

__all__ = ["RecipeParser"]


class RecipeParser(argparse.ArgumentParser):
    """Applies --pd-recipe between parsing and Megatron's validation, which has no hook there.

    `pd_recipe_set` of its result lists what the recipe set, each as on a command line.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        argv: Sequence[str] = sys.argv[1:] if args is None else args
        parsed, unknown = super().parse_known_args(argv, namespace)
        given = {argument.partition("=")[0] for argument in argv}
        parsed.pd_recipe_set = _apply_recipe(parsed, given)
        return parsed, unknown


def _apply_recipe(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Fill in what the flags in `given` leave open; return the flags that were set."""
    if getattr(args, "pd_recipe", None) is None:
        return []
    recipe = RECIPES[args.pd_recipe]
    settings = {
        f"pd_{name}": value
        for name, value in recipe.options.items()
        if getattr(args, f"pd_{name}") is None
    } | _lr_settings(recipe, args, given)
    for name, value in settings.items():
        setattr(args, name, value)
    return [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]


def _lr_settings(
    recipe: Recipe, args: argparse.Namespace, given: set[str]
) -> dict[str, str | float | int]:
    if "--lr-decay-style" in given and args.lr_decay_style != recipe.lr_decay_style:
        return {}
    settings: dict[str, str | float | int] = {}
    if "--lr-decay-style" not in given:
        settings["lr_decay_style"] = recipe.lr_decay_style
    if not given & {"--lr-warmup-fraction", "--lr-warmup-iters", "--lr-warmup-samples"}:
        settings["lr_warmup_fraction"] = 0.1
    if recipe.lr_decay_style == "WSD":
        if "--lr-wsd-decay-style" not in given:
            settings["lr_wsd_decay_style"] = "cosine"
        unit = "samples" if args.train_samples else "iters"
        length = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if getattr(args, f"lr_wsd_decay_{unit}") is None and length:
            settings[f"lr_wsd_decay_{unit}"] = max(1, round(0.01 * length))
    return settings
