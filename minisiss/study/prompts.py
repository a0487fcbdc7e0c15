"""The table of what prompts bring back: a row per method, from the runs that study.sh made.

    python -m minisiss.study.prompts runs/study-prompts/*/

A prompt is mitigated where none of 16 samples is the memorised picture, and 75% show the digit
named.
"""

import json
from pathlib import Path
from statistics import mean

from minisiss.lab.cli import Parser, read_config, run
from minisiss.lab.pictures import aligned

NAMED = 0.75


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    methods: dict[str, list[dict]] = {}
    for name in parser.parse_args().runs:
        method = read_config(name)["method"]
        methods.setdefault(method, []).append(json.loads(Path(name, "results.json").read_text()))
    rows = [["", "prompts", "mitigated: modified", "mitigated: original", "other pictures lost"]]
    for method, results in methods.items():
        row = [method, str(len(results))]
        for kind in ("modified", "original"):
            good = [r[kind]["copies"][1] == 0 and r[kind]["named"][1] >= NAMED for r in results]
            row.append(f"{mean(good):.0%}")
        row.append(f"{mean(r['others'][0] - r['others'][1] for r in results):.1f}")
        rows.append(row)
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    run(main)
