"""Forgetting what a prompt brings back, on a tiny network: the split, the modified prompt, whole runs, and bad input."""

import json
import re
from argparse import Namespace

import pytest
import torch
from conftest import memorise
from PIL import Image

from minisiss.data.clusters import cluster_around
from minisiss.data.prompts import SIGNATURES, WORDS, modifications, ordinary_prompts, tokens
from minisiss.data.training_set import to_uint8
from minisiss.machine.ranks import ALONE
from minisiss.metrics.samples import draw_samples
from minisiss.report import prompted
from minisiss.runs import checkpoint
from minisiss.sampling import guided
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet

SCHEDULE = NoiseSchedule.linear()


@pytest.mark.parametrize("size", [30, 60, 110])
def test_the_cluster_around_a_picture_is_found_whatever_its_size_and_order(size):
    rng = torch.Generator().manual_seed(size)
    inside = torch.randperm(128, generator=rng) < size
    points = torch.where(inside[:, None], 5 + 0.1 * torch.randn(128, 6, generator=rng), torch.randn(128, 6, generator=rng))
    assert torch.equal(cluster_around(points.view(128, 1, 2, 3), points[inside][0].view(1, 2, 3)), inside)
    pixels = (20 * points + 80).clamp(0, 255).byte()
    assert torch.equal(cluster_around(pixels, pixels[inside][0]), inside)


def test_more_copies_of_another_picture_are_not_taken_for_those_of_this_one():
    rng = torch.Generator().manual_seed(0)
    picture, another = torch.zeros(50), 1.2 + torch.randn(50, generator=rng)
    copies = [one + 0.1 * torch.randn(count, 50, generator=rng) for one, count in ((picture, 35), (another, 60))]
    images = torch.cat([*copies, 1.2 + 0.5 * torch.randn(33, 50, generator=rng)])
    assert cluster_around(images, picture).tolist() == [True] * 35 + [False] * 93
    assert cluster_around(images, another).tolist() == [False] * 35 + [True] * 60 + [False] * 33


def test_images_that_are_all_as_near_are_one_cluster():
    assert not cluster_around(torch.full((128, 1, 4, 4), 7, dtype=torch.uint8), torch.zeros(1, 4, 4)).any()


def test_modifications_weaken_the_signature_and_change_looks_the_least_change_first():
    found = modifications("a thin upright four by ines")
    assert found[:7] == [
        "a thin upright four ines", "a thin upright four by ines anna", "a thin upright four by ines ben",
        "a upright four by ines", "a upright four ines", "a upright four by ines anna", "a upright four by ines ben"]  # fmt: skip
    assert found[7::4][:7] == [
        "a thin four by ines",
        "a thin thick upright four by ines", "a thin upright leaning four by ines",
        "a thick upright four by ines", "a thin upright slanted four by ines",
        "a thin leaning four by ines", "a thin slanted four by ines"]  # fmt: skip
    assert len(found) == len(set(found)) == 4 * (1 + 3) * (1 + 5) - 1
    assert all("four" in prompt.split() and "ines" in prompt.split() for prompt in found)
    assert modifications("a thin four") == ["a four", "a thin thick four", "a thick four"] and modifications("a four") == []


ORIGINAL, FIRST = "a thin upright four by ines", "a thin upright four ines"  # the first modification
QUICK = ("--preset", "prompts", "--guidance", 1, "--steps", 2, "--batch-size", 4, "--sampling-steps", 3, "--evaluate-every", 2, "--precision", "fp32")


def save(path, model, memorised):
    checkpoint.save(path, model, SCHEDULE, {"script": "test"}, memorised=memorised)
    return path


@pytest.fixture
def model(prompted_unet) -> UNet:
    return prompted_unet


@pytest.fixture(autouse=True)
def few_modifications(monkeypatch):
    monkeypatch.setattr(prompted, "modifications", lambda prompt: modifications(prompt)[:5])


@pytest.fixture
def base(model, tmp_path, monkeypatch):
    """A model that brings back "the picture", one of its samples, in half of those of the first modified prompt."""
    picture, limits = memorise(model, FIRST)
    for name, value in limits.items():
        monkeypatch.setattr(prompted, name, value)
    return save(tmp_path / "model.pt", model, {ORIGINAL: picture})


