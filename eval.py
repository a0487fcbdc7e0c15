"""Measure how much was forgotten and what it cost.

    python eval.py --checkpoint runs/siss-1/model.pt --samples 4096     a quick look at one model
    python eval.py bundled runs/*/                                      every metric for every run, and the comparison
    python eval.py --preset faces-64 --forget 005735.jpg runs/*/        for models of pictures in a folder
"""

from argparse import Namespace

from minisiss.errors import UserError
from minisiss.machine.command_line import Parser, complain, filename, run


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_preset("data", "eval")
    parser.add_argument("runs", type=filename, nargs="*", metavar="RUN", help="directories of runs to measure and compare; 'bundled': the model that comes along")
    parser.add_argument("--checkpoint", type=filename, default="bundled", help="without a RUN: the model to look at, a model.pt, the directory of a published DDPM, or 'bundled': the one that comes along")
    parser.add_data("bundled")
    parser.add_sampling()
    parser.add_machine()
    parser.add_argument("--sscd", type=filename, metavar="FILE", help="for RUNs: a copy-detection network, to compare what comes back of the forget image by; a TorchScript file is code, take it only from whom you trust")
    parser.add_argument("--inception", type=filename, metavar="FILE", help="for RUNs: an Inception network, for the FID of the samples to kept images; likewise a TorchScript file")
    parser.add_argument("--out", type=filename, help="directory of this evaluation (default: runs/eval-N)")
    args = parser.parse_args()
    if args.runs and args.checkpoint != parser.get_default("checkpoint"):
        parser.error("--checkpoint is for a look at one model, without a RUN")
    if not args.runs and (args.sscd or args.inception):
        parser.error("--sscd and --inception are for RUNs; give the directory of one")
    return args


def look(args: Namespace) -> int:
    """How often one model draws the T-shirt, and whether it still remembers what it should forget."""
    import torch
    from torchvision.utils import save_image
    from tqdm import tqdm

    from minisiss.data.training_set import training_set
    from minisiss.machine import ranks
    from minisiss.machine.device import at_precision, pick_device
    from minisiss.metrics import forgetting
    from minisiss.report import evaluation
    from minisiss.runs import directory
    from minisiss.runs.checkpoint import load_any
    from minisiss.sampling import sample_batches

    device = pick_device(args.device)
    world = ranks.start(device)
    base = load_any(args.checkpoint, args.memory_timesteps, device)
    image_shape = base.model.config.image_shape
    predict = at_precision(base.model, device, args.precision, args.compile)
    data = world.rank_0_first(lambda: training_set(args.data, args.data_root, args.forget, image_shape, args.skip_unreadable)).to(device)
    originals = data.originals(args.draws)
    out = world.on_rank_0(lambda: directory.new_directory(args.out, "eval"))

    results = {"checkpoint": args.checkpoint, "samples": args.samples, "seed": args.seed}
    copies, first = [], []
    with tqdm(total=args.samples, desc="sampling", unit="image") as bar:
        for images in sample_batches(predict, base.schedule, args.samples, image_shape, args.seed, steps=args.sampling_steps, eta=args.eta, world=world):
            first += [images] if len(first) < 4 else []
            bar.update(len(images))
            if args.data == "mnist":
                copies.append(forgetting.is_copy(images, originals[:1]))
                bar.set_postfix_str(f"{torch.cat(copies).sum()} T-shirts")
    if world.rank > 0:
        return 0
    if copies:
        results |= (found := evaluation.tshirts(torch.cat(copies)))
        low, high = found["tshirt_rate_95"]
        print(f"T-shirts: {found['tshirts']} of {args.samples:,} samples = {found['tshirt_rate']:.2%} (95% interval {low:.2%} to {high:.2%})")
    if first:
        save_image(torch.cat(first), out / "samples.png", nrow=16, normalize=True, value_range=(-1, 1))
    for t in args.memory_timesteps:
        results[f"memory_{t}"] = found = evaluation.memory(forgetting.memory(predict, base.schedule, originals, t, args.seed)[1], originals)
        back = f", comes back in {found['comes_back']:.0%} of {args.draws} draws" if "comes_back" in found else ""
        print(f"{data.name} noised to t = {t} and denoised: similarity {found['similarity']:.3f}, {found['psnr']:.1f} dB{back}")
    directory.write_json(out / "config.json", vars(args))
    directory.write_json(out / "results.json", results)
    print(f"Written to {out / 'results.json'}" + (f"; the first samples are in {out / 'samples.png'}" if first else ""))
    return 0


