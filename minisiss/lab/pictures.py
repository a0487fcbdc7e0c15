"""What people look at: sheets of images, a film, and tables in Markdown."""

from pathlib import Path

from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn.functional import pad
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

from minisiss.lab.data import to_uint8
from minisiss.sampling import sample
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet

GAP, LABEL, TEXT = 4, 60, 22  # pixels: between images, for a word beside a row, for a line of text
WIDTH, SIDE = 640, 84  # pixels: of a line of text; to which small images are enlarged

Row = str | tuple[str, Tensor]  # a line of text; a word and images [N, C, H, W] in [−1, 1]


def sheet(rows: list[Row]) -> Image.Image:
    """Rows of text and images, one below the other."""
    strips = [strip(row) for row in rows]
    width = max(picture.width for picture in strips)
    height = sum(picture.height for picture in strips)
    page = Image.new("RGB", (width, height), "white")
    y = 0
    for picture in strips:
        page.paste(picture, (0, y))
        y += picture.height
    return page


def strip(row: Row) -> Image.Image:
    """A line of text, or a word with images beside it. Small images are enlarged."""
    if isinstance(row, str):
        words = row
        picture = Image.new("RGB", (WIDTH, TEXT), "white")
    else:
        words, images = row
        scale = max(1, SIDE // images.shape[-1])
        pixels = to_uint8(images).cpu().expand(-1, 3, -1, -1)
        pixels = repeat(pixels, "n c h w -> n c (h a) (w b)", a=scale, b=scale)
        pixels = pad(pixels, (GAP, 0, GAP, 0), value=255)  # to the left of each, and above
        line = to_pil_image(rearrange(pixels, "n c h w -> c h (n w)"))
        picture = Image.new("RGB", (LABEL + line.width, line.height), "white")
        picture.paste(line, (LABEL, 0))
    font = ImageFont.load_default(size=13)
    place = GAP, picture.height // 2
    ImageDraw.Draw(picture).text(place, words, "black", font, anchor="lm")
    return picture


def save_samples(path: Path, model: UNet, schedule: NoiseSchedule) -> None:
    """A picture of 64 samples, the same noise each time."""
    noise = Generator(schedule.gamma.device).manual_seed(0)
    samples = sample(model, schedule, (64, *model.config.image_shape), generator=noise)
    save_image(samples, path, normalize=True, value_range=(-1, 1))


def save_gif(path: Path, pages: list[Image.Image]) -> None:
    """Pages as a film, in 32 colours: a few 100 KB."""
    frames = [page.quantize(32) for page in pages]
    times = [500] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def aligned(rows: list[list[str]]) -> str:
    """A table in Markdown, of a heading and rows. The first column is flush left, the rest
    right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0]]
    rule += ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
