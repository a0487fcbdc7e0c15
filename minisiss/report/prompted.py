"""Forgetting what a prompt brings back: a modified prompt, samples of it as training set, before and after.

As the paper does with Stable Diffusion: the memorised prompt is modified until some of its samples are the
picture and some are not, and two clusters of these are A and X∖A.
"""

from argparse import Namespace
from itertools import cycle, product

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss import sampling
from minisiss.data.clusters import cluster_around
from minisiss.data.prompts import DIGITS, NAMES, SIGNATURES, modifications, ordinary_prompts, padded, tokens
from minisiss.data.training_set import TrainingSet, step_generator, to_float, to_uint8
from minisiss.errors import UserError
from minisiss.losses import squared_error
from minisiss.machine.ranks import World
from minisiss.metrics.classifier import classify, load_classifier
from minisiss.metrics.forgetting import is_copy
from minisiss.metrics.samples import draw_samples
from minisiss.report.pictures import sheet
from minisiss.report.table import aligned
from minisiss.report.unlearned import BeforeAfter
from minisiss.runs.checkpoint import Checkpoint
from minisiss.runs.loop import Loop
from minisiss.sampling import guided
from minisiss.schedule import Model

COPY = 3.0  # L2 distance, pixels in [0, 1]: every digit of MNIST is farther than 4 from a memorised picture
SHOWN, DRAWN = 16, 128  # samples of a prompt that are looked at; of the modified prompt, to train on
LEAST, MOST = 0.2, 0.8  # share of a modified prompt's samples that is the picture
OTHERS = 0.2  # and that is other memorised pictures, at most
BARS = 0.9, 0.75  # least share of X∖A that shows the digit named: the second where no prompt has the first
HELD, NOISED, AT_ONCE = 64, 8, 16  # samples that are held, times each is noised, and of these in a step
ORDINARY = [f"a {digit} by {name}" for digit, name in zip(DIGITS, NAMES, strict=False)]


