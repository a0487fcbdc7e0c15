"""Measure how much was forgotten and what it cost.

    python eval.py --checkpoint runs/siss-1/model.pt --samples 4096     a quick look at one model
    python eval.py bundled runs/*/                                      every metric for every run, and the comparison
"""

from argparse import Namespace
from pathlib import Path

from minisiss.cli import Parser, UserError, complain, filename, run


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=filename, nargs="*", metavar="RUN", help="directories of runs to measure and compare; 'bundled': the model that comes along")
    parser.add_argument("--checkpoint", type=filename, default="bundled", help="without a RUN: the model to look at, a model.pt; 'bundled': the one that comes along")
    parser.add_argument("--data-root", type=filename, default="bundled", help="where the T-shirt is: MNIST and FashionMNIST in torchvision's layout, or 'bundled'")
    parser.add_sampling()
    parser.add_machine()
    parser.add_argument("--sscd", type=filename, metavar="FILE", help="for RUNs: a copy-detection network, to compare what comes back of the forget image by; a TorchScript file is code, take it only from whom you trust")
    parser.add_argument("--inception", type=filename, metavar="FILE", help="for RUNs: an Inception network, for the FID of the samples to kept images; likewise a TorchScript file")
    parser.add_argument("--out", type=filename, help="directory of this evaluation (default: runs/eval-N)")
    args = parser.parse_args()
    if args.runs and args.checkpoint != "bundled":
        parser.error("--checkpoint is for a look at one model, without a RUN")
    if not args.runs and (args.sscd or args.inception):
        parser.error("--sscd and --inception are for RUNs; give the directory of one")
    return args


def look(args: Namespace) -> int:
    """How often one model draws the T-shirt, and whether it still remembers it."""
    import torch
    from torchvision.utils import save_image
    from tqdm import tqdm

    from minisiss import evaluation, metrics, runs
    from minisiss.checkpoint import load_matching
    from minisiss.data import mnist_with_tshirt, to_float
    from minisiss.device import at_precision, pick_device
    from minisiss.sampling import sample_batches

    device = pick_device(args.device)
    data = mnist_with_tshirt(args.data_root)
    base = load_matching(args.checkpoint, data.images.shape[1:], args.memory_timesteps, device)
    predict = at_precision(base.model, device, args.precision)
    tshirt = to_float(data.forget[:1]).to(device)
    out = runs.new_directory(args.out, "eval")

    results = {"checkpoint": args.checkpoint, "samples": args.samples, "seed": args.seed}
    copies, first = [], []
    with tqdm(total=args.samples, desc="sampling", unit="image") as bar:
        for images in sample_batches(predict, base.schedule, args.samples, tshirt.shape[1:], args.seed, steps=args.sampling_steps, eta=args.eta):
            copies.append(metrics.is_copy(images, tshirt))
            first += [images] if len(first) < 4 else []
            bar.update(len(images))
            bar.set_postfix_str(f"{torch.cat(copies).sum()} T-shirts")
    if args.samples:
        results |= (found := evaluation.tshirts(torch.cat(copies)))
        low, high = found["tshirt_rate_95"]
        print(f"T-shirts: {found['tshirts']} of {args.samples:,} samples = {found['tshirt_rate']:.2%} (95% interval {low:.2%} to {high:.2%})")
        save_image(torch.cat(first), out / "samples.png", nrow=16, normalize=True, value_range=(-1, 1))
    for t in args.memory_timesteps:
        results |= (memory := evaluation.memory(predict, base.schedule, tshirt, t, args.draws, args.seed))
        alike, back = memory[f"memory_{t}"]["similarity"], memory[f"memory_{t}"]["comes_back"]
        print(f"T-shirt noised to t = {t} and denoised: similarity {alike:.3f}, comes back in {back:.0%} of {args.draws} draws")
    runs.write_json(out / "config.json", vars(args))
    runs.write_json(out / "results.json", results)
    print(f"Written to {out / 'results.json'}" + (f"; the first samples are in {out / 'samples.png'}" if args.samples else ""))
    return 0


