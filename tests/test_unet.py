import math

import pytest
import torch
from conftest import randomise

from minisiss.presets import PRESETS
from minisiss.unet import (
    Attention,
    Downsample,
    ResidualBlock,
    UNet,
    UNetConfig,
    Upsample,
    attend,
    timestep_embedding,
)

SMALL = dict(image_size=8, channels=(8, 16), norm_groups=4, layers_per_block=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(attention_levels=(0, 1), head_channels=4),
        dict(layers_per_block=2, attention_levels=()),
        dict(channels=(8, 16, 24), downsample_padding=0, flip_sin_to_cos=True, freq_shift=0),
        dict(image_channels=3, channels=(8,), attention_levels=(0,)),
    ],
)
def test_the_output_has_the_inputs_shape_and_every_parameter_gets_a_gradient(options):
    config = UNetConfig(**{**SMALL, **options})
    model = randomise(UNet(config))
    x = torch.randn(2, config.image_channels, 8, 8)
    noise = model(x, torch.tensor([0, 999]))
    assert noise.shape == x.shape
    noise.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all of a query's scores alike, which softmax does not see: its gradient is zero in exact arithmetic.
    assert [name for name in without if not name.endswith("key.bias")] == []


def count(model: UNet, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_the_topology_is_that_of_the_published_checkpoints():
    model = UNet(UNetConfig(**PRESETS["mnist"]["unet"]))
    # Three levels: 2 blocks each down, 3 each up, 2 in the middle; attention beside each block of level 1, and one in the middle.
    assert count(model, ResidualBlock) == 3 * 2 + 3 * 3 + 2
    assert count(model, Attention) == 2 + 3 + 1
    assert (count(model, Downsample), count(model, Upsample)) == (2, 2)
    # On the way up each block takes one skip: what it joins is fixed by which skip that is.
    joined = [residual.conv1.in_channels for level in model.up for residual, _ in level["blocks"]]
    assert joined == [256 + 256, 256 + 256, 256 + 128, 256 + 128, 128 + 128, 128 + 64, 128 + 64, 64 + 64, 64 + 64]


def test_celebahqs_preset_has_the_published_models_parameters():
    with torch.device("meta"):
        model = UNet(UNetConfig(**PRESETS["celebahq"]["unet"]))
    assert sum(p.numel() for p in model.parameters()) == 113_673_219


def test_computing_activations_again_changes_no_gradient():
    model = randomise(UNet(UNetConfig(**SMALL, attention_levels=(1,))))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    saved, gradients = [], []
    for model.checkpoint_activations in (False, True):
        kept = 0

        def count_saved(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
            loss = model(x, t).square().mean()
        loss.backward()
        saved.append(kept)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert saved[1] < saved[0] / 2


def test_each_skip_reaches_the_output():
    model = randomise(UNet(UNetConfig(**SMALL)))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad():
        reference = model(x, t)
        for level in model.up:
            for residual, _ in level["blocks"]:
                weight = residual.conv1.weight.data.clone()
                residual.conv1.weight.data[:, weight.shape[1] // 2 :] = 0
                assert not torch.allclose(model(x, t), reference)
                residual.conv1.weight.data.copy_(weight)


def test_images_of_a_batch_do_not_see_each_other_but_their_own_timestep():
    model = randomise(UNet(UNetConfig(**SMALL, attention_levels=(1,))))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 10, 900])
    together = model(x, t)
    for i in range(3):
        assert torch.allclose(model(x[i : i + 1], t[i : i + 1]), together[i : i + 1], atol=1e-5)
    assert not torch.allclose(model(x, t.flip(0)), together, atol=1e-3)


def test_attention_sees_all_pixels_and_no_order():
    attention = randomise(Attention(8, UNetConfig(**SMALL, head_channels=4)))
    x = torch.randn(1, 8, 4, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffle = lambda h: h.flatten(2)[:, :, order].reshape(h.shape)  # noqa: E731
    assert torch.allclose(attention(shuffle(x)), shuffle(attention(x)), atol=1e-5)


def test_time_embedding_values_and_options():
    t = torch.tensor([0, 7])
    embedding = timestep_embedding(t, 4, flip_sin_to_cos=False, freq_shift=1)  # frequencies 1 and 1e-4
    assert embedding[1].tolist() == pytest.approx([math.sin(7), math.sin(7e-4), math.cos(7), math.cos(7e-4)], abs=1e-6)
    embedding_2 = timestep_embedding(t, 4, flip_sin_to_cos=True, freq_shift=0)  # frequencies 1 and 1e-2
    assert embedding_2[1].tolist() == pytest.approx([math.cos(7), math.cos(0.07), math.sin(7), math.sin(0.07)], abs=1e-6)
    assert torch.equal(embedding[0], torch.tensor([0.0, 0, 1, 1]))


def test_downsampling_padding_decides_where_the_picture_ends():
    symmetric, corner = Downsample(1, padding=1), Downsample(1, padding=0)
    for layer in (symmetric, corner):
        torch.nn.init.ones_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(symmetric(ones)[0, 0], torch.tensor([[4.0, 6], [6, 9]]))
    assert torch.equal(corner(ones)[0, 0], torch.tensor([[9.0, 6], [6, 4]]))


def test_an_untrained_network_predicts_zero():
    assert UNet(UNetConfig(**SMALL))(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).abs().max() == 0


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(channels=()), "channels"),
        (dict(channels=(8, -16)), "channels"),
        (dict(channels=(8, 10**9)), "channels"),
        (dict(channels=(8, 18)), "norm_groups"),
        (dict(attention_levels=(2,)), "attention_levels"),
        (dict(head_channels=5), "head_channels"),
        (dict(image_size=7), "image_size"),
        (dict(channels=(9, 9), norm_groups=3), "even"),
        (dict(channels=(2, 2), norm_groups=1), "4 or more if freq_shift is 1"),  # 0 / 0 in the time embedding
    ],
)
def test_impossible_configs_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        UNetConfig(**{**SMALL, "attention_levels": (1,), **options})


