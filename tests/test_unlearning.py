import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import randomise

from minisiss import losses, unlearning
from minisiss.data.neighbours import nearest_kept
from minisiss.data.training_set import TrainingSet
from minisiss.losses import Term, Terms
from minisiss.machine.ranks import gradient_in_parts
from minisiss.schedule import NoiseSchedule
from minisiss.study.workload import literal_gradients
from minisiss.unet import UNet, UNetConfig
from minisiss.unlearning import METHODS, Settings, draw_batch

SCHEDULE = NoiseSchedule.linear()


class TwoParameters(torch.nn.Module):
    """ε_θ(m, t) = p m + q, whose gradients fit on a line."""

    def __init__(self, p=0.3, q=-0.2):
        super().__init__()
        self.p, self.q = torch.nn.Parameter(torch.tensor(p)), torch.nn.Parameter(torch.tensor(q))

    def forward(self, m, timesteps):
        return self.p * m + self.q

    def gradient(self, term):
        """d/dp, d/dq of mean over images of weight · mean over pixels of (target − p m − q)²."""
        error = self.p.detach() * term.noisy + self.q.detach() - term.target
        weighted = 2 * term.weight[:, None, None, None] * error / error[0].numel() / len(error)
        return [(weighted * term.noisy).sum().item(), weighted.sum().item()]


def batch(seed=0, size=6, draw_x="all"):
    images = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    data, generator = TrainingSet(images, 3), torch.Generator().manual_seed(seed)
    return draw_batch(data, size, SCHEDULE, generator, draw_x, nearest_kept(data, 4))


def step(method, settings, seed=0, draw_x="all", also=lambda model: None):
    """One SGD step at rate 1 on the two-parameter model: the gradients by hand, what was stepped along, the figures."""
    model = TwoParameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    terms = METHODS[method].terms(model, batch(seed, draw_x=draw_x), SCHEDULE, settings)
    keep, forget = (model.gradient(term) if term else None for term in (terms.keep, terms.forget))
    old = [p.item() for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearning, "MAX_NORM", 1e9)
        figures = unlearning.step(METHODS[method], terms, optimizer, settings, also=also(model))
    return keep, forget, [before - p.item() for before, p in zip(old, model.parameters(), strict=True)], figures


def combine(keep, forget, c):
    return pytest.approx([k - c * f for k, f in zip(keep, forget, strict=True)], rel=1e-4, abs=1e-6)


def length(g):
    return math.hypot(*g)


@pytest.mark.parametrize("method", ["siss", "siss_no_is"])
@pytest.mark.parametrize("rho", [0.0, 0.1, 2.0])
def test_the_norm_rule_subtracts_a_fraction_of_the_kept_norm(method, rho):
    keep, forget, moved, figures = step(method, Settings(grad_ratio=rho))
    c = rho * length(keep) / length(forget)
    assert moved == combine(keep, forget, c)
    assert figures["c"].item() == pytest.approx(c, rel=1e-4)
    # ‖c · g_forget‖ = ρ ‖g_keep‖
    assert figures["c"].item() * length(forget) == pytest.approx(rho * length(keep), rel=1e-4)
    assert figures["norm_keep"].item() == pytest.approx(length(keep), rel=1e-4)
    assert figures["norm_forget"].item() == pytest.approx(length(forget), rel=1e-4)


@pytest.mark.parametrize("draw_x, c_of_deletion", [("all", 1), ("rest", 0)])
@pytest.mark.parametrize("method", ["siss", "siss_no_is"])
@pytest.mark.parametrize("s", [0.0, 5.0])
def test_the_superfactor_is_s_more_than_deletion(method, s, draw_x, c_of_deletion):
    keep, forget, moved, _ = step(method, Settings(superfactor=s), draw_x=draw_x)
    assert moved == combine(keep, forget, c_of_deletion + s)


