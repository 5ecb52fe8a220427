#!/usr/bin/env bash
# What each choice of adrpo in toy_mnist_flow.py is worth: one flag changed at a time, on the base models of
# benchmark/toy_tradeoff.sh (its RUNS_DIR).
#   bash benchmark/toy_ablation.sh RUNS_DIR OUT_DIR [flags for toy_mnist_flow.py, such as --data-dir DIR]
# then: python benchmark/ablation_table.py OUT_DIR benchmark/results/toy_ablation.md
# SEEDS="1 2" and JOBS=1 (processes at a time, one thread each) change the size. About 8 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=$1 out=$2
shift 2
export OMP_NUM_THREADS=1
toy=(python toy_mnist_flow.py --dataset mnist --output-dir "$out" --eval-every 20 --save-every 100000 --methods adrpo "$@")
mkdir -p "$out"

one_seed() {
    local seed=$1 base=(--seed "$1" --pretrained "$runs/seed$1-default")
    "${toy[@]}" "${base[@]}" --run-name "defaults--seed$seed"
    "${toy[@]}" "${base[@]}" --run-name "adv-clip-k-1--seed$seed" --adv-clip-k 1
    "${toy[@]}" "${base[@]}" --run-name "adv-clip-k-4--seed$seed" --adv-clip-k 4
    "${toy[@]}" "${base[@]}" --run-name "adv-norm-group-beta0-0.25--seed$seed" --adv-norm group --beta0 0.25
    "${toy[@]}" "${base[@]}" --run-name "ema-decay-0--seed$seed" --ema-decay 0
    "${toy[@]}" "${base[@]}" --run-name "num-steps-10--seed$seed" --num-steps 10
    "${toy[@]}" "${base[@]}" --run-name "group-size-64--seed$seed" --group-size 64
    "${toy[@]}" "${base[@]}" --run-name "precision-fp32--seed$seed" --precision fp32
}

for seed in ${SEEDS:-1 2 3}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    one_seed "$seed" >"$out/seed$seed.log" 2>&1 &
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
exit "$failed"
