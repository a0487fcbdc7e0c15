"""Published DDPMs, held against what diffusers computed with them (tests/golden)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minisiss.lab import published
from minisiss.lab.cli import UserError
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "diffusion_pytorch_model.bin"


def assert_golden(model: UNet, name: str) -> None:
    golden = torch.load(GOLDEN / name / "outputs.pt", weights_only=True)
    outputs = golden["outputs"]
    channels, size = outputs.shape[1:3]
    pixels = torch.arange(channels * size * size) ** 2 % 1009  # the image of make_golden.py
    images = 2 * pixels.sin().view(1, channels, size, size).expand_as(outputs)
    with torch.no_grad():
        torch.testing.assert_close(model(images, golden["timesteps"]), outputs, rtol=0, atol=1e-5)


def change(path: Path, **values) -> None:
    """Change values of a JSON file; `...` removes one."""
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def same_weights(model: UNet, other: UNet) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def cifar(tmp_path) -> Path:
    """A copy of the model in a single directory, with a schedule."""
    folder = Path(shutil.copytree(GOLDEN / "cifar10", tmp_path / "cifar10"))
    shutil.copy(GOLDEN / "celebahq/scheduler_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def model() -> UNet:
    """What is in `cifar`."""
    return published.load(GOLDEN / "cifar10")[0]


def refusal(folder: Path) -> str:
    """The line that refuses a model."""
    with pytest.raises(UserError) as caught:
        published.load(folder)
    line = str(caught.value)
    assert line.startswith(str(folder)) and "\n" not in line and len(line) < len(str(folder)) + 300
    return line


@pytest.mark.parametrize("name", ["celebahq", "cifar10", "mnist"])
def test_outputs_are_those_of_diffusers(name):
    model, schedule = published.load(GOLDEN / name)
    assert_golden(model, name)
    # In these files the weights are float16, and share memory.
    parameters = list(model.parameters())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert torch.equal(schedule.betas, NoiseSchedule.linear().betas)


OTHER = dict(norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0)


@pytest.mark.parametrize("name, value", [*OTHER.items(), ("attention_head_dim", 4)])
def test_golden_outputs_depend_on_every_option(name, value, cifar):
    change(cifar / "config.json", **{name: value})
    with pytest.raises(AssertionError, match="not close"):
        assert_golden(published.load(cifar)[0], "cifar10")


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_old_attention_names_are_read(shape, cifar, model):
    weights = torch.load(cifar / WEIGHTS, weights_only=True)
    old = dict(weights)
    for name in weights:
        for new_part, old_part in OLD_NAMES.items():
            if new_part in name:
                old[name.replace(new_part, old_part)] = old.pop(name)
    changed = old.keys() - weights.keys()
    assert len(changed) == 6 * 8  # six attentions of four layers, with weight and bias
    if shape == "convolution":
        for name in changed:
            if name.endswith("weight"):
                old[name] = old[name][..., None, None]
    torch.save(old, cifar / WEIGHTS)
    assert same_weights(published.load(cifar)[0], model)


def test_safetensors_are_read_where_no_bin_is(cifar, model):
    safetensors = pytest.importorskip("safetensors.torch")
    safe = (cifar / WEIGHTS).with_suffix(".safetensors")
    safetensors.save_file(torch.load(cifar / WEIGHTS, weights_only=True), safe)
    (cifar / WEIGHTS).unlink()
    assert same_weights(published.load(cifar)[0], model)
    safe.write_bytes(b"damaged")
    assert f"{safe.name}: cannot be read" in refusal(cifar)


def test_without_safetensors_the_bin_is_read(cifar, model, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)
    safe = (cifar / WEIGHTS).with_suffix(".safetensors")
    safe.write_bytes(b"not read")
    assert same_weights(published.load(cifar)[0], model)
    (cifar / WEIGHTS).unlink()
    assert f"{safe.name}: cannot be read: ModuleNotFoundError" in refusal(cifar)


def test_weights_under_two_names_are_refused(cifar):
    weights = torch.load(cifar / WEIGHTS, weights_only=True)
    name = "mid_block.attentions.0.to_q.bias"
    weights[name.replace("to_q", "query")] = weights[name]
    torch.save(weights, cifar / WEIGHTS)
    assert "middle.1.query.bias" in refusal(cifar)


# Where the network and the schedule are. EMAModel of diffusers adds its own settings to the config.
EMA = "decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split()


def test_averaged_weights_come_first_unless_others_are_named(cifar, model, tmp_path):
    for name in ("unet", "unet_ema"):
        shutil.copytree(cifar, tmp_path / "run" / name)
    weights = torch.load(cifar / WEIGHTS, weights_only=True)
    halved = {name: value / 2 for name, value in weights.items()}
    torch.save(halved, tmp_path / "run/unet_ema" / WEIGHTS)
    change(tmp_path / "run/unet_ema/config.json", **dict.fromkeys(EMA, 1))
    for place, factor in {"run": 0.5, "run/unet_ema": 0.5, "run/unet": 1.0}.items():
        found = published.load(tmp_path / place)[0]
        assert torch.equal(found.conv_in.weight, factor * model.conv_in.weight)


@pytest.mark.parametrize("scheduler", ["scheduler", ".", "unet"])
@pytest.mark.parametrize("typed", ["pipe", "pipe/unet", "pipe/../pipe/unet/"])
def test_the_schedule_beside_the_network_is_read(typed, scheduler, cifar, tmp_path, capsys):
    shutil.move(cifar, tmp_path / "pipe/unet")
    folder = tmp_path / "pipe" / scheduler
    folder.mkdir(exist_ok=True)
    config = folder / "scheduler_config.json"
    (tmp_path / "pipe/unet/scheduler_config.json").rename(config)
    change(config, beta_end=0.03)
    schedule = published.load(tmp_path / typed)[1]
    assert torch.equal(schedule.betas, NoiseSchedule.linear(beta_end=0.03).betas)
    assert "assumed" not in capsys.readouterr().err


def test_an_assumed_schedule_is_said_by_rank_0(cifar, monkeypatch, capsys):
    (cifar / "scheduler_config.json").unlink()
    _, schedule = published.load(cifar)
    assert torch.equal(schedule.betas, NoiseSchedule.linear().betas)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {cifar}: ") and "a linear one is assumed" in line
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "1")
    published.load(cifar)
    assert capsys.readouterr().err == ""


def test_the_schedule_of_an_old_version_is_read(cifar):
    config = dict(_class_name="DDIMScheduler", num_train_timesteps=9, beta_start=0.1, beta_end=0.2)
    (cifar / "scheduler_config.json").write_text(json.dumps(config))
    assert torch.equal(published.load(cifar)[1].betas, NoiseSchedule.linear(9, 0.1, 0.2).betas)


# What our network or schedule cannot reproduce, and words that the line has.
CONFIGS = [
    (dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"]), "CrossAttnDownBlock2D"),
    (dict(block_out_channels=[8, 8]), "cannot be read"),
    (dict(up_block_types=["UpBlock2D"] * 4), "up_block_types"),
    (dict(_class_name="UNet2DConditionModel", cross_attention_dim=768), "cross_attention_dim"),
    (dict(preset="mnist-small"), "preset"),  # the config.json of a run
    (dict(out_channels=6), "out_channels = 6"),
    (dict(sample_size=9), "image_size=9"),
    (dict(norm_num_groups=...), "norm_num_groups"),
    (dict(attention_head_dim=5), "make no network"),
    (dict(freq_shift="1"), "make no network"),
    (dict(block_out_channels=[8, 8, 8, 8]), "size mismatch"),
]
# These have one value here; any other is refused.
CONFIGS += [({name: "other"}, f"{name} = other") for name in published.FIXED]
WRONG_KINDS = dict(sample_size=..., block_out_channels=[4, "8", 8, 8], norm_num_groups=0)
CONFIGS += [({name: value}, "config.json: cannot be read") for name, value in WRONG_KINDS.items()]
SCHEDULES = [
    (dict(beta_start=...), "beta_start"),
    (dict(beta_end=2.0), "betas"),
    (dict(num_train_timesteps=0), "betas"),
    (dict(num_train_timesteps="1000"), "TypeError"),
    (dict(beta_start=0.9, beta_end=0.9), "ᾱ is above 0"),
]
SCHEDULES += [({name: "other"}, f"{name} = other") for name in published.FIXED_SCHEDULE]


@pytest.mark.parametrize("values, words", CONFIGS, ids=str)
def test_what_our_network_cannot_do_is_refused(values, words, cifar):
    change(cifar / "config.json", **values)
    assert words in refusal(cifar)


@pytest.mark.parametrize("values, words", SCHEDULES, ids=str)
def test_what_our_schedule_cannot_do_is_refused(values, words, cifar):
    change(cifar / "scheduler_config.json", **values)
    line = refusal(cifar)
    assert words in line and "scheduler_config.json: cannot be read" in line


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_json_that_is_none_is_refused(name, text, cifar):
    (cifar / name).write_text(text, encoding="latin-1")
    assert f"/{name}: cannot be read" in refusal(cifar)


def test_missing_files_are_named(cifar):
    (cifar / WEIGHTS).unlink()
    assert f"{WEIGHTS[:-4]}.safetensors: cannot be read: FileNotFoundError" in refusal(cifar)
    (cifar / "config.json").unlink()
    assert "holds no model" in refusal(cifar)
    assert "holds no model" in refusal(cifar.parent / "nowhere")
