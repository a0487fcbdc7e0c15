"""What is measured: how much is remembered, and how good samples are. Functions on tensors."""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minisiss.lab import files, machine
from minisiss.lab.data import ASSETS, step_generator, to_float, to_uint8
from minisiss.sampling import denoise_from
from minisiss.schedule import Model, NoiseSchedule
from minisiss.unlearning import sum_over_ranks

TSHIRT_DISTANCE = 10.0  # the paper's, for 28×28 pixels
LEAST = 100  # of fewer samples, inception score and Fréchet distance say nothing
BATCH = 64  # samples drawn at a time
Moments = tuple[Tensor, Tensor]  # mean [D] and covariance [D, D], float64 on the CPU

# Of the next three: images [B, C, H, W] and original [1 or B, C, H, W], both in [−1, 1].


def is_copy(images: Tensor, original: Tensor, distance: float = TSHIRT_DISTANCE) -> Tensor:
    """Which images lie within an L2 distance of the original, pixels in [0, 1]: [B] bool."""
    return ((images - original) / 2).flatten(1).norm(dim=1) < distance


def similarity(images: Tensor, original: Tensor) -> Tensor:
    """Cosine similarity of the pixels in [0, 1]: [B]. Two digits have about 0.4, a copy has 1."""
    return F.cosine_similarity((images + 1).flatten(1), (original + 1).flatten(1))


