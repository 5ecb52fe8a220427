#!/usr/bin/env bash
# Reward against diversity of every method of toy_mnist_flow.py at several strengths, 5 seeds: 110 fine-tunings.
#   bash benchmark/toy_tradeoff.sh RUNS_DIR [flags for toy_mnist_flow.py, such as --data-dir DIR or --dataset digits]
# then: python benchmark/plot_tradeoff.py RUNS_DIR benchmark/results/toy_tradeoff
# SEEDS="1 2" and JOBS=1 (processes at a time, one thread each) change the size.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=$1
shift
export OMP_NUM_THREADS=1
toy=(python toy_mnist_flow.py --dataset mnist --output-dir "$runs" "$@")
mkdir -p "$runs"

one_seed() {
    "${toy[@]}" --seed "$1" --run-name "seed$1" --methods orw adrpo raft dpo \
        --alpha 0 0.03 0.1 0.2 0.3 0.5 1 --beta0 0.02 0.04 0.06 0.1 0.2 0.4 --beta-dpo 10 30 100 300 1000
    # Is the fixed weight better off with a smaller tau?
    "${toy[@]}" --seed "$1" --run-name "seed$1-tau30" --pretrained "$runs/seed$1" --methods orw \
        --alpha 0.1 0.2 0.3 --tau 30
}

for seed in ${SEEDS:-1 2 3 4 5}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    one_seed "$seed" >"$runs/seed$seed.log" 2>&1 &
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
exit "$failed"
