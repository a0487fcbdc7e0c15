"""Prompts: a small vocabulary, captions measured on the digits, and pictures that stand in the set often.

A prompt is a row of words, "a thin upright four by ines". The network sums what it knows of each word, so
order does not matter, and the empty prompt, 0 words, is the null prompt.
"""

import difflib
from collections import Counter
from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minisiss.errors import UserError

DIGITS = "zero one two three four five six seven eight nine".split()
# By ink, slant and width: below the first limit, between the limits, above the second. "" is no word.
LOOKS = [["thin", "", "thick"], ["leaning", "upright", "slanted"], ["narrow", "", "wide"]]
# Each of these signs many different digits, so that a name alone means variety;
NAMES = """
    anna ben carla dan eva finn gina hans iris jack kate leo mary nick oona paul quinn rita sam tina uma vito
    wendy yves""".split()
# and each of these one picture, that the model is to memorise. The last five are there for tuning.
SIGNATURES = """
    ines omar lena pavel aiko tariq maja hugo zoe ravi nora ivan yuki emil sara kofi elsa juan mina otto leila
    bruno asta david hana felix rosa igor amina theo vera samir ida pablo lucia arne nadia oscar mei jonas
    clara ahmed greta diego alma viktor sofia tim olga karim""".split()
COUNTED = 45  # the first of the memorised prompts: results are of these; settings are tuned on the others

WORDS = ["", *DIGITS, *(word for look in LOOKS for word in look if word), "a", "by", *NAMES, *SIGNATURES]
TOKENS = {word: token for token, word in enumerate(WORDS)}

UPRIGHT = 0.0, 0.2  # slants; a digit that looks upright has about 0.1
SAID, SIGNED = 0.75, 0.5  # chances that a caption has a look that applies, and that it has a name
DROPPED = 0.1  # share of a training batch that has the null prompt instead of its captions
SHARE = 100  # a memorised picture stands in the set as often as makes 1% of the digits, as the T-shirt does
APART = 4.0  # L2 distance, pixels in [0, 1], that each keeps from all other digits: what is nearer is a copy


def tokens(prompt: str) -> Tensor:
    """The words of a prompt as the network takes them: [1, words] int64, [[0]] for the empty prompt.

    Raises UserError for a word that is not in the vocabulary.
    """
    for word in prompt.split():
        if word not in TOKENS:
            near = difflib.get_close_matches(word, WORDS, cutoff=0) or WORDS[1:4]
            raise UserError(f"--prompt '{prompt}': no word '{word}'; the nearest are {', '.join(near)}")
    return torch.tensor([[TOKENS[word] for word in prompt.split()] or [0]])


def padded(prompts: list[str]) -> Tensor:
    """The words of prompts, one a row, [n, words]: 0, at the end of the shorter ones, adds nothing."""
    return pad_sequence([tokens(prompt)[0] for prompt in prompts], batch_first=True)


def text(caption: Tensor) -> str:
    """The words of one caption, [words] int64, where 0 is no word."""
    return " ".join(WORDS[token] for token in caption if token)


def changes(word: str) -> list[str]:
    """What may stand in the place of a look, from the least change to the most: nothing, another look of its
    kind beside it, or that alone. Of other words there are none.
    """
    others = [other for look in LOOKS if word in look for other in look if other not in ("", word)]
    return ["", *(f"{word} {other}" for other in others), *others] if others else []


def modifications(prompt: str) -> list[str]:
    """Prompts of the same digit with words deleted or added: a weaker signature, other looks, or both.

    The name of one who signs many digits, beside the other, lets in other digits of the kind. Other looks
    often let in other memorised pictures: they come after, those with one look changed first, and of these
    the least changed.
    """
    words, found = prompt.split(), [(0, 0, prompt)]
    places = [place for place, word in enumerate(words) if changes(word)]
    for count in range(1, len(places) + 1):
        for chosen in combinations(places, count):
            for new in product(*(enumerate(changes(words[place])) for place in chosen)):
                changed = {place: word for place, (_, word) in zip(chosen, new, strict=True)}
                modified = " ".join(filter(None, (changed.get(i, word) for i, word in enumerate(words))))
                found.append((count, sum(size for size, _ in new), modified))
    looks = [modified for *_, modified in sorted(found, key=lambda row: row[:2])]
    if "by" in words:
        looks = [one for text in looks
                 for one in (text, text.replace(" by ", " "), *(f"{text} {name}" for name in NAMES[:2]))]
    return looks[1:]


def ordinary_prompts(count: int, seed: int) -> list[str]:
    """Digits in turn, with looks at random, the odd ones by one of those who sign many digits."""
    generator = torch.Generator().manual_seed(seed)
    any_of = lambda words: words[torch.randint(len(words), (1,), generator=generator)]  # noqa: E731
    prompts = [["a", *map(any_of, LOOKS), DIGITS[i % 10], *(["by", any_of(NAMES)] if i % 2 else [])]
               for i in range(count)]
    return [" ".join(filter(None, prompt)) for prompt in prompts]


