"""Forgetting what a prompt brings back, as the paper does with Stable Diffusion.

The memorised prompt is modified until some of its samples are the picture and some are not. 128
samples of the modified prompt in two clusters are A and X∖A, and the network is unlearned at that
prompt.
"""

from argparse import Namespace

import torch
from torch import Tensor

from minisiss.lab import metrics, pictures, ranks
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.data import TrainingSet, to_float, to_uint8
from minisiss.lab.prompts import DIGITS, cluster_around, modifications, ordinary_prompts
from minisiss.lab.prompts import padded, tokens
from minisiss.lab.run import Run, write_json
from minisiss.sampling import guided
from minisiss.schedule import Model

COPY = 3.0  # L2 distance, pixels in [0, 1]: every digit of MNIST is farther than 4 from these
SHOWN, DRAWN = 16, 128  # samples of a prompt that are shown; of the modified prompt, to train on
LEAST, MOST = 0.2, 0.8  # share of the modified prompt's samples that are the picture
OTHERS = 0.2  # and at most this share are other memorised pictures
LOOK_IMAGES = 48  # noisy images per look
NAMED = 0.75  # and at least this share of X∖A shows the digit that the prompt names


class Prompted:
    """A model before and after it forgets the picture that a prompt brings back.

    `data` has the samples of the modified prompt, and `prompt` its words; at this fixed prompt the
    network is an unconditional one. Raises UserError where there is nothing to forget, and where no
    modified prompt has samples of both kinds.
    """

    def __init__(self, args: Namespace, base: Checkpoint, model: Model,
                 device: torch.device) -> None:
        """base: the checkpoint that the unlearning begins with; model: its network."""
        if not base.memorised:
            words = "has memorised no pictures by prompts; try --preset prompts"
            raise UserError(f"--checkpoint {args.checkpoint}: {words}")
        self.args, self.schedule, self.device = args, base.schedule, device
        self.shape = base.model.config.image_shape
        self.memorised = list(base.memorised)
        self.pictures = to_float(torch.stack([*base.memorised.values()]))
        original = args.prompt or self.memorised[0]
        shares = self.shares(self.sample(model, [original], DRAWN))
        if not shares.any():
            words = f"nothing to forget: none of its {DRAWN} samples is a memorised picture"
            raise UserError(f"--prompt '{original}': {words}")
        self.which = int(shares.argmax())
        modified, self.data = self.modify(model, original)
        self.prompt = tokens(modified).to(device)
        self.kinds = {"modified": [modified], "original": [original],
                      "ordinary": ordinary_prompts(SHOWN)}

    def sample(self, model: Model, prompts: list[str], count: int) -> Tensor:
        """Samples of a prompt, or of `count` prompts one each: [count, C, H, W] in [−1, 1].

        The noise is the same for every prompt and model.
        """
        words = padded(prompts).expand(count, -1).to(self.device)
        samples = []
        for places in torch.arange(count).split(metrics.BATCH):
            samples.append(metrics.draw_samples(
                guided(model, words[places], self.args.guidance), self.schedule, places.tolist(),
                self.shape, self.args.seed, self.args.sampling_steps))
        return torch.cat(samples)

    def shares(self, samples: Tensor) -> Tensor:
        """Which share of the samples is each of the memorised pictures: [pictures]."""
        found = [metrics.is_copy(samples, p, COPY).float().mean() for p in self.pictures]
        return torch.stack(found)

    def named(self, samples: Tensor, prompts: list[str]) -> float:
        """Which share of the samples shows the digit that its prompt names."""
        right = 0
        for i, digit in enumerate(metrics.classify(samples)[1].argmax(dim=1).tolist()):
            right += DIGITS[digit] in prompts[i % len(prompts)].split()
        return right / max(1, len(samples))

    def modify(self, model: Model, original: str) -> tuple[str, TrainingSet]:
        """The first modified prompt with samples of both kinds, and 128 of its samples.

        8 samples are looked at first, then 32, then 128: most prompts fail soon.
        """
        tried = 0
        for prompt in modifications(original):
            tried += 1
            for count in (8, 32, DRAWN):
                samples = self.sample(model, [prompt], count)
                near = cluster_around(samples, self.pictures[self.which])
                if not self.fits(samples, near, prompt):
                    break
            else:
                images = to_uint8(torch.cat([samples[~near], samples[near]])).to(self.device)
                k, share = int(near.sum()), self.shares(samples)[self.which]
                print(f"to forget: '{original}'\nmodified, after {tried} were tried: '{prompt}'")
                print(f"{share:.0%} of its {DRAWN} samples are the picture; A has {k} of them")
                return prompt, TrainingSet(images, k, name="picture")
        words = f"none of {tried} modified prompts gives the picture in {LEAST:.0%} to {MOST:.0%}"
        raise UserError(f"--prompt '{original}': {words} of its samples, and else the digit")

    def fits(self, samples: Tensor, near: Tensor, prompt: str) -> bool:
        """Whether samples are of both kinds, and hardly any is another memorised picture."""
        shares = self.shares(samples)
        share, a = shares[self.which].item(), near.float().mean().item()
        both = LEAST <= share <= MOST and LEAST <= a <= MOST
        few = shares.sum().item() - share <= OTHERS
        return both and few and self.named(samples[~near], [prompt]) >= NAMED

    def draw(self, model: Model) -> tuple[dict[str, Tensor], int]:
        """Samples of each kind of prompt, and how many other memorised prompts give their
        picture."""
        samples = {kind: self.sample(model, p, SHOWN) for kind, p in self.kinds.items()}
        given = self.sample(model, self.memorised, len(self.memorised))
        others = metrics.is_copy(given, self.pictures, COPY)
        others[self.which] = False
        return samples, int(others.sum())

    def before(self, model: Model) -> None:
        self.drawn_before = self.draw(model)

    def look(self, run: Run, model: Model) -> None:
        """Log how well noise is predicted at the fixed prompt, on A and on X∖A."""
        at_prompt, losses = guided(model, self.prompt), {}
        for name, images in (("kept", self.data.keep), ("forget", self.data.forget)):
            loss = metrics.denoising_loss(at_prompt, self.schedule, images, LOOK_IMAGES)
            losses[f"loss_on_{name}"] = loss
        run.log(losses, shown=tuple(losses))

    def after(self, run: Run, model: Model) -> None:
        """Draw again; print the table, and write results.json and the picture."""
        drawn = {"before": self.drawn_before, "after": self.draw(model)}
        if ranks.rank() > 0:
            return
        rows, results = [["", "before", "after"]], {}
        page = [("picture", self.pictures[self.which][None])]
        for kind, prompts in self.kinds.items():
            copies, named = [], []
            page.append(f"{kind}: '{prompts[0]}'" + ", and others" * (len(prompts) > 1))
            for when, (samples, _) in drawn.items():
                copies.append(round(SHOWN * self.shares(samples[kind])[self.which].item()))
                named.append(self.named(samples[kind], prompts))
                page.append((when, samples[kind]))
            rows.append([f"copies of the picture, of {SHOWN} samples: {kind}", *map(str, copies)])
            rows.append(["samples that show the digit named", *(f"{share:.0%}" for share in named)])
            results[kind] = {"prompt": prompts[0], "copies": copies, "named": named}
        results["others"] = [others for _, others in drawn.values()]
        rows.append(["other memorised pictures still given", *map(str, results["others"])])
        write_json(run.out / "results.json", results)
        pictures.sheet(page).save(run.out / "before_after.png")
        print(f"\n{pictures.aligned(rows)}\n")
        print(f"{run.step} steps of {self.args.method} took {run.seconds:.0f} s.")
        print(f"Look at {run.out}/before_after.png; the model that forgot is {run.path}.")
