"""Where the network is run, and how: precision, and compiled."""

from functools import partial

import pytest
import torch
from conftest import randomise
from torch._dynamo.testing import CompileCounter

from minisiss.errors import UserError
from minisiss.machine.device import adamw, at_precision, pick_device
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


@pytest.fixture
def apple(monkeypatch):
    """A machine with Apple's GPU, as far as picking it goes."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: None)


def test_apples_gpu_is_picked_where_there_is_no_other(apple, monkeypatch):
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_ranks_do_not_take_apples_gpu(apple, monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert pick_device("auto") == CPU
    with pytest.raises(UserError, match="--device mps: ranks"):
        pick_device("mps")


def test_where_there_is_no_apples_gpu_it_is_not_picked():
    assert pick_device("auto") == CPU
    with pytest.raises(UserError, match="--device mps: not usable"):
        pick_device("mps")


def test_a_device_without_autocast_computes_in_float32(small, monkeypatch):
    exact = at_precision(small, CPU, "fp32")(*inputs(4))
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", None)
    assert torch.equal(at_precision(small, torch.device("mps"), "auto")(*inputs(4)), exact)
    with pytest.raises(UserError, match="--precision bf16: not on mps in torch"):
        at_precision(small, torch.device("mps"), "bf16")


def test_the_optimizer_is_one_kernel_where_every_torch_has_one(small):
    assert adamw(small, 0.1).defaults["fused"] is True
    assert adamw(small.to("meta"), 0.1).defaults["fused"] is None
