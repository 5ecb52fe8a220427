#!/usr/bin/env bash
# What each choice of adrpo in toy_mnist_flow.py is worth: one flag changed at a time; and beta0 for a
# reward that does not saturate. On the base models of benchmark/toy_tradeoff.sh (its RUNS_DIR).
#   bash benchmark/toy_ablation.sh RUNS_DIR OUT_DIR [flags for toy_mnist_flow.py, such as --data-dir DIR]
# then: python benchmark/ablation_table.py OUT_DIR benchmark/results/toy_ablation.md
# SEEDS="1 2" and JOBS=1 (processes at a time, one thread each) change the size.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=$1 out=$2
shift 2
export OMP_NUM_THREADS=1
toy=(python toy_mnist_flow.py --dataset mnist --output-dir "$out" --methods adrpo "$@")
mkdir -p "$out"

one_seed() {
    local seed=$1 base=(--seed "$1" --pretrained "$runs/seed$1")
    local eq6=(--adv-norm none --beta0 0.05)
    "${toy[@]}" "${base[@]}" --run-name "defaults--seed$seed"
    "${toy[@]}" "${base[@]}" --run-name "adv-norm-group--seed$seed" --adv-norm group --beta0 0.25
    "${toy[@]}" "${base[@]}" --run-name "eq6--seed$seed" "${eq6[@]}"
    "${toy[@]}" "${base[@]}" --run-name "eq6-adv-clip-k-1--seed$seed" "${eq6[@]}" --adv-clip-k 1
    "${toy[@]}" "${base[@]}" --run-name "eq6-adv-clip-k-4--seed$seed" "${eq6[@]}" --adv-clip-k 4
    "${toy[@]}" "${base[@]}" --run-name "eq6-ema-decay-0--seed$seed" "${eq6[@]}" --ema-decay 0
    "${toy[@]}" "${base[@]}" --run-name "eq6-num-steps-10--seed$seed" "${eq6[@]}" --num-steps 10
    "${toy[@]}" "${base[@]}" --run-name "eq6-group-size-64--seed$seed" "${eq6[@]}" --group-size 64
    "${toy[@]}" "${base[@]}" --run-name "eq6-fp32--seed$seed" "${eq6[@]}" --precision fp32
    "${toy[@]}" "${base[@]}" --run-name "darkness--seed$seed" --reward benchmark/darkness.py:darkness \
        --beta0 0.1 0.3 1 3
}

for seed in ${SEEDS:-1 2 3}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
    one_seed "$seed" >"$out/seed$seed.log" 2>&1 &
done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
exit "$failed"
