"""minisiss/runs/pretrained.py: published DDPMs, held against what diffusers computed with them (tests/golden)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minisiss.errors import UserError
from minisiss.runs.pretrained import (
    OLD_NAMES,
    load_pretrained,
    read_json,
    rename,
    save_pretrained,
    unet_config,
)
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["celebahq", "cifar10", "mnist"]
TINY = UNetConfig(
    image_size=8, channels=(8, 16), layers_per_block=1, attention_levels=(1,), head_channels=4, norm_groups=4, norm_eps=1e-5
)


def image(channels: int, size: int) -> torch.Tensor:
    """The image of make_golden.py."""
    return 2 * (torch.arange(channels * size * size) ** 2 % 1009).sin().view(1, channels, size, size)


def assert_golden(model: UNet, name: str) -> None:
    golden = torch.load(GOLDEN / name / "outputs.pt", weights_only=True)
    images = image(model.config.image_channels, model.config.image_size).expand_as(golden["outputs"])
    with torch.no_grad():
        torch.testing.assert_close(model(images, golden["timesteps"]), golden["outputs"], rtol=0, atol=1e-5)


def change(path: Path, **values) -> None:
    """Change values of a JSON file; `...` removes one."""
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


@pytest.fixture
def tiny() -> UNet:
    """A small model with random weights everywhere, also where an untrained one has zeros."""
    torch.manual_seed(0)
    model = UNet(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def published(tiny, tmp_path) -> Path:
    save_pretrained(tmp_path / "published", tiny, NoiseSchedule.linear())
    return tmp_path / "published"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_diffusers(name):
    model, schedule = load_pretrained(GOLDEN / name)
    assert_golden(model, name)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert all(map(torch.equal, vars(schedule).values(), vars(NoiseSchedule.linear()).values()))


@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_of_the_published_models(name):
    config = load_pretrained(GOLDEN / name)[0].config
    options = config.norm_eps, config.downsample_padding, config.flip_sin_to_cos, config.freq_shift
    assert options == ((1e-5, 1, True, 0) if name == "mnist" else (1e-6, 0, False, 1))
    assert (config.head_channels, config.attention_levels, len(config.channels)) == {
        "celebahq": (None, (4,), 6), "cifar10": (None, (1,), 4), "mnist": (4, (1,), 3),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "option",
    [dict(norm_eps=1e-5), dict(downsample_padding=1), dict(flip_sin_to_cos=True), dict(freq_shift=0), dict(attention_head_dim=4)],
)
def test_golden_outputs_depend_on_every_option(tmp_path, option):
    folder = shutil.copytree(GOLDEN / "cifar10", tmp_path / "cifar10")
    change(folder / "config.json", **option)
    with pytest.raises(AssertionError, match="not close"):
        assert_golden(load_pretrained(folder)[0], "cifar10")


@pytest.mark.parametrize(
    "name, image_size, channels, parameters",
    [("celebahq", 256, [128, 128, 256, 256, 512, 512], 113_673_219), ("cifar10", 32, [128, 256, 256, 256], 35_746_307)],
)
def test_published_sizes(tmp_path, name, image_size, channels, parameters):
    """With the golden config's sizes replaced by the published ones: as many parameters as diffusers counts."""
    path = Path(shutil.copy(GOLDEN / name / "config.json", tmp_path))
    change(path, sample_size=image_size, block_out_channels=channels, norm_num_groups=32)
    config = read_json(path, unet_config)
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == parameters


def test_defaults_are_those_of_diffusers():
    """What a config may leave out."""
    assert unet_config({"_class_name": "UNet2DModel", "sample_size": 64}) == UNetConfig(
        image_size=64, image_channels=3, channels=(224, 448, 672, 896), layers_per_block=2, attention_levels=(1, 2, 3),
        head_channels=8, norm_groups=32, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
    )  # fmt: skip


def test_round_trip_is_exact(tiny, published):
    model, schedule = load_pretrained(published)
    assert model.config == tiny.config
    assert model.state_dict().keys() == tiny.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tiny.state_dict().items())
    assert all(map(torch.equal, vars(schedule).values(), vars(NoiseSchedule.linear()).values()))


