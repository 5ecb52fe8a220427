#!/usr/bin/env bash
# grpo and adrpo of adrpo_grpo_llm.py from the same base models on the small language world.
#   for seed in 1 2 3; do python benchmark/mini_world_llm.py worlds/trap$seed --task trap --seed $seed; done
#   python benchmark/mini_world_llm.py worlds/sort1 --seed 1
#   bash benchmark/llm_mini.sh worlds runs
#   python benchmark/llm_mini_table.py worlds runs benchmark/results/llm_mini
# SEEDS="1 2 3 4 5", BASES="1 2 3" (of the trap), JOBS=1 (processes at a time, one thread each) change the size.
#
# Fixed before any of these runs, after pilots of grpo alone on two other base models (seeds 11 and 12), in which it
# escaped the trap after 60 to 180 iterations: task, rarity, learning rate, batch and 150 iterations. The question put to
# the trap: is the held-out reward after 150 iterations higher with adrpo than with grpo, both at beta0 = 0.04 and k = 1,
# over three base models and five seeds, paired? The other settings are there to show how it depends on beta0 and k.
set -euo pipefail
worlds=$(cd "$1" && pwd)
mkdir -p "$2"
runs=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
python=${PYTHON:-python}

common="--cpu --precision fp32 --output-dir $runs --max-prompt-length 8 --max-completion-length 8 --group-size 8"
common+=" --rollout-batch 512 --eval-max-prompts 128 --eval-samples 4 --eval-every 15 --save-every 1000"
common+=" --learning-rate 1e-4 --iterations 150"

world() { # flags that name a world
    echo "--model-id $1/model --dataset $1/train_prompts.jsonl --eval-dataset $1/heldout_prompts.jsonl"
}

settings="grpo-0.04 adrpo-0.04 grpo-0 grpo-0.08 adrpo-0.08 adrpo-0.04-k0.5 adrpo-0.04-k2 grpo-0.3 adrpo-0.3"

for seed in ${SEEDS:-1 2 3 4 5}; do
    for setting in $settings; do
        IFS=- read -r method beta0 clip <<<"$setting"
        flags="--seed $seed --method $method --beta0 $beta0 --adv-clip-k $(echo "${clip:-k1}" | tr -d k)"
        for base in ${BASES:-1 2 3}; do
            rewards="benchmark/mini_world_llm.py:trap benchmark/mini_world_llm.py:ascending"
            rewards+=" benchmark/mini_world_llm.py:descending --reward-weights 1 0 0"
            echo "trap$base-$setting-seed$seed $(world "$worlds/trap$base") --prompts-per-update 12 --reward $rewards $flags"
        done
        reward="benchmark/mini_world_llm.py:sorted_exactly"
        echo "sort1-$setting-seed$seed $(world "$worlds/sort1") --prompts-per-update 16 --reward $reward $flags"
    done
done | while read -r name flags; do
    if [ ! -f "$runs/$name/summary.json" ]; then # continue where an earlier call stopped
        rm -rf "${runs:?}/$name"
        echo "--run-name $name $flags"
    fi
done | xargs -P "${JOBS:-2}" -I{} bash -c "$python adrpo_grpo_llm.py $common {} >>\"$runs\"/log.txt 2>&1"
