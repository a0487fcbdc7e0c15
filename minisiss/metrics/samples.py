"""Samples of a model, from the same noise for every model."""

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss import sampling
from minisiss.data.training_set import step_generator, to_uint8
from minisiss.machine.ranks import ALONE, World
from minisiss.schedule import Model, NoiseSchedule


def draw_samples(model: Model, schedule: NoiseSchedule, count: int, image_shape: tuple[int, int, int], *,
                 seed: int, steps: int, eta: float, batch_size: int = 64, start: int = 0,
                 world: World = ALONE, title: str = "sampling") -> Tensor:
    """Draw `count` images in batches, each from noise that is a function of the seed and the batch's place.

    eta = 0 is the sampler of order 2 here, see `denoise_from`. The ranks take turns at the batches, and all
    get all of them, in order. Returns [count, C, H, W] uint8, or what comes after the first `start` of them,
    a multiple of the batch size.
    """
    device = schedule.gamma.device
    drawn = [torch.zeros(0, *image_shape, dtype=torch.uint8)]
    with tqdm(total=count - start, desc=title, unit="image") as bar:
        for first in range(start, count, batch_size * world.size):
            begin = first + batch_size * world.rank
            images = torch.zeros(batch_size, *image_shape, device=device)  # of one size on all ranks
            if (size := min(batch_size, count - begin)) > 0:
                shape, generator = (size, *image_shape), step_generator(seed, begin // batch_size, device)
                how = {"steps": steps, "eta": eta, "order": 1 if eta else 2}
                images[:size] = sampling.sample(model, schedule, shape, generator=generator, **how)
            drawn.append(to_uint8(world.gather(images)[: count - first]).cpu())
            bar.update(len(drawn[-1]))
    return torch.cat(drawn)


def draw_again(model: Model, schedule: NoiseSchedule, places: list[int], count: int,
               image_shape: tuple[int, int, int], *, seed: int, steps: int, batch_size: int = 64) -> Tensor:
    """Those at some places of the `count` samples that `draw_samples` draws with eta = 0, from a model as it
    is now: [number of places, C, H, W] in [−1, 1]."""
    device = schedule.gamma.device
    noise = [torch.zeros(0, *image_shape, device=device)]
    for place in places:
        batch, within = divmod(place, batch_size)
        shape, kind = (min(batch_size, count - batch * batch_size), *image_shape), {"device": device}
        noise.append(torch.randn(shape, generator=step_generator(seed, batch, device), **kind)[within, None])
    if not places:  # attention on a GPU takes no empty batch
        return noise[0]
    return sampling.denoise_from(
        model, schedule, torch.cat(noise), len(schedule) - 1, steps=steps, eta=0.0, order=2)
