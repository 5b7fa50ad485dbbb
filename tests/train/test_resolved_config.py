"""What a run's distillation resolves to, and what a resumed run is told to have changed."""

import json

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.schedules import AlphaSchedule
from megatron_pd.train.resolved_config import changes, resolved_config


def resolved(samples: int = 100, **settings):
    config = PDConfig(**settings)
    schedule = AlphaSchedule(config.alpha_schedule, max=config.alpha, warmup=0.1)
    return resolved_config(config, schedule, samples)


def test_changes_are_named_one_by_one():
    old, new = resolved(), resolved(alpha=0.5, top_k=12)
    assert changes(old, old) == []
    assert changes(old, new) == [
        "--pd-top-k was unset and is now 12.",
        "--pd-alpha was 0.9 and is now 0.5.",
    ]
    assert changes(None, None) == []
    assert changes(None, new) == ["Distillation was off and is now on."]
    assert changes(old, None) == ["Distillation was on and is now off."]


def test_a_longer_run_and_another_alpha_curve_are_changes():
    assert changes(resolved(100), resolved(200)) == ["samples of the run was 100 and is now 200."]
    found = changes(resolved(), resolved(alpha_schedule="wsd"))
    assert "--pd-alpha-schedule was constant and is now wsd." in found
    assert "α: warmup was unset and is now 0.1." in found


def test_it_survives_json():
    found = resolved(store=["a.pd", "b.pd"], loss="jsd", alpha_schedule="wsd")
    assert json.loads(json.dumps(found)) == found
    assert found["--pd-store"] == ["a.pd", "b.pd"]
    assert found["--pd-jsd-beta"] == 0.5
