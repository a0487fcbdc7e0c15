"""The experiments, by name: what each network, training and unlearning is."""

# A preset names an experiment. Every value is the default of a flag: of train_ddpm.py ("unet", "train"), of unlearn.py
# ("unlearn", and "unlearn METHOD" where a method needs other values), of eval.py ("eval"), or of all three ("data").
PRESETS: dict[str, dict[str, dict]] = {
    # Small enough to train on two CPU cores in about an hour; the bundled model.
    "mnist-small": {
        "unet": dict(
            image_size=28, image_channels=1, channels=(24, 48, 96), layers_per_block=1, attention_levels=(),
            head_channels=None, norm_groups=8, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
        ),
        "train": dict(steps=14_000, batch_size=64, lr=1e-3, warmup=500, ema=0.999),
        # A step draws x from X and so descends on A a little too: it takes c > 1 to subtract more than that. c falls from some 40
        # to 2 at ρ = 1, and below 1 at ρ = 0.1, with which the T-shirt stays. A low rate, as the noise of the steps costs the digits most.
        "unlearn": dict(steps=150, batch_size=64, lr=2.5e-5, ema=0.9, grad_ratio=1.0),
        # Of the rates and numbers of steps that were tried, those that bring the memory of the T-shirt down to that of any
        # digit at the least loss on kept digits; naive deletion never does, this is where it remembers least. SISS: see the README.
        "unlearn naive_deletion": dict(lr=1e-3),
        "unlearn neggrad": dict(steps=60, lr=1e-5),
        "unlearn erasediff": dict(steps=30, lr=3e-5),
    },
    # The paper's MNIST model, for a GPU.
    "mnist": {
        "unet": dict(
            image_size=28, image_channels=1, channels=(64, 128, 256), layers_per_block=2, attention_levels=(1,),
            head_channels=8, norm_groups=32, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
        ),
        "train": dict(steps=50_000, batch_size=128, lr=1e-4, warmup=500, ema=0.9999),
        "unlearn": dict(steps=150, batch_size=128, lr=1e-4, ema=0.9),
    },
    # The paper's main experiment, from the published google/ddpm-celebahq-256: for a GPU.
    "celebahq": {
        "data": dict(data="pictures", data_root="celeba_hq_256"),
        "unet": dict(
            image_size=256, image_channels=3, channels=(128, 128, 256, 256, 512, 512), layers_per_block=2, attention_levels=(4,),
            head_channels=None, norm_groups=32, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        ),
        "train": dict(steps=500_000, batch_size=64, lr=2e-5, warmup=5000, ema=0.9999),
        "unlearn": dict(
            checkpoint="ddpm-celebahq-256", steps=60, batch_size=64, accumulate=4, lr=5e-6, draw_x="rest", evaluate_every=10,
            samples=64, draws=8, memory_timesteps=[250, 500],
        ),
        "eval": dict(checkpoint="ddpm-celebahq-256", draws=8, memory_timesteps=[250, 500]),
    },
    # A folder of a few dozen faces, small enough to memorise all of them on one CPU core in an hour. Small batches, as it is
    # the number of steps that counts: 600 of 8 pictures remember better than 300 of 16, which cost the same.
    "faces-64": {
        "data": dict(data="pictures", data_root="faces"),
        "unet": dict(
            image_size=64, image_channels=3, channels=(32, 64, 128, 128), layers_per_block=1, attention_levels=(),
            head_channels=None, norm_groups=8, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
        ),
        "train": dict(steps=6500, batch_size=8, lr=1e-3, warmup=100, ema=0.999),
        "unlearn": dict(
            checkpoint="runs/train-1/model.pt", steps=60, batch_size=16, lr=1e-4, ema=0.9, draw_x="rest", evaluate_every=10,
            samples=64, draws=8, memory_timesteps=[250, 500],
        ),
        "eval": dict(checkpoint="runs/train-1/model.pt", draws=8, memory_timesteps=[250, 500]),
    },
    # For tests and for trying out a change: seconds, and nothing worth looking at.
    "mnist-tiny": {
        "unet": dict(
            image_size=28, image_channels=1, channels=(8, 16), layers_per_block=1, attention_levels=(),
            head_channels=None, norm_groups=4, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
        ),
        "train": dict(steps=20, batch_size=8, lr=1e-3, warmup=5, ema=0.9),
        "unlearn": dict(steps=6, batch_size=8, lr=1e-4, ema=0.5, samples=8, sampling_steps=3, draws=2, memory_timesteps=[500], evaluate_every=3),
    },
}  # fmt: skip