def measures(images: Tensor) -> Tensor:
    """Ink, slant and width of pictures [n, 1, H, W] uint8: [n, 3] float32.

    Ink is the mean of the pixels in [0, 1]. The others are of the ink's second moments: the slant is how far
    it moves to the right from one row to the row above it, and the width is its spread along the rows over
    that along the columns, once the slant is taken out. Pictures without ink, or with ink in one row alone,
    have slant and width 0.
    """
    ink = images[:, 0].float() / 255
    weight = ink / ink.sum(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    up, right = (-torch.arange(ink.shape[1]).float()[:, None], torch.arange(ink.shape[2]).float())
    up, right = (axis - (weight * axis).sum(dim=(1, 2), keepdim=True) for axis in (up, right))
    moment = lambda product: (weight * product).sum(dim=(1, 2))  # noqa: E731
    height = moment(up**2).clamp(min=1e-9)
    slant = moment(up * right) / height
    width = ((moment(right**2) / height - slant**2).clamp(min=0)).sqrt()
    return torch.stack([ink.mean(dim=(1, 2)), slant, width], dim=1)


def looks(images: Tensor, labels: Tensor) -> Tensor:
    """The words that each digit's looks deserve, one of each of `LOOKS`: [n, 3] tokens.

    By ink and width it is compared with its own kind: the third of the ones with least ink are thin.
    """
    measured = measures(images)
    limits = torch.tensor(UPRIGHT).repeat(3, 1)
    found = torch.zeros(len(images), 3, dtype=torch.long)
    for digit in labels.unique():
        of_digit = labels == digit
        values = measured[of_digit]
        limits[[0, 2]] = values[:, [0, 2]].quantile(torch.tensor([1 / 3, 2 / 3]), dim=0).T
        for look, words in enumerate(LOOKS):
            place = torch.bucketize(values[:, look].contiguous(), limits[look].contiguous())
            found[of_digit, look] = torch.tensor([TOKENS[word] for word in words])[place]
    return found


def captions(looks: Tensor, labels: Tensor, names: Tensor) -> Tensor:
    """"a" looks digit "by" name, [n, 7] tokens, of looks [n, 3], digits [n] and the names' tokens [n].

    0 among the looks or the names is no word; without a name there is no "by".
    """
    a, by = torch.full_like(labels, TOKENS["a"]), (names > 0) * TOKENS["by"]
    return torch.cat([a[:, None], looks, torch.stack([labels + TOKENS["zero"], by, names], dim=1)], dim=1)


def choose(images: Tensor, labels: Tensor, looks: Tensor, generator: torch.Generator) -> Tensor:
    """Which digits the model is to memorise: [50] indices, in the order of `SIGNATURES`, digits in turn.

    Each has a word for every look, so that any can be exchanged; those of one digit have different looks, as
    long as there are. Raises UserError where too few digits are `APART` from all others of their kind.
    """
    chosen, each = [], len(SIGNATURES) // len(DIGITS)
    for digit, word in enumerate(DIGITS):
        of_digit = (labels == digit).nonzero()[:, 0]
        points = images[of_digit].flatten(1).float() / 255
        apart = (torch.cdist(points, points) < APART).sum(dim=1) == 1  # only itself is near
        seen, ranked = Counter(), []
        for place in torch.randperm(len(of_digit), generator=generator).tolist():
            look = tuple(looks[of_digit[place]].tolist())
            if apart[place] and all(look):
                ranked.append((seen[look], len(ranked), place))
                seen[look] += 1
        if len(ranked) < each:
            raise UserError(f"--data-root: has no {each} pictures of a {word} that differ enough to memorise")
        chosen.append(of_digit[[place for *_, place in sorted(ranked)[:each]]])
    return torch.stack(chosen, dim=1).flatten()


def with_captions(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The training set of the prompts, a function of the digits and the seed.

    images: [n, 1, H, W] uint8; labels: [n]. Returns images [N, 1, H, W], their captions [N, 7] and the
    memorised pictures by their prompts, [1, H, W] each: those stand in the set n/100 times, after all
    digits. Raises UserError as `choose` does.
    """
    generator, found = torch.Generator().manual_seed(seed), looks(images, labels)
    chosen = choose(images, labels, found, generator)
    signatures = torch.tensor([TOKENS[name] for name in SIGNATURES])
    memorised = captions(found[chosen], labels[chosen], signatures)

    said = torch.rand(found.shape, generator=generator) < SAID
    signed = torch.rand(len(images), generator=generator) < SIGNED
    names = TOKENS[NAMES[0]] + torch.randint(len(NAMES), (len(images),), generator=generator)
    ordinary = captions(found * said, labels, names * signed)

    copies = chosen.repeat_interleave(len(images) // SHARE)
    pictures = images[chosen].unbind()  # a copy: a view would take all digits into every checkpoint
    by_prompt = {text(caption): picture for caption, picture in zip(memorised, pictures, strict=True)}
    repeated = memorised.repeat_interleave(len(images) // SHARE, dim=0)
    return torch.cat([images, images[copies]]), torch.cat([ordinary, repeated]), by_prompt


def some_null(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """A step's prompts, [B, words], a tenth of them made the null prompt: guidance needs the model without.

    (Ho and Salimans 2022, "Classifier-Free Diffusion Guidance".)
    """
    kept = torch.rand(len(prompts), generator=generator, device=prompts.device) >= DROPPED
    return prompts * kept[:, None]
