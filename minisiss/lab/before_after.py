"""What unlearn.py shows: a model before and after, and what it remembers in between."""

import shlex
from argparse import Namespace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from minisiss.lab import machine, metrics
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.data import load_training_set, note_forgotten_before, to_uint8
from minisiss.lab.evaluation import Evaluation, aligned, cell
from minisiss.lab.prompted import GUIDANCE, Prompted
from minisiss.lab.run import Run, write_json
from minisiss.sampling import guided
from minisiss.schedule import Model

LOOK_DRAWS = 8  # few, and the same at every look
SHOWN = 12  # samples in the pictures, at most half of them to be forgotten
PICTURES = 3  # to forget, in the pictures
WIDTH, TEXT = 532, 22  # pixels, of a line of text
GAP, SIDE = 4, 84  # pixels: between images; to which small images are enlarged


class BeforeAfter:
    """Measures a model before, during and after unlearning."""

    def __init__(self, args: Namespace, base: Checkpoint, model: Model,
                 device: torch.device) -> None:
        """base: the checkpoint that the unlearning begins with; model: its network."""
        self.args, self.schedule = args, base.schedule
        if args.data == "prompts":
            self.evaluation = Prompted(args, base, model, device)
        else:
            data = load_training_set(args, base.model.config.image_shape, device)
            note_forgotten_before(data, set(base.forgotten) - set(args.forget))
            self.evaluation = Evaluation(args, data, device)
        self.data, self.prompt = self.evaluation.data, self.evaluation.prompt

    def before(self, model: Model) -> None:
        """Measure the model before unlearning, and choose which samples the pictures show."""
        evaluation = self.evaluation
        self.figures_before = evaluation.figures(model, self.schedule)
        found = evaluation.copies(evaluation.samples)
        copies, others = found.nonzero().flatten(), (~found).nonzero().flatten()
        self.shown = torch.cat([copies[: SHOWN // 2], others])[:SHOWN].tolist()
        self.film = [self.page(model, "before unlearning")]

    def look(self, run: Run, model: Model) -> None:
        """Log how alike the picture comes back, and film it."""
        predict, evaluation = guided(model, self.prompt, GUIDANCE), self.evaluation
        some = evaluation.originals["memory"][:LOOK_DRAWS]
        back = evaluation.recall(predict, self.schedule, some, evaluation.middle)
        run.log({"memory": metrics.similarity(back, some).mean()}, shown=("memory",))
        self.film.append(self.page(model, f"step {run.step}"))

    def page(self, model: Model, title: str) -> Image.Image:
        """What a model samples, and what it brings back of the first pictures to forget."""
        predict, evaluation = guided(model, self.prompt, GUIDANCE), self.evaluation
        rows = [words(f"{title}: the same noise each time")]
        if self.shown:
            samples = evaluation.sample(predict, self.schedule, self.shown)
            rows.append(grid(samples, columns=SHOWN // 2))
        times = self.args.memory_timesteps
        seen = f"what to forget, noised to t = {', '.join(map(str, times))}, and denoised"
        columns = [evaluation.different[:PICTURES]]
        for t in times:
            columns.append(evaluation.recall(predict, self.schedule, columns[0], t))
        by_picture = torch.stack(columns, dim=1).flatten(0, 1)
        return below([*rows, words(seen), grid(by_picture, len(columns))])

    def after(self, run: Run, model: Model) -> None:
        """Measure again; print the table, and write results.json and the pictures."""
        before, after = self.figures_before, self.evaluation.figures(model, self.schedule)
        self.film.append(self.page(model, f"after {run.step} steps"))
        if machine.rank() > 0:
            return
        rows = [[f"forgetting: {self.data.name}", "before", "after"]]
        for name in before | after:
            rows.append([name, cell(name, [before.get(name)]), cell(name, [after.get(name)])])
        write_json(run.out / "results.json", {"before": before, "after": after})
        below([self.film[0], self.film[-1]]).save(run.out / "before_after.png")
        save_gif(run.out / "forgetting.gif", self.film)
        print(f"\n{aligned(rows)}\n")
        print(f"Look at {run.out}/before_after.png and forgetting.gif.")
        if self.evaluation.is_mnist:
            print(f"Next: python eval.py {shlex.quote(str(run.out))}")


def words(text: str) -> Image.Image:
    """A line of text."""
    picture = Image.new("RGB", (WIDTH, TEXT), "white")
    font = ImageFont.load_default(size=13)
    ImageDraw.Draw(picture).text((GAP, TEXT // 2), text, "black", font, anchor="lm")
    return picture


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images [N, C, H, W] in [−1, 1], row by row. Small ones are enlarged."""
    scale = max(1, SIDE // images.shape[-1])
    pixels = to_uint8(images).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return to_pil_image(make_grid(pixels, columns, padding=GAP, pad_value=255))


def below(pictures: list[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    width = max(picture.width for picture in pictures)
    height = sum(picture.height for picture in pictures)
    page = Image.new("RGB", (width, height), "white")
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height
    return page


def save_gif(path: Path, pages: list[Image.Image]) -> None:
    """Pages as a film, in 32 colours: a few 100 KB."""
    frames = [page.quantize(32) for page in pages]
    times = [500] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
