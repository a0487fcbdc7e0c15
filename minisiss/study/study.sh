#!/usr/bin/env bash
# The study behind the README's table:
#     bash minisiss/study/study.sh                  the bundled model as the base: hours on two CPU cores
#     bash minisiss/study/study.sh mnist            the paper's model, from the start: for a GPU
#     bash minisiss/study/study.sh prompts [METHOD] what 45 prompts bring back
# Stopped and started again, it goes on where it was. MNIST is read from data/, or from a second argument.
set -euo pipefail
export LC_ALL=C # the runs have the same order in every language
cd "$(dirname "$0")/../.."

once() { # once SCRIPT DIRECTORY FLAGS…: start the run there, or resume it, unless it is finished
    if [ -e "$2/done" ]; then return; fi
    local how=(--out "$2" "${@:3}")
    if [ -e "$2/config.json" ]; then how=(--resume "$2"); fi
    python "$1" "${how[@]}" || return
    touch "$2/done"
}

preset=${1:-mnist-small}
if [ "$preset" = prompts ]; then
    method=${2:-siss_by_norms}
    mkdir -p runs/study-prompts
    python - <<END | head -45 | while IFS= read -r prompt; do
from minisiss.lab.checkpoint import load_any
print(*load_any("bundled-prompts").memorised, sep="\n")
END
        run="runs/study-prompts/$method-${prompt##* }"
        once unlearn.py "$run" --preset prompts --method "$method" --prompt "$prompt" ||
            echo "$prompt: no modified prompt" >> "runs/study-prompts/$method-failed.txt"
    done
    python - runs/study-prompts/"$method"-*/results.json <<END
import json, sys
from statistics import mean
before, after = zip(*(json.load(open(path)).values() for path in sys.argv[1:]))
given = "other memorised pictures given"
print(f"{len(after)} prompts; {mean(run[given] for run in before) - mean(run[given] for run in after):.1f} other pictures lost")
for kind in ("modified", "original"):  # mitigated: no copy, and 75% of the samples show the digit named
    good = [run[f"{kind}: copies"] == 0 and run[f"{kind}: its digit"] >= 0.75 for run in after]
    print(f"mitigated at the {kind} prompt: {sum(good) / 45:.0%} of 45")
END
    exit
fi

root=${2:-data} digits=bundled
study=runs/study-$preset
base=bundled models=(bundled)
if [ "$preset" != mnist-small ]; then
    base=$study/pretrained/model.pt models=() digits=$root
    once train_ddpm.py "$study/pretrained" --preset "$preset" --data-root "$root"
fi
once train_ddpm.py "$study/retrained" --preset "$preset" --data-root "$root" --exclude-forget
for seed in 0 1 2; do
    for method in siss siss_by_norms siss_no_is naive_deletion neggrad erasediff retrack old_targets; do
        once unlearn.py "$study/$method-$seed" --preset "$preset" --data-root "$digits" --samples 0 \
            --checkpoint "$base" --method "$method" --seed "$seed"
    done
done
python eval.py "${models[@]}" "$study"/*/ --preset "$preset" --data-root "$digits"
