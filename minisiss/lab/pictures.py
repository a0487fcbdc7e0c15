"""What people look at: sheets of images, a film, and tables in Markdown."""

from pathlib import Path

import torch
from einops import repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import save_image

from minisiss.lab.data import to_uint8
from minisiss.sampling import sample
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet

GAP, LABEL, TEXT = 4, 60, 22  # pixels: between images, for a word beside a row, for a line of text
SIDE = 84  # pixels to which small images are enlarged
COLUMNS = 12

Row = str | list[str] | tuple[str, Tensor]  # a line of text, headings of columns, a word and images


def sheet(rows: list[Row]) -> Image.Image:
    """Rows, one below the other. Images: [N, C, H, W] in [−1, 1]; small ones are enlarged."""
    first = next(row[1] for row in rows if isinstance(row, tuple))
    scale = max(1, SIDE // first.shape[-1])
    height, width = (scale * side + GAP for side in first.shape[-2:])
    heights = [height if isinstance(row, tuple) else TEXT for row in rows]
    columns = max(len(row[1]) for row in rows if isinstance(row, tuple))
    page = Image.new("RGB", (max(640, LABEL + columns * width), sum(heights) + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    y = GAP
    for row, row_height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            draw.text((GAP, y), row, "black", font)
        elif isinstance(row, list):
            for column, heading in enumerate(row):
                middle = LABEL + column * width + width // 2
                draw.text((middle, y), heading, "black", font, anchor="ma")
        else:
            draw.text((GAP, y + height // 2), row[0], "black", font, anchor="lm")
            for column, image in enumerate(row[1]):
                page.paste(to_pil(image, scale), (LABEL + column * width, y))
        y += row_height
    return page


def to_pil(image: Tensor, scale: int) -> Image.Image:
    """An image [C, H, W] in [−1, 1], C = 1 or 3, enlarged without smoothing."""
    colour = to_uint8(image).expand(3, -1, -1)
    pixels = repeat(colour, "c h w -> (h a) (w b) c", a=scale, b=scale)
    return Image.fromarray(pixels.cpu().numpy())


def save_samples(path: Path, model: UNet, schedule: NoiseSchedule) -> None:
    """A picture of 64 samples, the same noise each time."""
    noise = torch.Generator(schedule.gamma.device).manual_seed(0)
    samples = sample(model, schedule, (64, *model.config.image_shape), generator=noise)
    save_image(samples, path, normalize=True, value_range=(-1, 1))


def samples_before_after(before: Tensor, after: Tensor, copies: Tensor) -> list[Row]:
    """Samples that were the picture to forget ([N] bool) and others, each above its new sample."""
    rows: list[Row] = []
    for words, chosen, most in (("to be forgotten", copies, 1), ("to be kept", ~copies, 3)):
        if chosen.any():
            rows.append(f"Samples {words}, and what the same noise gives after unlearning")
        pairs = zip(before[chosen].split(COLUMNS), after[chosen].split(COLUMNS), strict=True)
        for old, new in list(pairs)[:most]:
            rows += [("before", old), ("after", new)] if len(old) else []
    return rows


def memory_before_after(originals: Tensor, before: dict, after: dict,
                        timesteps: list[int]) -> list[Row]:
    """The first three pictures to forget, and what comes back of them, a column per timestep."""
    rows: list[Row] = ["The image to forget, noised to a timestep and denoised again"]
    rows.append([f"t = {t}" for t in timesteps])
    for draw, original in enumerate(originals[:3]):
        if draw == 0 or not original.equal(originals[draw - 1]):
            rows.append(("original", original.expand(len(timesteps), -1, -1, -1)))
        for word, back in (("before", before), ("after", after)):
            rows.append((word, torch.stack([back["memory", t][draw] for t in timesteps])))
    return rows


def save_gif(path: Path, timesteps: list[int], frames: dict[int, tuple[Tensor, Tensor]]) -> None:
    """The steps of unlearning as a film, in 32 colours: a few 100 KB.

    frames: by step some samples, and what comes back of the picture to forget from each timestep.
    """
    pages = []
    for step, images in frames.items():
        samples, memory = images
        rows: list[Row] = [f"step {step} of {max(frames)}: the same noise each time"]
        rows += [("samples", part) for part in samples.split(COLUMNS // 2) if len(part)]
        rows += [[f"t = {t}" for t in timesteps], ("memory", memory)]
        pages.append(sheet(rows).quantize(32))
    times = [500] * (len(pages) - 1) + [3000]  # milliseconds
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)


def aligned(rows: list[list[str]]) -> str:
    """A table in Markdown of a heading and rows. The first column is flush left, the rest right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = []
    for name, *cells in (rows[0], rule, *rows[1:]):
        right = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append(f"| {' | '.join([name.ljust(first), *right])} |")
    return "\n".join(lines)
