"""Pictures for people: rows of images with a word beside each row."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import save_image

from minisiss import sampling
from minisiss.data.training_set import to_uint8
from minisiss.schedule import Model, NoiseSchedule

GAP, LABEL, TEXT = 4, 60, 22  # pixels: between images, for the word beside a row, for a line of text
SIDE = 84  # pixels to which small images are enlarged
COLUMNS = 12  # of samples before and after

Row = str | list[str] | tuple[str, Tensor]  # a line of text, a heading a column, or a label and its images
Memories = dict[int, tuple[Tensor, Tensor]]  # of each timestep, the noised images and the denoised ones


def save_samples(folder: Path, step: int, model: Model, schedule: NoiseSchedule, image_shape: Sequence[int],
                 seed: int) -> None:
    """A sheet of 64 samples of a model after a step. image_shape: […, C, H, W]."""
    generator = torch.Generator(schedule.gamma.device).manual_seed(seed)
    samples = sampling.sample(model, schedule, (64, *image_shape[-3:]), generator=generator)
    save_image(samples, folder / f"samples-{step:06d}.png", nrow=8, normalize=True, value_range=(-1, 1))


def save_before_after(path: Path, before: Tensor, after: Tensor, tshirts: Tensor) -> None:
    """Samples, T-shirts ([B] bool) and ordinary ones, each above what the same noise gives afterwards."""
    rows: list[Row] = []
    kinds = ("Samples that were the T-shirt", tshirts, 1), ("Ordinary samples", ~tshirts, 3)
    for what, which, most in kinds:
        if which.any():
            rows.append(f"{what}, and what the same noise gives after unlearning")
            pairs = zip(before[which].split(COLUMNS), after[which].split(COLUMNS), strict=True)
            for old, new in list(pairs)[:most]:
                rows += [("before", old), ("after", new)]
    if rows:
        sheet(rows).save(path)


def save_memory(path: Path, originals: Tensor, before: Memories, after: Memories, draws: int = 3) -> None:
    """One column a timestep: the image to forget, noised to it, and denoised before and after unlearning.

    originals: [≥ 1, C, H, W], what each draw started from.
    """
    title = "The image to forget, noised to a timestep and denoised again"
    rows: list[Row] = [title, [f"t = {t}" for t in before]]
    for draw, original in enumerate(originals[:draws]):
        if draw == 0 or not original.equal(originals[draw - 1]):
            rows.append(("original", original.expand(len(before), -1, -1, -1)))
        rows.append("")
        for label, memories, part in (("noised", before, 0), ("before", before, 1), ("after", after, 1)):
            rows.append((label, torch.stack([memory[part][draw] for memory in memories.values()])))
    sheet(rows).save(path)


def save_strip(path: Path, timesteps: list[int], strip: dict[int, Tensor]) -> None:
    """What comes back of the image to forget: a row a timestep it was noised to, a column a step.

    strip: of each step [number of timesteps, C, H, W].
    """
    title = "The image to forget, noised to a timestep and denoised, by steps of unlearning"
    by_timestep = torch.stack(list(strip.values()), dim=1)
    rows = [(f"t = {t}", images) for t, images in zip(timesteps, by_timestep, strict=True)]
    sheet([title, [str(step) for step in strip], *rows]).save(path)


def save_gif(path: Path, timesteps: list[int], frames: dict[int, tuple[Tensor, Tensor]]) -> None:
    """The steps of unlearning as a film: of each step some samples, and what comes back of the image to
    forget from each timestep, [N, C, H, W] both. Small, and in 32 colours: a few 100 KB."""
    sheets = []
    for step, (samples, memory) in frames.items():
        rows: list[Row] = [f"step {step} of {max(frames)}: the same noise each time"]
        images = torch.cat([samples, memory])
        if images.shape[-1] > SIDE:
            images = F.interpolate(images, SIDE, mode="area")
        samples, memory = images.split([len(samples), len(memory)])
        rows += [("samples", some) for some in samples.split(COLUMNS // 2) if len(some)]
        rows += [[f"t = {t}" for t in timesteps], ("memory", memory)]
        sheets.append(sheet(rows).quantize(32))
    times = [1500, *[500] * (len(sheets) - 2), 3000][: len(sheets)]  # milliseconds
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=times, loop=0)


def sheet(rows: list[Row]) -> Image.Image:
    """Rows, one below the other. Images: [N, C, H, W] in [−1, 1]; small ones are enlarged."""
    pictures = [row[1] for row in rows if isinstance(row, tuple)]
    scale = max(1, SIDE // pictures[0].shape[-1])
    height, width = (scale * side + GAP for side in pictures[0].shape[-2:])
    heights = [height if isinstance(row, tuple) else TEXT for row in rows]
    font, y = ImageFont.load_default(size=13), GAP
    widths = [LABEL + len(images) * width for images in pictures]
    widths += [font.getlength(row) for row in rows if isinstance(row, str)]
    page = Image.new("RGB", (int(max(widths)) + 2 * GAP, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for row, row_height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            draw.text((GAP, y), row, "black", font)
        elif isinstance(row, list):
            for column, heading in enumerate(row):
                draw.text((LABEL + column * width + width // 2, y), heading, "black", font, anchor="ma")
        else:
            draw.text((GAP, y + height // 2), row[0], "black", font, anchor="lm")
            for column, image in enumerate(row[1]):
                page.paste(to_pil(image, scale), (LABEL + column * width, y))
        y += row_height
    return page


def to_pil(image: Tensor, scale: int) -> Image.Image:
    """An image [C, H, W] in [−1, 1], with C = 1 or 3, enlarged without smoothing."""
    colour = to_uint8(image).expand(3, -1, -1)
    return Image.fromarray(repeat(colour, "c h w -> (h a) (w b) c", a=scale, b=scale).cpu().numpy())