def psnr(images: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: [B]. From about 30 dB on two pictures look the same."""
    mean_square = ((images - original) / 2).square().flatten(1).mean(dim=1)
    return -10 * mean_square.clamp(min=1e-10).log10()


def noise_and_denoise(model: Model, schedule: NoiseSchedule, originals: Tensor, timestep: int,
                      seed: int, steps: int = 25) -> Tensor:
    """Noise images [N, C, H, W] to a timestep and denoise them: a model that remembers an image
    brings it back. The noise is a function of seed and timestep, the same for every model."""
    generator = step_generator(seed, timestep, originals.device)
    noise = torch.randn(originals.shape, generator=generator, device=originals.device)
    timesteps = torch.full((len(originals),), timestep, device=originals.device)
    noisy = schedule.add_noise(originals, noise, timesteps)
    return denoise_from(model, schedule, noisy, timestep, steps=steps, generator=generator)


def draw_samples(model: Model, schedule: NoiseSchedule, places: list[int],
                 image_shape: tuple[int, int, int], seed: int, steps: int) -> Tensor:
    """Draw a sample per place by DPM-Solver++: [N, C, H, W] in [−1, 1], in grey levels, on the CPU.
    The noise is a function of seed and place. Under torchrun the ranks take turns at batches."""
    device = schedule.gamma.device
    samples = torch.zeros(len(places), *image_shape, dtype=torch.uint8, device=device)
    starts = range(0, len(places), BATCH)[machine.rank() :: machine.size()]
    for start in tqdm(starts, desc="sampling", leave=False):
        noise = []
        for place in places[start : start + BATCH]:
            generator = step_generator(seed, f"sample {place}", device)
            noise.append(torch.randn(image_shape, generator=generator, device=device))
        drawn = denoise_from(model, schedule, torch.stack(noise), len(schedule) - 1, steps=steps,
                             eta=0.0, order=2)
        samples[start : start + BATCH] = to_uint8(drawn)
    sum_over_ranks([samples])
    return to_float(samples.cpu())


def log_density(model: Model, schedule: NoiseSchedule, x: Tensor, probes: Tensor,
                steps: int = 40) -> Tensor:
    """Estimate log p(x) in nats under the model: [B].

    By the probability-flow ODE (Song et al. 2021b, "Score-Based Generative Modeling through
    Stochastic Differential Equations", 4.3). In the time ℓ = log σ/γ, with the score −ε_θ/σ, it is

        dm/dℓ = −σ² m + σ ε_θ(m, τ(ℓ)),   σ² = sigmoid(2ℓ)

        log p(x) = log N(m at ℓ_T−1; 0, I) + ∫ ∇·(dm/dℓ) dℓ,   m at ℓ_0 = x       (eqs. 13 and 39)

    The divergence is estimated as vᵀ J v with a probe v (Hutchinson 1990; eq. 40). Between the T
    values of ℓ that a DDPM knows the timestep becomes a real number, τ. The method is the classical
    one of Runge and Kutta: with 80 steps the bits per dimension of trained models change by less
    than 0.003. p is the density of images with the noise of t = 0: σ_0 = √β_0 is 1.3 grey levels.

    x: [B, C, H, W]; probes: the same shape, of mean 0 and covariance I. `model` must accept real
    timesteps and be differentiable in x, in float32.
    """
    known = (schedule.sigma.double() / schedule.gamma.double()).log().cpu().numpy()
    h = (known[-1] - known[0]) / steps

    def slope(time: float, m: Tensor) -> tuple[Tensor, Tensor]:
        """dm/dℓ and its divergence, [B]."""
        variance = 1 / (1 + math.exp(-2 * time))
        tau = np.interp(time, known, range(len(known)))
        m = m.detach().requires_grad_()
        with torch.enable_grad():
            noise = model(m, torch.full((len(m),), tau, dtype=m.dtype, device=m.device))
            (product,) = torch.autograd.grad(noise, m, probes)  # vᵀ ∂ε_θ/∂m
        trace = (product * probes).flatten(1).sum(dim=1)
        velocity = -variance * m.detach() + math.sqrt(variance) * noise.detach()
        return velocity, -variance * m[0].numel() + math.sqrt(variance) * trace

    m, integral = x, torch.zeros(len(x), device=x.device)
    for number in range(steps):
        start, middle, end = (known[0] + h * (number + part) for part in (0, 0.5, 1))
        m1, d1 = slope(start, m)
        m2, d2 = slope(middle, m + h / 2 * m1)
        m3, d3 = slope(middle, m + h / 2 * m2)
        m4, d4 = slope(end, m + h * m3)
        m = m + h / 6 * (m1 + 2 * m2 + 2 * m3 + m4)
        integral = integral + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    log_prior = -0.5 * (m.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1)
    return log_prior + integral


def bits_per_dimension(model: Model, schedule: NoiseSchedule, image: Tensor, probes: int = 8,
                       seed: int = 0) -> float:
    """Negative log-likelihood of an image in bits per dimension:

        −log2 p(x) / d + 7        with d = C·H·W

    The 7 turns the density on [−1, 1] into that of 8-bit pixels: a level is 2/255 ≈ 2^−7 wide. The
    image, [1, C, H, W] in [−1, 1], is not dequantized. A wrecked model gives no finite number.
    """
    generator = torch.Generator(image.device).manual_seed(seed)
    shape = (probes, *image.shape[1:])
    signs = torch.randint(2, shape, generator=generator, device=image.device) * 2.0 - 1
    log_p = log_density(model, schedule, image.expand(shape), signs)
    return (-log_p / (math.log(2) * image[0].numel()) + 7).mean().item()


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95% interval of a rate that is honest near 0 and 1 too (Wilson 1927)."""
    rate, z = successes / trials, 1.959964  # z: 97.5% of N(0, 1) lie below it
    centre = rate + z**2 / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def inception_score(probabilities: Tensor, splits: int = 10) -> float:
    """exp E_x KL(p(y|x) ‖ p(y)), the mean over splits (Salimans et al. 2016, section 4).

    From 1, where every image has the same p(y|x), to the number of classes, where every image is
    surely of one class and the classes are equally frequent. probabilities: [N, classes], p(y|x).
    """
    scores = []
    for p in probabilities.cpu().double().tensor_split(splits):
        marginal = p.mean(dim=0)  # p(y)
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1)  # 0 log 0 = 0
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


def moments(features: Tensor) -> Moments:
    """Mean and covariance (divisor N − 1) of features [N, D]."""
    features = features.cpu().double()
    return features.mean(dim=0), torch.atleast_2d(torch.cov(features.T))


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017, eq. 6).

    The squared 2-Wasserstein distance of the Gaussians with these moments. Σ_a Σ_b has the
    eigenvalues of the symmetric Σ_a^½ Σ_b Σ_a^½. The trace of its root is the sum of their roots.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T  # Σ_a^½
    eigenvalues = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()  # rounding makes some of 0 negative
    squared_means = (mean_a - mean_b).square().sum()
    return (squared_means + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


class DigitClassifier(nn.Module):
    """p(digit | image): images [B, 1, 28, 28] in [−1, 1] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int, *pool: nn.Module) -> list[nn.Module]:
            convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            return [convolution, *pool, nn.BatchNorm2d(out_channels), nn.ReLU()]

        halve = nn.MaxPool2d(2)  # 28 → 14 → 7 → 3 pixels
        self.body = nn.Sequential(
            *block(1, 24, halve), *block(24, 48, halve), *block(48, 48), *block(48, 96, halve),
            nn.Flatten(), nn.Linear(96 * 3 * 3, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


@cache
def load_classifier() -> tuple[DigitClassifier, Moments]:
    """The bundled classifier, and the moments of its features of MNIST's 10,000 test digits."""
    state = files.read_tensors(ASSETS / "digit-classifier.pt")
    classifier = DigitClassifier()
    classifier.load_state_dict(state["weights"])
    return classifier.eval().requires_grad_(False), tuple(state["test_moments"])


@torch.inference_mode()
def classify(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, 128] of the last hidden layer, and probabilities [N, 10] of the digits."""
    classifier, _ = load_classifier()
    features = torch.cat([classifier.body(batch) for batch in images.split(500)])
    return features, classifier.head(features).softmax(dim=1)


def quality(samples: Tensor, left_out: Tensor) -> tuple[dict[str, float], Moments]:
    """Inception score, and Fréchet distance to real digits, of samples [N, 1, 28, 28] that are not
    left out, [N] bool. Also returns the moments of the features of all samples."""
    features, probabilities = classify(samples)
    _, real = load_classifier()
    distance = frechet_distance(moments(features[~left_out]), real)
    score = inception_score(probabilities[~left_out])
    return {"inception score": score, "Fréchet distance": distance}, moments(features)


def load_torchscript(path: str, device: torch.device) -> nn.Module:
    """Read a user's network. A TorchScript file is a program, and loading it runs it."""
    with files.reading(path):
        return torch.jit.load(path, map_location=device).eval()


@torch.inference_mode()
def descriptors(network: nn.Module, images: Tensor) -> Tensor:
    """Unit vectors [N, D] (SSCD: Pizzi et al. 2022). Those of copies have an inner product of more
    than 0.5 (Somepalli et al. 2023). SSCD has seen 288 pixels, and colours of ImageNet."""
    mean = images.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = images.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    size = [round(288 / min(images.shape[2:]) * side) for side in images.shape[2:]]
    vectors = []
    for batch in images.expand(-1, 3, -1, -1).split(32):
        pixels = F.interpolate((batch + 1) / 2, size=size, mode="bilinear", antialias=True)
        vectors.append(F.normalize(network((pixels - mean) / std), dim=1))
    return torch.cat(vectors)


@torch.inference_mode()
def inception_features(network: nn.Module, images: Tensor) -> Tensor:
    """Features [N, D] for the FID (Heusel et al. 2017), by `network(uint8 images [B, 3, H, W],
    return_features=True)`, which resizes by itself as the file of Karras et al. (2020) does."""
    features = []
    for batch in images.split(32):
        features.append(network(to_uint8(batch).expand(-1, 3, -1, -1), return_features=True))
    return torch.cat(features)
