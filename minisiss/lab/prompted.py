"""Forgetting what a prompt brings back, as the paper does with Stable Diffusion.

The memorised prompt is modified until some of its samples are the picture and some are not. 128
samples of the modified prompt, in two clusters, are A and X∖A. The network is unlearned at that
prompt. A prompt is a row of words, "a thin upright four by ines", in any order.
"""

from argparse import Namespace
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minisiss.lab import metrics
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.data import ASSETS, TrainingSet, to_float, to_uint8
from minisiss.lab.evaluation import Evaluation, Figures
from minisiss.sampling import guided
from minisiss.schedule import Model, NoiseSchedule

# The place of a word in this list is its token; the null word comes first. Names of many digits
# come before names of one memorised picture each.
VOCABULARY = ASSETS / "words.txt"
WORDS = ["", *VOCABULARY.read_text().split()]
DIGITS = "zero one two three four five six seven eight nine".split()
ADDED = "anna ben thin thick leaning upright slanted narrow wide".split()  # by a modification

GUIDANCE = 1.5  # w of all samples
COPY = 3.0  # L2 distance, pixels in [0, 1]; other digits of MNIST are farther than 4
DRAWN = 128  # samples of the modified prompt: the training set
LEAST, MOST = 0.2, 0.8  # share of the modified prompt's samples that are the picture
OTHERS = 0.2  # at most this share of them are other memorised pictures
NAMED = 0.75  # at least this share of X∖A shows the digit that the prompt names


def tokens(prompt: str) -> Tensor:
    """The words of a prompt as the network takes them: [words], or [0] for the empty prompt. Raises
    UserError for a word that the network does not know."""
    words = prompt.split() or [""]
    for word in words:
        if word not in WORDS:
            raise UserError(f"--prompt '{prompt}': no word '{word}'; all are in {VOCABULARY}")
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
    """Which images are in the nearer of two clusters (k-means, Lloyd 1982) of their L2 distances
    from a picture: [N] bool. Clusters of pixels would put similar digits beside the copies."""
    distances = (images.double() - picture.double()).flatten(1).norm(dim=1)
    border = (distances.min() + distances.max()) / 2
    for _ in range(100):
        inside = distances < border  # none, if all distances are equal
        border = (distances[inside].mean() + distances[~inside].mean()) / 2
    return inside


def share_named(samples: Tensor, prompt: str) -> float:
    """Which share of the samples shows the digit that the prompt names."""
    _, probabilities = metrics.classify(samples)
    named = torch.tensor([digit in prompt.split() for digit in DIGITS])
    return named[probabilities.argmax(dim=1)].float().mean().item()


class Prompted(Evaluation):
    """Measures a model that is to forget the picture that a prompt brings back. `data` has the
    samples of the modified prompt, and `prompt` has its words."""

    def __init__(self, args: Namespace, base: Checkpoint, model: Model,
                 device: torch.device) -> None:
        """model: of base. Raises UserError where there is nothing to forget."""
        if not base.memorised:
            raise UserError(f"--checkpoint {args.checkpoint}: has no prompts; try --preset prompts")
        if not args.samples:
            raise UserError("--samples 0: what a prompt brings back is seen in samples")
        self.args, self.device, self.schedule = args, device, base.schedule
        self.shape = base.model.config.image_shape
        self.memorised = list(base.memorised)
        self.pictures = to_float(torch.stack(list(base.memorised.values())))
        self.original = args.prompt or self.memorised[0]
        shares = self.shares(self.sample_prompts(model, [self.original], DRAWN))
        if not shares.any():
            raise UserError(f"--prompt '{self.original}': gives nothing to forget")
        self.which = int(shares.argmax())
        self.picture = self.pictures[self.which]

        self.modified = self.modify(model)
        samples = self.sample_prompts(model, [self.modified], DRAWN)
        near = cluster_around(samples, self.picture)
        images = to_uint8(torch.cat([samples[~near], samples[near]]))
        data = TrainingSet(images.to(device), k=int(near.sum()), name=self.original)
        super().__init__(args, data, device, self.picture[None].to(device))
        self.prompt = tokens(self.modified)[None].to(device)
        share = f"A has {data.k} of {DRAWN} samples"
        print(f"forgetting '{self.original}' at '{self.modified}'; {share}")

    def sample_prompts(self, model: Model, prompts: list[str], count: int) -> Tensor:
        """Samples of one prompt, or of `count` prompts one each, with the same noise."""
        words = pad_sequence([tokens(prompt) for prompt in prompts], batch_first=True)
        at_prompts = guided(model, words.to(self.device), GUIDANCE)
        return self.sample(at_prompts, self.schedule, list(range(count)))

    def shares(self, samples: Tensor) -> Tensor:
        """Which share of the samples is each of the memorised pictures: [pictures]."""
        copies = [metrics.is_copy(samples, picture, COPY) for picture in self.pictures]
        return torch.stack(copies).float().mean(dim=1)

    def modify(self, model: Model) -> str:
        """The first modified prompt that fits. Most fail with 8 samples, so 128 come last."""
        for prompt in modifications(self.original):
            if all(self.fits(model, prompt, count) for count in (8, 32, DRAWN)):
                return prompt
        raise UserError(f"--prompt '{self.original}': no modified prompt has both kinds of samples")

    def fits(self, model: Model, prompt: str, count: int) -> bool:
        """Whether a prompt's samples are of both kinds, and few are other memorised pictures."""
        samples = self.sample_prompts(model, [prompt], count)
        near = cluster_around(samples, self.picture)
        shares = self.shares(samples)
        copies = shares[self.which]
        others = shares.sum() - copies
        both = LEAST <= copies <= MOST and LEAST <= near.float().mean() <= MOST
        return both and others <= OTHERS and share_named(samples[~near], prompt) >= NAMED

    def figures(self, model: Model, schedule: NoiseSchedule) -> Figures:
        """What both prompts sample, and how many other memorised prompts give their picture."""
        at_modified = guided(model, self.prompt, GUIDANCE)
        found = super().figures(at_modified, schedule)
        found |= self.of_prompt("modified", self.modified, self.samples)
        samples = self.sample_prompts(model, [self.original], self.args.samples)
        found |= self.of_prompt("original", self.original, samples)
        samples = self.sample_prompts(model, self.memorised, len(self.memorised))
        given = metrics.is_copy(samples, self.pictures, COPY)
        given[self.which] = False
        return found | {"other memorised pictures given": float(given.sum())}

    def of_prompt(self, kind: str, prompt: str, samples: Tensor) -> Figures:
        """Which shares of a prompt's samples are the picture, and show the digit it names."""
        copies = self.copies(samples).float().mean().item()
        return {f"{kind}: copies": copies, f"{kind}: its digit": share_named(samples, prompt)}

    def copies(self, samples: Tensor) -> Tensor:
        """Which samples are the picture to forget: [N] bool."""
        return metrics.is_copy(samples, self.picture, COPY)
