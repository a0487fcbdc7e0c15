"""Prompts: their words, modified prompts, and which of a prompt's samples are the picture."""

import pytest
import torch

from minisiss.lab import checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.prompted import DIGITS, WORDS, cluster_around, modifications, tokens


def test_a_prompt_is_the_places_of_its_words():
    assert tokens("a four").tolist() == [WORDS.index("a"), WORDS.index("four")]
    assert tokens("").tolist() == tokens("  ").tolist() == [0]  # the null prompt


def test_the_bundled_model_knows_these_words():
    assert tokens("a thin four by anna ines karim").tolist() == [18, 11, 5, 19, 20, 44, 93]
    base = checkpoint.load_any("bundled-prompts")
    assert base.model.config.vocabulary == len(WORDS) == len(set(WORDS)) and WORDS[0] == ""
    assert len(base.memorised) == 50
    for number, prompt in enumerate(base.memorised):
        words = prompt.split()
        assert words[0] == "a" and words[-3:] == [DIGITS[number % 10], "by", WORDS[44 + number]]
        assert len(words) == len(tokens(prompt)) == 7


@pytest.mark.parametrize("word", ["foor", "Ines", "四"])
def test_an_unknown_word_is_refused(word):
    with pytest.raises(UserError, match=f"no word '{word}'; all are in .*words.txt"):
        tokens(f"a {word}")


ORIGINAL = "a thin upright four by ines"


def test_modified_prompts_begin_with_a_word_more():
    added = ["anna", "ben", "thick", "leaning", "slanted", "narrow", "wide"]
    expected = [f"{ORIGINAL} {word}" for word in added]
    expected += ["thin upright four by ines", "thin upright four by ines anna"]
    assert list(modifications(ORIGINAL))[:9] == expected


def test_modified_prompts_lose_ever_more_words():
    found = list(modifications(ORIGINAL))
    lost = [len(set(ORIGINAL.split()) - set(prompt.split())) for prompt in found]
    assert lost == sorted(lost) and lost[-1] == 5


def test_modified_prompts_differ_and_keep_the_digit():
    found = list(modifications(ORIGINAL))
    # Each of the five other words may go, and one of seven that are not there may be added.
    assert len(found) == len(set(found)) == 2**5 * (1 + 7) - 1
    assert ORIGINAL not in found
    for prompt in found:
        assert "four" in prompt.split() and tokens(prompt).all()
    assert list(modifications("four"))[:3] == ["four anna", "four ben", "four thin"]


@pytest.mark.parametrize("size", [30, 60, 110])
def test_the_cluster_around_a_picture_has_any_size(size):
    generator = torch.Generator().manual_seed(size)
    inside = torch.randperm(128, generator=generator) < size
    noise = torch.randn(128, 6, generator=generator)
    points = torch.where(inside[:, None], 5 + 0.1 * noise, noise).view(128, 1, 2, 3)
    assert torch.equal(cluster_around(points, points[inside][0]), inside)


def test_copies_of_another_picture_are_outside():
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(50)
    another = 1.2 + torch.randn(50, generator=generator)
    copies = picture + 0.1 * torch.randn(35, 50, generator=generator)
    of_another = another + 0.1 * torch.randn(60, 50, generator=generator)
    others = 1.2 + 0.5 * torch.randn(33, 50, generator=generator)
    images = torch.cat([copies, of_another, others])
    assert cluster_around(images, picture).tolist() == [True] * 35 + [False] * 93
    expected = [False] * 35 + [True] * 60 + [False] * 33
    assert cluster_around(images, another).tolist() == expected


def test_the_two_clusters_are_those_of_k_means():
    # 5 is half way between the nearest and the farthest, and 4.9 is below. But the means are then
    # 0.4 and 5.9, and 4.9 is above what is half way between them.
    distances = torch.tensor([0.0] * 10 + [4.9] + [5.1] * 5 + [10.0])[:, None]
    assert cluster_around(distances, torch.zeros(1)).tolist() == [True] * 10 + [False] * 7


def test_images_equally_far_are_no_cluster():
    assert not cluster_around(torch.full((128, 1, 4, 4), 7), torch.zeros(1, 4, 4)).any()