def compare(args: Namespace) -> int:
    """Every metric for every run, one table and one picture. What is wrong with one run does not stop the others."""
    from tqdm import tqdm

    from minisiss import colour, comparison, evaluation, metrics, runs
    from minisiss.checkpoint import load_matching
    from minisiss.classifier import classify, load_classifier
    from minisiss.data import draw, held_out_digits, mnist_with_tshirt, step_generator, to_float
    from minisiss.device import at_precision, pick_device
    from minisiss.files import write_atomically
    from minisiss.quality import SPLITS, frechet_distance, moments

    if args.samples < SPLITS:
        raise UserError(f"--samples {args.samples}: an inception score over {SPLITS} splits needs at least {SPLITS}")
    device = pick_device(args.device)
    classifier, real = load_classifier()
    classifier = classifier.to(device)
    sscd = colour.load_torchscript(args.sscd, "--sscd", colour.SSCD, device) if args.sscd else None
    inception = colour.load_torchscript(args.inception, "--inception", colour.INCEPTION, device) if args.inception else None
    data = mnist_with_tshirt(args.data_root).to(device)
    tshirt, image_shape = to_float(data.forget[:1]), data.images.shape[1:]
    sets = {"forget set": data.forget, "kept": data.keep, "held out": held_out_digits(args.data_root).to(device)}

    finished, status = [], 0
    for name in args.runs:
        try:
            finished.append(evaluation.find_run(name, image_shape, args.memory_timesteps))
        except UserError as error:
            complain(error)
            status = 2
    finished = [one for one in finished if one]  # runs/*/ matches the directories of evaluations too
    if not finished:
        complain(UserError("nothing to measure: none of these directories holds a finished run of train_ddpm.py or unlearn.py"))
        return 2
    if inception:
        kept = draw(data.keep, args.samples, step_generator(args.seed, 0, device))
        kept_moments = moments(colour.inception_features(inception, kept))
    out = runs.new_directory(args.out, "eval")
    runs.write_json(out / "config.json", vars(args))

    middle = sorted(args.memory_timesteps)[len(args.memory_timesteps) // 2]
    results, features_of_all = [], []
    bar = tqdm(finished, desc="measuring", unit="run")
    for one in bar:
        base = load_matching(one.checkpoint, image_shape, args.memory_timesteps, device)
        predict = at_precision(base.model, device, args.precision)
        result = {"run": one.name, "method": one.method, "steps": one.steps, "seconds": one.seconds}

        bar.set_postfix_str(f"{one.name}: samples")
        samples = evaluation.draw_samples(
            one, predict, base.schedule, args.samples, image_shape,
            steps=args.sampling_steps, eta=args.eta, seed=args.seed, precision=args.precision,
        )  # fmt: skip
        copies = metrics.is_copy(samples, tshirt)
        features, probabilities = (part.cpu() for part in classify(classifier, samples))
        result |= evaluation.tshirts(copies) | evaluation.quality(features, probabilities, copies.cpu(), real)
        features_of_all.append(moments(features))
        if inception:
            result["fid"] = frechet_distance(moments(colour.inception_features(inception, samples)), kept_moments)

        bar.set_postfix_str(f"{one.name}: memory")
        for t in tqdm(args.memory_timesteps, desc="noise and denoise", unit="timestep", leave=False):
            result |= evaluation.memory(predict, base.schedule, tshirt, t, args.draws, args.seed, classifier)
        if sscd:
            denoised = metrics.memory(predict, base.schedule, tshirt, middle, args.draws, args.seed)[1]
            result["copy_similarity"] = colour.copy_similarity(sscd, denoised, tshirt).mean().item()

        bar.set_postfix_str(f"{one.name}: likelihood")
        result |= evaluation.likelihood(base.model, base.schedule, tshirt, args.seed)
        bar.set_postfix_str(f"{one.name}: losses")
        result |= evaluation.losses(predict, base.schedule, sets, args.seed)
        results.append(result | {"settings": one.settings})

    comparison.add_distances(results, features_of_all)
    groups = comparison.group(results)
    table = comparison.table(groups, middle)
    losses = f"Denoising loss, by tenths of the timesteps from the least noise to the most:\n\n{comparison.table_of_losses(groups)}\n"
    print(f"\n{table}\n")
    write_atomically(out / "results.md", lambda file: file.write(f"{table}\n\n{comparison.EXPLANATION}\n{losses}".encode()))
    runs.write_json(out / "results.json", {"rows": {label: [result["run"] for result in members] for label, members in groups.items()}, "runs": results})
    try:
        from minisiss.plots import save_pareto
    except ImportError:
        print("No pareto.png: it needs matplotlib (pip install matplotlib)")
    else:
        save_pareto(out / "pareto.png", groups, middle)
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return status


def main() -> int:
    args = parse_arguments()
    return compare(args) if args.runs else look(args)


if __name__ == "__main__":
    run(main)
