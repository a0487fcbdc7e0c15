"""The experiments, by name. Imports nothing.

Every value is the default of a flag: of train_ddpm.py ("unet", where a field of `UNetConfig` is not as
declared there, and "train"), of unlearn.py ("unlearn", and "unlearn METHOD" where a method needs other
values), of eval.py ("eval"), or of all three ("data").
"""

# As in most published DDPMs of recent years; celebahq keeps Ho et al.'s values.
RECENT = dict(norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0)

PRESETS: dict[str, dict[str, dict]] = {
    # The bundled model: small enough to train on two CPU cores in an hour or two.
    "mnist-small": {
        "unet": RECENT | dict(channels=(24, 48, 96), layers_per_block=1, attention_levels=(), norm_groups=8),
        "train": dict(steps=14_000, batch_size=64, lr=1e-3, warmup=500, ema=0.999),
        # SISS: with x ~ X it takes c > 1 to push away from A. At ρ = 1 c falls from some 40 to 2; at ρ = 0.1
        # it falls below 1, and the T-shirt stays. (ρ = 1 is outside the paper's guarantee. With x ~ X∖A and
        # ρ = 0.3, which is inside, one seed still remembers.) A low rate, as the noise of the steps is what
        # costs the digits most. How these and the next were chosen, and why no ceiling: study/RESULTS.md.
        "unlearn": dict(
            method="unseen", steps=150, batch_size=64, lr=2.5e-5, ema=0.9, sampling_steps=10, draws=16),
        "unlearn siss": dict(grad_ratio=1.0, draw_x="all"),
        "unlearn siss_no_is": dict(grad_ratio=1.0, draw_x="all"),
        "unlearn naive_deletion": dict(lr=1e-3),
        "unlearn neggrad": dict(steps=60, lr=1e-5),
        "unlearn erasediff": dict(steps=30, lr=3e-5),
        "unlearn retrack": dict(steps=50, batch_size=128, lr=5e-5, ema=0.0),  # as published
        # No noise in its targets: few steps at a high rate.
        "unlearn unseen": dict(steps=45, lr=1e-4, evaluate_every=9),
        "eval": dict(sampling_steps=10),  # as good as DDIM's 25: study/SPEED.md
    },
    # The same network with prompts, a third of them memorised: see data/prompts.py. From the bundled weights.
    "prompts": {
        "data": dict(data="prompts"),
        "unet": RECENT | dict(
            channels=(24, 48, 96), layers_per_block=1, attention_levels=(), norm_groups=8, vocabulary=94),
        "train": dict(init="bundled", steps=4000, batch_size=64, lr=1e-3, warmup=100, ema=0.999),
        "unlearn": dict(
            checkpoint="bundled-prompts",
            guidance=1.5, hold=10.0, steps=35, batch_size=16, lr=3e-4, evaluate_every=35, sampling_steps=10),
        "unlearn siss": dict(grad_ratio=0.3),
        "unlearn siss_no_is": dict(grad_ratio=0.4),
        "unlearn naive_deletion": dict(lr=5e-4),
        "unlearn erasediff": dict(lr=1e-4),
        "unlearn neggrad": dict(lr=3e-5),
        "unlearn retrack": dict(lr=7e-4),
    },
    # The paper's MNIST model, for a GPU.
    "mnist": {
        "unet": RECENT | dict(channels=(64, 128, 256), head_channels=8),
        "train": dict(steps=50_000, batch_size=128, lr=1e-4, warmup=500, ema=0.9999),
        "unlearn": dict(steps=150, batch_size=128, lr=1e-4, ema=0.9),
    },
    # The paper's main experiment, from the published google/ddpm-celebahq-256: for a GPU.
    "celebahq": {
        "data": dict(data="pictures", data_root="celeba_hq_256"),
        "unet": dict(
            image_size=256, image_channels=3, channels=(128, 128, 256, 256, 512, 512), attention_levels=(4,),
            downsample_padding=0),
        "train": dict(steps=500_000, batch_size=64, lr=2e-5, warmup=5000, ema=0.9999),
        "unlearn": dict(
            checkpoint="ddpm-celebahq-256", steps=60, batch_size=64, accumulate=4, lr=5e-6,
            evaluate_every=10, samples=64, draws=8, memory_timesteps=[250, 500]),
        "eval": dict(checkpoint="ddpm-celebahq-256", draws=8, memory_timesteps=[250, 500]),
    },
    # A few dozen faces, few enough to memorise all of them on one CPU core in an hour. Small batches, as it
    # is the number of steps that counts: 600 of 8 pictures remember better than 300 of 16 of equal cost.
    "faces-64": {
        "data": dict(data="pictures", data_root="faces"),
        "unet": RECENT | dict(
            image_size=64, image_channels=3, channels=(32, 64, 128, 128), layers_per_block=1,
            attention_levels=(), norm_groups=8),
        "train": dict(steps=6500, batch_size=8, lr=1e-3, warmup=100, ema=0.999),
        "unlearn": dict(
            checkpoint="runs/train-1/model.pt", steps=60, batch_size=16, lr=1e-4, ema=0.9,
            evaluate_every=10, samples=64, draws=8, memory_timesteps=[250, 500]),
        "eval": dict(checkpoint="runs/train-1/model.pt", draws=8, memory_timesteps=[250, 500]),
    },
    # For tests and for trying out a change: seconds, and nothing worth looking at.
    "mnist-tiny": {
        "unet": RECENT | dict(channels=(8, 16), layers_per_block=1, attention_levels=(), norm_groups=4),
        "train": dict(steps=20, batch_size=8, lr=1e-3, warmup=5, ema=0.9),
        "unlearn": dict(
            steps=6, batch_size=8, lr=1e-4, ema=0.5, samples=8, sampling_steps=3, draws=2,
            memory_timesteps=[500], evaluate_every=3),
    },
}  # fmt: skip