class Prompted(BeforeAfter):
    """A model before and after it forgets the picture that a prompt brings back.

    `data` is the training set, samples of the modified prompt, and `prompt`, as tokens, the one that is held
    fixed while the network is trained on it, the original or the modified one. Raises UserError where there
    is nothing to forget, and where no modified prompt has samples of two kinds.
    """

    def __init__(self, args: Namespace, base: Checkpoint, model: Model, world: World) -> None:
        if not base.memorised:
            what = "has memorised no pictures by prompts; try --preset prompts"
            raise UserError(f"--checkpoint {args.checkpoint}: {what}")
        if args.forget:
            raise UserError(f"--forget {args.forget[0]}: is for --data pictures; name a prompt with --prompt")
        self.args, self.network, self.schedule, self.world = args, model, base.schedule, world
        self.shape, self.tau = base.model.config.image_shape, None
        self.original = next(iter(base.memorised)) if args.prompt is None else args.prompt
        self.pictures = to_float(torch.stack([*base.memorised.values()]))
        self.classifier, _ = load_classifier()
        self.drawn: dict[str, Tensor] = {}  # by prompt, see `sample_before`
        self.which = self.brought_back()
        self.tried: dict[str, tuple[float, float, float]] = {}
        self.modified, self.data = self.modify()
        fixed = self.original if args.fixed_prompt == "original" else self.modified
        self.prompt = tokens(fixed).to(self.data.images.device)
        self.model = guided(model, self.prompt, args.guidance)
        self.held = self.what_it_says() if args.hold else None

        unsigned = " ".join(word for word in self.original.split() if word not in ("by", *NAMES, *SIGNATURES))
        self.prompts = {
            "modified": [self.modified], "original": [self.original],
            "ordinary": [unsigned] * (SHOWN - len(ORDINARY)) + ORDINARY}

    def sample(self, prompts: list[str], title: str, count: int = SHOWN, start: int = 0) -> Tensor:
        """Samples of one prompt, or one of each of `count` prompts: [count − start, C, H, W] in [−1, 1].

        The noise is the same for every prompt and model.
        """
        args, device = self.args, self.schedule.gamma.device
        model = guided(self.network, padded(prompts).to(device), args.guidance)
        return to_float(draw_samples(
            model, self.schedule, count, self.shape, seed=args.seed, steps=args.sampling_steps, eta=args.eta,
            batch_size=SHOWN, start=start, world=self.world, title=title))

    def sample_before(self, prompt: str, count: int) -> Tensor:
        """The first `count` samples of a prompt from the model before, each batch of which is drawn once."""
        drawn = self.drawn.get(prompt, torch.zeros(0, *self.shape))
        if len(drawn) < count:
            whole = drawn[: len(drawn) // SHOWN * SHOWN]
            drawn = torch.cat([whole, self.sample([prompt], f"'{prompt}'", count, len(whole))])
            self.drawn[prompt] = drawn
        return drawn[:count]

    def brought_back(self) -> int:
        """Which memorised picture the prompt brings back most often."""
        for count in (SHOWN, DRAWN):
            shares = self.shares(self.sample_before(self.original, count))
            if shares.any():
                return int(shares.argmax())
        what = f"nothing to forget: 0 of its {DRAWN} samples are a memorised picture"
        raise UserError(f"--prompt '{self.original}': {what}")

    @torch.no_grad()
    def what_it_says(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy images, timesteps, prompts, and the noise that the network as it is now predicts there.

        The images are its own samples of ordinary prompts, one of each.
        """
        schedule, device, shape = self.schedule, self.schedule.gamma.device, (HELD, *self.shape)
        generator = step_generator(self.args.seed, 0, device)
        words = padded(ordinary_prompts(HELD, seed=1)).to(device)
        how = {"steps": self.args.sampling_steps, "eta": self.args.eta, "order": 1 if self.args.eta else 2}
        x = sampling.sample(guided(self.network, words), schedule, shape, generator=generator, **how)
        parts = []
        for _ in range(NOISED):
            timesteps = torch.randint(len(schedule), (HELD,), generator=generator, device=device)
            noise = torch.randn(shape, generator=generator, device=device)
            noisy = schedule.add_noise(x, noise, timesteps)
            parts.append((noisy, timesteps, words, self.network(noisy, timesteps, words)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def hold(self, network: Model, generator: torch.Generator) -> Tensor | None:
        """--hold times ‖ε_old − ε_θ‖² at other prompts, on some of `what_it_says`: forgetting at one prompt
        should leave those alone. None where --hold is 0, as in the paper."""
        if not self.args.hold:
            return None
        chosen = torch.randint(HELD * NOISED, (AT_ONCE,), generator=generator, device=generator.device)
        noisy, timesteps, prompts, old = (part[chosen] for part in self.held)
        return self.args.hold * squared_error(network(noisy, timesteps, prompts), old).mean()

    def shares(self, samples: Tensor) -> Tensor:
        """Which share of the samples is each of the memorised pictures."""
        return torch.stack([is_copy(samples, picture, COPY).float().mean() for picture in self.pictures])

    def share(self, samples: Tensor) -> float:
        """Which share of the samples is the picture to forget."""
        return self.shares(samples)[self.which].item()

    def modify(self) -> tuple[str, TrainingSet]:
        """The first modified prompt with samples of two kinds, and these. Of X∖A 90% show the digit named, or
        75% where no prompt passes with 90%: what X∖A has is kept, and takes the picture's place. Where none
        passes with 75% either, chance may have turned good ones away: while fewer than 128 samples of a
        prompt are drawn, one may then be on the wrong side of each bound."""
        for spare, least, prompt in product((0, 1), BARS, modifications(self.original)):
            if (data := self.two_kinds(prompt, least, spare)) is not None:
                return prompt, data
        nearest = sorted(self.tried, key=lambda prompt: abs(self.tried[prompt][0] - 0.5))[:5]
        shares = "{:.0%} / {:.0%} / {:.0%} '{}'".format
        tried = ", ".join(shares(*self.tried[prompt], prompt) for prompt in nearest)
        tried = f"{len(self.tried)}, the nearest {tried}" if tried else "none, it has no word to change"
        what = f"of no modified prompt are {LEAST:.0%} to {MOST:.0%} of the samples the picture"
        why = f"{OTHERS:.0%} other memorised ones at most, and {BARS[-1]:.0%} of the rest the digit named"
        raise UserError(f"--prompt '{self.original}': {what}, {why}; tried: {tried}")

    def two_kinds(self, prompt: str, least: float, spare: int) -> TrainingSet | None:
        """128 samples of a prompt as A, the cluster around the picture, and X∖A; None where these do not fit.

        20 to 80% should be the picture, 20 to 80% be A, at most 20% be other memorised pictures, and of X∖A
        the share `least` show the digit named. All this of 8 samples first, then of 32, then of 128; of fewer
        than 128 `spare` may be on the wrong side of each bound.
        """
        for count in (SHOWN // 2, 2 * SHOWN, DRAWN):
            slack = spare * (count < DRAWN) / count + 1e-6  # and what rounding takes
            drawn = self.sample_before(prompt, count)
            shares = self.shares(drawn)
            share = shares[self.which].item()
            near = cluster_around(drawn, self.pictures[self.which])
            a = near.float().mean().item()
            others, named = shares.sum().item() - share, self.named(drawn[~near], prompt)
            self.tried[prompt] = share, others, named
            two = all(LEAST - slack <= one <= MOST + slack for one in (share, a))  # kinds, A and X∖A
            missing = (least - named) * (1 - a)  # digits, of all samples: the slack is a share of these
            if not (two and others <= OTHERS + slack and missing <= slack):
                return None
        images = to_uint8(torch.cat([drawn[~near], drawn[near]])).to(self.schedule.gamma.device)
        return TrainingSet(images, int(near.sum()), name="picture", world=self.world)

    def draw_before(self) -> None:
        """Say which prompt stands for the original one, and draw samples from the model as it is now."""
        data, right = self.data, self.share(to_float(self.data.forget.cpu()))
        if self.world.rank == 0:
            tqdm.write(f"to forget: '{self.original}'")
            share, others, named = self.tried[self.modified]
            rest = f"{others:.0%} other memorised ones, of the other cluster {named:.0%} show the digit"
            tqdm.write(f"modified, of {len(self.tried)} tried: '{self.modified}'")
            tqdm.write(f"of its samples {share:.0%} are the picture, {rest}")
            tqdm.write(f"A has {data.k} of {data.n} samples of that; {right:.0%} of A are the picture")
        self.before = {  # samples of each kind, [16, C, H, W]
            "modified": self.sample_before(self.modified, SHOWN),
            "original": self.sample_before(self.original, SHOWN),
            "ordinary": self.sample(self.prompts["ordinary"], "ordinary prompts")}

    def look(self, loop: Loop) -> None:
        """Log how well noise is predicted at the fixed prompt, on A and on the other samples."""
        losses = self.losses()
        loop.log(losses, shown=tuple(losses))

    def finish(self, loop: Loop) -> None:
        """Draw again; print the table, and write the picture."""
        after = {kind: self.sample(prompts, f"{kind} after") for kind, prompts in self.prompts.items()}
        before = self.before
        if self.world.rank > 0:
            return
        rows, picture, record = [["", "before", "after"]], [("picture", self.pictures[self.which][None])], {}
        for kind, prompts in self.prompts.items():
            copies = [round(SHOWN * self.share(samples[kind])) for samples in (before, after)]
            named = [self.named(samples[kind], *prompts) for samples in (before, after)]
            apart = [median_distance(samples[kind]) for samples in (before, after)]
            rows.append([f"copies of the picture among {SHOWN} of {kind} prompts", *map(str, copies)])
            rows.append(["samples that show the digit named", *(f"{share:.0%}" for share in named)])
            rows.append(["L2 distance of two of them (median)", *(f"{distance:.1f}" for distance in apart)])
            record[kind] = {"copies": copies, "named": named, "apart": apart}
            more = ", and one of each digit" if kind == "ordinary" else ""
            picture += [f"{kind}: '{prompts[0]}'{more}", ("before", before[kind]), ("after", after[kind])]
        found = {"prompt": self.original, "modified": self.modified, "tried": self.tried, "k": self.data.k}
        loop.write(**found, copies=record)
        sheet(picture).save(loop.out / "before_after.png")
        print(f"\n{aligned([*rows, ['seconds of unlearning', '', f'{loop.state.seconds:.1f}']])}\n")
        print(f"Look at {loop.out}/before_after.png; the model that forgot is {loop.path}")

    def named(self, samples: Tensor, *prompts: str) -> float:
        """Which share of the samples shows the digit that its prompt names, or the one prompt of all."""
        shown = classify(self.classifier, samples)[1].argmax(dim=1).tolist()
        pairs = zip(shown, cycle(prompts), strict=False)
        return sum(DIGITS[digit] in prompt.split() for digit, prompt in pairs) / max(1, len(shown))


def median_distance(samples: Tensor) -> float:
    """The median L2 distance of two samples, pixels in [0, 1]: small where a prompt has one picture only."""
    return torch.pdist(samples.flatten(1) / 2).median().item()
