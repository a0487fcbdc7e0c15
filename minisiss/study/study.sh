#!/usr/bin/env bash
# The study behind the README's tables: the base model, the model retrained without the T-shirt, every method
# with three seeds, SISS with other λ and ρ, and the comparisons.
#
#     bash minisiss/study/study.sh                the bundled model as the base: hours on two CPU cores
#     bash minisiss/study/study.sh mnist          the paper's model, everything from the start: for a GPU
#     bash minisiss/study/study.sh mnist ROOT     with MNIST and FashionMNIST in ROOT instead of data/
#
# Ctrl-C stops it. Started again, it leaves alone what is finished and goes on with what was stopped.
set -euo pipefail

preset=${1:-mnist-small} root=${2:-data}
study=runs/study-$preset ablation=runs/ablation-$preset
here=$(dirname "$0")/../..

once() { # once SCRIPT DIRECTORY FLAGS…: start the run there or go on with it, unless it is finished
    if [ -e "$2/done" ]; then return; fi
    local how=(--out "$2" "${@:3}")
    if [ -e "$2/config.json" ]; then how=(--resume "$2"); fi
    python "$here/$1" "${how[@]}"
    touch "$2/done"
}

base=bundled pretrained=(bundled)
if [ "$preset" != mnist-small ]; then
    base=$study/pretrained/model.pt pretrained=()
    once train_ddpm.py "$study/pretrained" --preset "$preset" --data-root "$root"
fi
once train_ddpm.py "$study/retrained" --preset "$preset" --data-root "$root" --exclude-forget

forget=(--preset "$preset" --data-root "$root" --checkpoint "$base" --samples 0) # eval.py draws the samples
for seed in 0 1 2; do
    for method in siss siss_no_is naive_deletion neggrad erasediff; do
        once unlearn.py "$study/$method-$seed" "${forget[@]}" --method "$method" --seed "$seed"
    done
done
# λ = 0.5 is the preset, and one of these ρ too, whose run stands for both.
for lam in 0 0.1 0.9 1; do once unlearn.py "$ablation/lam-$lam" "${forget[@]}" --lam "$lam"; done
for rho in 0.01 0.05 0.1 0.3 0.5 1; do
    once unlearn.py "$ablation/rho-$rho" "${forget[@]}" --grad-ratio "$rho"
done

python "$here/eval.py" "${pretrained[@]}" "$study"/*/ --data-root "$root" --samples 4096
python "$here/eval.py" "$ablation"/*/ --data-root "$root" --samples 1024
