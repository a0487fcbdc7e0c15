from itertools import pairwise

import pytest
import torch
from conftest import TINY, randomise
from test_unlearning import ROWS, SETTINGS, draw_batch_of

from minisiss.sampling import denoise_from, guided, sample
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig
from minisiss.unlearning import METHODS

SCHEDULE = NoiseSchedule.linear(40, 1e-3, 0.2)
SHAPE = (3, 1, 4, 4)


def model(x, timesteps):
    """Any smooth function of both arguments."""
    return torch.tanh(0.7 * x + 0.01 * timesteps[:, None, None, None]) + 0.1 * x.flip(-1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_eta_1_over_all_timesteps_is_ddpm():
    # Ho et al. 2020, algorithm 2, written with the posterior's mean (eq. 7) and variance β̃_t.
    rng = generator()
    x = torch.randn(SHAPE, generator=rng)
    cumprod = torch.cat([torch.ones(1), SCHEDULE.alphas_cumprod]).double()
    for t in reversed(range(40)):
        beta, before, alpha_bar = SCHEDULE.betas[t].double(), cumprod[t], cumprod[t + 1]
        x0 = (x - (1 - alpha_bar).sqrt() * model(x, torch.full((3,), t))) / alpha_bar.sqrt()
        of_x0 = before.sqrt() * beta / (1 - alpha_bar)
        of_x = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
        x = of_x0 * x0.clamp(-1, 1) + of_x * x
        if t > 0:
            variance = (1 - before) / (1 - alpha_bar) * beta
            x = x + variance.sqrt() * torch.randn(SHAPE, generator=rng)
    # It takes no more steps than there are timesteps.
    ours = sample(model, SCHEDULE, SHAPE, steps=60, eta=1.0, generator=generator())
    assert torch.allclose(ours, x, atol=1e-4)


def test_eta_0_is_deterministic_ddim():
    def bounded(x, timesteps):  # the x̂_0 of this model is below 0.5: nothing is clipped
        x0 = torch.tanh(x + 0.01 * timesteps[:, None, None, None]) / 2
        return SCHEDULE.noise_between(x0, x, timesteps)

    # Song et al. 2021a, eq. 12.
    x = noise = torch.randn(SHAPE, generator=generator())
    alphas = torch.cat([torch.ones(1), SCHEDULE.alphas_cumprod])  # with that of the clean image
    for t, t_next in pairwise([39, 29, 19, 9, -1]):
        alpha, alpha_next = alphas[t + 1], alphas[t_next + 1]
        epsilon = bounded(x, torch.full((3,), t))
        x0 = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        x = alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * epsilon
    ours = denoise_from(bounded, SCHEDULE, noise, 39, steps=4, eta=0.0)
    assert torch.allclose(ours, x, atol=1e-4)
    again = denoise_from(bounded, SCHEDULE, noise, 39, steps=4, eta=0.0, generator=generator(5))
    assert torch.equal(ours, again)  # it draws no noise of its own


def test_order_2_is_dpm_solver_2m():
    # Lu et al. 2022, algorithm 2, as it stands there: α = √ᾱ, σ = √(1−ᾱ), λ = log α/σ.
    x = noise = torch.randn(SHAPE, generator=generator()).double()
    alphas = SCHEDULE.alphas_cumprod.double().sqrt()
    sigmas = (1 - SCHEDULE.alphas_cumprod.double()).sqrt()
    lambdas, times, x0 = (alphas / sigmas).log(), [39, 31, 23, 15, 7], []
    for i, t in enumerate(times):
        predicted = (x - sigmas[t] * model(x, torch.full((3,), t))) / alphas[t]
        x0.append(predicted.clamp(-1, 1))
        t_next = times[i + 1] if i < 4 else t
        h, direction = lambdas[t_next] - lambdas[t], x0[-1]
        if i > 0:
            r = (lambdas[t] - lambdas[times[i - 1]]) / h
            direction = (1 + 1 / (2 * r)) * x0[-1] - 1 / (2 * r) * x0[-2]
        x = sigmas[t_next] / sigmas[t] * x - alphas[t_next] * ((-h).exp() - 1) * direction
    ours = denoise_from(model, SCHEDULE, noise, 39, steps=5, eta=0.0, order=2)
    assert torch.allclose(ours, x0[-1], atol=1e-5)


@pytest.mark.parametrize("order, least, most", [(1, 1.9, 2.0), (2, 3.8, 4.3)])
def test_errors_fall_by_2_to_the_order(order, least, most):
    # Of Gaussian data N(0, s²) the ODE's solution is known: x/√(γ² s² + σ²) stays the same (Song
    # et al. 2021b, eq. 13). λ = ½ log ᾱ/(1−ᾱ) grows evenly here, from −3 to 5.
    alphas_cumprod = torch.linspace(5, -3, 640, dtype=torch.float64).mul(2).sigmoid()
    one = torch.ones(1, dtype=torch.float64)
    betas = 1 - alphas_cumprod / torch.cat([one, alphas_cumprod[:-1]])
    schedule, s = NoiseSchedule.from_betas(betas), 0.7
    variance = schedule.gamma.double() ** 2 * s**2 + schedule.sigma.double() ** 2

    def ideal(x, t):
        return (schedule.sigma / variance)[t].view(-1, 1, 1, 1) * x

    start, errors = one.view(1, 1, 1, 1), []
    for steps in (20, 40, 80):
        ours = denoise_from(ideal, schedule, start, 639, steps=steps, eta=0.0, order=order)
        errors.append((ours - s / variance[-1].sqrt()).abs().item())
    for coarse, fine in pairwise(errors):
        assert least < coarse / fine < most


PROMPT = torch.tensor([[2, 4]])


def prompted():
    return randomise(UNet(UNetConfig(**TINY | {"image_size": 4, "vocabulary": 6})))


def test_guidance_is_linear_in_its_weight():
    network, sizes = prompted(), []
    x, t = torch.randn(SHAPE, generator=generator()), torch.tensor([0, 5, 39])

    def watched(x, timesteps, prompt=None):
        sizes.append(len(x))
        return network(x, timesteps, prompt)

    for prompt in (PROMPT, torch.tensor([[1, 0], [2, 3], [5, 5]])):  # for all, and one each
        without, given = network(x, t), network(x, t, prompt)
        assert not torch.allclose(without, given, atol=1e-2)
        for guidance in (-1.0, 0.0, 0.5, 3.0):
            ours = guided(watched, prompt, guidance)(x, t)
            expected = without + guidance * (given - without)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(guided(watched, prompt)(x, t), given)
        assert torch.equal(guided(watched, None, 3.0)(x, t), without)
    assert sizes == [6, 6, 6, 6, 3, 3] * 2  # always one call, of both predictions where it must


@pytest.mark.parametrize("name", ROWS)
def test_fixed_prompt_makes_an_unconditional_network(name):
    """Bit for bit, whatever the method: so the losses need not know of prompts."""
    conditional, folded = prompted(), prompted()
    embedding, time = folded.prompt(PROMPT).detach(), folded.time
    folded.prompt, folded.time = None, torch.nn.Module()
    folded.time.forward = lambda h: time(h) + embedding  # the prompt, as a part of the time
    values = []
    for model, network in ((guided(conditional, PROMPT), conditional), (folded, folded)):
        loss = METHODS[name].loss_of(model, NoiseSchedule.linear(), SETTINGS)(draw_batch_of(5))
        torch.stack(loss).sum().backward()
        values.append([*loss, *(p.grad for p in network.middle.parameters())])
    assert all(map(torch.equal, *values))
