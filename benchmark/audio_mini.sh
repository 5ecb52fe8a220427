#!/usr/bin/env bash
# grpo and adrpo of adrpo_audio_mmau.py, with the outcome's rewards and with CESAR's, on the small world of sounds.
#   for seed in 2 3 4; do python benchmark/mini_world_audio.py worlds/audio$seed --seed $seed; done
#   bash benchmark/audio_mini.sh worlds runs
#   python benchmark/audio_mini_table.py worlds runs benchmark/results/audio_mini
# SEEDS="2 3 4" (a base model and a run each), JOBS=2 (processes at a time, one thread each) change the size,
# SETTINGS="grpo adrpo" runs these only.
#
# Fixed before any of these runs: world, learning rate, batch, 90 iterations, seeds and these questions, each answered by
# the paired difference over the base models: is adrpo (k = 1) more often right than grpo, greedily and sampled? Do 0.5x
# and 2x of the clip range differ from 1x? Do CESAR's rewards lower the share of rambling, which has no effect on the
# answer in this world, and does their use change accuracy? Before it there was a run of grpo on a base model of seed 1.
set -euo pipefail
worlds=$(cd "$1" && pwd)
mkdir -p "$2"
runs=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
python=${PYTHON:-python}

common="--cpu --precision fp32 --eval-batch 128 --rollout-batch 512"
train="--iterations 90 --prompts-per-update 12 --group-size 8 --max-completion-length 128 --train-tokens 8192"
train+=" --lora-rank 16 --lora-alpha 32 --learning-rate 1e-3 --think-budget 50 --eval-every 1000 --eval-max 72 --save-every 1000"
measure="--max-completion-length 192"

job() { # name, flags: one line for xargs, unless it is done
    if [ ! -f "$runs/$1/done" ]; then
        rm -rf "${runs:?}/$1"
        echo "$1 $2"
    fi
}

run() { # one job in a process of its own; of a greedy one the curve over all think budgets
    case $1 in
    *-greedy) $python benchmark/mmau_scaling.py "$runs/$1" --think-budgets 0 25 50 75 100 $common "${@:2}" ;;
    *) $python adrpo_audio_mmau.py $common --output-dir "$runs" --run-name "$@" ;;
    esac >>"$runs/log-$1.txt" 2>&1 && touch "$runs/$1/done"
}

flags_of() { # of a setting
    case $1 in
    grpo) echo "--method grpo" ;;
    adrpo) echo "--method adrpo" ;;
    adrpo-k0.5) echo "--method adrpo --adv-clip-k 0.5" ;;
    adrpo-k2) echo "--method adrpo --adv-clip-k 2" ;;
    grpo-cesar) echo "--method grpo --reward-weights 5 1 1 1 1" ;;
    adrpo-cesar) echo "--method adrpo --reward-weights 5 1 1 1 1" ;;
    *)
        echo "error: SETTINGS: no setting $1" >&2
        exit 1
        ;;
    esac
}

all() { # runs the lines of stdin
    xargs -P "${JOBS:-2}" -I{} bash -c "run {}"
}

export -f run
export python common runs
settings=${SETTINGS:-grpo adrpo adrpo-cesar grpo-cesar adrpo-k0.5 adrpo-k2}
for seed in ${SEEDS:-2 3 4}; do
    world="--model-id $worlds/audio$seed/model --eval-data $worlds/audio$seed/heldout.json"
    for setting in $settings; do
        flags=$(flags_of "$setting") # on a line of its own: an unknown setting ends the script
        job "$setting-$seed" "$world --train-data $worlds/audio$seed/train.json --seed $seed $train $flags"
    done
done | all

# Every model, and the base model: greedily at every think budget, and one sample of each question at that of training.
for seed in ${SEEDS:-2 3 4}; do
    world="--model-id $worlds/audio$seed/model --eval-data $worlds/audio$seed/heldout.json --seed $seed"
    for setting in base $settings; do
        adapter=$([ "$setting" = base ] || echo "--adapter $runs/$setting-$seed/final")
        job "$setting-$seed-greedy" "$world $adapter $measure"
        job "$setting-$seed-sampled" "$world $adapter $measure --eval-only --think-budget 50 --eval-temperature 1"
    done
done | all