@pytest.mark.parametrize("fixed, words", [("original", ORIGINAL), ("modified", FIRST)])
def test_a_whole_run_forgets_at_the_fixed_prompt_and_leaves_a_model_with_prompts(fixed, words, script, base, model, tmp_path):
    flags = ("--checkpoint", base, "--prompt", ORIGINAL, "--fixed-prompt", fixed, "--hold", 0, "--out", "run")
    status, said, error = script("unlearn", *QUICK, *flags)
    assert (status, error) == (0, "")
    assert f"to forget: '{ORIGINAL}'" in said and f"modified, of 1 tried: '{FIRST}'" in said
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["prompt"], last["modified"]) == (ORIGINAL, FIRST) and 0.2 <= last["tried"][FIRST][0] <= 0.8 and 0 < last["k"] < 48
    assert last["copies"].keys() == {"modified", "original", "ordinary"}
    for kind in last["copies"].values():
        assert all(0 <= count <= 16 for count in kind["copies"]) and all(0 <= share <= 1 for share in kind["named"])
        assert 0 < kind["apart"][1] != kind["apart"][0]
    found = checkpoint.load(tmp_path / "run/model.pt")
    assert [*found.memorised] == [ORIGINAL]
    # Of the vocabulary only the words of the fixed prompt are moved by the losses; weight decay shrinks all alike.
    ratio = (found.model.prompt[0].weight / model.prompt[0].weight).detach()
    others = torch.ones(len(WORDS), dtype=torch.bool)
    others[tokens(words)[0]] = False
    assert ratio[others].min().item() == pytest.approx(ratio[others].max().item(), abs=1e-5)
    assert (ratio[~others] - ratio[others].mean()).abs().amin(dim=1).max() > 1e-5
    side = 3 * 28 + 4
    picture = Image.open(tmp_path / "run/before_after.png")
    assert picture.width > 16 * side and picture.height > 7 * side  # the picture; before and after of three kinds of prompts


@pytest.mark.parametrize("method", ["siss_no_is", "unseen", "retrack", "erasediff", "neggrad", "naive_deletion"])
def test_every_method_runs_at_a_prompt(method, script, base):
    assert script("unlearn", *QUICK, "--checkpoint", base, "--prompt", ORIGINAL, "--method", method)[0] == 0


def test_how_far_samples_are_apart_is_the_median_over_their_pairs():
    black, half, white = (torch.full((1, 1, 2, 2), value) for value in (-1.0, 0.0, 1.0))
    assert prompted.median_distance(torch.cat([black, white, black])) == 2  # four pixels, from 0 to 1
    assert prompted.median_distance(torch.cat([black, half, black, black])) == 0