@pytest.mark.parametrize("linear", [(1000, 1e-4, 0.02), (50, 0.0012, 0.3), (7, 0.1, 0.1), (1, 0.01, 0.01)])
def test_round_trip_of_the_schedule(tiny, tmp_path, linear):
    (tmp_path / "new").mkdir()  # may be there, if it is empty
    save_pretrained(tmp_path / "new", tiny, NoiseSchedule.linear(*linear))
    assert torch.equal(load_pretrained(tmp_path / "new")[1].betas, NoiseSchedule.linear(*linear).betas)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_published_models(tmp_path, name):
    model, schedule = load_pretrained(GOLDEN / name)
    save_pretrained(tmp_path / "deep" / name, model, schedule)
    again, _ = load_pretrained(tmp_path / "deep" / name)
    assert again.config == model.config
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]  # nothing temporary stays


@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_old_attention_names(tiny, published, shape):
    path = published / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    old = {rename(name, OLD_NAMES): value for name, value in weights.items()}
    assert len(old.keys() - weights.keys()) == 4 * 8  # four attentions of four layers, with weight and bias
    if shape == "convolution":
        layers = "query.weight", "key.weight", "value.weight", "proj_attn.weight"
        old = {name: value[..., None, None] if name.endswith(layers) else value for name, value in old.items()}
    torch.save(old, path)
    state = load_pretrained(published)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("places", ["unet scheduler", "unet .", "unet unet", ". scheduler", "unet unet/scheduler"])
def test_layouts(tiny, tmp_path, places):
    save_pretrained(tmp_path / "flat", tiny, NoiseSchedule.linear(20))
    unet, scheduler = (tmp_path / "model" / place for place in places.split())
    for folder in (unet, scheduler):
        folder.mkdir(parents=True, exist_ok=True)
    for file in (tmp_path / "flat").iterdir():
        file.rename((scheduler if file.name == "scheduler_config.json" else unet) / file.name)
    model, schedule = load_pretrained(str(tmp_path / "model"))
    assert len(schedule) == 20
    assert torch.equal(model.conv_in.weight, tiny.conv_in.weight)


@pytest.mark.parametrize("typed", ["pipe/unet", "pipe/unet/", "./pipe/../pipe/unet", "pipe/unet_ema", "in pipe/unet: .", "in pipe: unet/"])
def test_the_schedule_beside_the_network_is_found(published, tmp_path, monkeypatch, capsys, typed):
    pipe = tmp_path / "pipe"
    place, _, directory = typed.rpartition(": ")
    shutil.copytree(published, pipe / ("unet_ema" if "unet_ema" in typed else "unet"))
    (pipe / "scheduler").mkdir()
    (config,) = pipe.glob("unet*/scheduler_config.json")
    config.rename(pipe / "scheduler/scheduler_config.json")
    monkeypatch.chdir(tmp_path / place.removeprefix("in "))
    change(pipe / "scheduler/scheduler_config.json", beta_end=0.03)
    assert torch.equal(load_pretrained(directory)[1].betas, NoiseSchedule.linear(beta_end=0.03).betas)
    assert "scheduler_config.json" not in capsys.readouterr().err
    change(pipe / "scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2")
    with pytest.raises(UserError, match="scheduler/scheduler_config.json: beta_schedule is .squaredcos_cap_v2"):
        load_pretrained(directory)


def test_a_schedule_that_is_assumed_is_one_line_by_rank_0(published, tmp_path, monkeypatch, capsys):
    load_pretrained(published)
    (published / "scheduler_config.json").unlink()
    broken, of_rank_1 = (Path(shutil.copytree(published, tmp_path / name)) for name in ("broken", "of-rank-1"))
    (broken / "diffusion_pytorch_model.bin").write_bytes(b"damaged")
    error(broken, "not a readable")  # and nothing else: what is refused is one line
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    load_pretrained(of_rank_1)
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        load_pretrained(published)
    (note,) = capsys.readouterr().err.splitlines()
    assert note == f"note: {published}: no scheduler_config.json in it or beside it; the schedule is assumed to be linear, 0.0001 to 0.02 in 1000 timesteps"


EMA = dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=60, power=0.75, update_after_step=0, use_ema_warmup=True)


