"""The network itself. That it predicts what diffusers does is in test_published.py."""

import pytest
import torch
from conftest import randomise

from minisiss.lab.presets import PRESETS
from minisiss.unet import UNet, UNetConfig

SMALL = dict(image_size=8, channels=(8, 16), norm_groups=4, layers_per_block=1)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 500, 900])


def small(**options):
    return randomise(UNet(UNetConfig(**SMALL | options)))


OPTIONS = [
    dict(),
    dict(attention_levels=(0, 1), head_channels=4),
    dict(layers_per_block=2, attention_levels=()),
    dict(channels=(8, 16, 24), downsample_padding=0, flip_sin_to_cos=True, freq_shift=0),
    dict(image_channels=3, channels=(8,), attention_levels=(0,)),
]
IMPOSSIBLE = [
    dict(channels=()),
    dict(channels=(9, 9), norm_groups=3),  # an odd number has no half of sines
    dict(channels=(8, 18)),
    dict(norm_groups=-4),
    dict(attention_levels=(2,)),
    dict(attention_levels=(-1,)),
    dict(head_channels=5),
    dict(head_channels=-4),
    dict(layers_per_block=0),
    dict(layers_per_block=10**6),
    dict(image_size=7),
    dict(image_size=0),
    dict(downsample_padding=2),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = small(**options)
    x = torch.randn(2, *model.config.image_shape, generator=torch.Generator().manual_seed(0))
    noise = model(x, torch.tensor([0, 999]))
    assert noise.shape == x.shape
    noise.square().sum().backward()
    without = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike, which softmax does not see: its gradient is
    # zero in exact arithmetic.
    assert all(name.endswith("key.bias") for name in without)


def test_celebahq_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = UNet(UNetConfig(**PRESETS["celebahq"]["unet"]))
    assert sum(p.numel() for p in model.parameters()) == 113_673_219


def test_image_sees_its_own_timestep_and_prompt_alone():
    model = small(vocabulary=6)
    words = torch.tensor([[1, 2], [3, 0], [0, 0]])
    together = model(X, T, words)
    alone = [model(*row) for row in zip(X.split(1), T.split(1), words.split(1), strict=True)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(X, T.flip(0), words), together, atol=1e-3)
    assert not torch.allclose(model(X, T, words.flip(0)), together, atol=1e-3)


@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_impossible_configs_are_refused(options):
    with pytest.raises(ValueError, match=r"make no network: UNetConfig\(image_size|divisible"):
        UNet(UNetConfig(**SMALL | options))


def test_without_vocabulary_a_prompt_is_an_error():
    with pytest.raises(TypeError):
        small()(X, T, torch.tensor([[1]]))


def test_null_words_add_nothing_to_a_prompt():
    model = small(vocabulary=6)
    null, given = model(X, T), model(X, T, torch.tensor([[2, 5]]))
    assert not torch.allclose(given, null, atol=1e-3)
    for empty in ([[0]], [[0, 0, 0]], [[0]] * 3):
        torch.testing.assert_close(model(X, T, torch.tensor(empty)), null)
    for same in ([[5, 2]], [[0, 2, 0, 5]]):  # a sum: neither order nor null words count
        torch.testing.assert_close(model(X, T, torch.tensor(same)), given)
    assert not torch.allclose(model(X, T, torch.tensor([[2, 5, 2, 5]])), given, atol=1e-3)


def test_gradients_reach_only_the_words_of_prompts():
    model = small(vocabulary=6)
    model(X, T, torch.tensor([[1, 4], [0, 0], [4, 0]])).square().sum().backward()
    reached = model.prompt[0].weight.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [False, True, False, False, True, False]
