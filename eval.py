"""Measure how much was forgotten and what it cost.

    python eval.py --checkpoint runs/siss-1/model.pt --samples 4096     a quick look at one model
    python eval.py bundled runs/*/                                      every metric of every run, compared
    python eval.py runs/*/ --preset faces-64 --forget 005735.jpg        for models of pictures in a folder
"""

from argparse import Namespace

from minisiss.errors import UserError
from minisiss.machine.command_line import Parser, complain, filename, run


def main() -> int:
    args = parse_arguments()
    # These import torch, which takes seconds: only once the command line is known to be right.
    from torchvision.utils import save_image
    from tqdm import tqdm

    from minisiss.machine.device import pick_device
    from minisiss.machine.ranks import start
    from minisiss.report import comparison
    from minisiss.report.evaluation import Evaluation, add_distances, find_runs, one_model
    from minisiss.runs.directory import new_directory, write_json

    if args.data == "prompts":
        raise UserError("--data prompts: what a prompt brings back is shown by unlearn.py")
    device = pick_device(args.device)
    world = start(device)
    found, wrong = find_runs(args, world) if args.runs else ([one_model(args)], [])
    if len(wrong) == 1 and not found:
        raise wrong[0]
    for error in wrong if world.rank == 0 else ():  # one broken run does not stop the others
        complain(error)
    if not found:
        raise UserError("nothing to measure: none of these directories holds a finished run of a script")
    evaluation = Evaluation(args, found[0].image_shape, device, world)
    out = world.on_rank_0(lambda: new_directory(args.out, "eval"))
    world.on_rank_0(lambda: write_json(out / "config.json", vars(args)))
    with tqdm(found, desc="measuring", unit="run") as bar:
        results = [evaluation.measure(one, bar.set_postfix_str) for one in bar]
    if world.rank > 0:
        return 0  # any other status, and torchrun would end rank 0 before it has written the table
    add_distances(results, evaluation.features)
    comparison.write(out, results, args.memory_timesteps, evaluation.forgotten)
    if args.samples and not args.runs:
        save_image(evaluation.first, out / "samples.png", nrow=16, normalize=True, value_range=(-1, 1))
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 2 if wrong else 0


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_preset("data", "eval")
    add = parser.add_argument
    add("runs", type=filename, nargs="*", metavar="RUN",
        help="directories of runs to measure and compare; 'bundled': the model that comes along")
    add("--checkpoint", type=filename, default="bundled",
        help="without a RUN: the model to look at, a model.pt, a published DDPM's directory, or 'bundled'")
    parser.add_data("bundled")
    parser.add_sampling()
    parser.add_machine()
    add("--sscd", type=filename, metavar="FILE",
        help="for RUNs: a copy-detection network, to compare what comes back of the forget image by; "
        "a TorchScript file is code, take it only from whom you trust")
    add("--inception", type=filename, metavar="FILE",
        help="for RUNs: an Inception network, for the FID to kept images; likewise a TorchScript file")
    add("--out", type=filename, help="directory of this evaluation (default: runs/eval-N)")
    args = parser.parse_args()  # fmt: skip
    if args.runs and args.checkpoint != parser.get_default("checkpoint"):
        parser.error("--checkpoint is for a look at one model, without a RUN")
    if not args.runs and (args.sscd or args.inception):
        parser.error("--sscd and --inception are for RUNs; give the directory of one")
    return args


if __name__ == "__main__":
    run(main)