def test_retrack_descends_on_both_terms():
    for s in (None, 5.0):  # it subtracts nothing, whatever s
        keep, forget, moved, _ = step("retrack", Settings(superfactor=s))
        assert moved == combine(keep, forget, -1)


def test_unseen_descends_on_both_terms_in_one_pass():
    model, drawn, settings = TwoParameters(), batch(size=40, draw_x="rest"), Settings(unseen_weight=300.0)
    terms = METHODS["unseen"].terms(model, drawn, SCHEDULE, settings, old=lambda m, t: m * torch.arange(4.0))
    everything, before = torch.arange(40), [p.item() for p in model.parameters()]
    keep, forget = (model.gradient(replace(term, target=term.target[everything])) for term in (terms.keep, terms.forget))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearning, "MAX_NORM", 1e9)
        figures = unlearning.step(METHODS["unseen"], terms, torch.optim.SGD(model.parameters(), lr=1.0), settings)
    assert "loss" in figures and "norm_keep" not in figures
    assert [old - p.item() for old, p in zip(before, model.parameters(), strict=True)] == combine(keep, forget, -1)


@pytest.mark.parametrize("superfactor", [None, 5.0], ids=["two passes", "one pass"])
def test_images_above_the_ceiling_push_no_longer(superfactor):
    model, drawn, settings = TwoParameters(), batch(size=40), Settings(superfactor=superfactor)
    terms = METHODS["siss"].terms(model, drawn, SCHEDULE, settings)
    error = losses.squared_error(model(terms.forget.noisy, drawn.timesteps), terms.forget.target).detach()
    tau = error[terms.forget.counts].median() * 1.0001  # not at an error itself
    ceiling = torch.full((1000,), tau.item())
    terms = METHODS["siss"].terms(model, drawn, SCHEDULE, settings, ceiling)
    assert 0 < (error[terms.forget.counts] > tau).float().mean() < 1
    forget = model.gradient(replace(terms.forget, weight=terms.forget.weight * (error <= tau)))
    keep, old = model.gradient(terms.keep), [p.item() for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearning, "MAX_NORM", 1e9)
        figures = unlearning.step(METHODS["siss"], terms, torch.optim.SGD(model.parameters(), lr=1.0), settings)
    moved = [before - p.item() for before, p in zip(old, model.parameters(), strict=True)]
    c = 1 + superfactor if superfactor else figures["c"].item()
    assert moved == combine(keep, forget, c)


def test_naive_deletion_descends_and_neggrad_ascends():
    keep, forget, moved, _ = step("naive_deletion", Settings())
    assert forget is None and moved == pytest.approx(keep, rel=1e-4)
    keep, forget, moved, _ = step("neggrad", Settings())
    assert keep is None and moved == pytest.approx([-f for f in forget], rel=1e-4)


def test_erasediff_descends_on_both_terms_on_one_side_of_its_switch_and_on_the_kept_one_on_the_other():
    sides = set()
    for eta in (0.0, 0.1, 1e3):
        for seed in range(6):
            keep, forget, moved, _ = step("erasediff", Settings(erasediff_eta=eta), seed)
            agreement = (keep[0] * forget[0] + keep[1] * forget[1]) / length(forget) ** 2
            assert moved == combine(keep, forget, -max(eta - agreement, 0.0))
            sides.add(eta > agreement)
    assert sides == {True, False}


def test_gradients_are_clipped_after_they_are_combined():
    model = TwoParameters(p=50.0)
    terms = losses.siss(model, batch(), SCHEDULE, 0.5)
    old = [p.item() for p in model.parameters()]
    figures = unlearning.step(METHODS["siss"], terms, torch.optim.SGD(model.parameters(), lr=1.0), Settings())
    assert figures["norm"] > 1
    assert length([before - p.item() for before, p in zip(old, model.parameters(), strict=True)]) == pytest.approx(1, rel=1e-4)