@pytest.mark.parametrize(
    "named, read, said",
    [
        ("", "unet_ema", "unet_ema: these weights were read, which are averaged"),
        ("unet_ema", "unet_ema", "unet_ema: these weights were read, which are averaged"),
        ("unet", "unet", "unet: these weights were read; the averaged ones are in "),
    ],
)
def test_the_averaged_weights_of_a_checkpoint_are_read_unless_the_others_are_named(tiny, published, tmp_path, capsys, named, read, said):
    """In the layout in which diffusers' training scripts write checkpoints: without a schedule, and EMAModel adds to the config."""
    directory = tmp_path / "checkpoint-60"
    shutil.copytree(published, directory / "unet", ignore=shutil.ignore_patterns("scheduler*"))
    shutil.copytree(directory / "unet", directory / "unet_ema")
    change(directory / "unet_ema/config.json", **EMA)
    torch.save({name: value / 2 for name, value in torch.load(published / "diffusion_pytorch_model.bin").items()}, directory / "unet_ema/diffusion_pytorch_model.bin")
    model, _ = load_pretrained(directory / named)
    assert torch.equal(model.conv_in.weight, tiny.conv_in.weight / 2 if read == "unet_ema" else tiny.conv_in.weight)
    which, schedule = capsys.readouterr().err.splitlines()
    assert which.startswith(f"note: {directory}/{said}") and f"{directory}/{read}: no scheduler_config.json" in schedule
    change(directory / "unet_ema/config.json", model_config={})
    if read == "unet_ema":
        error(directory / named, "config.json: model_config is no argument")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_a_wrapped_or_compiled_model(tiny, published, prefix):
    path = published / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({prefix + name: value for name, value in weights.items()}, path)
    state = load_pretrained(published)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.state_dict().items())
    torch.save({prefix * (name != "conv_in.bias") + name: value for name, value in weights.items()}, path)
    error(published, path.name, "lacks")  # one name without it: of no wrapper


def test_half_precision_and_shared_memory(tiny, published):
    """Tensors that share memory in the file, or are of another precision, become separate float32 parameters."""
    path = published / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["mid_block.resnets.0.norm1.bias"] = weights["mid_block.resnets.1.norm1.bias"]
    weights["conv_in.weight"] = weights["conv_in.weight"].bfloat16()
    torch.save(weights, path)
    model, _ = load_pretrained(published)
    assert torch.equal(model.conv_in.weight, tiny.conv_in.weight.bfloat16().float())
    assert model.middle[0].norm1.bias.data_ptr() != model.middle[2].norm1.bias.data_ptr()


# What can be wrong: each is one line that names the file and the thing. What strangers may send is in test_hostile_files.py.


def error(directory: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(directory)
    assert all(part in str(caught.value) for part in (str(directory), *parts)), caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(directory)) + 200


