"""Deliberate errors, one line each, and the tests that must notice them.

Each row changes one place of a copy of the module and runs the tests below on that copy; one that passes them all is
a hole in the tests. The names are functions of test_derivations.py and test_unlearning.py, with their arguments.
"""

import sys
import types

import pytest
import test_derivations
import test_losses
import test_unlearning

from minisiss import losses, unlearning

# The tests that a mutant of losses.py meets: each claim once, at one setting.
DERIVATIONS = [
    lambda: test_losses.test_weights_are_the_ratios_of_densities_that_define_them(0.1, 700),
    lambda: test_losses.test_the_mixture_takes_a_where_pick_is_below_lambda(),
    lambda: test_derivations.test_naive_deletion_is_the_loss_on_the_kept_set_and_neggrad_minus_the_loss_on_the_forget_set(300),
    lambda: test_derivations.test_subtraction_identity(300),
    *(lambda x_from=x_from: test_derivations.test_siss_at_s_0_is_naive_deletion_for_every_lambda(x_from, 0.1, 1e-10, 300) for x_from in test_derivations.FORMS),
    *(lambda x_from=x_from: test_derivations.test_the_superfactor_subtracts_the_forget_sets_loss_s_times(x_from, 9.0, 0.5, 1e-10, 300) for x_from in test_derivations.FORMS),
    lambda: test_derivations.test_under_a_ceiling_siss_subtracts_the_mean_of_what_is_below_it(9.0, 300),
    lambda: test_losses.test_the_ideal_noise_is_the_literal_sum(0.01),
    lambda: test_losses.test_retracks_terms_weigh_l_unlearn_by_lambda_and_the_kept_loss_by_the_rest(),
    lambda: test_losses.test_unseen_asks_the_old_model_of_x_and_of_a_with_rows_and_columns_exchanged(),
    lambda: test_derivations.test_erasediff_pulls_the_prediction_on_the_forget_set_to_the_uniform_noise(),
]
MONTE_CARLO = [test_derivations.test_siss_agrees_with_naive_deletion_on_a_unet_by_monte_carlo]
RULES = [
    lambda: test_unlearning.test_the_norm_rule_subtracts_a_fraction_of_the_kept_norm("siss", 2.0),
    lambda: test_unlearning.test_the_superfactor_is_s_more_than_deletion("siss", 5.0, "all", 1),
    lambda: test_unlearning.test_the_superfactor_is_s_more_than_deletion("siss_no_is", 5.0, "rest", 0),
    lambda: test_unlearning.test_retrack_descends_on_both_terms(),
    lambda: test_unlearning.test_unseen_descends_on_both_terms_in_one_pass(),
    lambda: test_unlearning.test_images_above_the_ceiling_push_no_longer(None),
    lambda: test_unlearning.test_images_above_the_ceiling_push_no_longer(5.0),
    lambda: test_unlearning.test_naive_deletion_descends_and_neggrad_ascends(),
    lambda: test_unlearning.test_erasediff_descends_on_both_terms_on_one_side_of_its_switch_and_on_the_kept_one_on_the_other(),
    lambda: test_unlearning.test_each_method_has_its_loss_its_rule_and_its_numbers(),
    lambda: test_unlearning.test_a_batch_draws_x_from_where_it_is_told_and_a_from_the_forget_set(),
]