def test_a_further_loss_is_descended_on_too_and_leaves_c_alone():
    settings = Settings(grad_ratio=0.5)
    *_, alone, figures = step("siss", settings)
    *_, moved, with_it = step("siss", settings, also=lambda model: 3 * model.p + model.q**2)
    assert moved == pytest.approx([alone[0] + 3, alone[1] + 2 * -0.2], rel=1e-4)
    assert with_it["c"] == figures["c"] and with_it["loss_also"].item() == pytest.approx(3 * 0.3 + 0.04)
    assert "loss_also" not in figures


def test_a_batch_in_which_nothing_is_to_be_forgotten_only_descends():
    model = TwoParameters()
    terms = losses.siss(model, batch(), SCHEDULE, 0.5)
    nothing = Term(model, terms.forget.noisy, terms.forget.timesteps, terms.forget.target, torch.zeros(6))
    figures = unlearning.step(METHODS["siss"], Terms(terms.keep, nothing), torch.optim.SGD(model.parameters(), lr=1.0), Settings())
    assert figures["norm"].item() == pytest.approx(figures["norm_keep"].item()) and figures["norm_forget"] == 0


@pytest.mark.parametrize("broken", ["keep", "forget"])
def test_a_loss_that_is_no_number_stops_before_the_parameters_change(broken):
    model = TwoParameters()
    terms = losses.siss(model, batch(), SCHEDULE, 0.5)
    getattr(terms, broken).target[1] = float("nan")
    with pytest.raises(FloatingPointError, match=f"loss_{broken} is nan"):
        unlearning.step(METHODS["siss"], terms, torch.optim.SGD(model.parameters(), lr=1.0), Settings())
    assert model.p.item() == pytest.approx(0.3) and model.q.item() == pytest.approx(-0.2)


def test_a_parameter_that_is_no_number_any_more_stops_too():
    model = TwoParameters()
    with pytest.raises(FloatingPointError, match="a parameter"):
        unlearning.step(METHODS["siss"], losses.siss(model, batch(), SCHEDULE, 0.5), torch.optim.SGD(model.parameters(), lr=math.inf), Settings())


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("config", [dict(image_size=28), dict(image_size=256, image_channels=3, channels=(4,) * 6, norm_groups=2)], ids=["28", "256"])
def test_leaving_out_images_of_negligible_weight_changes_no_gradient(lam, config):
    config = UNetConfig(**{**dict(channels=(8, 16), norm_groups=4, layers_per_block=1, attention_levels=()), **config})
    model = randomise(UNet(config))
    shape, rng = (8, config.image_channels, config.image_size, config.image_size), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    drawn = draw_batch(TrainingSet(images, 1), 4, SCHEDULE, torch.Generator().manual_seed(0), "all")
    terms = losses.siss(model, drawn, SCHEDULE, lam)
    parameters = list(model.parameters())
    # In one part, and in two parts of two images: accumulation is the same sum.
    ways = [unlearning.gradient, gradient_in_parts, partial(gradient_in_parts, micro_batch=2)]
    for term, literal in zip((terms.keep, terms.forget), literal_gradients(terms, parameters), strict=True):
        for gradient in ways:
            _, ours = gradient(term, parameters)
            scale = unlearning.norm(list(literal))
            assert unlearning.norm([a - b for a, b in zip(ours, literal, strict=True)]) <= 1e-5 * scale


@pytest.mark.parametrize("s", [0.0, 9.0])
def test_with_a_known_c_one_pass_makes_the_same_step(s, monkeypatch):
    _, _, by_one, known = step("siss", Settings(superfactor=s))
    monkeypatch.setattr(Terms, "share_images", False)
    keep, forget, by_two, figures = step("siss", Settings(superfactor=s))
    assert by_one == pytest.approx(by_two, rel=1e-4) and by_one == combine(keep, forget, 1 + s)
    assert known["loss"] == pytest.approx((figures["loss_keep"] - (1 + s) * figures["loss_forget"]).item(), rel=1e-4)
    assert known["norm"] == pytest.approx(figures["norm"].item(), rel=1e-4) and "norm_keep" not in known
    _, _, other, _ = step("siss", Settings(superfactor=s + 1))
    assert other != pytest.approx(by_two, rel=1e-2)


