#!/usr/bin/env bash
# grpo and adrpo of adrpo_grpo_llm.py from the same base models on the small language world.
#   for seed in 4 5 6; do python benchmark/mini_world_llm.py worlds/trap$seed --task trap --rare 0.015 --seed $seed; done
#   python benchmark/mini_world_llm.py worlds/sort1 --seed 1
#   bash benchmark/llm_mini.sh worlds runs
#   python benchmark/llm_mini_table.py worlds runs benchmark/results/llm_mini
# SEEDS="1 2 3 4 5", BASES="4 5 6" (of the trap), JOBS=1 (processes at a time, one thread each) change the size,
# SETTINGS="grpo-0.04 adrpo-0.04" runs these only.
#
# Fixed before any of these runs: task, rarity, learning rate, batch and 250 iterations. The question put to the trap: is
# the held-out reward in the end higher with adrpo than with grpo, both at beta0 = 0.04 and k = 1, over three base models
# and five seeds, paired? The other settings are there to show how it depends on beta0 and k. Before it there were pilots
# of grpo alone (base models of seeds 11 and 12), and a first sweep on base models 1 to 3 at --rare 0.01 with 150
# iterations, stopped after 36 runs because not one of them, of either method, had escaped.
set -euo pipefail
worlds=$(cd "$1" && pwd)
mkdir -p "$2"
runs=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
python=${PYTHON:-python}

common="--cpu --precision fp32 --output-dir $runs --max-prompt-length 8 --max-completion-length 8 --group-size 8"
common+=" --rollout-batch 512 --eval-max-prompts 128 --eval-samples 4 --save-every 1000"
common+=" --learning-rate 1e-4"

world() { # flags that name a world
    echo "--model-id $1/model --dataset $1/train_prompts.jsonl --eval-dataset $1/heldout_prompts.jsonl"
}

settings=${SETTINGS:-grpo-0.04 adrpo-0.04 grpo-0 grpo-0.08 adrpo-0.04-k2 adrpo-0.04-k0.5 adrpo-0.08 grpo-0.3 adrpo-0.3}

for seed in ${SEEDS:-1 2 3 4 5}; do
    for setting in $settings; do
        IFS=- read -r method beta0 clip <<<"$setting"
        flags="--seed $seed --method $method --beta0 $beta0 --adv-clip-k $(echo "${clip:-k1}" | tr -d k)"
        trap="--prompts-per-update 12 --iterations 250 --eval-every 25 --reward benchmark/mini_world_llm.py:trap"
        trap+=" benchmark/mini_world_llm.py:ascending benchmark/mini_world_llm.py:descending --reward-weights 1 0 0"
        sort="--prompts-per-update 16 --iterations 150 --eval-every 15"
        sort+=" --reward benchmark/mini_world_llm.py:sorted_exactly"
        for base in ${BASES:-4 5 6}; do
            echo "trap$base-$setting-seed$seed $(world "$worlds/trap$base") $trap $flags"
        done
        echo "sort1-$setting-seed$seed $(world "$worlds/sort1") $sort $flags"
    done
done | while read -r name flags; do
    if [ ! -f "$runs/$name/summary.json" ]; then # continue where an earlier call stopped
        rm -rf "${runs:?}/$name"
        echo "--run-name $name $flags"
    fi
done | xargs -P "${JOBS:-2}" -I{} bash -c "$python adrpo_grpo_llm.py $common {} >>\"$runs\"/log.txt 2>&1"