LOSSES = [
    ("sign of Δ", "((x - a) * (middle - m))", "((a - x) * (middle - m))"),
    ("γ for σ in Δ", "gamma / sigma**2 * (", "sigma / gamma**2 * ("),
    ("σ for σ² in Δ", "gamma / sigma**2 * (", "gamma / sigma * ("),
    ("no γ at the middle", "broadcast(gamma, x) * ((x + a) / 2)", "(x + a) / 2"),
    ("λ for 1−λ", "math.log1p(-lam) if lam < 1", "math.log(lam) if lam > 0"),
    ("the mixture's λ for 1−λ", "pick < lam", "pick < 1 - lam"),
    ("x and a exchanged in the mixture", "a, x)\n", "x, a)\n"),
    ("γ for σ in the mixture", "+ broadcast(sigma, x) * noise\n\n\ndef importance", "+ broadcast(gamma, x) * noise\n\n\ndef importance"),
    ("no n/(n−k)", "(n / (n - k), k", "(1.0, k"),
    ("no k/(n−k), x ~ X", "k / (n - k), 1.0)", "1.0, 1.0)"),
    ("no k/(n−k), x ~ X∖A", "k / (n - k), 0.0)", "1.0, 0.0)"),
    ("n/(n−k) for k/(n−k)", "k / (n - k), 1.0)", "n / (n - k), 1.0)"),
    ("the forms mixed: x ~ X∖A, c of x ~ X", "k / (n - k), 0.0)", "k / (n - k), 1.0)"),
    ("the forms mixed: x ~ X∖A, prefactor of x ~ X", "else (1.0, k", "else (n / (n - k), k"),
    ("the forms exchanged", 'self.x_from == "all" else', 'self.x_from != "all" else'),
    ("weight of the wrong term, kept", "of_keep * w_x", "of_keep * w_a"),
    ("weight of the wrong term, forgotten", "of_forget * w_a", "of_forget * w_x"),
    ("prefactors exchanged", "of_keep, of_forget, c = batch.prefactors\n    gamma", "of_forget, of_keep, c = batch.prefactors\n    gamma"),
    ("weights exchanged", "w_x, w_a = importance", "w_a, w_x = importance"),
    ("ε_a for ε_x", "epsilon_x, of_keep", "epsilon_a, of_keep"),
    ("ε_x for ε_a", "epsilon_a, of_forget", "epsilon_x, of_forget"),
    ("targets exchanged", "epsilon_x = (m - broadcast(gamma, m) * x)", "epsilon_x = (m - broadcast(gamma, m) * a)"),
    ("the drawn noise as kept target", "epsilon_x, of_keep", "batch.noise, of_keep"),
    ("the drawn noise as forgotten target", "epsilon_a, of_forget", "batch.noise, of_forget"),
    ("γ for σ in ε_x", "x) / broadcast(sigma, m)", "x) / broadcast(gamma, m)"),
    ("no γ in ε_a", "epsilon_a = (m - broadcast(gamma, m) * a)", "epsilon_a = (m - a)"),
    ("naive deletion on A", "(model, batch.x, batch.timesteps, batch.noise, schedule))", "(model, batch.a, batch.timesteps, batch.noise, schedule))"),
    ("NegGrad on X", "forget=epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule))", "forget=epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule))"),
    ("NegGrad descends", "Terms(forget=epsilon_matching", "Terms(keep=epsilon_matching"),
    ("No IS without n/(n−k)", "schedule, of_keep)", "schedule)"),
    ("No IS without k/(n−k)", "schedule, of_forget)", "schedule)"),
    ("a floor for a ceiling", "clamp(max=self", "clamp(min=self"),
    ("the weight under the ceiling too", "self.weight[images] * error\n", "(self.weight[images] * error).clamp(max=1 if self.ceiling is None else self.ceiling[images])\n"),
    ("the ceiling of another timestep", "ceiling=ceiling[self.forget.timesteps]", "ceiling=ceiling[0 * self.forget.timesteps]"),
    ("the ceiling on the kept term", "forget=replace(self.forget, ceiling", "keep=replace(self.keep, ceiling"),
    ("unseen asks of A itself", "old(m.mT, t).mT", "old(m, t)"),
    ("unseen does not exchange back", "old(m.mT, t).mT", "old(m.mT, t)"),
    ("unseen turned for exchanged", "old(m.mT, t).mT", "old(m.rot90(1, (2, 3)), t).rot90(-1, (2, 3))"),
    ("unseen keeps by the noise", "replace(terms.keep, target=of_x)", "terms.keep"),
    ("unseen's targets exchanged", "of_x, of_a = Teacher", "of_a, of_x = Teacher"),
    ("unseen without its weight", "unseen_weight * terms.forget.weight", "terms.forget.weight"),
    ("unseen weighs A as x", "unseen_weight * terms.forget.weight", "unseen_weight * terms.keep.weight"),
    ("a teacher's gradient", "with torch.no_grad():\n            return self", "with torch.enable_grad():\n            return self"),
    ("a teacher at other images' timesteps", "self.timesteps[images])\n\n\n@dataclass(frozen=True)\nclass Term:", "self.timesteps[: len(images)])\n\n\n@dataclass(frozen=True)\nclass Term:"),
    ("ReTrack's λ exchanged", "batch.noise, schedule, 1 - retrack_weight", "batch.noise, schedule, retrack_weight"),
    ("ReTrack's forget term on x", "epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule, retrack_weight)", "epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule, retrack_weight)"),
    ("ReTrack's farthest neighbours", "(gamma / sigma**2 * inner)", "(-gamma / sigma**2 * inner)"),
    ("σ for σ² in ReTrack's shares", "(gamma / sigma**2 * inner)", "(gamma / sigma * inner)"),
    ("no γ at ReTrack's middle", "- gamma / 2 * from_first", "- 1 / 2 * from_first"),
    ("γ for σ in ReTrack's target", "gamma * nearest) / sigma)", "gamma * nearest) / gamma)"),
    ("no γ in ReTrack's target", "(rest - gamma * nearest)", "(rest - nearest)"),
    ("EraseDiff's target is the noise", "batch.timesteps, batch.uniform, ", "batch.timesteps, batch.noise, "),
    ("EraseDiff's forget term on x", "a_t = schedule.add_noise(batch.a", "a_t = schedule.add_noise(batch.x"),
]  # fmt: skip
UNLEARNING = [
    ("ρ inverted", "settings.grad_ratio * norm(g_keep)", "1 / settings.grad_ratio * norm(g_keep)"),
    ("norms exchanged", "norm(g_keep) / norm(g_forget).clamp", "norm(g_forget) / norm(g_keep).clamp"),
    ("s for 1+s", "return terms.c_of_deletion + settings", "return settings"),
    ("1+s for s", "return terms.c_of_deletion + settings", "return 1 + settings"),
    ("ReTrack ascends", "return -1.0", "return 1.0"),
    ("ReTrack's forget term at s", "return -1.0", "return -(settings.superfactor or 1.0)"),
    ("no ceiling", "return terms if ceiling is None else terms.below(ceiling)", "return terms"),
    ("forget gradient added", "keep.sub_(c * forget)", "keep.add_(c * forget)"),
    ("one pass with the forget term added", "terms.forget, c)", "terms.forget, -c)"),
    ("NegGrad descends", "g = [-f for f", "g = [f for f"),
    ("EraseDiff without its switch", "- agreement).clamp(min=0)", "- agreement)"),
    ("EraseDiff divides by the norm, not its square", "norm(g_forget).square().clamp", "norm(g_forget).clamp"),
    ("EraseDiff's forget term ascended", "return -(settings.erasediff_eta", "return (settings.erasediff_eta"),
    ("the weighed images' mean instead of the batch's", ".sum() / batch_size", ".mean()"),
    ("No IS with importance sampling", "Method(losses.siss_no_is)", 'Method(losses.siss, settings=("lam",))'),
    ("EraseDiff without its uniform noise", "Method(losses.erasediff, ", "Method(losses.siss_no_is, "),
    ("ReTrack without its neighbours", 'losses.retrack, None, settings=("retrack_weight",)', "losses.siss_no_is, None"),
    ("another ρ", '"] = 0.1\n    superfactor', '"] = 1.0\n    superfactor'),
    ("another η", 'rule"] = 0.1', 'rule"] = 1.0'),
    ("another λ of ReTrack", "= 0.005", "= 0.5"),
    ("another K of ReTrack", "0: all\"] = 10", "0: all\"] = 1"),
    ("x from all of X", "data.draw(draw_x, ", 'data.draw("all", '),
    ("a from X∖A", 'data.draw("forget", ', 'data.draw("rest", '),
    ("the neighbours of x", "neighbours(a) if", "neighbours(x) if"),
    ("a batch of the other form", "x_from=draw_x", 'x_from="all"'),
    ("uniform noise for normal", "noise=torch.randn", "noise=torch.rand"),
    ("normal noise for EraseDiff's uniform", "uniform=torch.rand(", "uniform=torch.randn("),
]  # fmt: skip