@pytest.mark.parametrize("gradient", [unlearning.gradient, gradient_in_parts])
def test_one_pass_for_both_terms_takes_the_images_that_count_in_either(gradient):
    sizes = []

    def model(noisy, timesteps):
        sizes.append(len(noisy))
        return weight * noisy

    weight = torch.nn.Parameter(torch.tensor(0.5))
    noisy = torch.ones(4, 1, 2, 2)
    keep, forget = (Term(model, noisy, torch.zeros(4), torch.zeros(4, 1, 2, 2), torch.tensor(w)) for w in ([2.0, 1, 0, 0], [0.0, 1, 3, 0]))
    value, (g,) = gradient(losses.Difference(keep, forget, 0.1), [weight])
    # (2 + 1 − 0.1 · (1 + 3)) · weight² over a batch of four
    assert sizes == [3] and value.item() == pytest.approx(2.6 / 4 * 0.25) and g.item() == pytest.approx(2.6 / 4)


@pytest.mark.parametrize("micro_batch, asked_of", [(None, [2, 1]), (1, [1, 0, 1, 0, 0, 1])])
def test_one_pass_asks_a_teacher_for_the_images_that_count_in_its_term(micro_batch, asked_of):
    asked = []
    config = UNetConfig(image_size=4, channels=(8, 16), norm_groups=4, layers_per_block=1)
    model, old = randomise(UNet(config)), randomise(UNet(config), seed=1)

    def teacher(noisy, timesteps):
        asked.append(len(noisy))
        return old(noisy, timesteps)

    noisy, timesteps = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 99, 500, 900])
    target = losses.Teacher(teacher, noisy, timesteps)
    keep, forget = (Term(model, noisy, timesteps, target, torch.tensor(w)) for w in ([2.0, 1, 0, 0], [0.0, 0, 3, 0]))
    parameters = list(model.parameters())
    value, ours = gradient_in_parts(losses.Difference(keep, forget, -1.0), parameters, micro_batch=micro_batch)
    assert asked == asked_of
    literal = (torch.tensor([2.0, 1, 3, 0]) * (old(noisy, timesteps).detach() - model(noisy, timesteps)).square().flatten(1).mean(dim=1)).mean()
    assert value.item() == pytest.approx(literal.item(), rel=1e-5)
    for a, b in zip(ours, torch.autograd.grad(literal, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", [unlearning.gradient, gradient_in_parts])
def test_a_term_in_which_no_image_counts_has_no_gradient_and_no_pass(gradient):
    weight = torch.nn.Parameter(torch.tensor(0.5))
    term = Term(None, torch.ones(4, 1, 2, 2), torch.zeros(4), torch.zeros(4, 1, 2, 2), torch.zeros(4))
    assert gradient(term, [weight]) == (0, [0])


def test_one_pass_is_refused_for_terms_of_different_noisy_images():
    terms = losses.siss_no_is(TwoParameters(), batch(), SCHEDULE)
    assert not terms.share_images
    with pytest.raises(ValueError, match="share"):
        losses.Difference(terms.keep, terms.forget, 1.0)


def test_the_figures_count_effective_images_and_those_that_matter_to_both_terms():
    assert unlearning.effective_sample_size(torch.tensor([1.0, 1, 0, 0])) == 2
    assert unlearning.effective_sample_size(torch.tensor([3.0, 1e-6])).item() == pytest.approx(1, rel=1e-4)
    assert unlearning.effective_sample_size(torch.zeros(3)) == 0
    figures = step("siss", Settings())[3]
    assert set(figures) == {"loss_keep", "norm_keep", "ess_keep", "loss_forget", "norm_forget", "ess_forget", "overlap", "c", "norm"}
    terms = losses.siss(TwoParameters(), batch(), SCHEDULE, 0.5)
    assert figures["overlap"].item() == ((terms.keep.weight > 1e-8) & (terms.forget.weight > 1e-8)).float().mean().item()


def test_each_method_has_its_loss_its_rule_and_its_numbers():
    """Row by row: another loss or rule of the same form would pass the tests of the steps, which take the terms from the table."""
    fields = lambda row: (row.loss.__name__, row.rule and row.rule.__name__, row.settings, row.neighbours, row.old)  # noqa: E731
    rows = {name: fields(row) for name, row in METHODS.items()}
    assert rows == {
        "siss": ("siss", "subtract", ("lam",), False, False),
        "siss_no_is": ("siss_no_is", "subtract", (), False, False),
        "naive_deletion": ("naive_deletion", None, (), False, False),
        "neggrad": ("neggrad", None, (), False, False),
        "erasediff": ("erasediff", "erasediff_rule", (), False, False),
        "retrack": ("retrack", None, ("retrack_weight",), True, False),
        "unseen": ("unseen", None, ("lam", "unseen_weight"), False, True),
    }
    assert vars(Settings()) == dict(
        lam=0.5, grad_ratio=0.1, superfactor=None, ceiling=0.0, erasediff_eta=0.1, retrack_weight=0.005, neighbours=10, unseen_weight=3.0)  # fmt: skip


def test_a_batch_draws_x_from_where_it_is_told_and_a_from_the_forget_set():
    # Pixel values tell the sets apart: 0 … 7 are X∖A, 8 and 9 are A.
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    data = TrainingSet(images, 2)
    seen = {}
    for draw_x in ("all", "rest"):
        drawn = draw_batch(data, 400, SCHEDULE, torch.Generator().manual_seed(0), draw_x, neighbours=lambda a: a)
        assert (drawn.n, drawn.k, drawn.x_from) == (10, 2, draw_x)
        value = lambda z: set(((z[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())  # noqa: E731
        seen[draw_x] = value(drawn.x)
        assert value(drawn.a) == {8, 9} and drawn.neighbours is drawn.a  # near a, not near x
        assert drawn.timesteps.min() < 10 and drawn.timesteps.max() > 990
        for uniform in (drawn.pick, drawn.uniform):
            assert uniform.min() >= 0 and uniform.max() < 1 and uniform.mean().item() == pytest.approx(0.5, abs=0.05)
        assert drawn.noise.mean().abs() < 0.1 and drawn.noise.std().item() == pytest.approx(1, abs=0.1)
        assert drawn.uniform.shape == drawn.noise.shape == drawn.x.shape and drawn.pick.shape == (400,)
    assert seen == {"all": set(range(10)), "rest": set(range(8))}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0, 2.0])
def test_a_step_with_a_disturbance_below_the_gradients_norm_still_descends_and_no_other_is_promised_to(p):
    """The paper's appendix "gradient clipping": ‖v‖ ≤ p ‖∇f‖ gives f(x') ≤ f(x) − (1 − p − ε) t ‖∇f‖²."""
    smoothness, t = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64), 0.01  # f(x) = ½ Σ h x², whose L is 3
    f = lambda x: 0.5 * (smoothness * x.square()).sum(-1)  # noqa: E731
    epsilon = 3 * t / 2 + 3 * t * p + 3 * t * p**2 / 2
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(1000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    slope = smoothness * x
    length = slope.norm(dim=1, keepdim=True)
    worst, any_v = -p * slope, p * length * direction / direction.norm(dim=1, keepdim=True)
    for v in (any_v, worst):
        after, bound = f(x - t * (slope + v)), f(x) - (1 - p - epsilon) * t * length[:, 0] ** 2
        assert (after <= bound + 1e-12).all()
    falls = f(x - t * (slope + worst)) < f(x)
    assert falls.all() if p < 1 else not falls.any()  # the norm rule with ρ < 1 is within the guarantee
