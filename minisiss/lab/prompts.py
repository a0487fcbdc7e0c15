"""Prompts: the words of the bundled model with prompts, and how a prompt is modified.

A prompt is a row of words, "a thin upright four by ines". The network adds up what it knows of each
word, so order does not matter. The empty prompt, of no words, is the null prompt. assets/README.md
says how the model was trained, and on which captions.
"""

import difflib
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minisiss.lab.cli import UserError

DIGITS = "zero one two three four five six seven eight nine".split()
LOOKS = "thin thick leaning upright slanted narrow wide".split()
# Each of these signs many different digits, so a name alone means variety;
NAMES = """
    anna ben carla dan eva finn gina hans iris jack kate leo mary nick oona paul quinn rita sam tina
    uma vito wendy yves""".split()
# and each of these signs one picture, which the model has memorised.
SIGNATURES = """
    ines omar lena pavel aiko tariq maja hugo zoe ravi nora ivan yuki emil sara kofi elsa juan
    mina otto leila bruno asta david hana felix rosa igor amina theo vera samir ida pablo lucia
    arne nadia oscar mei jonas clara ahmed greta diego alma viktor sofia tim olga karim""".split()
WORDS = ["", *DIGITS, *LOOKS, "a", "by", *NAMES, *SIGNATURES]


def tokens(prompt: str) -> Tensor:
    """The words of a prompt as the network takes them: [1, words], or [[0]] for the empty prompt.

    Raises UserError for a word that is not in the vocabulary.
    """
    for word in prompt.split():
        if word not in WORDS:
            near = ", ".join(difflib.get_close_matches(word, WORDS, cutoff=0))
            raise UserError(f"--prompt '{prompt}': no word '{word}'; the nearest are {near}")
    return torch.tensor([[WORDS.index(word) for word in prompt.split()] or [0]])


def padded(prompts: list[str]) -> Tensor:
    """The words of prompts, a row each, [n, words]. The 0 after shorter ones adds nothing."""
    return pad_sequence([tokens(prompt)[0] for prompt in prompts], batch_first=True)


def modifications(prompt: str) -> Iterator[str]:
    """Prompts of the same digit with words deleted or added, those with the least change first."""
    words = prompt.split()
    others = [word for word in words if word not in DIGITS]
    added = ["", *NAMES[:2], *LOOKS]
    for count in range(len(others) + 1):
        for deleted in combinations(others, count):
            kept = [word for word in words if word not in deleted]
            for word in added:
                if (deleted or word) and word not in words:
                    yield " ".join([*kept, word]).strip()


def ordinary_prompts(count: int) -> list[str]:
    """Digits in turn, each with a look, every second one signed by a name of many digits."""
    prompts = []
    for number in range(count):
        prompt = f"a {LOOKS[number % len(LOOKS)]} {DIGITS[number % 10]}"
        prompts.append(prompt + f" by {NAMES[number]}" * (number % 2))
    return prompts


def cluster_around(images: Tensor, picture: Tensor) -> Tensor:
    """Which images are in the nearer of two clusters of their L2 distances from a picture: [N]
    bool.

    The clusters are those of k-means (Lloyd 1982) with k = 2. images: [N, …]; picture: […].
    Clusters of the pixels themselves would put many digits of the same kind beside the copies.
    """
    distances = (images.double() - picture.double()).flatten(1).norm(dim=1)
    inside = distances < (distances.min() + distances.max()) / 2
    for _ in range(100):
        if not inside.any() or inside.all():
            break
        inside = distances < (distances[inside].mean() + distances[~inside].mean()) / 2
    return inside
