"""Pictures for people: rows of images with a word beside each row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import save_image

from minisiss import sampling
from minisiss.data.training_set import to_uint8
from minisiss.schedule import Model, NoiseSchedule

GAP, LABEL, TEXT = 4, 60, 22  # pixels: between images, for the word beside a row, for a line of text

Row = str | list[str] | tuple[str, Tensor]  # a line of text, a heading for each column, or a label and its images
Memories = dict[int, tuple[Tensor, Tensor]]  # of each timestep, the noised images and the denoised ones


def save_samples(path: Path, model: Model, schedule: NoiseSchedule, image_shape: Sequence[int], seed: int) -> None:
    """A sheet of 64 samples of a model. image_shape: […, C, H, W]."""
    generator = torch.Generator(schedule.gamma.device).manual_seed(seed)
    samples = sampling.sample(model, schedule, (64, *image_shape[-3:]), generator=generator)
    save_image(samples, path, nrow=8, normalize=True, value_range=(-1, 1))


def save_before_after(path: Path, before: Tensor, after: Tensor, tshirts: Tensor) -> None:
    """The samples that were T-shirts, [B] bool, and ordinary ones, each above what the same noise gives after
    unlearning."""
    columns = 12
    rows: list[Row] = []
    if tshirts.any():
        rows += ["Samples that were the T-shirt, and what the same noise gives after unlearning"]
        rows += [("before", before[tshirts][:columns]), ("after", after[tshirts][:columns])]
    if not tshirts.all():
        rows += ["Ordinary samples, and what the same noise gives after unlearning"]
        for begin in range(0, min(3 * columns, int((~tshirts).sum())), columns):
            some = slice(begin, begin + columns)
            rows += [("before", before[~tshirts][some]), ("after", after[~tshirts][some])]
    if rows:
        save_rows(path, rows)


def save_memory(path: Path, originals: Tensor, before: Memories, after: Memories, draws: int = 3) -> None:
    """One column a timestep: the image to forget, noised to it, and denoised before and after unlearning.

    originals: [≥ draws, C, H, W], what each draw started from.
    """
    rows: list[Row] = ["The image to forget, noised to a timestep and denoised again", [f"t = {t}" for t in before]]
    for draw in range(min(draws, len(originals))):
        if draw == 0 or not originals[draw].equal(originals[draw - 1]):
            rows += [("original", originals[draw].expand(len(before), -1, -1, -1))]
        noisy, denoised_before, denoised_after = (
            torch.stack([memories[t][part][draw] for t in before]) for memories, part in ((before, 0), (before, 1), (after, 1))
        )
        rows += ["", ("noised", noisy), ("before", denoised_before), ("after", denoised_after)]
    save_rows(path, rows)


def save_strip(path: Path, timesteps: list[int], strip: dict[int, Tensor]) -> None:
    """One column for each step in `strip`: the image to forget, noised to each timestep and denoised at that
    step.

    strip: of each step [number of timesteps, C, H, W].
    """
    rows: list[Row] = ["The image to forget, noised to a timestep and denoised, by steps of unlearning", [str(step) for step in strip]]
    save_rows(path, rows + [(f"t = {t}", torch.stack(images)) for t, images in zip(timesteps, zip(*strip.values(), strict=True), strict=True)])


def save_rows(path: Path, rows: list[Row]) -> None:
    """Write a PNG of rows one below the other. Images are [N, C, H, W] in [−1, 1], all of one size; small
    ones are enlarged."""
    pictures = [row[1] for row in rows if isinstance(row, tuple)]
    scale = max(1, 84 // pictures[0].shape[-1])
    height, width = (scale * side + GAP for side in pictures[0].shape[-2:])
    heights = [height if isinstance(row, tuple) else TEXT for row in rows]
    font, y = ImageFont.load_default(size=13), GAP
    widths = [LABEL + len(images) * width for images in pictures] + [font.getlength(row) for row in rows if isinstance(row, str)]
    sheet = Image.new("RGB", (int(max(widths)) + 2 * GAP, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, row_height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            draw.text((GAP, y), row, "black", font)
        elif isinstance(row, list):
            for column, heading in enumerate(row):
                draw.text((LABEL + column * width + width // 2, y), heading, "black", font, anchor="ma")
        else:
            draw.text((GAP, y + height // 2), row[0], "black", font, anchor="lm")
            for column, image in enumerate(row[1]):
                sheet.paste(to_pil(image, scale), (LABEL + column * width, y))
        y += row_height
    sheet.save(path)


def to_pil(image: Tensor, scale: int) -> Image.Image:
    """An image [C, H, W] in [−1, 1], with C = 1 or 3, enlarged without smoothing."""
    pixels = rearrange(to_uint8(image), "c h w -> h w c").cpu().numpy()
    pixels = np.repeat(pixels, 3 // pixels.shape[2], axis=2)
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((scale * width, scale * height), Image.Resampling.NEAREST)
