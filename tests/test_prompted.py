"""Forgetting what a prompt brings back: a whole run on a small network, and what is refused."""

import json
from argparse import Namespace

import pytest
import torch
from conftest import TINY, randomise
from PIL import Image

from minisiss.lab import checkpoint, metrics
from minisiss.lab.data import to_float
from minisiss.lab.prompted import WORDS, Prompted, cluster_around, tokens
from minisiss.sampling import guided
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule.linear()
PROMPT = "a thin one by ines"
BLACK, WHITE = torch.zeros(1, 28, 28).byte(), torch.full((1, 28, 28), 255).byte()
NOISY = (torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)) * 255).byte()
QUICK = ("--preset", "prompts", "--precision", "fp32", "--sampling-steps", 1, "--seed", 6)


@pytest.fixture
def model():
    """A network with prompts that samples black pictures with some white pixels.

    One step of sampling makes each pixel black or white. The bias is such that half of the samples
    have nine white pixels or more: too many for a copy. The classifier sees a one in all of them.
    """
    network = randomise(UNet(UNetConfig(**TINY, vocabulary=len(WORDS))), seed=1)
    network.conv_out.bias.data.fill_(2.417)
    return network


@pytest.fixture
def forget(script, model, tmp_path):
    """Run unlearn.py where pictures are memorised: forget({prompt: picture}, "--steps", 3)."""

    def run(memorised, *arguments):
        base = checkpoint.Checkpoint(model, SCHEDULE, {}, memorised)
        checkpoint.save(tmp_path / "model.pt", base)
        return script("unlearn", *QUICK, "--checkpoint", "model.pt", *arguments)

    return run


def test_a_whole_run_steps_at_a_modified_prompt(forget, model, tmp_path):
    memorised = {"a nine by otto": WHITE, PROMPT: BLACK}
    steps = ("--steps", 3, "--batch-size", 8, "--lr", 1e-2, "--out", "run")
    status, said, error = forget(memorised, "--prompt", PROMPT, *steps)
    assert (status, error) == (0, "")
    modified = f"{PROMPT} anna"  # the first modification

    def samples_of(network):
        at_prompt = guided(network, tokens(modified)[None], 1.5)  # the preset's guidance
        places = list(range(128))
        return metrics.draw_samples(at_prompt, SCHEDULE, places, (1, 28, 28), seed=6, steps=1)

    def copies_of(samples):
        return metrics.is_copy(samples, to_float(BLACK), 3.0)[:16].sum().item()

    samples = samples_of(model)
    near = cluster_around(samples, to_float(BLACK)).sum()
    assert f"forgetting '{PROMPT}' at '{modified}'; A has {near} of 128 samples" in said

    results = json.loads((tmp_path / "run/results.json").read_text())
    found = checkpoint.load(tmp_path / "run/model.pt")
    shares = []
    for when, network in (("before", model), ("after", found.model)):
        figures = results[when]
        shares.append(copies_of(samples_of(network)) / 16)
        assert figures["modified: copies"] == shares[-1]
        assert figures["other memorised pictures given"] == 0  # the picture itself is none of them
        assert {"original: copies", "original: its digit"} < figures.keys()
    assert 0 < shares[0] < 1 and shares[0] != shares[1]
    assert results["before"]["modified: its digit"] == 1  # all look like a one

    with Image.open(tmp_path / "run/before_after.png") as picture:
        assert picture.width > 5 * 84 and picture.height > 5 * 84  # images of 84 pixels
    assert list(found.memorised) == list(memorised)
    ratio = (found.model.prompt[0].weight / model.prompt[0].weight).detach()
    others = torch.ones(len(WORDS), dtype=torch.bool)
    others[tokens(modified)] = False
    decay = ratio[others].mean()  # what AdamW does without a gradient
    assert torch.allclose(ratio[others], decay, atol=1e-5)
    assert (ratio[~others] - decay).abs().amax(dim=1).min() > 1e-3


SHORT = "one ines"  # it has few modifications
DOTTED = BLACK.clone()
DOTTED[0, 14, 14] = 255
NONE = "no modified prompt has both kinds of samples"
# What is memorised, the prompt that is typed, the network's bias, and words of the error.
REFUSED = {
    "no sample is it": ({PROMPT: NOISY}, "", 2.417, "gives nothing to forget"),
    "all samples are it": ({SHORT: BLACK}, "", 1e3, NONE),
    "another picture too": ({SHORT: BLACK, "nine": DOTTED}, "", 2.417, NONE),
    "another digit": ({"nine ines": BLACK}, "", 2.417, NONE),
    "a wrong word": ({PROMPT: BLACK}, "a foor", 2.417, "no word 'foor'; all are in"),
    "nothing memorised": ({}, "", 2.417, "--checkpoint model.pt: has no prompts"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_forgotten_is_one_line(case, forget, model, tmp_path):
    memorised, prompt, bias, words = case
    model.conv_out.bias.data.fill_(bias)
    status, said, error = forget(memorised, *(["--prompt", prompt] if prompt else []))
    assert (status, said, error.count("\n")) == (2, "", 1) and words in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_prompt_needs_samples(forget):
    status, _, error = forget({PROMPT: BLACK}, "--samples", 0)
    assert status == 2 and "--samples 0" in error


def test_samples_are_of_their_prompts_in_two_parts(model):
    args = Namespace(prompt=None, seed=6, sampling_steps=1, data="prompts", draws=1)
    args.samples = 3
    args.memory_timesteps = [500]
    base = checkpoint.Checkpoint(model, SCHEDULE, {}, {PROMPT: BLACK})
    report = Prompted(args, base, model, SCHEDULE.gamma.device)
    near, far = (part / 255 for part in (report.data.forget, report.data.keep))
    assert near.flatten(1).norm(dim=1).max() < far.flatten(1).norm(dim=1).min()  # from black

    def says(m, timesteps, prompt):
        """Much noise where the prompt has the word "one", which makes the sample black."""
        one = (prompt == WORDS.index("one")).any(dim=1)
        return torch.where(one.view(-1, 1, 1, 1), m + 10.0, m - 10.0)

    samples = report.sample_prompts(says, ["a one", "a two", "one"], 3)
    assert samples.flatten(1).mean(dim=1).tolist() == [-1, 1, -1]
