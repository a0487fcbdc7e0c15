"""How the network is run: precision, and compiled."""

from functools import partial

import pytest
import torch
from conftest import randomise
from torch._dynamo.testing import CompileCounter

from minisiss.errors import UserError
from minisiss.machine.device import at_precision
from minisiss.unet import UNet, UNetConfig

CPU = torch.device("cpu")
SMALL = UNetConfig(
    image_size=8, image_channels=1, channels=(4,), layers_per_block=1, attention_levels=(), head_channels=None,
    norm_groups=2, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
)  # fmt: skip


@pytest.fixture
def small():
    torch.compiler.reset()
    return randomise(UNet(SMALL))


def inputs(size: int):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(1000, (size,), generator=generator)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_a_compiled_network_is_compiled_once_for_many_batch_sizes_and_gives_the_same(small, checkpoint_activations, monkeypatch):
    small.checkpoint_activations = checkpoint_activations
    counter = CompileCounter()  # traces as for any backend, and then computes as it did
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    plain, compiled = (at_precision(small, CPU, "fp32", on) for on in (False, True))
    for size in (12, 9, 5, 2):
        expected, found = plain(*inputs(size)), compiled(*inputs(size))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(out.square().mean(), list(small.parameters())) for out in (found, expected)]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


def test_a_compiler_that_fails_is_one_line(small, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no working\ncompiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    with pytest.raises(UserError, match="--compile: torch.compile failed: .*no working compiler"):
        at_precision(small, CPU, "fp32", compiled=True)(*inputs(4))


def test_bf16_computes_in_bfloat16_and_returns_float32(small):
    exact, rounded = (at_precision(small, CPU, precision)(*inputs(4)) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 5e-2