@pytest.mark.parametrize(
    "values, parts",
    [
        (dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"]), ["CrossAttnDownBlock2D", "down_block_types"]),
        (dict(up_block_types=["UpBlock2D", "UpBlock2D"]), ["up_block_types", '["AttnUpBlock2D", "UpBlock2D"]']),
        (dict(down_block_types="DownBlock2D"), ["down_block_types", "a list"]),
        (dict(down_block_types=["DownBlock2D"]), ["down_block_types"]),
        (dict(_class_name="UNet2DConditionModel"), ["UNet2DConditionModel", "UNet2DModel"]),
        (dict(_class_name=..., preset="mnist"), ["_class_name", "UNet2DModel"]),  # a run's config.json
        (dict(sample_size=...), ["sample_size", "null", "integer"]),
        (dict(sample_size=[8, 8]), ["sample_size", "[8, 8]"]),
        (dict(sample_size=9), ["9", "divisible"]),
        (dict(out_channels=2), ["out_channels", "in_channels"]),
        (dict(block_out_channels=[8, "16"]), ["channels", "16"]),
        (dict(block_out_channels=8), ["block_out_channels", "8"]),
        (dict(layers_per_block=[1, 1]), ["layers_per_block", "[1, 1]"]),
        (dict(layers_per_block=10**9), ["layers_per_block", "1000000000"]),
        (dict(layers_per_block=True), ["layers_per_block", "true"]),
        (dict(norm_num_groups=0), ["norm_num_groups", "0"]),
        (dict(norm_num_groups=...), ["32", "divisible"]),  # the default
        (dict(norm_eps="1e-5"), ["norm_eps", "1e-5"]),
        (dict(attention_head_dim=5), ["5", "divide"]),
        (dict(attention_head_dim=0), ["attention_head_dim", "null or an integer"]),
        (dict(downsample_padding=2), ["downsample_padding", "2", "0 or 1"]),
        (dict(flip_sin_to_cos="yes"), ["flip_sin_to_cos", "yes"]),
        (dict(freq_shift=8), ["freq_shift", "8"]),
        (dict(time_embedding_type="fourier"), ["fourier", "positional"]),
        (dict(time_embedding_dim=64), ["time_embedding_dim", "64"]),
        (dict(act_fn="gelu"), ["act_fn", "gelu", "silu"]),
        (dict(mid_block_type=None), ["mid_block_type", "null"]),
        (dict(mid_block_scale_factor=1.5), ["mid_block_scale_factor", "1.5"]),
        (dict(center_input_sample=True), ["center_input_sample", "true"]),
        (dict(add_attention=False), ["add_attention", "false"]),
        (dict(attn_norm_num_groups=2), ["attn_norm_num_groups", "2"]),
        (dict(resnet_time_scale_shift="scale_shift"), ["resnet_time_scale_shift", "scale_shift"]),
        (dict(downsample_type="resnet"), ["downsample_type", "resnet"]),
        (dict(upsample_type="resnet"), ["upsample_type", "resnet"]),
        (dict(class_embed_type="timestep"), ["class_embed_type", "timestep"]),
        (dict(num_class_embeds=10), ["num_class_embeds", "10"]),
        (dict(new_option=1), ["new_option"]),
    ],
)
def test_configs_that_are_refused(published, values, parts):
    change(published / "config.json", **values)
    error(published, "config.json", *parts)


@pytest.mark.parametrize(
    "values, parts",
    [
        (dict(beta_schedule="squaredcos_cap_v2"), ["beta_schedule", "squaredcos_cap_v2", "linear"]),
        (dict(prediction_type="v_prediction"), ["prediction_type", "v_prediction", "epsilon"]),
        (dict(trained_betas=[0.1] * 1000), ["trained_betas", "[0.1, 0.1,", "expected null"]),
        (dict(rescale_betas_zero_snr=True), ["rescale_betas_zero_snr"]),
        (dict(_class_name="ScoreSdeVeScheduler"), ["ScoreSdeVeScheduler", "DDPMScheduler"]),
        (dict(beta_end=2.0), ["2.0"]),
        (dict(beta_start="a"), ["beta_start", "a"]),
        (dict(num_train_timesteps=0), ["num_train_timesteps", "0"]),
    ],
)
def test_schedulers_that_are_refused(published, values, parts):
    change(published / "scheduler_config.json", **values)
    error(published, "scheduler_config.json", *parts)


def test_a_scheduler_config_may_be_short_or_about_sampling(published):
    (published / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler", "clip_sample": true, "beta_end": 0.03}')
    assert torch.equal(load_pretrained(published)[1].betas, NoiseSchedule.linear(beta_end=0.03).betas)
    (published / "scheduler_config.json").unlink()
    assert torch.equal(load_pretrained(published)[1].betas, NoiseSchedule.linear().betas)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
@pytest.mark.parametrize("file", ["config.json", "scheduler_config.json"])
def test_json_that_is_none(published, file, text):
    (published / file).write_text(text, encoding="latin-1")
    error(published, file)


@pytest.mark.parametrize(
    "key", ["conv_in.weight", "down_blocks.1.attentions.0.to_q.weight", "up_blocks.1.resnets.1.conv_shortcut.bias"]
)
def test_weights_that_do_not_fit(published, key):
    path = published / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    good, wrong = weights.pop(key), torch.zeros(3, 5)

    torch.save(weights, path)
    error(published, path.name, key, str(list(good.shape)))
    torch.save(weights | {key: wrong}, path)
    error(published, path.name, key, "[3, 5]", str(list(good.shape)))
    torch.save(weights | {key: good.int()}, path)
    error(published, path.name, key, "floating-point")
    torch.save(weights | {key: "text"}, path)
    error(published, path.name, key, "floating-point")
    torch.save(weights | {key: good, "extra.bias": wrong}, path)
    error(published, path.name, "extra.bias")
    torch.save(weights | {key: good, "mid_block.attentions.0.query.weight": wrong}, path)  # beside to_q
    error(published, path.name, "mid_block.attentions.0.query.weight")


def test_files_that_are_not_there_or_damaged(published, tmp_path):
    path = published / "diffusion_pytorch_model.bin"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no weights", b"PK\x03\x04"):
        path.write_bytes(damaged)
        error(published, path.name, "not a readable")
    torch.save([1, 2], path)
    error(published, path.name, "not a readable")
    path.unlink()
    error(published, "no weights", "diffusion_pytorch_model.bin", "safetensors")
    (published / "config.json").unlink()
    error(published, "config.json")
    error(tmp_path / "nowhere", "config.json")


@pytest.mark.parametrize(
    "names, parts",
    [
        (["diffusion_pytorch_model.fp16.safetensors"], ["fp16.safetensors is a variant", "copy it to diffusion_pytorch_model.safetensors)"]),
        (["diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.non_ema.bin"], ["fp16.bin is a variant", "copy it to diffusion_pytorch_model.bin)"]),
        (["diffusion_pytorch_model-00002-of-00002.bin", "diffusion_pytorch_model-00001-of-00002.bin"], ["model-00001-of-00002.bin is one part", "as one file"]),
        (["diffusion_pytorch_model.safetensors.index.json"], ["safetensors.index.json is one part", "as one file"]),
        (["diffusion_pytorch_model.safetensors.index.fp16.json"], ["safetensors.index.fp16.json is one part", "as one file"]),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], ["fp16-00001-of-00002.safetensors is one part", "as one file"]),
        (["diffusion_pytorch_model.\n.bin", "diffusion_pytorch_model.msgpack"], ["neither diffusion_pytorch_model.safetensors nor"]),
    ],
)
def test_weights_in_files_of_other_names(published, names, parts):
    for name in names:
        shutil.copy(published / "diffusion_pytorch_model.bin", published / name)
    load_pretrained(published)  # from the file of the right name
    (published / "diffusion_pytorch_model.bin").unlink()
    error(published, "holds no weights", *parts)


