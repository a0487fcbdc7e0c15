"""Measure a checkpoint: how often it draws the T-shirt, and whether it still remembers it.

    python eval.py --checkpoint runs/siss-1/model.pt --samples 4096
"""

from argparse import Namespace

from minisiss.cli import Parser, run


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", default="bundled", help="a model.pt; 'bundled': the one that comes along")
    parser.add_argument("--data-root", default="bundled", help="where the T-shirt is: FashionMNIST in torchvision's layout, or 'bundled'")
    parser.add_sampling()
    parser.add_machine()
    parser.add_argument("--out", help="directory of this run (default: runs/eval-N)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    import torch
    from torchvision.utils import save_image
    from tqdm import tqdm

    from minisiss import metrics, runs
    from minisiss.checkpoint import load_matching
    from minisiss.data import mnist_with_tshirt, to_float
    from minisiss.device import at_precision, pick_device
    from minisiss.sampling import sample_batches

    device = pick_device(args.device)
    data = mnist_with_tshirt(args.data_root)
    base = load_matching(args.checkpoint, data.images.shape[1:], args.memory_timesteps, device)
    model, schedule = base.model, base.schedule
    predict = at_precision(model, device, args.precision)
    tshirt = to_float(data.forget[:1]).to(device)
    out = runs.new_directory(args.out, "eval")

    results = {"checkpoint": args.checkpoint, "samples": args.samples, "seed": args.seed}
    tshirts, first = 0, []
    with tqdm(total=args.samples, desc="sampling", unit="image") as bar:
        for images in sample_batches(predict, schedule, args.samples, tshirt.shape[1:], args.seed, steps=args.sampling_steps, eta=args.eta):
            tshirts += int(metrics.is_copy(images, tshirt).sum())
            first += [images] if len(first) < 4 else []
            bar.update(len(images))
            bar.set_postfix_str(f"{tshirts} T-shirts")
    if args.samples:
        low, high = metrics.wilson_interval(tshirts, args.samples)
        results |= {"tshirts": tshirts, "tshirt_rate": tshirts / args.samples, "tshirt_rate_95": [low, high]}
        print(f"T-shirts: {tshirts} of {args.samples:,} samples = {tshirts / args.samples:.2%} (95% interval {low:.2%} to {high:.2%})")
        save_image(torch.cat(first), out / "samples.png", nrow=16, normalize=True, value_range=(-1, 1))
    for t in args.memory_timesteps:
        denoised = metrics.memory(predict, schedule, tshirt, t, args.draws, args.seed)[1]
        alike, back = metrics.similarity(denoised, tshirt).mean().item(), metrics.is_copy(denoised, tshirt).float().mean().item()
        results[f"memory_{t}"] = {"similarity": alike, "comes_back": back}
        print(f"T-shirt noised to t = {t} and denoised: similarity {alike:.3f}, comes back in {back:.0%} of {args.draws} draws")
    runs.write_json(out / "config.json", vars(args))
    runs.write_json(out / "results.json", results)
    print(f"Written to {out / 'results.json'}" + (f"; the first samples are in {out / 'samples.png'}" if args.samples else ""))
    return 0


if __name__ == "__main__":
    run(main)
