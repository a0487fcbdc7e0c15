"""Deliberate errors, one place each, that the tests of the method must notice.

A row has a name, a function, an expression or statement in it, and what takes its place. Code is
compared as ast.unparse writes it, so its layout does not matter. Then the module's tests must fail.
"""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_beyond
import test_derivations
import test_losses
import test_unlearning

from minisiss import beyond, losses, unlearning

TESTS = {  # in this order each of these modules is executed: it imports those before it
    losses: [test_derivations, test_losses],
    beyond: [test_beyond],
    unlearning: [test_unlearning],
}
ROWS = {
    losses: [
        ("ε_a for ε_x", "siss", "schedule.noise_between(x, m, t)", "schedule.noise_between(a, m, t)"),
        ("ε_x for ε_a", "siss", "schedule.noise_between(a, m, t)", "schedule.noise_between(x, m, t)"),
        ("the drawn noise for ε_a", "siss", "schedule.noise_between(a, m, t)", "batch.noise"),
        ("weights exchanged", "siss", "importance_weights(m, x, a, gamma, sigma, lam)", "importance_weights(m, a, x, gamma, sigma, lam)"),
        ("w_a in keep", "siss", "batch.keep_prefactor * w_x", "batch.keep_prefactor * w_a"),
        ("w_x in forget", "siss", "batch.forget_prefactor * w_a", "batch.forget_prefactor * w_x"),
        ("a second network call", "siss", "squared_error(epsilon_a, prediction)", "squared_error(epsilon_a, model(m, t))"),
        ("x and a exchanged in the mixture", "sample_mixture", "torch.where(broadcast(pick < lam, x), a, x)", "torch.where(broadcast(pick < lam, x), x, a)"),
        ("sign of Δ", "importance_weights", "x - a", "a - x"),
        ("σ for σ² in Δ", "importance_weights", "gamma / sigma**2", "gamma / sigma"),
        ("no γ at the middle", "importance_weights", "broadcast(gamma, x) * (x + a) / 2", "(x + a) / 2"),
        ("λ for 1−λ in w_x", "importance_weights", "(1 - lam) + lam * delta.exp()", "lam + (1 - lam) * delta.exp()"),
        ("Δ for −Δ in w_a", "importance_weights", "(-delta).exp()", "delta.exp()"),
        ("weights without a bound", "importance_weights", "delta.clamp(-MAX_DELTA, MAX_DELTA)", "delta"),
        ("λ above 1 taken", "importance_weights", "not 0 <= lam <= 1", "lam < 0"),
        ("a sum over pixels", "squared_error", "(target - prediction).pow(2).flatten(1).mean(dim=1)", "(target - prediction).pow(2).flatten(1).sum(dim=1)"),
        ("no n/(n−k)", "keep_prefactor", "self.n / (self.n - self.k)", "1.0"),
        ("forms mixed: n/(n−k) with x ~ X∖A", "keep_prefactor", "1.0", "self.n / (self.n - self.k)"),
        ("n/(n−k) for k/(n−k)", "forget_prefactor", "self.k / (self.n - self.k)", "self.n / (self.n - self.k)"),
        ("naive deletion on A", "naive_deletion", "batch.x", "batch.a"),
        ("NegGrad on X", "neggrad", "batch.a", "batch.x"),
        ("NegGrad descends", "neggrad", "return torch.zeros_like(forget), forget", "return forget, torch.zeros_like(forget)"),
        ("No IS without n/(n−k)", "siss_no_is", "batch.keep_prefactor * keep", "keep"),
        ("No IS without k/(n−k)", "siss_no_is", "batch.forget_prefactor * forget", "forget"),
        ("EraseDiff's target is the noise", "erasediff", "batch.uniform", "batch.noise"),
    ],
    beyond: [
        ("λ for 1−λ", "retrack", "1 - weight", "weight"),
        ("near the noisy image", "retrack", "nearest(batch.a)", "nearest(a_t)"),
        ("farthest images", "ideal_noise", "x - first", "first - x"),
        ("σ for σ²", "ideal_noise", "gamma / sigma**2", "gamma / sigma"),
        ("equal weights", "ideal_noise", "(w * x).sum(dim=1)", "x.mean(dim=1)"),
        ("asks of A itself", "old_targets", "old(m.mT, t).mT", "old(m, t)"),
        ("does not exchange back", "old_targets", "old(m.mT, t).mT", "old(m.mT, t)"),
        ("turned, not exchanged", "old_targets", "old(m.mT, t).mT", "old(m.rot90(1, (2, 3)), t).rot90(-1, (2, 3))"),
        ("keeps by the noise", "old_targets", "squared_error(target_of_x, prediction)", "squared_error(batch.noise, prediction)"),
        ("no weight s", "old_targets", "weight * forget", "forget"),
        ("a gradient of the old model", "old_targets", "torch.no_grad()", "torch.enable_grad()"),
    ],
    unlearning: [
        ("forget gradient added by a number", "step", "keep - c * forget", "keep + c * forget"),
        ("forget gradient added by a rule", "step", "keep -= c * forget", "keep += c * forget"),
        ("mean of a part, kept", "step", "keep.sum() / size", "keep.mean()"),
        ("mean of a part, forgotten", "step", "forget.sum() / size", "forget.mean()"),
        ("not clipped", "step", "clip_grad_norm_(parameters, MAX_NORM)", "clip_grad_norm_(parameters, 1e9)"),
        ("steps along NaN", "step", "not all(finite)", "not any(finite)"),
        ("losses exchanged", "step", "[keep.detach(), forget.detach()]", "[forget.detach(), keep.detach()]"),
        ("parts without their last image", "parts_of", "places[-1] + 1", "places[-1]"),
        ("ρ inverted", "ratio_of_norms", "grad_ratio * norm(g_keep)", "norm(g_keep) / grad_ratio"),
        ("EraseDiff without its switch", "erasediff_rule", "(eta - agreement).clamp(min=0)", "(eta - agreement)"),
        ("EraseDiff ascends", "erasediff_rule", "-(eta - agreement).clamp(min=0)", "(eta - agreement).clamp(min=0)"),
        ("s for 1+s", "c_of_superfactor", '1 + s if draw_x == "all" else s', "s"),
        ("1+s for s", "c_of_superfactor", '1 + s if draw_x == "all" else s', "1 + s"),
        ("s rises", "c_of_superfactor", "1 - progress / subtract_until", "progress / subtract_until"),
        ("s falls below 0", "c_of_superfactor", "max(0.0, 1 - progress / subtract_until)", "1 - progress / subtract_until"),
        ("the rate rises", "learning_rate", "1 + math.cos", "1 - math.cos"),
        ("timesteps with gaps", "spread", "order + inside", "order"),
        ("timesteps in order", "spread", "torch.randperm(size, generator=generator, device=device)", "torch.arange(size)"),
        ("No IS with IS", "METHODS", "losses.siss_no_is", "losses.siss"),
        ("x from all of X", "draw_batch", "data.draw(draw_x, size, generator)", 'data.draw("all", size, generator)'),
        ("a from X∖A", "draw_batch", 'data.draw("forget", size, generator)', 'data.draw("rest", size, generator)'),
        ("n without k", "draw_batch", "data.n", "data.n - data.k"),
        ("normal noise for uniform", "draw_batch", "torch.rand(x.shape, **options)", "torch.randn(x.shape, **options)"),
        ("half of the timesteps", "draw_batch", "len(schedule)", "len(schedule) // 2"),
        ("decay for 1 − decay", "update_average", "1 - decay", "decay"),
    ],
}  # fmt: skip


