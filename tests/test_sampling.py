import copy
from itertools import pairwise

import pytest
import torch
from conftest import randomise

from minisiss import losses, unlearning
from minisiss.sampling import denoise_from, guided, sample, timestep_sequence
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig


def model(x, timesteps):
    """Any smooth function of both arguments."""
    return torch.tanh(0.7 * x + 0.01 * timesteps[:, None, None, None]) + 0.1 * x.flip(-1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SCHEDULE = NoiseSchedule.linear(40, 1e-3, 0.2)
SHAPE = (3, 1, 4, 4)


@pytest.mark.parametrize("clip", [True, False])
def test_eta_1_over_all_timesteps_is_the_ddpm_algorithm(clip):
    # Ho et al. 2020, algorithm 2, written with the posterior mean (eq. 7) and variance β̃_t.
    rng = generator()
    x = torch.randn(SHAPE, generator=rng)
    betas, cumprod = SCHEDULE.betas.double(), SCHEDULE.alphas_cumprod.double()
    for t in reversed(range(40)):
        alpha_bar, beta = cumprod[t], betas[t]
        before = cumprod[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
        x0 = (x - (1 - alpha_bar).sqrt() * model(x, torch.full((3,), t))) / alpha_bar.sqrt()
        if clip:
            x0 = x0.clamp(-1, 1)
        mean = before.sqrt() * beta / (1 - alpha_bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar) * x
        variance = (1 - before) / (1 - alpha_bar) * beta
        x = (mean + variance.sqrt() * torch.randn(SHAPE, generator=rng) if t > 0 else mean).float()
    assert torch.allclose(sample(model, SCHEDULE, SHAPE, steps=40, eta=1.0, clip=clip, generator=generator()), x, atol=1e-4)


def test_eta_0_is_deterministic_ddim():
    x = noise = torch.randn(SHAPE, generator=generator())
    times = [39, 29, 19, 9]
    for t, following in zip(times, [29, 19, 9, None], strict=True):
        alpha = SCHEDULE.alphas_cumprod[t]
        alpha_next = SCHEDULE.alphas_cumprod[following] if following is not None else torch.tensor(1.0)
        epsilon = model(x, torch.full((3,), t))
        x = alpha_next.sqrt() * (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt() + (1 - alpha_next).sqrt() * epsilon
    drawn = denoise_from(model, SCHEDULE, noise, 39, steps=4, eta=0.0, clip=False)
    assert torch.allclose(drawn, x, atol=1e-4)
    # Without noise of its own, it does not depend on a generator.
    assert torch.equal(drawn, denoise_from(model, SCHEDULE, noise, 39, steps=4, eta=0.0, clip=False, generator=generator(5)))


def test_order_2_is_dpm_solver_2m():
    # Lu et al. 2022, algorithm 2, as it stands there: α = √ᾱ, σ = √(1−ᾱ), λ = log α/σ, D of the data prediction x̂_0.
    x = noise = torch.randn(SHAPE, generator=generator()).double()
    alphas, sigmas = (bar.double().sqrt() for bar in (SCHEDULE.alphas_cumprod, 1 - SCHEDULE.alphas_cumprod))
    lambdas, times, found = (alphas / sigmas).log(), [39, 31, 23, 15, 7], []
    for i, t in enumerate(times):
        x0 = (x - sigmas[t] * model(x, torch.full((3,), t))) / alphas[t]
        found.append(x0.clamp(-1, 1))
        if i == len(times) - 1:
            x = found[-1]
            break
        h, direction = lambdas[times[i + 1]] - lambdas[t], found[-1]
        if i > 0:
            r = (lambdas[t] - lambdas[times[i - 1]]) / h
            direction = (1 + 1 / (2 * r)) * found[-1] - 1 / (2 * r) * found[-2]
        following = times[i + 1]
        x = sigmas[following] / sigmas[t] * x - alphas[following] * ((-h).exp() - 1) * direction
    drawn = denoise_from(model, SCHEDULE, noise, 39, steps=5, eta=0.0, order=2)
    assert torch.allclose(drawn, x, atol=1e-5)
    assert not torch.allclose(drawn, denoise_from(model, SCHEDULE, noise, 39, steps=5, eta=0.0), atol=1e-3)


def test_halving_the_step_halves_the_error_of_order_1_and_quarters_that_of_order_2():
    # Of Gaussian data N(0, s²) the ODE's solution is known: x/√(γ² s² + σ²) does not change (Song et al. 2021b, eq. 13).
    # λ = ½ log ᾱ/(1−ᾱ) grows evenly here, from −3 to 5.
    alphas_cumprod = torch.linspace(5, -3, 640, dtype=torch.float64).mul(2).sigmoid()
    betas = 1 - alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    schedule, s = NoiseSchedule.from_betas(betas), 0.7
    variance = schedule.gamma.double() ** 2 * s**2 + schedule.sigma.double() ** 2
    ideal = lambda x, t: (schedule.sigma / variance)[t].view(-1, 1, 1, 1) * x  # noqa: E731
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for order, least, most in ((1, 1.9, 2.0), (2, 3.8, 4.3)):
        errors = [
            (denoise_from(ideal, schedule, start, 639, steps=n, eta=0.0, order=order, clip=False) - s / variance[-1].sqrt()).abs()
            for n in (20, 40, 80)]
        assert all(least < coarse / fine < most for coarse, fine in pairwise(errors)), (order, errors)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_step_and_the_last_of_order_2_are_those_of_ddim(steps):
    noise = torch.randn(SHAPE, generator=generator())
    first, second = (denoise_from(model, SCHEDULE, noise, 39, steps=steps, eta=0.0, order=order) for order in (1, 2))
    assert torch.equal(first, second)


def test_over_all_timesteps_the_orders_agree():
    noise = torch.randn(SHAPE, generator=generator())
    first, second = (denoise_from(model, SCHEDULE, noise, 39, steps=40, eta=0.0, order=order) for order in (1, 2))
    assert second.isfinite().all() and 0 < (first - second).abs().max() < 0.1


def test_order_2_is_for_the_deterministic_sampler():
    with pytest.raises(ValueError, match="eta 0.5"):
        sample(model, SCHEDULE, SHAPE, steps=5, eta=0.5, order=2)


def test_the_ideal_denoiser_brings_back_the_one_image_it_knows():
    known = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)

    def ideal(x, timesteps):
        gamma, sigma = (values[timesteps][:, None, None, None] for values in (SCHEDULE.gamma, SCHEDULE.sigma))
        return (x - gamma * known) / sigma

    for eta in (0.0, 1.0):
        drawn = sample(ideal, SCHEDULE, SHAPE, steps=10, eta=eta, generator=generator())
        assert torch.allclose(drawn, known.expand(SHAPE), atol=1e-4)


def test_samples_are_a_function_of_the_generators_seed():
    draw = lambda seed: sample(model, SCHEDULE, SHAPE, steps=5, generator=generator(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_clipping_keeps_the_pictures_range():
    drawn = sample(lambda x, t: 3 * x, SCHEDULE, SHAPE, steps=10, generator=generator())
    assert drawn.abs().max() <= 1


@pytest.mark.parametrize("first, steps, expected", [(9, 5, [9, 7, 5, 3, 1]), (11, 3, [11, 7, 3]), (3, 50, [3, 2, 1, 0]), (0, 5, [0]), (7, 1, [7])])
def test_timesteps_run_from_the_first_towards_the_clean_image(first, steps, expected):
    assert timestep_sequence(first, steps) == expected


X, T = torch.randn(4, 1, 8, 8, generator=generator(1)), torch.tensor([0, 5, 20, 39])
PROMPT = torch.tensor([[2, 4]])


def prompted(seed=0):
    return randomise(UNet(UNetConfig(image_size=8, channels=(8, 16), norm_groups=4, layers_per_block=1, attention_levels=(), vocabulary=6)), seed)


def test_guidance_1_is_the_conditional_network_and_0_the_unconditional_one_and_each_computes_only_that():
    network, batches = prompted(), []

    def model(x, timesteps, prompt=None):
        batches.append(len(x))
        return network(x, timesteps, prompt)

    assert torch.equal(guided(model, PROMPT)(X, T), network(X, T, PROMPT))
    assert torch.equal(guided(model, PROMPT, 1.0)(X, T), network(X, T, PROMPT))
    assert torch.equal(guided(model, PROMPT, 0.0)(X, T), network(X, T))
    assert torch.equal(guided(model, None)(X, T), network(X, T))
    assert batches == [4, 4, 4, 4]
    guided(model, PROMPT, 2.0)(X, T)
    assert batches[4:] == [8]  # one call


@pytest.mark.parametrize("prompt", [PROMPT, torch.tensor([[1, 0], [2, 3], [0, 0], [5, 5]])], ids=["one", "one each"])
@pytest.mark.parametrize("guidance", [-1.0, 0.5, 1.5, 3.0])
def test_guidance_is_linear_between_the_unconditional_and_the_conditional_network_and_beyond(guidance, prompt):
    network = prompted()
    without, given = network(X, T), network(X, T, prompt)
    torch.testing.assert_close(guided(network, prompt, guidance)(X, T), without + guidance * (given - without), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(without, given, atol=1e-2)


@pytest.mark.parametrize("name", unlearning.METHODS)
def test_a_method_at_a_fixed_prompt_is_the_method_of_an_unconditional_network_bit_for_bit(name):
    """The prompt's embedding folded into the time embedding: the losses need not know of prompts."""
    conditional = prompted()
    folded = prompted()
    embedding, time = folded.prompt(PROMPT).detach(), folded.time
    folded.prompt, folded.time = None, torch.nn.Module()
    folded.time.forward = lambda h: time(h) + embedding

    method, x, a = unlearning.METHODS[name], X, X.flip(0)
    more = {"generator": generator(2)}
    batch = losses.Batch(
        x, a, T, torch.randn(X.shape, **more), torch.rand(4, **more), torch.rand(X.shape, **more), n=128, k=60,
        x_from="rest", neighbours=X[None] if method.neighbours else None)
    values, gradients = [], []
    for model, parameters in ((guided(conditional, PROMPT), list(conditional.middle.parameters())), (folded, list(folded.middle.parameters()))):
        old = copy.deepcopy(conditional if model is not folded else folded)
        old = guided(old, PROMPT) if model is not folded else old
        terms = method.terms(model, batch, SCHEDULE, unlearning.Settings(), old=old)
        for term in (terms.keep, terms.forget):
            if term is not None:
                value, gradient = unlearning.gradient(term, parameters)
                values.append(value), gradients.extend(gradient)
    half = len(values) // 2
    assert half and all(map(torch.equal, values[:half], values[half:]))
    assert all(map(torch.equal, gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]))
    assert any(gradient.any() for gradient in gradients)
