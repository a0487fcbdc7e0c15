"""Forgetting what a prompt brings back, as the paper does with Stable Diffusion.

The memorised prompt is modified until some of its samples are the picture and some are not. 128
samples of the modified prompt, in two clusters, are A and X∖A. The network is unlearned at that
prompt.

A prompt is a row of words, "a thin upright four by ines". The network adds up what it knows of each
word, so order does not matter. assets/README.md says how the model was trained.
"""

import difflib
from argparse import Namespace
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minisiss.lab import machine, metrics, pictures
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.data import ASSETS, TrainingSet, to_float, to_uint8
from minisiss.lab.run import Run, write_json
from minisiss.sampling import guided
from minisiss.schedule import Model

# The place of a word in this list is its token; the null word comes first. After the names of many
# digits come those of one picture each, which the model has memorised.
WORDS = ["", *(ASSETS / "words.txt").read_text().split()]
DIGITS = "zero one two three four five six seven eight nine".split()
ADDED = "anna ben thin thick leaning upright slanted narrow wide".split()  # by a modification

COPY = 3.0  # L2 distance, pixels in [0, 1]: every digit of MNIST is farther than 4 from these
SHOWN = 16  # samples of a prompt in the table and in the picture
DRAWN = 128  # samples of the modified prompt: the training set
LEAST, MOST = 0.2, 0.8  # share of the modified prompt's samples that are the picture
OTHERS = 0.2  # at most this share of them are other memorised pictures
NAMED = 0.75  # at least this share of X∖A shows the digit that the prompt names


def tokens(prompt: str) -> Tensor:
    """The words of a prompt as the network takes them: [words], or [0] for the empty prompt.

    Raises UserError for a word that the network does not know.
    """
    words = prompt.split() or [""]
    for word in words:
        if word not in WORDS:
            nearest = ", ".join(difflib.get_close_matches(word, WORDS, cutoff=0))
            raise UserError(f"--prompt '{prompt}': no word '{word}'; the nearest are {nearest}")
    return torch.tensor([WORDS.index(word) for word in words])


def modifications(prompt: str) -> Iterator[str]:
    """Prompts of the same digit with words deleted or added, those with the least change first."""
    words = prompt.split()
    others = [word for word in words if word not in DIGITS]
    for count in range(len(others) + 1):
        for deleted in combinations(others, count):
            kept = [word for word in words if word not in deleted]
            if deleted:
                yield " ".join(kept)
            for added in ADDED:
                if added not in words:
                    yield " ".join([*kept, added])


def cluster_around(images: Tensor, picture: Tensor) -> Tensor:
    """Which images are in the nearer of two clusters of their L2 distances from a picture: [N]
    bool.

    The clusters are those of k-means (Lloyd 1982) with k = 2. images: [N, …]; picture: […].
    Clusters of the pixels themselves would put many digits of the same kind beside the copies.
    """
    distances = (images.double() - picture.double()).flatten(1).norm(dim=1)
    border = (distances.min() + distances.max()) / 2
    for _ in range(100):
        inside = distances < border  # none, if all distances are equal; then the border is NaN
        border = (distances[inside].mean() + distances[~inside].mean()) / 2
    return inside


def share_named(samples: Tensor, prompt: str) -> float:
    """Which share of the samples shows the digit that the prompt names."""
    _, probabilities = metrics.classify(samples)
    digits = probabilities.argmax(dim=1)
    right = [DIGITS[digit] in prompt.split() for digit in digits]
    return sum(right) / len(right)


