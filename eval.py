"""Measure a checkpoint: how often it draws the T-shirt, and how much of the T-shirt it remembers.

    python eval.py --checkpoint runs/siss-1/model.pt --samples 4096
"""

from argparse import Namespace

from minisiss.cli import Parser, UserError, run


def parse_arguments() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", default="bundled", help="a model.pt; 'bundled': the one that comes along")
    parser.add_argument("--data-root", default="bundled", help="where the T-shirt comes from: FashionMNIST in torchvision's layout, or 'bundled'")
    parser.add_sampling()
    parser.add_machine()
    parser.add_argument("--out", help="directory of this run (default: runs/eval-N)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    return 0


if __name__ == "__main__":
    run(main)
