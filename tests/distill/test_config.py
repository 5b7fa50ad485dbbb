"""PDConfig: what does not fit is refused with a sentence."""

import pytest

from megatron_pd.distill.config import PDConfig
from megatron_pd.errors import UserError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "l2"}, "--pd-loss is 'l2'; it must be one of nll"),
        ({"tail": "drop"}, "--pd-tail is 'drop'"),
        ({"alpha_schedule": "step"}, "--pd-alpha-schedule is 'step'"),
        ({"adaptive_temperature": "x"}, "--pd-adaptive-temperature is 'x'"),
        ({"recipe": "best"}, "--pd-recipe is 'best'"),
        ({"alpha_schedule": "wsd", "alpha_decay_style": "x"}, "--pd-alpha-decay-style is 'x'"),
        ({"jsd_beta": 0.5}, "--pd-jsd-beta is 0.5, which nothing uses.*--pd-loss jsd"),
        ({"alpha_min": 0.1}, "--pd-alpha-min is 0.1, which nothing uses"),
        ({"alpha_warmup": 0.1}, "--pd-alpha-warmup is 0.1, which nothing uses"),
        ({"alpha_decay": 0.1}, "--pd-alpha-decay is 0.1, which nothing uses"),
        ({"alpha_decay_style": "linear"}, "--pd-alpha-decay-style is linear, which nothing"),
        ({"alpha_period": 0.1}, "--pd-alpha-period is 0.1, which nothing uses"),
        ({"adaptive_slope": 0.1}, "--pd-adaptive-slope is 0.1, which nothing uses"),
        ({"adaptive_min": 1.0}, "--pd-adaptive-min is 1.0, which nothing uses"),
        ({"adaptive_temperature": "wttm", "adaptive_max": 2.0}, "--pd-adaptive-max is 2.0, which"),
        ({"top_p": 0.0}, "--pd-top-p is 0.0"),
        ({"top_k": 0}, "--pd-top-k is 0"),
        ({"temperature": 0.0}, "--pd-temperature is 0.0; a temperature"),
        ({"temperature": float("nan")}, "--pd-temperature is nan"),
        ({"student_temperature": -1.0}, "--pd-student-temperature is -1.0"),
        (
            {"adaptive_temperature": "normkd", "adaptive_min": 3.0, "adaptive_max": 2.0},
            "--pd-adaptive-min is 3.0 and --pd-adaptive-max 2.0",
        ),
        ({"alpha": 1.5}, r"--pd-alpha is 1.5; .*\[0, 1\]"),
        ({"alpha": float("nan")}, "--pd-alpha is nan"),
        (
            {"alpha": 0.3, "alpha_min": 0.4, "alpha_schedule": "wsd"},
            "--pd-alpha-min is 0.4 and --pd-alpha, the highest α, is only 0.3",
        ),
        ({"alpha_schedule": "wsd", "alpha_warmup": -0.1}, "--pd-alpha-warmup is -0.1"),
        ({"alpha_schedule": "wsd", "alpha_decay": 1.5}, "--pd-alpha-decay is 1.5; from 1 on"),
        ({"alpha_schedule": "period", "alpha_period": 0.0}, "--pd-alpha-period is 0"),
        ({"loss_chunk_tokens": 0}, "--pd-loss-chunk-tokens is 0"),
        ({"loss_chunk_tokens": "some"}, "--pd-loss-chunk-tokens is some; it is auto"),
        ({"loss": "jsd", "jsd_beta": 1.0}, "--pd-jsd-beta is 1.0"),
        ({"loss": "mse-logit", "tail": "raw"}, "--pd-tail is raw, and --pd-loss mse-logit"),
        ({"tail": "sampled", "loss": "jsd"}, "--pd-tail sampled .* --pd-loss is jsd"),
        ({"tail": "sampled", "temperature": 2.0}, "Leave out --pd-temperature"),
        ({"tail": "sampled", "student_temperature": 2.0}, "Leave out --pd-temperature"),
        ({"tail": "sampled", "top_k": 5}, "Leave out --pd-top-p and --pd-top-k"),
        (
            {"tail": "sampled", "top_k": 5, "recipe": "vanilla"},
            "--pd-top-k .or --pd-recipe vanilla",
        ),
        ({"tau_squared": True, "adaptive_temperature": "wttm"}, "would weigh a row twice"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PDConfig(**settings)


def test_the_student_is_tempered_over_the_vocabulary_only_where_the_policy_says_so():
    hot = {"student_temperature": 2.0}
    assert PDConfig(**hot).needs_tempered_student
    assert PDConfig(**hot, tail="to-label").needs_tempered_student
    assert not PDConfig().needs_tempered_student
    assert not PDConfig(**hot, tail="ghost").needs_tempered_student
    assert not PDConfig(**hot, loss="mse-logit").needs_tempered_student