def test_two_channels_are_enough_where_the_frequencies_are_not_shifted():
    model = randomise(UNet(UNetConfig(**{**SMALL, "channels": (2, 2), "norm_groups": 1}, freq_shift=0)))
    assert model(torch.randn(1, 1, 8, 8), torch.tensor([3])).isfinite().all()


@pytest.mark.parametrize("pixels", [49, 257])
def test_attention_is_the_same_by_the_formula_and_by_torchs_kernel(pixels):
    q, k, v = torch.randn(3, 2, 4, pixels, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = (q @ k.mT / 8**0.5).softmax(dim=-1) @ v
    for precision, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs = [part.to(precision) for part in (q, k, v)]
        torch.testing.assert_close(attend(*inputs).float(), expected, atol=tolerance, rtol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(attend(*inputs).float(), expected, atol=tolerance, rtol=tolerance)


PROMPTED = dict(**SMALL, vocabulary=6)
X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 500, 900])


def test_without_a_vocabulary_nothing_changes_and_a_prompt_is_an_error():
    torch.manual_seed(0)
    model = UNet(UNetConfig(**SMALL))
    assert not [name for name in model.state_dict() if "prompt" in name]
    assert torch.equal(model(X, T), model(X, T, None))
    with pytest.raises(ValueError, match="no vocabulary"):
        model(X, T, torch.tensor([[1]]))


def test_the_null_prompt_is_the_empty_one_and_null_words_add_nothing():
    model = randomise(UNet(UNetConfig(**PROMPTED)))
    null = model(X, T)
    assert torch.equal(model(X, T, torch.tensor([[0]])), null)
    for empty in ([[0, 0, 0]], [[0]] * 3):
        torch.testing.assert_close(model(X, T, torch.tensor(empty)), null)
    given = model(X, T, torch.tensor([[2, 5]]))
    assert not torch.allclose(given, null, atol=1e-3)
    for same in ([[5, 2]], [[0, 2, 0, 5]]):  # words are summed: neither their order nor null words count
        torch.testing.assert_close(model(X, T, torch.tensor(same)), given)
    assert not torch.allclose(model(X, T, torch.tensor([[2, 5, 5]])), given, atol=1e-3)  # a sum, not a mean of a set


def test_each_image_has_its_own_prompt():
    model = randomise(UNet(UNetConfig(**PROMPTED)))
    words = torch.tensor([[1, 2], [3, 0], [0, 0]])
    together = model(X, T, words)
    for i in range(3):
        torch.testing.assert_close(model(X[i : i + 1], T[i : i + 1], words[i : i + 1]), together[i : i + 1])
    assert not torch.allclose(model(X, T, words.flip(0)), together, atol=1e-3)


def test_gradients_reach_the_words_of_the_prompts_and_no_others():
    model = randomise(UNet(UNetConfig(**PROMPTED)))
    model(X, T, torch.tensor([[1, 4], [0, 0], [4, 0]])).square().sum().backward()
    reached = model.prompt[0].weight.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [False, True, False, False, True, False]


def test_an_untrained_vocabulary_has_words_of_deviation_0_2():
    torch.manual_seed(0)
    assert UNet(UNetConfig(**SMALL, vocabulary=1000)).prompt[0].weight.std().item() == pytest.approx(0.2, rel=0.05)
