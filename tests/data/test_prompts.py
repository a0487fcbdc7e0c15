"""Captions of pictures that can be measured by hand, and the set that is made of them."""

from argparse import Namespace

import pytest
import torch

from minisiss.data import prompts
from minisiss.data.digits import bundled_digits, labelled_digits
from minisiss.data.prompts import (
    COUNTED,
    LOOKS,
    NAMES,
    SIGNATURES,
    TOKENS,
    WORDS,
    captions,
    choose,
    looks,
    measures,
    some_null,
    text,
    tokens,
    with_captions,
)
from minisiss.data.training_set import load_training_set, training_set
from minisiss.errors import UserError
from minisiss.presets import PRESETS


def drawing(*rows: str) -> torch.Tensor:
    """[1, H, W] uint8: a # is full ink, a + a fifth of it."""
    ink = {"#": 255, "+": 51, " ": 0}
    return torch.tensor([[[ink[pixel] for pixel in row] for row in rows]], dtype=torch.uint8)


# Ink, slant and width by hand. The bar's rows are at −1, 0 and 1 and all ink at one column.
BAR = drawing(" #  ", " #  ", " #  ")
# One column to the right from each row to the one above: slant 1, and nothing is left of the width without it.
SLASH = drawing("  # ", " #  ", "#   ")
BACKSLASH = drawing("#   ", " #  ", "  # ")
# 2 × 4 pixels of ink: spread 5/4 along the rows, 1/4 along the columns.
BLOCK = drawing("    ", "####", "####")
# As the bar, but most of its ink is in the middle row: moments are weighed by ink.
FAINT = drawing("+  +", "#  #", "+  +")


@pytest.mark.parametrize("picture, ink, slant, width", [
    (BAR, 3 / 12, 0, 0),
    (SLASH, 3 / 12, 1, 0),
    (BACKSLASH, 3 / 12, -1, 0),
    (BLOCK, 8 / 12, 0, 5**0.5),
    (FAINT, 2.8 / 12, 0, (1.5**2 / (2 * 0.4 / 2.8)) ** 0.5),
    (drawing("    ", "    ", "    "), 0, 0, 0),
])  # fmt: skip
def test_ink_slant_and_width_by_hand(picture, ink, slant, width):
    # Beside other pictures, which must not matter; and moved, which must not matter either.
    both = torch.stack([SLASH, picture, picture.roll(1, dims=-1) if picture is BAR else picture])
    expected = torch.tensor([ink, slant, width], dtype=torch.float32)
    torch.testing.assert_close(measures(both)[1:], expected.expand(2, -1), atol=1e-3, rtol=1e-5)


def test_looks_are_thirds_of_a_digits_own_kind_but_for_the_slant():
    # Three ones and three sevens, with 2, 3 and 4 rows of ink: a thin seven has more ink than a thick one.
    ones = [drawing(*[" #  "] * rows, *["    "] * (4 - rows)) for rows in (2, 3, 4)]
    sevens = [drawing(*["####"] * rows, *["    "] * (4 - rows)) for rows in (2, 3, 4)]
    found = looks(torch.stack([*ones, *sevens]), torch.tensor([1, 1, 1, 7, 7, 7]))
    words = [[WORDS[token] for token in row] for row in found.tolist()]
    # They are upright, with slant 0. As wide as each other are the ones; the sevens are the narrower, the taller.
    assert [row[0] for row in words] == ["thin", "", "thick"] * 2
    assert [row[2] for row in words][3:] == ["wide", "", "narrow"]
    slants = looks(torch.stack([SLASH, BAR, BACKSLASH]), torch.tensor([1, 1, 1]))[:, 1]
    assert [WORDS[token] for token in slants] == ["slanted", "leaning", "leaning"]  # 0 itself is the limit


def test_a_caption_is_looks_digit_and_name_and_says_no_by_without_a_name():
    thin, slanted, wide = (TOKENS[word] for word in ("thin", "slanted", "wide"))
    found = captions(torch.tensor([[thin, slanted, wide], [0, slanted, 0]]), torch.tensor([4, 0]), torch.tensor([TOKENS["ines"], 0]))
    assert [text(row) for row in found] == ["a thin slanted wide four by ines", "a slanted zero"]
    assert found.shape == (2, 7)


def test_the_vocabulary_is_of_at_most_128_different_words_and_the_presets_network_has_all():
    assert len(set(WORDS)) == len(WORDS) == len(TOKENS) == PRESETS["prompts"]["unet"]["vocabulary"] <= 128
    assert WORDS[0] == "" and len(SIGNATURES) == 50 and COUNTED == 45


def test_a_prompt_is_its_words_in_any_order_and_the_empty_one_is_the_null_word():
    assert tokens("a four by ines").tolist() == [[TOKENS[word] for word in ("a", "four", "by", "ines")]]
    assert tokens("").tolist() == tokens("  ").tolist() == [[0]]
    assert text(tokens("by ines a four")[0]) == "by ines a four"


@pytest.mark.parametrize("word, near", [("foor", "four"), ("inez", "ines"), ("Ines", "ines"), ("thik", "thick"), ("四", "")])
def test_a_word_that_is_not_in_the_vocabulary_is_refused_with_the_nearest(word, near):
    with pytest.raises(UserError, match=f"no word '{word}'; the nearest are .*{near}"):
        tokens(f"a {word}")