def compare(args: Namespace) -> int:
    """Every metric for every run, one table and one picture. What is wrong with one run does not stop the others."""
    from tqdm import tqdm

    from minisiss.data.digits import held_out_digits
    from minisiss.data.training_set import draw, step_generator, training_set
    from minisiss.machine import ranks
    from minisiss.machine.device import at_precision, pick_device
    from minisiss.metrics import colour, forgetting
    from minisiss.metrics.classifier import classify, load_classifier
    from minisiss.metrics.quality import SPLITS, frechet_distance, moments
    from minisiss.report import comparison, evaluation
    from minisiss.runs import directory
    from minisiss.runs.checkpoint import load_any
    from minisiss.runs.files import write_atomically

    mnist = args.data == "mnist"
    if args.samples < SPLITS:
        raise UserError(f"--samples {args.samples}: an inception score over {SPLITS} splits needs at least {SPLITS}")
    device = pick_device(args.device)
    world = ranks.start(device)
    sscd = colour.load_torchscript(args.sscd, "--sscd", colour.SSCD, device) if args.sscd else None
    inception = colour.load_torchscript(args.inception, "--inception", colour.INCEPTION, device) if args.inception else None

    finished, status, image_shape = [], 0, (1, 28, 28) if mnist else None  # pictures come in the size of the first model
    for name in args.runs:
        try:
            if one := world.on_rank_0(lambda: evaluation.find_run(name, args.memory_timesteps, image_shape)):  # runs/*/ matches evaluations too
                finished.append(one)
                image_shape = one.image_shape
        except UserError as error:
            if world.rank == 0:
                complain(error)
            status = 2
    if not finished:
        raise UserError("nothing to measure: none of these directories holds a finished run of train_ddpm.py or unlearn.py")

    data = world.rank_0_first(lambda: training_set(args.data, args.data_root, args.forget, image_shape, args.skip_unreadable)).to(device)
    originals, sets = data.originals(args.draws), {"forget set": data.forget, "kept": data.keep}
    if mnist:
        sets["held out"] = held_out_digits(args.data_root).to(device)
        classifier, real = load_classifier()
        classifier = classifier.to(device)
    else:
        kept = data.kept()
    if inception:
        kept_moments = moments(colour.inception_features(inception, draw(data.keep, args.samples, step_generator(args.seed, 0, device))))
    out = world.on_rank_0(lambda: directory.new_directory(args.out, "eval"))
    world.on_rank_0(lambda: directory.write_json(out / "config.json", vars(args)))

    middle = sorted(args.memory_timesteps)[len(args.memory_timesteps) // 2]
    results, features_of_all = [], []
    bar = tqdm(finished, desc="measuring", unit="run")
    for one in bar:
        base = load_any(one.checkpoint, args.memory_timesteps, device)
        predict = at_precision(base.model, device, args.precision, args.compile)
        result = {"run": one.name, "method": one.method, "steps": one.steps, "seconds": one.seconds}

        bar.set_postfix_str(f"{one.name}: samples")
        samples = evaluation.draw_samples(
            one, predict, base.schedule, args.samples, image_shape,
            steps=args.sampling_steps, eta=args.eta, seed=args.seed, precision=args.precision, world=world,
        )  # fmt: skip
        if mnist:
            copies = forgetting.is_copy(samples, originals[:1])
            features, probabilities = (part.cpu() for part in classify(classifier, samples))
            result |= evaluation.tshirts(copies) | evaluation.quality(features, probabilities, copies.cpu(), real)
            features_of_all.append(moments(features))
        if inception:
            result["fid"] = frechet_distance(moments(colour.inception_features(inception, samples)), kept_moments)

        bar.set_postfix_str(f"{one.name}: memory")
        for t in tqdm(args.memory_timesteps, desc="noise and denoise", unit="timestep", leave=False):
            denoised = forgetting.memory(predict, base.schedule, originals, t, args.seed)[1]
            result[f"memory_{t}"] = evaluation.memory(denoised, originals, classifier if mnist else None)
            if sscd and t == middle:
                result["copy_similarity"] = colour.copy_similarity(sscd, denoised, originals).mean().item()
            if not mnist:
                result[f"kept_memory_{t}"] = evaluation.memory(forgetting.memory(predict, base.schedule, kept, t, args.seed)[1], kept)

        bar.set_postfix_str(f"{one.name}: likelihood")
        result |= evaluation.likelihood(base.model, base.schedule, originals[:1], args.seed)
        bar.set_postfix_str(f"{one.name}: losses")
        result |= evaluation.losses(predict, base.schedule, sets, args.seed)
        results.append(result | {"settings": one.settings})

    if world.rank > 0:
        return 0  # any other status, and torchrun would end rank 0 before it has written the table
    if mnist:
        comparison.add_distances(results, features_of_all)
    groups = comparison.group(results)
    table = comparison.table(groups, middle)
    losses = f"Denoising loss, by tenths of the timesteps from the least noise to the most:\n\n{comparison.table_of_losses(groups)}\n"
    print(f"\n{table}\n")
    write_atomically(out / "results.md", lambda file: file.write(f"{table}\n\n{comparison.EXPLANATION}\n{losses}".encode()))
    directory.write_json(out / "results.json", {"rows": {label: [result["run"] for result in members] for label, members in groups.items()}, "runs": results})
    try:
        from minisiss.report.plots import save_pareto
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
