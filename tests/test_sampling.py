import pytest
import torch

from minisiss.sampling import denoise_from, sample, timestep_sequence
from minisiss.schedule import NoiseSchedule


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
    times = [39, 26, 13, 0]
    for t, following in zip(times, [26, 13, 0, None], strict=True):
        alpha = SCHEDULE.alphas_cumprod[t]
        alpha_next = SCHEDULE.alphas_cumprod[following] if following is not None else torch.tensor(1.0)
        epsilon = model(x, torch.full((3,), t))
        x = alpha_next.sqrt() * (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt() + (1 - alpha_next).sqrt() * epsilon
    drawn = denoise_from(model, SCHEDULE, noise, 39, steps=4, eta=0.0, clip=False)
    assert torch.allclose(drawn, x, atol=1e-4)
    # Without noise of its own, it does not depend on a generator.
    assert torch.equal(drawn, denoise_from(model, SCHEDULE, noise, 39, steps=4, eta=0.0, clip=False, generator=generator(5)))


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


@pytest.mark.parametrize("first, steps, expected", [(9, 4, [9, 6, 3, 0]), (3, 50, [3, 2, 1, 0]), (0, 5, [0]), (7, 1, [7])])
def test_timesteps_run_from_the_first_to_zero(first, steps, expected):
    assert timestep_sequence(first, steps) == expected
