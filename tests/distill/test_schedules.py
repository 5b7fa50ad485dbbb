"""α curves against values worked out by hand, and Megatron's own WSD learning rate."""

import pytest

from megatron_pd.distill.schedules import DECAY_STYLES, AlphaCurve, AlphaSchedule, alpha_at
from megatron_pd.errors import UserError

TOTAL = 1000

WSD = AlphaSchedule("wsd", max=0.9, warmup=0.1, decay=0.2)
FLOOR = AlphaSchedule("wsd", max=0.9, min=0.1, warmup=0.1, decay=0.2, decay_style="linear")

TABLES = [
    (AlphaSchedule("constant", max=0.7, min=0.2), [(0, 0.7), (500, 0.7), (1000, 0.7)]),
    (
        AlphaSchedule("linear-increase", max=0.9, min=0.1),
        [(0, 0.1), (250, 0.3), (500, 0.5), (1000, 0.9), (1500, 0.9)],
    ),
    (
        AlphaSchedule("linear-decrease", max=0.9, min=0.1),
        [(0, 0.9), (250, 0.7), (500, 0.5), (1000, 0.1), (1500, 0.1)],
    ),
    (
        AlphaSchedule("period", max=0.8, min=0.2, period=0.4),
        # a cycle of 400: up over 200, back over 200; the run ends half way through the third
        [(0, 0.2), (100, 0.5), (200, 0.8), (300, 0.5), (400, 0.2), (600, 0.8), (1000, 0.8)],
    ),
    (
        WSD,
        # rise over 100, level to 800, half a cosine over 200
        [
            (-1, 0.0),
            (0, 0.0),
            (1, 0.009),
            (50, 0.45),
            (99, 0.891),
            (100, 0.9),
            (800, 0.9),
            (900, 0.45),
            (1000, 0.0),
            (1001, 0.0),
        ],
    ),
    (FLOOR, [(0, 0.1), (50, 0.5), (100, 0.9), (800, 0.9), (850, 0.7), (900, 0.5), (1000, 0.1)]),
    # the decay is over before the run is
    (
        AlphaSchedule("wsd", max=1.0, decay=0.2, decay_style="linear", end=0.8),
        [(0, 1.0), (600, 1.0), (700, 0.5), (800, 0.0), (1000, 0.0)],
    ),
    # neither warmup nor decay; at the end the run's last value is the floor
    (AlphaSchedule("wsd", max=1.0), [(0, 1.0), (999, 1.0), (1000, 1.0)]),
]


@pytest.mark.parametrize(("schedule", "table"), TABLES)
def test_values_at_the_phase_boundaries(schedule, table):
    for step, alpha in table:
        assert alpha_at(schedule, step, TOTAL) == pytest.approx(alpha, abs=1e-12), step


@pytest.mark.parametrize(
    ("style", "halfway", "three_quarters"),
    [
        ("linear", 0.5, 0.25),
        ("cosine", 0.5, 0.1464466094),
        ("exponential", 0.4142135624, 0.1892071150),
        ("minus_sqrt", 0.2928932188, 0.1339745962),
    ],
)
def test_decay_curves(style, halfway, three_quarters):
    schedule = AlphaSchedule("wsd", max=1.0, decay=0.2, decay_style=style)
    assert alpha_at(schedule, 800, TOTAL) == 1.0
    assert alpha_at(schedule, 900, TOTAL) == pytest.approx(halfway, abs=1e-9)
    assert alpha_at(schedule, 950, TOTAL) == pytest.approx(three_quarters, abs=1e-9)
    assert alpha_at(schedule, 1000, TOTAL) == 0.0


@pytest.mark.parametrize("schedule", [row[0] for row in TABLES])
def test_the_unit_of_steps_does_not_matter(schedule):
    """Batch-size ramp-up moves through samples unevenly; the curve is one of samples alone."""
    for step in (0, 70, 430, 810, 999, 1000):
        assert alpha_at(schedule, step * 512, TOTAL * 512) == alpha_at(schedule, step, TOTAL)


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="--pd-alpha-warmup"):
        AlphaSchedule("wsd", max=1.0, warmup=0.6, decay=0.5)
    AlphaSchedule("wsd", max=1.0, warmup=0.9, decay=0.1)


def test_a_curve_reads_phases_that_there_are():
    AlphaCurve(lambda schedule, done: done, "up", phases=("warmup", "end"))
    with pytest.raises(UserError, match="phases plateau, and there are only warmup, decay"):
        AlphaCurve(lambda schedule, done: done, "up", phases=("warmup", "plateau"))


def test_unknown_names_and_empty_runs_are_refused():
    with pytest.raises(UserError, match="no α schedule 'triangle'"):
        alpha_at(AlphaSchedule("triangle", max=1.0), 1, 2)
    with pytest.raises(UserError, match="no decay style 'steep'"):
        alpha_at(AlphaSchedule("wsd", max=1.0, decay=1.0, decay_style="steep"), 1, 2)
    with pytest.raises(UserError, match="at least one"):
        alpha_at(WSD, 0, 0)


@pytest.mark.parametrize("style", DECAY_STYLES)
def test_wsd_is_the_curve_of_megatrons_learning_rate(style):
    from megatron_pd.megatron import cpu

    cpu.install()
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.9,
        min_lr=0.0,
        lr_warmup_steps=100,
        lr_decay_steps=TOTAL,
        lr_decay_style="WSD",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=200,
        lr_wsd_decay_style=style,
    )
    schedule = AlphaSchedule("wsd", max=0.9, warmup=0.1, decay=0.2, decay_style=style)
    for step in range(0, TOTAL + 1, 10):
        scheduler.num_steps = step
        expected = scheduler.get_lr({"max_lr": 0.9, "min_lr": 0.0})
        assert alpha_at(schedule, step, TOTAL) == pytest.approx(expected, abs=1e-12), step