class Prompted:
    """A model before and after it forgets the picture that a prompt brings back.

    `data` has the samples of the modified prompt, and `prompt` has its words. Raises UserError
    where there is nothing to forget, and where no modified prompt has samples of both kinds.
    """

    def __init__(self, args: Namespace, base: Checkpoint, model: Model,
                 device: torch.device) -> None:
        """base: the checkpoint that the unlearning begins with; model: its network."""
        if not base.memorised:
            raise UserError(f"--checkpoint {args.checkpoint}: has no prompts; try --preset prompts")
        self.args, self.device = args, device
        self.schedule, self.shape = base.schedule, base.model.config.image_shape
        self.memorised = list(base.memorised)
        self.pictures = to_float(torch.stack(list(base.memorised.values())))
        original = args.prompt or self.memorised[0]
        shares = self.shares(self.sample(model, [original], DRAWN))
        if not shares.any():
            raise UserError(f"--prompt '{original}': gives no memorised picture: nothing to forget")
        self.which = int(shares.argmax())
        self.picture = self.pictures[self.which]

        modified = self.modify(model, original)
        samples = self.sample(model, [modified], DRAWN)
        near = cluster_around(samples, self.picture)
        images = to_uint8(torch.cat([samples[~near], samples[near]]))
        self.data = TrainingSet(images.to(device), k=int(near.sum()))
        self.prompt = tokens(modified)[None].to(device)
        print(f"forgetting '{original}' at '{modified}'; A has {self.data.k} of its samples")
        self.prompts = {"modified": modified, "original": original}
        self.drawn = {"modified": [], "original": []}
        self.others = []

    def sample(self, model: Model, prompts: list[str], count: int) -> Tensor:
        """Samples of one prompt, or of `count` prompts one each: [count, C, H, W] in [−1, 1].

        The noise is the same for every prompt and model.
        """
        words = pad_sequence([tokens(prompt) for prompt in prompts], batch_first=True)
        at_prompts = guided(model, words.to(self.device), self.args.guidance)
        return metrics.draw_samples(at_prompts, self.schedule, list(range(count)), self.shape,
                                    self.args.seed, self.args.sampling_steps)

    def shares(self, samples: Tensor) -> Tensor:
        """Which share of the samples is each of the memorised pictures: [pictures]."""
        copies = [metrics.is_copy(samples, picture, COPY) for picture in self.pictures]
        return torch.stack(copies).float().mean(dim=1)

    def copies(self, samples: Tensor) -> int:
        """How many of the samples are the picture to forget."""
        return int(metrics.is_copy(samples, self.picture, COPY).sum())

    def modify(self, model: Model, original: str) -> str:
        """The first modified prompt that fits. Most fail with 8 samples, so 128 come last."""
        for prompt in modifications(original):
            if all(self.fits(model, prompt, count) for count in (8, 32, DRAWN)):
                return prompt
        raise UserError(f"--prompt '{original}': no modified prompt has samples of both kinds")

    def fits(self, model: Model, prompt: str, count: int) -> bool:
        """Whether a prompt's samples are of both kinds, and few are other memorised pictures."""
        samples = self.sample(model, [prompt], count)
        near = cluster_around(samples, self.picture)
        shares = self.shares(samples)
        copies = shares[self.which]
        others = shares.sum() - copies
        both = LEAST <= copies <= MOST and LEAST <= near.float().mean() <= MOST
        return both and others <= OTHERS and share_named(samples[~near], prompt) >= NAMED

    def before(self, model: Model) -> None:
        """Draw samples, and count how many other memorised prompts give their picture."""
        for kind, prompt in self.prompts.items():
            self.drawn[kind].append(self.sample(model, [prompt], SHOWN))
        samples = self.sample(model, self.memorised, len(self.memorised))
        given = metrics.is_copy(samples, self.pictures, COPY)
        given[self.which] = False
        self.others.append(int(given.sum()))

    def look(self, run: Run, model: Model) -> None:
        """Log how well noise is predicted at the fixed prompt, on X∖A and on A."""
        model = guided(model, self.prompt)
        kept = metrics.denoising_loss(model, self.schedule, self.data.keep)
        forget = metrics.denoising_loss(model, self.schedule, self.data.forget)
        run.log({"loss_on_kept": kept, "loss_on_forget": forget})

    def after(self, run: Run, model: Model) -> None:
        """Draw again; print the table, and write results.json and the picture."""
        self.before(model)  # the same noise, after unlearning
        if machine.rank() > 0:
            return
        results = {"others": self.others}
        rows = [["", "before", "after"]]
        page = [("picture", self.picture[None])]
        for kind, prompt in self.prompts.items():
            before, after = self.drawn[kind]
            copies = [self.copies(before), self.copies(after)]
            named = [share_named(before, prompt), share_named(after, prompt)]
            rows.append([f"{kind}: copies of the picture, of {SHOWN}", *map(str, copies)])
            rows.append([f"{kind}: share that shows the digit", *map(str, named)])
            page += [f"{kind}: '{prompt}'", ("before", before), ("after", after)]
            results[kind] = {"prompt": prompt, "copies": copies, "named": named}
        rows.append(["other memorised pictures still given", *map(str, self.others)])
        write_json(run.out / "results.json", results)
        pictures.sheet(page).save(run.out / "before_after.png")
        print(f"\n{pictures.aligned(rows)}\n")
        print(f"Look at {run.out}/before_after.png; the model that forgot is {run.path}.")
