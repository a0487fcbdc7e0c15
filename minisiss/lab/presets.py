"""The experiments, by name. Imports nothing.

"unet" has the fields of `UNetConfig`. Every other value is the default of a flag: "all" of the
three scripts, "train" of train_ddpm.py, "unlearn" of unlearn.py, and "unlearn METHOD" where a
method needs other values. How the values were found: study/NOTEBOOK.md.
"""

# As in most published DDPMs of recent years; celebahq keeps Ho et al.'s values.
RECENT = dict(norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0)
SMALL = RECENT | dict(layers_per_block=1, attention_levels=(), norm_groups=8)

PRESETS: dict[str, dict[str, dict]] = {
    # The bundled model: small enough to train on two CPU cores in an hour or two.
    "mnist-small": {
        "unet": SMALL | dict(channels=(24, 48, 96)),
        "all": dict(sampling_steps=10),
        "train": dict(steps=14_000, batch_size=64, lr=1e-3, warmup=500, ema=0.999),
        # At large t all noisy images are alike, and the loss has a least value only if
        # s < (n−k)/k = 100. s begins near it: then forgetting begins at large t, and turns the
        # T-shirt into digits. With s = 12 more seeds turn it into a white square.
        "unlearn": dict(steps=320, batch_size=64, lr=1e-4, ema=0.95, draws=16, superfactor=90.0,
                        subtract_until=0.0375, evaluate_every=40),
        # With x ~ X only c > 1 pushes away from A. At ρ = 1 c falls from some 45 to 1.
        "unlearn siss_by_norms": dict(steps=150, lr=2.5e-5, lr_end=1.0, ema=0.9, grad_ratio=1.0,
                                      draw_x="all"),
        "unlearn naive_deletion": dict(steps=150, lr=2e-3),
        "unlearn neggrad": dict(steps=60, lr=2e-5),
        "unlearn erasediff": dict(steps=30, lr=6e-5),
        "unlearn retrack": dict(steps=50, batch_size=128, lr=1e-4, ema=0.0),
        # Its targets have no noise: few steps at a high rate.
        "unlearn old_targets": dict(steps=45, lr=2e-4, evaluate_every=9),
    },
    # The same network with prompts, of which it has memorised 50: see lab/prompted.py.
    "prompts": {
        "all": dict(data="prompts", samples=16, sampling_steps=10, draws=8),
        "unlearn": dict(method="siss_by_norms", checkpoint="bundled-prompts", steps=35,
                        batch_size=16, lr=4e-4, evaluate_every=35, grad_ratio=0.2),
        "unlearn erasediff": dict(lr=2e-4),
        "unlearn neggrad": dict(lr=6e-5),
        "unlearn retrack": dict(lr=1.4e-3),
    },
    # The paper's MNIST model, for a GPU.
    "mnist": {
        "unet": RECENT | dict(channels=(64, 128, 256), head_channels=8),
        "train": dict(steps=50_000, batch_size=128, lr=1e-4, warmup=500, ema=0.9999),
        "unlearn": dict(steps=320, batch_size=128, lr=1e-4, ema=0.95),
    },
    # The paper's main experiment, from the published google/ddpm-celebahq-256: for a GPU.
    "celebahq": {
        "unet": dict(image_size=256, image_channels=3, channels=(128, 128, 256, 256, 512, 512),
                     attention_levels=(4,), downsample_padding=0),
        "all": dict(data="pictures", data_root="celeba_hq_256", checkpoint="ddpm-celebahq-256",
                    draws=8, memory_timesteps=[250, 500]),
        "train": dict(steps=500_000, batch_size=64, lr=2e-5, warmup=5000, ema=0.9999),
        "unlearn": dict(method="siss_by_norms", steps=60, batch_size=64, accumulate=4, lr=5e-6,
                        evaluate_every=10, samples=64),
    },
    # A few dozen faces, memorised on one CPU core in an hour. Many small batches remember best.
    "faces-64": {
        "unet": SMALL | dict(image_size=64, image_channels=3, channels=(32, 64, 128, 128)),
        "all": dict(data="pictures", data_root="faces", checkpoint="runs/train-1/model.pt",
                    draws=8, memory_timesteps=[250, 500]),
        "train": dict(steps=6500, batch_size=8, lr=1e-3, warmup=100, ema=0.999),
        "unlearn": dict(method="siss_by_norms", steps=60, batch_size=16, lr=2e-4, ema=0.9,
                        evaluate_every=10, samples=64),
    },
    # For tests and for trying out a change: seconds, and nothing worth looking at.
    "mnist-tiny": {
        "unet": SMALL | dict(channels=(8, 16), norm_groups=4),
        "all": dict(samples=8, sampling_steps=3, draws=2, memory_timesteps=[500]),
        "train": dict(steps=20, batch_size=8, lr=1e-3, warmup=5, ema=0.9),
        "unlearn": dict(steps=6, batch_size=8, lr=1e-4, ema=0.5, evaluate_every=3),
    },
}