@pytest.fixture(scope="module")
def bundled():
    images, labels = labelled_digits("bundled")
    return images, labels, with_captions(images, labels, seed=0)


def test_every_digit_is_there_once_with_its_own_words_and_fifty_more_often(bundled):
    images, labels, (everything, captioned, memorised) = bundled
    assert torch.equal(everything[:10_000], images) and torch.equal(everything[:10_000], bundled_digits())
    assert len(everything) == len(captioned) == 10_000 + 50 * 100
    assert torch.equal(captioned[:10_000, 4], labels + TOKENS["zero"])
    pictures = torch.stack([*memorised.values()])
    assert torch.equal(everything[10_000:], pictures.repeat_interleave(100, dim=0))
    assert [text(row) for row in captioned[10_000::100]] == [*memorised] == [text(row) for row in captioned[10_099::100]]


def test_memorised_captions_say_every_look_and_have_a_name_to_themselves(bundled):
    _, _, (_, captioned, memorised) = bundled
    said = [prompt.split() for prompt in memorised]
    assert [words[-1] for words in said] == SIGNATURES
    assert all(len(words) == 7 and words[0] == "a" and words[5] == "by" for words in said)
    assert [words[4] for words in said] == prompts.DIGITS * 5
    for look, place in zip(LOOKS, (1, 2, 3), strict=True):
        assert {words[place] for words in said} == {word for word in look if word}
    signatures = torch.tensor([TOKENS[name] for name in SIGNATURES])
    assert not torch.isin(captioned[:10_000], signatures).any()


def test_ordinary_captions_say_true_looks_most_of_the_time_and_every_name_signs_many_digits(bundled):
    images, labels, (_, captioned, _) = bundled
    ordinary, true = captioned[:10_000], looks(images, labels)
    said = ordinary[:, 1:4]
    assert (said[said > 0] == true[said > 0]).all()
    assert (said > 0).sum() / (true > 0).sum() == pytest.approx(0.75, abs=0.02)
    assert (ordinary[:, 6] > 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert ((ordinary[:, 5] > 0) == (ordinary[:, 6] > 0)).all()
    for name in NAMES:
        assert len(labels[ordinary[:, 6] == TOKENS[name]].unique()) == 10
        assert (ordinary[:, 6] == TOKENS[name]).sum() > 100


def test_what_is_memorised_is_apart_from_all_others(bundled):
    images, _, (_, _, memorised) = bundled
    distance = torch.cdist(torch.stack([*memorised.values()]).flatten(1).float() / 255, images.flatten(1).float() / 255)
    nearest = distance.sort(dim=1)[0]
    assert (nearest[:, 0] < 0.1).all() and (nearest[:, 1] >= prompts.APART).all()


def test_captions_are_a_function_of_the_digits_and_the_seed(bundled):
    images, labels, found = bundled
    again, other = with_captions(images, labels, seed=0), with_captions(images, labels, seed=1)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1]) and list(found[2]) == list(again[2])
    assert not torch.equal(found[1], other[1]) and not torch.equal(found[0], other[0])


def test_too_few_different_digits_are_one_line():
    images, labels = bundled_digits()[::500].repeat(10, 1, 1, 1), (torch.arange(10_000) // 1000)[::500].repeat(10)
    with pytest.raises(UserError, match="--data-root: has no 5 pictures of a zero"):
        choose(images, labels, looks(images, labels), torch.Generator().manual_seed(0))


def test_a_tenth_of_the_prompts_of_a_step_are_the_null_prompt_as_a_whole():
    captioned = torch.ones(10_000, 7, dtype=torch.long)
    found = some_null(captioned, torch.Generator().manual_seed(0))
    words = found.sum(dim=1)
    assert set(words.tolist()) == {0, 7}
    assert (words == 0).float().mean() == pytest.approx(0.1, abs=0.01)


def test_the_training_set_has_nothing_to_forget_and_a_listing_with_its_captions():
    data = training_set("prompts", "bundled", [], (1, 28, 28), seed=3)
    assert (data.n, data.k) == (15_000, 0) and len(data.memorised) == 50
    other = training_set("prompts", "bundled", [], (1, 28, 28), seed=4)
    assert data.listing().keys() == {"digits", "T-shirts", "captions"}
    assert data.listing()["captions"] != other.listing()["captions"]
    assert "captions" not in training_set("mnist", "bundled", [], (1, 28, 28)).listing()


def test_prompts_of_a_step_are_those_of_its_images():
    args = Namespace(data="prompts", data_root="bundled", forget=[], skip_unreadable=False, seed=0)
    data = load_training_set(args, (1, 28, 28), torch.device("cpu"))
    indices = torch.tensor([3, 14_999, 5_000])
    for seed in range(20):
        found = data.prompts(indices, torch.Generator().manual_seed(seed))
        assert all(torch.equal(row, data.captions[i]) or not row.any() for row, i in zip(found, indices, strict=True))
    assert training_set("mnist", "bundled", [], (1, 28, 28)).prompts(indices, torch.Generator()) is None