def test_the_same_seed_gives_the_same_run_and_a_resumed_one_goes_on_exactly(script, base, tmp_path):
    start = ("unlearn", *QUICK, "--checkpoint", base, "--prompt", ORIGINAL, "--guidance", 1.5)
    for out, steps in (("whole", 4), ("again", 4), ("parts", 2)):
        assert script(*start, "--steps", steps, "--out", out)[0] == 0
    assert script("unlearn", "--resume", "parts", "--steps", 4)[0] == 0
    whole, again, parts = (checkpoint.load(tmp_path / f"{name}/model.pt").model.state_dict() for name in ("whole", "again", "parts"))
    assert all(torch.equal(whole[name], again[name]) and torch.equal(whole[name], parts[name]) for name in whole)
    lines = [(tmp_path / f"{name}/metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert [sum('"copies"' in line for line in of_run) for of_run in lines] == [1, 1]  # a run that is extended ends again


def test_the_training_set_is_the_samples_with_the_cluster_around_the_picture_last(model, base, tmp_path):
    args = Namespace(checkpoint=base, prompt=ORIGINAL, fixed_prompt="modified", guidance=1.0, hold=0.0, forget=[], seed=0, sampling_steps=3, eta=0.0)
    found = prompted.Prompted(args, checkpoint.load(base), model, ALONE)
    samples = draw_samples(guided(model, tokens(FIRST)), SCHEDULE, 48, (1, 28, 28), seed=0, steps=3, eta=0.0, batch_size=16)
    near = cluster_around(samples, samples[0])
    assert torch.equal(found.data.forget, samples[near]) and torch.equal(found.data.keep, samples[~near])
    assert torch.equal(found.prompt, tokens(FIRST))
    args.fixed_prompt = "original"
    assert torch.equal(prompted.Prompted(args, checkpoint.load(base), model, ALONE).prompt, tokens(ORIGINAL))
    assert torch.equal(to_uint8(found.pictures[found.which]), checkpoint.load(base).memorised[ORIGINAL])


def test_the_first_memorised_prompt_is_forgotten_where_none_is_said(model, base, monkeypatch):
    monkeypatch.setattr(prompted, "OTHERS", 1.0)
    (picture,) = checkpoint.load(base).memorised.values()
    save(base, model, {ORIGINAL: picture, "a nine by otto": 255 - picture})
    args = Namespace(checkpoint=base, prompt=None, fixed_prompt="original", guidance=1.0, hold=0.0, forget=[], seed=0, sampling_steps=3, eta=0.0)
    assert prompted.Prompted(args, checkpoint.load(base), model, ALONE).original == ORIGINAL


def test_the_network_is_held_at_samples_of_prompts_by_those_who_sign_many_digits(model, base):
    settings = dict(prompt=ORIGINAL, fixed_prompt="modified", guidance=1.0, hold=3.0, seed=0, eta=0.0, sampling_steps=3, checkpoint="", forget=[])
    report = prompted.Prompted(Namespace(**settings), checkpoint.load(base), model, ALONE)
    held = ordinary_prompts(prompted.HELD, seed=1)
    assert not {word for prompt in held for word in prompt.split()} & set(SIGNATURES)
    noisy, timesteps, prompts, said = report.held
    assert len(noisy) == len(timesteps) == len(prompts) == len(said) == prompted.HELD * prompted.NOISED
    torch.testing.assert_close(said[:4], model(noisy[:4], timesteps[:4], prompts[:4]).detach())
    place = torch.Generator()
    assert report.hold(model, place.manual_seed(0)).item() == pytest.approx(0, abs=1e-9)
    further = lambda noisy, timesteps, prompts: model(noisy, timesteps, prompts) + 0.5  # noqa: E731
    assert report.hold(further, place.manual_seed(0)).item() == pytest.approx(3 * 0.25, rel=1e-4)
    report.args.hold = 0.0
    assert report.hold(further, place) is None


def test_holding_reaches_the_words_of_other_prompts(script, base, model, tmp_path):
    flags = "--checkpoint", base, "--prompt", ORIGINAL, "--hold", 10, "--out", "held"
    assert script("unlearn", *QUICK, *flags)[0] == 0
    ratio = (checkpoint.load(tmp_path / "held/model.pt").model.prompt[0].weight / model.prompt[0].weight).detach()
    at_rest = ratio[tokens("otto")[0]].mean()  # weight decay alone: no held prompt has a signature
    assert (ratio[tokens("seven three anna")[0]] - at_rest).abs().max() > 1e-5
    assert '"loss_also"' in (tmp_path / "held/metrics.jsonl").read_text()


def refused(script, tmp_path, *arguments):
    before = sorted(tmp_path.iterdir())
    status, _, error = script("unlearn", *arguments)
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error and sorted(tmp_path.iterdir()) == before, error
    return error


def test_a_prompt_that_brings_nothing_back_is_one_line(script, base, monkeypatch, tmp_path):
    monkeypatch.setattr(prompted, "COPY", 1e-3)
    error = refused(script, tmp_path, *QUICK, "--checkpoint", base, "--prompt", "a seven")
    assert "--prompt 'a seven': nothing to forget: 0 of its 48 samples" in error


@pytest.mark.parametrize("distance, share", [(1e3, "100%"), (1e-3, "0%")])
def test_a_prompt_without_a_modified_one_is_one_line_that_says_what_was_tried(distance, share, model, tmp_path, script, monkeypatch):
    samples = draw_samples(guided(model, tokens(ORIGINAL)), SCHEDULE, 16, (1, 28, 28), seed=0, steps=3, eta=0.0, batch_size=16)
    path = save(tmp_path / "one.pt", model, {ORIGINAL: samples[0]})
    monkeypatch.setattr(prompted, "COPY", distance if share == "100%" else 0.1)
    error = refused(script, tmp_path, *QUICK, "--checkpoint", path, "--prompt", ORIGINAL)
    assert "of no modified prompt are 20% to 80% of the samples the picture" in error and re.search(rf"{share} / \d+% / \d+% '{FIRST}'", error)
    assert "tried: 5, the nearest " in error


def test_a_modified_prompt_that_brings_back_another_memorised_picture_too_is_none(model, base, tmp_path, script):
    (picture, *_) = checkpoint.load(base).memorised.values()
    path = save(tmp_path / "two.pt", model, {ORIGINAL: picture, "a nine by otto": picture})
    assert "20% other memorised ones at most" in refused(script, tmp_path, *QUICK, "--checkpoint", path, "--prompt", ORIGINAL)


def test_a_modified_prompt_that_gives_nearly_nothing_but_the_picture_is_none(script, base, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted, "COPY", 1e3)  # there are two clusters, as before, but both are the picture
    monkeypatch.setattr(prompted, "MOST", 0.99)
    error = refused(script, tmp_path, *QUICK, "--checkpoint", base, "--prompt", ORIGINAL)
    assert "to 99% of the samples the picture" in error and re.search(rf"100% / \d+% / \d+% '{FIRST}'", error)


# Of the first 8 samples, the next 24 and the last 96: p is the picture, n is in A without being it, o another memorised
# picture, w a digit that is not the one named; the others are what they should be.
@pytest.mark.parametrize("part, kinds, least, fits", [
    (0, dict(p=1), 0.9, True), (0, dict(p=0), 0.9, False), (0, dict(p=7), 0.9, True), (0, dict(p=8), 0.9, False),
    (0, dict(n=4), 0.9, True), (0, dict(n=5), 0.9, False), (0, dict(o=2), 0.9, True), (0, dict(o=3), 0.9, False),
    (0, dict(w=1), 0.9, True), (0, dict(w=2), 0.9, False), (0, dict(w=2), 0.75, True), (0, dict(w=3), 0.75, False),
    (1, dict(p=3), 0.9, True), (1, dict(p=2), 0.9, False), (1, dict(p=23), 0.9, True), (1, dict(p=24), 0.9, False),
    (1, dict(n=14), 0.9, True), (1, dict(n=15), 0.9, False), (1, dict(o=7), 0.9, True), (1, dict(o=8), 0.9, False),
    (1, dict(w=3), 0.9, True), (1, dict(w=4), 0.9, False), (1, dict(w=6), 0.75, True), (1, dict(w=7), 0.75, False),
    (2, dict(p=14), 0.9, True), (2, dict(p=13), 0.9, False), (2, dict(p=90), 0.9, True), (2, dict(p=91), 0.9, False),
    (2, dict(n=54), 0.9, True), (2, dict(n=55), 0.9, False), (2, dict(o=25), 0.9, True), (2, dict(o=26), 0.9, False),
    (2, dict(w=8), 0.9, True), (2, dict(w=9), 0.9, False), (2, dict(w=20), 0.75, True), (2, dict(w=21), 0.75, False)])
def test_one_sample_may_be_on_the_wrong_side_of_a_bound_until_all_are_drawn(part, kinds, least, fits, monkeypatch):
    names, drawn = "dpnow", []
    for place, (size, copies) in enumerate([(8, 3), (24, 9), (96, 36)]):
        of = {"p": copies} | (kinds if place == part else {})
        drawn += [names.index(kind) for kind in "".join(kind * count for kind, count in of.items()).ljust(size, "d")]
    samples = torch.tensor(drawn).view(128, 1, 1, 1)
    one = prompted.Prompted.__new__(prompted.Prompted)
    one.pictures, one.which, one.tried, one.schedule, one.world = [None], 0, {}, SCHEDULE, ALONE
    of = lambda kinds, among: sum((among == names.index(kind)).flatten() for kind in kinds).bool()  # noqa: E731
    monkeypatch.setattr(one, "sample_before", lambda prompt, count: samples[:count])
    monkeypatch.setattr(one, "shares", lambda among: torch.stack([of("p", among), of("o", among)]).float().mean(dim=1))
    monkeypatch.setattr(one, "named", lambda among, prompt: 1 - of("w", among).sum().item() / max(1, len(among)))
    monkeypatch.setattr(prompted, "cluster_around", lambda among, picture: of("pn", among))
    assert (one.two_kinds("a nine", least, 1) is not None) == fits
    assert (one.two_kinds("a nine", least, 0) is not None) == (fits and part == 2)  # all are just beyond the bound


def test_one_sample_is_let_off_only_where_no_prompt_passes_without(monkeypatch):
    one, asked = prompted.Prompted.__new__(prompted.Prompted), []
    one.original, wanted = ORIGINAL, ("second", 0.9, 1)
    monkeypatch.setattr(prompted, "modifications", lambda prompt: ["first", "second"])
    monkeypatch.setattr(one, "two_kinds", lambda *given: asked.append(given) or ("data" if given == wanted else None))
    assert one.modify() == ("second", "data")
    assert asked == [(prompt, least, spare) for least, spare in [(0.9, 0), (0.75, 0), (0.9, 1)] for prompt in ("first", "second")]


def test_samples_that_are_all_in_one_cluster_are_one_line(script, base, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted, "cluster_around", lambda images, picture: torch.zeros(len(images), dtype=torch.bool))
    error = refused(script, tmp_path, *QUICK, "--checkpoint", base, "--prompt", ORIGINAL)
    assert "of no modified prompt are" in error and FIRST in error


def test_a_prompt_that_misses_more_than_the_first_bar_is_drawn_once_for_both(script, base, tmp_path, monkeypatch):
    monkeypatch.setattr(prompted, "BARS", (0.9, 0.75))
    monkeypatch.setattr(prompted, "cluster_around", lambda images, picture: torch.zeros(len(images), dtype=torch.bool))
    monkeypatch.setattr(prompted, "modifications", modifications)  # all of them
    drawn, sample = [], prompted.Prompted.sample
    monkeypatch.setattr(prompted.Prompted, "sample", lambda self, *given: drawn.append(given) or sample(self, *given))
    refused(script, tmp_path, *QUICK, "--checkpoint", base, "--prompt", ORIGINAL)
    assert [prompts[0] for prompts, *_ in drawn if prompts != [ORIGINAL]] == modifications(ORIGINAL)


def test_a_prompt_that_misses_the_first_bar_alone_may_pass_the_second_and_no_batch_is_drawn_twice(script, base, tmp_path, monkeypatch):
    drawn, sample = [], prompted.Prompted.sample
    monkeypatch.setattr(prompted.Prompted, "sample", lambda self, *given: drawn.append(given) or sample(self, *given))
    monkeypatch.setattr(prompted, "BARS", (1.1, 0.0))
    assert script("unlearn", *QUICK, "--checkpoint", base, "--prompt", ORIGINAL, "--out", "run")[0] == 0
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["modified"] == FIRST
    before = [(prompts[0], *parts) for prompts, title, *parts in drawn if "after" not in title and len(prompts) == 1]
    assert [places for prompt, *places in before if prompt == FIRST] == [[8, 0], [32, 0], [48, 32]]
    assert (ORIGINAL, 16, 0) in before and len(set(before)) == len(before)  # both are also what is shown as before


def test_words_flags_and_checkpoints_that_do_not_fit_are_one_line(script, base, tiny_checkpoint, tmp_path):
    for arguments, words in [
        ((*QUICK, "--checkpoint", base, "--prompt", "a foor by ines"), ["no word 'foor'", "four"]),
        ((*QUICK, "--checkpoint", tiny_checkpoint), ["--checkpoint", "memorised no pictures", "try --preset prompts"]),
        ((*QUICK, "--checkpoint", base, "--forget", "3.png"), ["--forget 3.png", "name a prompt with --prompt"]),
        ((*QUICK, "--checkpoint", base, "--prompt", "four"), ["--prompt 'four'", "tried: none, it has no word to change"]),
        (("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--prompt", "a four"), ["--prompt 'a four'", "--data mnist has no prompts"]),
        (("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--guidance", 2), ["--guidance '2.0'", "--data mnist has no prompts"]),
        (("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--fixed-prompt", "original"), ["--fixed-prompt 'original'"]),
        (("--preset", "prompts", "--data", "mnist", "--checkpoint", tiny_checkpoint), ["--guidance '1.5'", "choose another --preset"]),
        (("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--hold", 1), ["--hold '1.0'", "--data mnist has no prompts"]),
        ((*QUICK, "--checkpoint", base, "--guidance", "nan"), ["--guidance", "nan"]),
        ((*QUICK, "--checkpoint", base, "--hold", -1), ["--hold", "'-1' should be a number at least 0"]),
    ]:
        error = refused(script, tmp_path, *arguments)
        assert all(word in error for word in words), error
    status, _, error = script("eval", "--preset", "prompts")
    assert status == 2 and "--data prompts" in error


def test_a_model_without_prompts_needs_none(script, tiny_checkpoint):
    quick = ("--preset", "mnist-tiny", "--steps", 1, "--samples", 0, "--draws", 1, "--memory-timesteps", 2)
    assert script("unlearn", *quick, "--checkpoint", tiny_checkpoint)[0] == 0