@contextmanager
def mutated(changed, name, old, new):
    """The modules with one place changed, while the context lasts."""
    originals = {module: dict(vars(module)) for module in TESTS}
    try:
        for module in TESTS:
            code = ast.unparse(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
            if module is changed:
                place = f"def {name}(" if f"def {name}(" in code else f"{name} = "
                before, place, after = code.partition(place)
                after, end, rest = after.partition("def ")
                old = ast.unparse(ast.parse(old))
                assert after.count(old) == 1, f"{old} stands {after.count(old)} times in {name}"
                code = before + place + after.replace(old, new) + end + rest
            exec(compile(code, module.__file__, "exec"), vars(module))
        yield
    finally:
        for module, names in originals.items():
            vars(module).update(names)


def run_tests_of(module):
    """Run each test with its first parameters and with its last. Monte Carlo has a test below."""
    for tests in TESTS[module]:
        for name, test in vars(tests).items():
            cases = [{}] if name.startswith("test_") and "monte_carlo" not in name else []
            for mark in getattr(test, "pytestmark", []):
                names, values = mark.args[0].split(", "), list(mark.args[1])
                rows = values if len(names) > 1 else [[value] for value in values]
                cases = [case | dict(zip(names, row)) for case in cases for row in rows]
            for case in cases[:1] + cases[1:][-1:]:
                test(**case)


CAUGHT = (AssertionError, FloatingPointError, pytest.fail.Exception)
ERRORS = {row[0]: (module, *row[1:]) for module, rows in ROWS.items() for row in rows}


@pytest.mark.parametrize("module", TESTS)
def test_code_as_it_is_passes(module):
    with mutated(losses, "siss", "batch.x", "batch.x"):
        run_tests_of(module)


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_caught(name):
    module, *change = ERRORS[name]
    with mutated(module, *change), pytest.raises(CAUGHT):
        run_tests_of(module)


@pytest.mark.parametrize("name", ["ε_x for ε_a", "weights exchanged", "no n/(n−k)", "sign of Δ"])
def test_monte_carlo_catches_error_too(name):
    with mutated(*ERRORS[name]), pytest.raises(AssertionError):
        test_derivations.test_monte_carlo_agrees_on_a_unet()
