#!/usr/bin/env bash
# Reward against diversity of every method of toy_mnist_flow.py at several strengths, 5 seeds: 95 fine-tunings.
#   bash benchmark/toy_tradeoff.sh RUNS_DIR [flags for toy_mnist_flow.py, such as --data-dir DIR or --dataset digits]
# then: python benchmark/plot_tradeoff.py RUNS_DIR benchmark/results/toy_tradeoff
# SEEDS="1 2" and JOBS=1 (processes at a time, one thread each) change the size. About 40 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=$1
shift
export OMP_NUM_THREADS=1
toy=(python toy_mnist_flow.py --dataset mnist --output-dir "$runs" --eval-every 20 --save-every 100000 "$@")

one_seed() {
    local seed=$1 base="$runs/seed$1-default"
    # The default run trains the seed's base model; the others start from the same one.
    "${toy[@]}" --seed "$seed" --run-name "seed$seed-default"
    local strengths=("0.01 0.03 10" "0.02 0.1 30" "0.03 0.3 300" "0.1 0.5 1000" "0.2 1.0 -")
    for strength in "${strengths[@]}"; do
        read -r beta0 alpha beta_dpo <<<"$strength"
        local methods=(adrpo orw-w2) dpo=()
        if [ "$beta_dpo" != - ]; then methods+=(dpo) dpo=(--beta-dpo "$beta_dpo"); fi
        "${toy[@]}" --seed "$seed" --pretrained "$base" --methods "${methods[@]}" \
            --beta0 "$beta0" --alpha "$alpha" "${dpo[@]}" --run-name "seed$seed-beta0_$beta0"
    done
}

jobs_max=${JOBS:-2}
for seed in ${SEEDS:-1 2 3 4 5}; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs_max" ]; do wait -n; done
    one_seed "$seed" >"$(mkdir -p "$runs" && echo "$runs/seed$seed.log")" 2>&1 &
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
exit "$failed"
