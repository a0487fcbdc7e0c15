#!/usr/bin/env bash
# The study behind the README's tables: the base model, the model retrained without the T-shirt, every method
# with three seeds, SISS with other λ and ρ, whether what was forgotten comes back, and the comparisons.
#
#     bash minisiss/study/study.sh                the bundled model as the base: hours on two CPU cores
#     bash minisiss/study/study.sh mnist          the paper's model, everything from the start: for a GPU
#     bash minisiss/study/study.sh mnist ROOT     with MNIST and FashionMNIST in ROOT instead of data/
#     bash minisiss/study/study.sh prompts        what prompts bring back
#
# Ctrl-C stops it. Started again, it leaves alone what is finished and goes on with what was stopped.
set -euo pipefail
export LC_ALL=C # runs in the same order in every table, whatever the language

preset=${1:-mnist-small} root=${2:-data}
study=runs/study-$preset ablation=runs/ablation-$preset again=runs/again-$preset
here=$(dirname "$0")/../..

if [ "$preset" = prompts ]; then
    for seed in 3 4; do # what the preset was chosen by
        python -m minisiss.study.prompts --prompts 46 50 --seed "$seed" --out "runs/tuning-prompts-$seed"
    done
    for seed in 0 1 2; do python -m minisiss.study.prompts --seed "$seed" --out "runs/study-prompts-$seed"; done
    python -m minisiss.study.prompts --in-a-row --out runs/study-prompts-0
    exit
fi

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

forget=(--preset "$preset" --data-root "$root" --samples 0) # eval.py draws the samples
paper=(--method siss --grad-ratio 0.1 --steps 300) # the paper's rule, which takes more steps here
ceiling=(--method siss --superfactor 9 --ceiling 1.75 --steps 200)
for seed in 0 1 2; do
    for method in siss siss_no_is naive_deletion neggrad erasediff retrack unseen; do
        once unlearn.py "$study/$method-$seed" "${forget[@]}" --checkpoint "$base" --method "$method" --seed "$seed"
    done
    once unlearn.py "$study/paper-$seed" "${forget[@]}" --checkpoint "$base" "${paper[@]}" --seed "$seed"
    once unlearn.py "$study/ceiling-$seed" "${forget[@]}" --checkpoint "$base" "${ceiling[@]}" --seed "$seed"
done
# λ = 0.5 is the preset of SISS, and one of these ρ too, whose run stands for both.
siss=("${forget[@]}" --checkpoint "$base" --method siss)
for lam in 0 0.1 0.9 1; do once unlearn.py "$ablation/lam-$lam" "${siss[@]}" --lam "$lam"; done
for rho in 0.01 0.05 0.1 0.3 0.5 1; do once unlearn.py "$ablation/rho-$rho" "${siss[@]}" --grad-ratio "$rho"; done

# Does it come back? Training goes on, on X∖A (naive deletion) and on X (the kept term alone, with x ~ X).
for run in retrained siss-0 ceiling-0 siss_no_is-0 naive_deletion-0 retrack-0 unseen-0; do
    on=("${forget[@]}" --checkpoint "$study/$run/model.pt" --lr 1e-4 --ema 0.9 --evaluate-every 10)
    once unlearn.py "$again/kept-$run" "${on[@]}" --method naive_deletion --steps 300
    once unlearn.py "$again/all-$run" "${on[@]}" --method siss_no_is --grad-ratio 0 --draw-x all --steps 150
done

python "$here/eval.py" "${pretrained[@]}" "$study"/*/ --data-root "$root" --samples 4096
for runs in "$ablation" "$again"; do
    python "$here/eval.py" "$runs"/*/ --data-root "$root" --samples 1024
done
