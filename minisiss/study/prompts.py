"""The table of what prompts bring back: a row per method, from the runs that study.sh made.

    python -m minisiss.study.prompts runs/study-prompts/*/

A prompt is mitigated where none of 16 samples is the memorised picture, and 75% show the digit
named.
"""

import json
from pathlib import Path
from statistics import mean

from minisiss.lab.cli import Parser, read_config, run
from minisiss.lab.evaluation import aligned
from minisiss.lab.prompted import GIVEN


def mitigated(after: dict, kind: str) -> bool:
    """Whether a prompt is mitigated. after: the figures after unlearning, in results.json."""
    return after[f"{kind}: copies"] == 0 and after[f"{kind}: its digit"] >= 0.75


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    methods: dict[str, list[dict]] = {}
    for name in parser.parse_args().runs:
        results = json.loads(Path(name, "results.json").read_text())
        methods.setdefault(read_config(name)["method"], []).append(results)
    rows = [["", "prompts", "mitigated: modified", "mitigated: original", "other pictures lost"]]
    for method, runs in methods.items():
        modified = mean(mitigated(results["after"], "modified") for results in runs)
        original = mean(mitigated(results["after"], "original") for results in runs)
        lost = mean(results["before"][GIVEN] - results["after"][GIVEN] for results in runs)
        rows.append([method, str(len(runs)), f"{modified:.0%}", f"{original:.0%}", f"{lost:.1f}"])
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    run(main)
