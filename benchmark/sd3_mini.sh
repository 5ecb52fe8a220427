#!/usr/bin/env bash
# Every method of adrpo_fm_sd3.py at several strengths on the small world, 3 seeds: 57 runs of 50 iterations.
#   python benchmark/mini_world_sd3.py WORLD --data-dir data/mnist
#   bash benchmark/sd3_mini.sh WORLD RUNS
#   python benchmark/sd3_mini_table.py WORLD RUNS benchmark/results/sd3_mini
# SEEDS="1 2" and JOBS=1 (processes at a time, one thread each) change the size. About 70 minutes on two cores.
# WHAT=variants: adrpo with other clips, shared noise, more times, and dpo online (18 runs of 3 seeds).
# WHAT=digit: adrpo, dpo and orw on a reward that leaves colour and thickness free (18 runs of 3 seeds).
set -euo pipefail
world=$(cd "$1" && pwd)
mkdir -p "$2"
runs=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MINI_WORLD="$world"
python=${PYTHON:-python}

common="--cpu --precision fp32 --model-id $world/model --clip-model local-dir:$world/clip --output-dir $runs"
common+=" --prompts $world/train_prompts.txt --eval-prompts $world/heldout_prompts.txt --max-sequence-length 8"
common+=" --resolution 32 --guidance-scale 1 --num-steps 10 --eval-steps 10 --eval-images 16 --eval-max-prompts 31"
common+=" --eval-metrics benchmark/mini_world_sd3.py:accepted --prompts-per-update 12 --group-size 8"
common+=" --rollout-batch 96 --train-batch 96 --updates-per-rollout 2 --lora-rank 16"
common+=" --lora-alpha 16 --iterations 50 --eval-every 25 --save-every 1000"

lines() { # one line per run: name, then its flags
    local seed=$1 digit="--reward benchmark/mini_world_sd3.py:digit_probability"
    case ${WHAT:-methods} in
    methods) # A is clipped at one standard deviation (k beta0 = 1): beta0 alone sets the strength
        echo "adrpo-0.1 --method adrpo --beta0 0.1 --adv-clip-k 10"
        echo "dpo-100 --method dpo --beta-dpo 100"
        echo "orw-0.3 --method orw --tau 3 --alpha 0.3"
        echo "raft-0.0003 --method raft --learning-rate 3e-4"
        echo "adrpo-0.25 --method adrpo --beta0 0.25 --adv-clip-k 4"
        echo "dpo-300 --method dpo --beta-dpo 300"
        echo "orw-1 --method orw --tau 3 --alpha 1"
        echo "raft-0.0001 --method raft --learning-rate 1e-4"
        echo "adrpo-0.05 --method adrpo --beta0 0.05 --adv-clip-k 20"
        echo "dpo-1000 --method dpo --beta-dpo 1000"
        echo "orw-0 --method orw --tau 3 --alpha 0"
        echo "raft-0.001 --method raft --learning-rate 1e-3"
        echo "adrpo-0.5 --method adrpo --beta0 0.5 --adv-clip-k 2"
        echo "dpo-50 --method dpo --beta-dpo 50"
        echo "orw-0.1 --method orw --tau 3 --alpha 0.1"
        echo "raft-0.0002 --method raft --learning-rate 2e-4"
        echo "adrpo-0.15 --method adrpo --beta0 0.15 --adv-clip-k 6.67"
        echo "dpo-3000 --method dpo --beta-dpo 3000"
        echo "orw-3 --method orw --tau 3 --alpha 3"
        ;;
    variants)
        echo "clip1 --beta0 0.1 --adv-clip-k 1"
        echo "noclip --beta0 0.1 --adv-clip-k None"
        echo "shared --beta0 0.1 --adv-clip-k 10 --share-noise"
        echo "times2 --beta0 0.1 --adv-clip-k 10 --timesteps-per-sample 2"
        echo "both --beta0 0.1 --adv-clip-k 10 --share-noise --timesteps-per-sample 2"
        echo "dpo-online-100 --method dpo --beta-dpo 100 --dpo-online"
        ;;
    digit)
        echo "adrpo-0.1 --method adrpo --beta0 0.1 --adv-clip-k 10 $digit"
        echo "adrpo-0.25 --method adrpo --beta0 0.25 --adv-clip-k 4 $digit"
        echo "dpo-100 --method dpo --beta-dpo 100 $digit"
        echo "dpo-300 --method dpo --beta-dpo 300 $digit"
        echo "orw-0.1 --method orw --tau 3 --alpha 0.1 $digit"
        echo "orw-1 --method orw --tau 3 --alpha 1 $digit"
        ;;
    *) echo "WHAT=$WHAT: must be methods, variants or digit" >&2 && exit 1 ;;
    esac | while read -r name flags; do
        # A flag may stand only once: these two where the line does not set them.
        case $flags in *--learning-rate*) ;; *) flags+=" --learning-rate 1e-3" ;; esac
        case $flags in *--timesteps-per-sample*) ;; *) flags+=" --timesteps-per-sample 1" ;; esac
        if [ ! -f "$runs/$name-seed$seed/summary.json" ]; then # continue where an earlier call stopped
            echo "--seed $seed --run-name $name-seed$seed $flags"
        fi
    done
}

for seed in ${SEEDS:-1 2 3}; do lines "$seed"; done |
    xargs -P "${JOBS:-2}" -I{} bash -c "echo '{}'; rm -rf \"$runs\"/\$(echo '{}' | cut -d' ' -f4); \
        $python adrpo_fm_sd3.py $common {} >>\"$runs\"/log.txt 2>&1"
