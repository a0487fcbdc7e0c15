"""How much is remembered, and how well noise is predicted: plain functions on tensors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minisiss.data.training_set import TrainingSet, draw, step_generator
from minisiss.losses import epsilon_matching
from minisiss.sampling import denoise_from
from minisiss.schedule import Model, NoiseSchedule

TSHIRT_DISTANCE = 10.0  # the paper's criterion for 28×28 pictures
RANGES, OF_EACH = 50, 40  # ranges of timesteps in which `look_alike_loss` is measured, noisy images of each

# images: [B, C, H, W] and original: [1 or B, C, H, W], both in [−1, 1], for the next three.


def is_copy(images: Tensor, original: Tensor, distance: float = TSHIRT_DISTANCE) -> Tensor:
    """Which images lie within an L2 distance of the original, pixels in [0, 1]: [B] bool (section 5)."""
    return ((images - original) / 2).flatten(1).norm(dim=1) < distance


def similarity(images: Tensor, original: Tensor) -> Tensor:
    """Cosine similarity of the pixels in [0, 1]: [B]. Two digits have about 0.4, a digit and itself 1."""
    return F.cosine_similarity((images + 1).flatten(1), (original + 1).flatten(1))


def psnr(images: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: [B]. From about 30 dB on two pictures look the same."""
    return -10 * ((images - original) / 2).square().flatten(1).mean(dim=1).clamp(min=1e-10).log10()


def noise_and_denoise(model: Model, schedule: NoiseSchedule, originals: Tensor, timestep: int, seed: int,
                      steps: int = 25) -> tuple[Tensor, Tensor]:
    """Noise images to one timestep and denoise them again: a model that remembers an image brings it back.

    originals: [N, C, H, W] in [−1, 1], also one image N times. Returns the noisy and the denoised images,
    [N, C, H, W] each; the noise is a function of the seed and the timestep, the same for every model.
    """
    generator = step_generator(seed, timestep, originals.device)
    noise = torch.randn(originals.shape, generator=generator, device=originals.device)
    timesteps = torch.full((len(originals),), timestep, device=originals.device)
    noisy = schedule.add_noise(originals, noise, timesteps)
    return noisy, denoise_from(model, schedule, noisy, timestep, steps=steps, generator=generator)


@torch.inference_mode()
def denoising_loss(model: Model, schedule: NoiseSchedule, images: Tensor, count: int, *, buckets: int = 1,
                   seed: int = 0) -> list[float]:
    """L_S on a set S of images, in `buckets` ranges of timesteps of equal length, from t = 0 upwards:
    [buckets].

    A model has a smaller loss on what it was trained on than on other images alike: a view on membership,
    where an image that is held out is the measure.

    images: [N, C, H, W] uint8 (a tensor or an `ImageFolder`), of which `count` are drawn, at timesteps spread
    evenly. Noise and draws are a function of the seed: sets and models are compared on the same noise.
    """
    generator = step_generator(seed, 0, images.device)
    noise = torch.randn(count, *images.shape[1:], generator=generator, device=images.device)
    x = draw(images, count, generator)
    timesteps = torch.arange(count, device=images.device) * len(schedule) // count
    batches = zip(x.split(64), timesteps.split(64), noise.split(64), strict=True)
    losses = torch.cat([epsilon_matching(model, *batch, schedule).per_image() for batch in batches])
    return [bucket.mean().item() for bucket in losses.tensor_split(buckets)]


def look_alikes(images: Tensor) -> Tensor:
    """Pictures alike that are in no training set, four of each: turned by a quarter to the left and to the
    right, and the mirror images of both: [4 N, C, H, W].

    They have the same pixels at other places. Copies of the T-shirt that are shifted by a few pixels are too
    much alike: a model that remembers it takes them for it, and is further off than one that never saw it.
    (Of a face these, and its mirror image, are nearer: one on its side is harder than any. study/RESULTS.md)
    """
    left = images.rot90(1, dims=(-2, -1))
    both = torch.cat([left, left.flip(-2, -1)])
    return torch.cat([both, both.flip(-1)])


def look_alike_loss(model: Model, schedule: NoiseSchedule, data: TrainingSet) -> Tensor:
    """τ_t: the loss of a model at each timestep on look-alikes of A, which it never saw: [T].

    A model that never saw A itself would have about this loss on it. Straight lines between the means of 50
    ranges of timesteps, of 40 noisy images each; of A's pictures the first 64 count.
    """
    forget = data.forget[torch.arange(min(64, data.k))].unique(dim=0)
    losses = denoising_loss(model, schedule, look_alikes(forget), OF_EACH * RANGES, buckets=RANGES)
    points = torch.tensor(losses, device=forget.device)[None, None]
    return F.interpolate(points, len(schedule), mode="linear")[0, 0]


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a rate that is honest near 0 and 1 too (Wilson 1927)."""
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
