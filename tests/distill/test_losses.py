"""Every tail policy and loss against the formulas written out on the dense vocabulary.

Axes: T tokens, V vocabulary, K columns of a row.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.losses import LOSSES
from megatron_pd.distill.objective import composed_loss, distillation_loss, mix
from megatron_pd.distill.tails import TAILS
from megatron_pd.distill.targets import TeacherTargets, sample, top_p_k, truncate
from megatron_pd.distill.temperatures import row_temperature
from megatron_pd.errors import UserError
from megatron_pd.ops import FUSED_LOSSES, is_fused, row_divergence

TOKENS, VOCABULARY = 9, 30
TEMPERATURES = [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 2.0), (2.0, 2.0), (1.5, 0.75)]
BETAS = [0.1, 0.3, 0.5, 0.7, 0.9]


def valid_configs() -> list[PDConfig]:
    configs = []
    for tail in TAILS:
        for loss in LOSSES:
            for tau, student_tau in TEMPERATURES:
                if not LOSSES.get(loss).uses_tail and tail != PDConfig().tail:
                    continue
                is_fit_for_draws = LOSSES.get(loss).linear_in_teacher and tau == student_tau == 1
                if TAILS.get(tail).of_draws and not is_fit_for_draws:
                    continue
                for beta in BETAS if LOSSES.get(loss).uses_beta else [None]:
                    configs.append(
                        PDConfig(
                            loss=loss,
                            tail=tail,
                            temperature=tau,
                            student_temperature=student_tau,
                            jsd_beta=beta,
                        )
                    )
    return configs


def name_of(config: PDConfig) -> str:
    beta = "" if config.jsd_beta is None else f"-{config.jsd_beta}"
    temperatures = f"{config.temperature}-{config.student_temperature}"
    return f"{config.tail}-{config.loss}{beta}-{temperatures}"


each_config = pytest.mark.parametrize("config", valid_configs(), ids=name_of)


@pytest.fixture
def generator() -> torch.Generator:
    seed = torch.seed()
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def operator_loss(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    *tempered: Tensor,
) -> Tensor:
    """The fused operator itself, without what decides whether it is called."""
    assert not tempered
    return row_divergence(
        logq_TK,
        label_logq_T,
        teacher.ids,
        teacher.logprobs.to(logq_TK.dtype),
        teacher.counts,
        labels_T,
        torch.full_like(label_logq_T, config.temperature),
        tail=config.tail,
        loss=config.loss,
        **({} if config.jsd_beta is None else {"jsd_beta": config.jsd_beta}),
    )


def loss_from_logits(
    config: PDConfig,
    teacher: TeacherTargets,
    logits_TV: Tensor,
    labels_T: Tensor,
    loss_of: Callable[..., Tensor] = distillation_loss,
) -> Tensor:
    """What the output processor does, on one rank: pick log-probabilities, then the loss."""

    def at_ids(temperature: float) -> Tensor:
        logq_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        return torch.where(teacher.mask, logq_TV.gather(-1, teacher.ids.long().clamp(min=0)), 0.0)

    def at_labels(temperature: float) -> Tensor:
        logq_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        return logq_TV.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1)

    tau = config.student_temperature
    tempered = (at_ids(tau), at_labels(tau)) if config.needs_tempered_student else ()
    return loss_of(config, teacher, at_ids(1.0), at_labels(1.0), labels_T, *tempered)


def value_and_gradient(
    config, teacher, logits_TV, labels_T, loss_of=distillation_loss
) -> tuple[Tensor, Tensor]:
    logits_TV = logits_TV.detach().clone().requires_grad_()
    loss_T = loss_from_logits(config, teacher, logits_TV, labels_T, loss_of)
    loss_T.sum().backward()
    return loss_T.detach(), logits_TV.grad


# ------------------------------------------------------------------------------ dense reference


def dense_measures(config: PDConfig, t_V: Tensor, z_V: Tensor, label: int):
    """The two measures, from the definition of the policy; t_V is the row, 0 off it."""
    tau, student_tau = config.temperature, config.student_temperature
    kept = t_V > 0
    a = t_V.sum()
    conditional = torch.where(kept, t_V ** (1 / tau), 0.0)
    conditional = conditional / conditional.sum()
    q_V = torch.softmax(z_V, dim=-1)
    tempered_q_V = torch.softmax(z_V / student_tau, dim=-1)
    match config.tail:
        case "renormalize":
            return conditional, tempered_q_V
        case "raw":
            return a * conditional, tempered_q_V
        case "sampled":
            return t_V, q_V
        case "to-label":
            target = a * conditional
            target[label] += 1 - a
            return target, tempered_q_V
        case "ghost":
            target = torch.cat([t_V[kept], (1 - a)[None]]) ** (1 / tau)
            student = torch.cat([q_V[kept], q_V[~kept].sum()[None]]) ** (1 / student_tau)
            return target / target.sum(), student / student.sum()
        case "decoupled":
            within = q_V[kept] ** (1 / student_tau)
            within = q_V[kept].sum() * within / within.sum()
            target = torch.cat([a * conditional[kept], (1 - a)[None]])
            return target, torch.cat([within, q_V[~kept].sum()[None]])


def dense_loss(config: PDConfig, t_V: Tensor, z_V: Tensor, label: int) -> Tensor:
    if config.loss == "mse-logit":
        kept = t_V > 0
        x = t_V[kept].log() / config.temperature
        y = z_V[kept] / config.student_temperature
        return ((x - x.mean()) - (y - y.mean())).square().mean()
    t, q = dense_measures(config, t_V, z_V, label)
    on = t > 0
    match config.loss:
        case "nll":
            return -(t[on] * q[on].log()).sum()
        case "kld":
            return (t[on] * (t[on] / q[on]).log()).sum()
        case "reverse-kld":
            return (q[on] * (q[on] / t[on]).log() - q[on] + t[on]).sum()
        case "jsd":
            beta = config.jsd_beta
            m = beta * t + (1 - beta) * q
            of_teacher = (t[on] * (t[on] / m[on]).log()).sum()
            return beta * of_teacher + (1 - beta) * (q * (q / m).log()).sum()
        case "mse-prob":
            return (t[on] - q[on]).square().sum()


def dense_value_and_gradient(config, teacher, logits_TV, labels_T) -> tuple[Tensor, Tensor]:
    logits_TV = logits_TV.detach().clone().requires_grad_()
    losses = []
    for row in range(logits_TV.shape[0]):
        count = int(teacher.counts[row])
        if count == 0:
            losses.append(logits_TV.new_zeros(()))
            continue
        t_V = torch.zeros(logits_TV.shape[-1], dtype=torch.float64)
        t_V[teacher.ids[row, :count].long()] = teacher.logprobs[row, :count].double().exp()
        losses.append(dense_loss(config, t_V, logits_TV[row], int(labels_T[row])))
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), logits_TV.grad


def random_case(generator, top_p=0.9, top_k=7):
    teacher_logits = torch.randn(TOKENS, VOCABULARY, generator=generator) * 2
    logits_TV = torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    labels_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    teacher = top_p_k(teacher_logits, top_p, top_k)
    labels_T[:3] = teacher.ids[:3, 0].long()  # labels on the row as well as off it
    teacher.counts[4] = 0
    return truncate(teacher), logits_TV, labels_T


def ways_to_compute(config: PDConfig) -> list[Callable[..., Tensor]]:
    has_operator = config.student_temperature == 1.0 and is_fused(config.loss, config.tail)
    return [distillation_loss, composed_loss, *([operator_loss] if has_operator else [])]


@each_config
def test_value_and_gradient_are_the_dense_ones(config, generator):
    """In float64 to rounding, in float32 to its precision, however they are computed."""
    teacher, logits_TV, labels_T = random_case(generator)
    if config.tail_policy.of_draws:
        teacher = sample(torch.randn(TOKENS, VOCABULARY, generator=generator), 12, generator)
    for dtype, rtol, atol in ((torch.float64, 1e-8, 1e-10), (torch.float32, 1e-4, 1e-4)):
        case = teacher, logits_TV.to(dtype), labels_T
        expected = dense_value_and_gradient(config, teacher, case[1].double(), labels_T)
        for loss_of in ways_to_compute(config):
            found = value_and_gradient(config, *case, loss_of)
            message = f"{loss_of.__name__}: {{}}".format
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol, msg=message)


# ------------------------------------------------------------------------------ closed forms


def closed_form_case(generator):
    """Rows without an empty one, with the dense p, t (0 off the row), mask and mass a."""
    teacher, logits_TV, labels_T = random_case(generator)
    keep = teacher.counts > 0
    teacher = teacher.map(lambda x: x[keep])
    logits_TV, labels_T = logits_TV[keep], labels_T[keep]
    t_TV = torch.zeros_like(logits_TV).scatter_add_(
        1,
        teacher.ids.long().clamp(min=0),
        torch.where(teacher.mask, teacher.logprobs.double().exp(), 0.0),
    )
    return teacher, logits_TV, labels_T, torch.softmax(logits_TV, -1), t_TV


@pytest.mark.parametrize("loss", ["nll", "kld"])
@pytest.mark.parametrize("tail", ["renormalize", "raw", "ghost", "decoupled", "to-label"])
def test_closed_form_gradients(tail, loss, generator):
    teacher, logits_TV, labels_T, p, t = closed_form_case(generator)
    a = t.sum(-1, keepdim=True)
    on = t > 0
    student_mass = (p * on).sum(-1, keepdim=True)
    off = p * (a - student_mass) / (1 - student_mass)
    label = torch.nn.functional.one_hot(labels_T, VOCABULARY)
    expected = {
        "renormalize": p - t / a,
        "raw": a * p - t,
        "ghost": torch.where(on, p - t, off),
        "decoupled": torch.where(on, p - t, off),
        "to-label": p - t - (1 - a) * label,
    }[tail]
    _, gradient = value_and_gradient(PDConfig(tail=tail, loss=loss), teacher, logits_TV, labels_T)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_sampled_gradient_is_the_dense_one_on_average(generator):
    rows = 20_000
    teacher_logits = torch.randn(VOCABULARY, generator=generator) * 2
    logits_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    draws = 10
    teacher = sample(teacher_logits.expand(rows, -1), draws, generator)
    labels_T = torch.zeros(rows, dtype=torch.int64)
    _, gradient = value_and_gradient(
        PDConfig(tail="sampled", loss="nll"), teacher, logits_V.expand(rows, -1), labels_T
    )
    t = torch.softmax(teacher_logits.double(), dim=-1)
    dense = torch.softmax(logits_V, dim=-1) - t
    standard_error = (t * (1 - t) / (draws * rows)).sqrt()
    assert ((gradient.mean(0) - dense).abs() < 6 * standard_error + 1e-9).all()

    truncated = top_p_k(teacher_logits, 0.9).map(lambda x: x[None])
    _, biased = value_and_gradient(PDConfig(), truncated, logits_V[None], labels_T[:1])
    assert ((biased[0] - dense).abs() > 6 * standard_error).any()


@pytest.mark.parametrize("tail", ["ghost", "decoupled", "to-label"])
def test_what_each_policy_is_biased_towards(tail, generator):
    """The gradient, summed over labels that the teacher draws, is 0 at the student of
    docs/losses.md. (`renormalize` and `raw` have none: their students have no tail.)"""
    teacher_logits = torch.randn(VOCABULARY, generator=generator)
    teacher = top_p_k(teacher_logits, top_k=6).map(lambda x: x.expand(VOCABULARY, *x.shape))
    t = torch.softmax(teacher_logits.double(), dim=-1)
    on = torch.zeros(VOCABULARY, dtype=torch.bool)
    on[teacher.ids[0].long()] = True
    a = t[on].sum()
    if tail == "to-label":
        student = torch.where(on, t * (2 - a), t * (1 - a))
    else:  # any proportions within the tail
        rest = torch.rand(VOCABULARY, generator=generator, dtype=torch.float64) * ~on
        student = torch.where(on, t, (1 - a) * rest / rest.sum())
    logits_TV = student.log().expand(VOCABULARY, -1)
    labels_T = torch.arange(VOCABULARY)
    _, gradient = value_and_gradient(PDConfig(tail=tail), teacher, logits_TV, labels_T)
    expected_gradient = t @ gradient
    torch.testing.assert_close(
        expected_gradient, torch.zeros_like(expected_gradient), rtol=0, atol=2e-7
    )


def test_ghost_of_the_whole_vocabulary_is_the_dense_kl(generator):
    teacher_logits = torch.randn(TOKENS, VOCABULARY, generator=generator) * 2
    logits_TV = torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    labels_T = torch.zeros(TOKENS, dtype=torch.int64)
    for tau, student_tau in TEMPERATURES:
        config = PDConfig(tail="ghost", temperature=tau, student_temperature=student_tau)
        value, gradient = value_and_gradient(config, top_p_k(teacher_logits), logits_TV, labels_T)
        t = torch.softmax(teacher_logits.double() / tau, dim=-1)
        q = torch.softmax(logits_TV / student_tau, dim=-1)
        torch.testing.assert_close(value, (t * (t / q).log()).sum(-1), rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient, (q - t) / student_tau, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", FUSED_LOSSES)
def test_decoupled_at_temperature_1_is_ghost(loss, generator):
    case = random_case(generator)
    ghost = value_and_gradient(PDConfig(tail="ghost", loss=loss), *case)
    decoupled = value_and_gradient(PDConfig(tail="decoupled", loss=loss), *case)
    torch.testing.assert_close(decoupled, ghost, rtol=1e-9, atol=1e-12)


def test_decoupled_is_the_kl_of_the_masses_and_the_weighted_kl_within(generator):
    teacher, logits_TV, labels_T, p, t = closed_form_case(generator)
    tau, student_tau = 2.0, 1.5
    config = PDConfig(tail="decoupled", temperature=tau, student_temperature=student_tau)
    value, _ = value_and_gradient(config, teacher, logits_TV, labels_T)
    on = t > 0
    a, mass = t.sum(-1), (p * on).sum(-1)
    within_t = t ** (1 / tau) / (t ** (1 / tau)).sum(-1, keepdim=True)
    within_q = torch.where(on, p ** (1 / student_tau), 0.0)
    within_q = within_q / within_q.sum(-1, keepdim=True)
    bernoulli = a * (a / mass).log() + (1 - a) * ((1 - a) / (1 - mass)).log()
    inner = torch.where(on, within_t * (within_t / within_q).log(), 0.0).sum(-1)
    torch.testing.assert_close(value, bernoulli + a * inner, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", ["renormalize", "ghost", "to-label", "decoupled"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_kld_and_nll_differ_by_the_teachers_entropy_alone(tail, tau, generator):
    teacher, logits_TV, labels_T = random_case(generator)
    kld, kld_gradient = value_and_gradient(
        PDConfig(tail=tail, loss="kld", temperature=tau), teacher, logits_TV, labels_T
    )
    nll, nll_gradient = value_and_gradient(
        PDConfig(tail=tail, loss="nll", temperature=tau), teacher, logits_TV, labels_T
    )
    torch.testing.assert_close(kld_gradient, nll_gradient, rtol=1e-9, atol=1e-12)
    for row in range(TOKENS):
        count = int(teacher.counts[row])
        if count == 0:
            continue
        t_V = torch.zeros(VOCABULARY, dtype=torch.float64)
        t_V[teacher.ids[row, :count].long()] = teacher.logprobs[row, :count].double().exp()
        config = PDConfig(tail=tail, temperature=tau)
        target, _ = dense_measures(config, t_V, logits_TV[row], int(labels_T[row]))
        entropy = -torch.xlogy(target, target).sum()
        assert (nll - kld)[row].item() == pytest.approx(entropy.item(), abs=1e-9)


# ------------------------------------------------------------------------------ temperatures


@pytest.mark.parametrize("loss", LOSSES)
def test_tau_squared_scales_loss_and_gradient_alike(loss, generator):
    case = random_case(generator)
    plain = value_and_gradient(PDConfig(loss=loss, temperature=3.0), *case)
    scaled = value_and_gradient(PDConfig(loss=loss, temperature=3.0, tau_squared=True), *case)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(9.0 * one, other)


def with_statistics(teacher: TeacherTargets, generator) -> TeacherTargets:
    return TeacherTargets(
        teacher.ids,
        teacher.logprobs,
        teacher.counts,
        entropy=torch.rand(TOKENS, generator=generator) * 4,
        std=1 + torch.rand(TOKENS, generator=generator),
    )


def test_adaptive_temperatures_are_those_of_the_docstring(generator):
    teacher, _, _ = random_case(generator)
    teacher = with_statistics(teacher, generator)
    cases = [
        (PDConfig(adaptive_temperature="normkd", temperature=1.5), 1.5 * teacher.std),
        (PDConfig(adaptive_temperature="wttm", temperature=2.5), torch.full((TOKENS,), 2.5)),
        (
            PDConfig(adaptive_temperature="adakd-sd", temperature=0.0, adaptive_slope=0.8),
            0.8 * teacher.std,
        ),
        (
            PDConfig(adaptive_temperature="adakd-h", temperature=3.0, adaptive_slope=-0.5),
            3.0 - 0.5 * teacher.entropy,
        ),
    ]
    for config, expected in cases:
        torch.testing.assert_close(row_temperature(config, teacher).squeeze(-1), expected)
    bounded = PDConfig(adaptive_temperature="normkd", adaptive_min=1.2, adaptive_max=1.4)
    expected = teacher.std.clamp(1.2, 1.4)
    torch.testing.assert_close(row_temperature(bounded, teacher).squeeze(-1), expected)


@pytest.mark.parametrize("kind", ["normkd", "wttm", "adakd-sd", "adakd-h"])
def test_each_row_is_trained_at_its_own_temperature_and_weight(kind, generator):
    teacher, logits_TV, labels_T = random_case(generator)
    teacher = with_statistics(teacher, generator)
    config = PDConfig(adaptive_temperature=kind, temperature=1.3)
    value, gradient = value_and_gradient(config, teacher, logits_TV, labels_T)
    for row in range(TOKENS):
        one = teacher.map(lambda x, row=row: x[row : row + 1])
        tau = row_temperature(config, one).item()
        fixed = PDConfig(temperature=tau)
        expected = value_and_gradient(fixed, one, logits_TV[row, None], labels_T[row, None])
        kept = one.logprobs[one.mask].double()
        weight = {"normkd": tau**2, "wttm": (kept / tau).exp().sum()}.get(kind, 1.0)
        torch.testing.assert_close(value[row, None], weight * expected[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient[row, None], weight * expected[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("normkd", "standard deviation"), ("adakd-sd", "standard"), ("adakd-h", "entropy")],
)
def test_a_missing_statistic_is_named(kind, name, generator):
    case = random_case(generator)
    with pytest.raises(UserError, match=f"{kind} needs the {name}"):
        value_and_gradient(PDConfig(adaptive_temperature=kind), *case)


def test_a_missing_tempered_student_is_named(generator):
    teacher, logits_TV, labels_T = random_case(generator)
    config = PDConfig(student_temperature=2.0)
    logq_TK = torch.zeros(teacher.ids.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"--pd-student-temperature 2\.0"):
        distillation_loss(config, teacher, logq_TK, logits_TV[:, 0], labels_T)


def test_truncation_of_the_configuration_is_that_of_the_rows(generator):
    teacher, logits_TV, labels_T = random_case(generator, top_p=1.0, top_k=20)
    for tail in ("renormalize", "ghost"):
        cut = value_and_gradient(
            PDConfig(tail=tail, top_p=0.6, top_k=3), teacher, logits_TV, labels_T
        )
        expected = value_and_gradient(
            PDConfig(tail=tail), truncate(teacher, 0.6, 3), logits_TV, labels_T
        )
        torch.testing.assert_close(cut, expected)


def test_mix_leaves_tokens_without_a_teacher_to_the_lm_loss():
    lm_T, kd_T = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 0.0])
    counts_T = torch.tensor([4, 0])
    assert mix(0.9, lm_T, kd_T, counts_T).tolist() == pytest.approx([0.1 * 2 + 0.9 * 5, 3.0])
    assert torch.equal(mix(0.0, lm_T, kd_T, counts_T), lm_T)


# ------------------------------------------------------------------------------ extreme rows


def extreme_rows() -> TeacherTargets:
    rows = [
        [0.0],  # all the mass on one token
        [math.log(0.6), math.log(0.4) + 3e-7],  # a hair above 1 after rounding
        [math.log(0.7), math.log(0.35)],  # above 1 by a coarse codec
        [-1e-9, -80.0],
        [-80.0, -80.0, -80.0],
        [],
        [math.log(0.5), math.log(0.3), math.log(0.1)],
        [-1.0, -2.0, -3.0, -90.0],
    ]
    ids = torch.full((len(rows), 4), -1, dtype=torch.int32)
    logprobs = torch.zeros(len(rows), 4)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.arange(len(row), dtype=torch.int32)
        logprobs[number, : len(row)] = torch.tensor(row)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return TeacherTargets(ids, logprobs, counts)


def extreme_students(rows: int) -> list[Tensor]:
    """Logits that love the row, hate it, love one token of it, love the rest, or are level."""
    level = torch.zeros(rows, 8)
    row, rest, first = level.clone(), level.clone(), level.clone()
    row[:, :4] = 1e4
    row[:, 4:] = -1e4
    rest[:, :4] = -1e4
    rest[:, 4:] = 1e4
    first[:, 0] = 1e4
    return [level, row, rest, first, -first]


@each_config
def test_extreme_rows_and_students_stay_finite(config):
    teacher = extreme_rows()
    for logits_TV in extreme_students(len(teacher.counts)):
        for label in (0, 2, 7):
            labels_T = torch.full_like(teacher.counts, label, dtype=torch.int64)
            value, gradient = value_and_gradient(config, teacher, logits_TV, labels_T)
            assert torch.isfinite(value).all(), (label, value)
            assert torch.isfinite(gradient).all(), (label, gradient)
            assert value[5] == 0.0
            assert (gradient[5] == 0.0).all()


@each_config
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_a_batch_without_any_teacher_is_zero(config, columns):
    teacher = TeacherTargets(
        torch.full((2, 3, columns), -1, dtype=torch.int32),
        torch.zeros(2, 3, columns),
        torch.zeros(2, 3, dtype=torch.int32),
    )
    logits = torch.randn(2, 3, 8).requires_grad_()
    loss = loss_from_logits(config, teacher, logits, torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(loss, torch.zeros(2, 3))
    loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3, 8))


@pytest.mark.parametrize("loss", ["nll", "kld", "mse-logit"])
@pytest.mark.parametrize("tail", ["renormalize", "raw", "ghost", "to-label", "decoupled"])
def test_the_gradient_is_whole_where_the_student_is_worst(tail, loss):
    """A student that is certain of another token is pulled as hard as p − t says."""
    if loss == "mse-logit" and tail != "renormalize":
        pytest.skip("mse-logit has no tail")
    probs = torch.tensor([0.6, 0.3])
    teacher = TeacherTargets(
        torch.tensor([[0, 1]], dtype=torch.int32),
        probs.log()[None],
        torch.tensor([2], dtype=torch.int32),
    )
    logits_TV = torch.tensor([[-1e4, 0.0, 1e4, 0.0]])
    _, gradient = value_and_gradient(
        PDConfig(tail=tail, loss=loss), teacher, logits_TV, torch.tensor([2])
    )
    assert gradient[0, 0] < -0.5


@pytest.mark.parametrize("tail", ["ghost", "decoupled"])
@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6])
def test_a_student_without_a_tail_is_pushed_off_the_row(tail, rest):
    """In float32 the error of the student's tail 1 − P is what limits the gradient."""
    probs = torch.tensor([0.6, 0.3])
    teacher = TeacherTargets(
        torch.tensor([[0, 1]], dtype=torch.int32),
        probs.log()[None],
        torch.tensor([2], dtype=torch.int32),
    )
    q = torch.tensor([0.5 - rest, 0.5, rest / 2, rest / 2], dtype=torch.float64)
    case = (PDConfig(tail=tail), teacher)
    _, single = value_and_gradient(*case, q.log()[None].float(), torch.tensor([0]))
    off = (0.9 - (1 - rest)) / 2
    expected = torch.tensor([q[0] - 0.6, q[1] - 0.3, off, off])
    error = (single[0] - expected).abs().max().item()
    assert error < 0.1 * 4e-7 / rest + 1e-6