def test_safetensors(tiny, published):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = published / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    save_file(weights, path.with_suffix(".safetensors"))
    path.write_bytes(b"damaged")  # and not needed: the safe file goes first
    state = load_pretrained(published)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.state_dict().items())
    path.with_suffix(".safetensors").write_bytes(b"damaged")
    error(published, "diffusion_pytorch_model.safetensors", "not a readable")


def test_safetensors_not_installed(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = published / "diffusion_pytorch_model.bin"
    path.with_suffix(".safetensors").write_bytes(b"not read")
    load_pretrained(published)  # from the .bin beside it
    path.unlink()
    error(published, "diffusion_pytorch_model.safetensors", 'pip install "minisiss[safetensors]"')


def test_what_cannot_be_saved(tiny, published, tmp_path):
    with pytest.raises(UserError, match="published: already exists"):
        save_pretrained(published, tiny, NoiseSchedule.linear())
    with pytest.raises(UserError, match="config.json: already exists"):
        save_pretrained(published / "config.json", tiny, NoiseSchedule.linear())
    with pytest.raises(UserError, match="not linear"):
        save_pretrained(tmp_path / "new", tiny, NoiseSchedule.from_betas(torch.linspace(0.1, 0.2, 10) ** 2))
    assert not (tmp_path / "new").exists()


def test_nothing_stays_of_a_save_that_fails(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_pretrained(tmp_path / "new", tiny, NoiseSchedule.linear())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_against_diffusers_itself(name, tmp_path):
    """Live, where it is installed: other weights than the golden ones there and back, and the schedule."""
    diffusers = pytest.importorskip("diffusers")
    unet = "unet" if name == "mnist" else ""
    torch.manual_seed(1)
    theirs = diffusers.UNet2DModel(**diffusers.UNet2DModel.load_config(GOLDEN / name / unet))
    theirs.save_pretrained(tmp_path / "theirs" / unet)
    model, schedule = load_pretrained(tmp_path / "theirs")
    images = torch.randn(4, model.config.image_channels, model.config.image_size, model.config.image_size)
    timesteps = torch.tensor([0, 1, 321, 999])
    with torch.no_grad():
        torch.testing.assert_close(model(images, timesteps), theirs(images, timesteps).sample, rtol=0, atol=1e-5)

    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 20
    save_pretrained(tmp_path / "ours", model, schedule)
    theirs, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(theirs(images, timesteps).sample, model(images, timesteps), rtol=0, atol=1e-5)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(scheduler.betas, schedule.betas)


def test_a_model_with_prompts_is_not_saved_as_one_without(tmp_path):
    with pytest.raises(UserError, match="new: a model that takes prompts"):
        save_pretrained(tmp_path / "new", UNet(UNetConfig(image_size=8, channels=(8,), norm_groups=4, attention_levels=(), vocabulary=3)), NoiseSchedule.linear())
    assert not any(tmp_path.iterdir())