def mutate(monkeypatch, module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """A copy of the module with one place changed, put where the tests look for the original."""
    source = open(module.__file__, encoding="utf-8").read()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    mutant = types.ModuleType(module.__name__)
    mutant.__file__ = module.__file__
    monkeypatch.setitem(sys.modules, module.__name__, mutant)  # dataclasses look their module up
    exec(compile(source.replace(old, new), module.__file__, "exec"), mutant.__dict__)
    if module is losses:
        monkeypatch.setattr(unlearning, "Batch", mutant.Batch)
    for test in (test_losses, test_derivations, test_unlearning):
        for name, value in list(vars(test).items()):
            if value is module:
                monkeypatch.setattr(test, name, mutant)
            elif getattr(value, "__module__", None) == module.__name__ or (name == "METHODS" and module is unlearning):
                monkeypatch.setattr(test, name, getattr(mutant, name))
    return mutant


def caught(tests) -> bool:
    for test in tests:
        try:
            test()
        except (AssertionError, FloatingPointError):
            return True
    return False


def test_the_tests_pass_on_the_code_as_it_is(monkeypatch):
    mutate(monkeypatch, losses, "def siss(", "def siss(")
    assert not caught(DERIVATIONS + MONTE_CARLO)
    mutate(monkeypatch, unlearning, "def step(", "def step(")
    for test in RULES:
        test()


@pytest.mark.parametrize("name, old, new", LOSSES, ids=[row[0] for row in LOSSES])
def test_an_error_in_the_losses_is_caught(monkeypatch, name, old, new):
    mutate(monkeypatch, losses, old, new)
    assert caught(DERIVATIONS), f"no test notices: {name}"


@pytest.mark.parametrize("name", ["weights exchanged", "no n/(n−k)", "targets exchanged", "ε_a for ε_x", "ε_x for ε_a", "sign of Δ"])
def test_monte_carlo_catches_it_too(monkeypatch, name):
    old, new = next((old, new) for row, old, new in LOSSES if row == name)
    mutate(monkeypatch, losses, old, new)
    assert caught(MONTE_CARLO), f"Monte Carlo does not notice: {name}"


@pytest.mark.parametrize("name, old, new", UNLEARNING, ids=[row[0] for row in UNLEARNING])
def test_an_error_in_the_step_is_caught(monkeypatch, name, old, new):
    mutate(monkeypatch, unlearning, old, new)
    assert caught(RULES), f"no test notices: {name}"
