#!/usr/bin/env bash
# Every figure of the small worlds and of the toy, from nothing: worlds, runs, tables, one part after the other.
#   bash benchmark/run_all.sh OUT [PART ...]
# Parts, in this order, and hours on a quiet two-core CPU (m: measured, for our published figures; e: estimated from the
# time of one run, not run as a whole):
#   toy       1.2   the sweep of 110 fine-tunings (.9 m) and what adrpo's own choices are worth (.3 e)
#   parts     2.8   which of ADRPO's two parts does the work (171 runs, one process, m)
#   images    1.9   the world (.1 m), the sweep of 57 runs (1.2 m), variants and the digit reward (18 runs, .6 e)
#   text       .7   four worlds (seconds), 152 runs of half a minute (e)
#   audio     1.6   three worlds (.45 m, one after the other), 18 runs and their 42 evaluations (1.1 e)
#   counts     .1   memory by fake tensors, kernels, the plug-ins' equality (e)
#   speed      .5   seconds of a step of each script, alone on the machine (e)
# About nine hours in all. Without PART: all but speed, which wants a quiet machine. DATA: MNIST's IDX files (default
# data/mnist; the toy downloads them there). JOBS=1: one process at a time. A part that was stopped goes on from its
# finished runs (toy: from the seed's beginning).
# Tables and figures land in OUT/results under the names of benchmark/results: compare with diff. To each .md one line
# is added: command, commit, machine, versions. sd3_adv_norm.md, by hand from runs with the flag --adv-norm, is not made.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
parts=${*:-toy parts images text audio counts}
data=$(realpath -m "${DATA:-data/mnist}")
runs=$out/runs worlds=$out/worlds results=$out/results
mkdir -p "$runs" "$worlds" "$results"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
python=${PYTHON:-python}
export PYTHON=$python
PATH=$(dirname "$(command -v "$python")"):$PATH # the toy's sweeps call `python`

machine=$(grep -m1 "model name" /proc/cpuinfo 2>/dev/null | cut -d: -f2 || true)
machine="$(nproc --all) cores,${machine:- a CPU}, $($python -c 'import torch; print("torch", torch.__version__)')"

stamp() { # FILE COMMAND: what made it
    printf '\nMade by `%s` in benchmark/run_all.sh, commit %s, %s.\n' "$2" "$(git rev-parse --short HEAD)" "$machine" >>"$1"
}

world() { # FOLDER COMMAND...: make it unless it is there
    [ -f "$1/world.json" ] || $python "${@:2}"
}

toy() {
    [ -f "$runs/toy/done" ] || bash benchmark/toy_tradeoff.sh "$runs/toy" --data-dir "$data"
    touch "$runs/toy/done"
    $python benchmark/plot_tradeoff.py "$runs/toy" "$results/toy_tradeoff"
    stamp "$results/toy_tradeoff.md" "bash benchmark/toy_tradeoff.sh RUNS --data-dir DATA"
    [ -f "$runs/toy_ablation/done" ] || bash benchmark/toy_ablation.sh "$runs/toy" "$runs/toy_ablation" --data-dir "$data"
    touch "$runs/toy_ablation/done"
    $python benchmark/ablation_table.py "$runs/toy_ablation" "$results/toy_ablation.md"
    stamp "$results/toy_ablation.md" "bash benchmark/toy_ablation.sh RUNS OUT --data-dir DATA"
    $python benchmark/plot_targets.py "$results/toy_targets.png"
}

parts() {
    local program=benchmark/ablation_parts.py
    world "$worlds/digits" benchmark/mini_world_sd3.py "$worlds/digits" --data-dir "$data"
    $python $program toy "$runs/parts" --data-dir "$data"
    $python $program orw "$runs/parts" --data-dir "$data"
    $python $program images "$runs/parts" --world "$worlds/digits"
    $python $program text "$runs/parts" --world "$worlds" # makes its base models, trap21 to trap23
    $python $program table "$runs/parts" --out "$results/ablation_parts" # has its own line
}

images() {
    local sweep=benchmark/sd3_mini.sh table=benchmark/sd3_mini_table.py digits=$worlds/digits
    world "$digits" benchmark/mini_world_sd3.py "$digits" --data-dir "$data"
    bash $sweep "$digits" "$runs/images"
    $python $table "$digits" "$runs/images" "$results/sd3_mini"
    stamp "$results/sd3_mini.md" "bash $sweep WORLD RUNS"
    mkdir -p "$runs/images_variants"
    for name in adrpo-0.1-seed1 dpo-100-seed1 dpo-300-seed1; do # beside which the variants are shown
        [ -d "$runs/images_variants/$name" ] || cp -r "$runs/images/$name" "$runs/images_variants"
    done
    WHAT=variants SEEDS=1 bash $sweep "$digits" "$runs/images_variants"
    $python $table "$digits" "$runs/images_variants" "$results/sd3_mini_variants"
    stamp "$results/sd3_mini_variants.md" "WHAT=variants SEEDS=1 bash $sweep WORLD RUNS"
    WHAT=digit SEEDS="1 2" bash $sweep "$digits" "$runs/images_digit"
    $python $table "$digits" "$runs/images_digit" "$results/sd3_mini_digit"
    stamp "$results/sd3_mini_digit.md" "WHAT=digit SEEDS='1 2' bash $sweep WORLD RUNS"
}

text() {
    local program=benchmark/mini_world_llm.py sweep=benchmark/llm_mini.sh
    for seed in 4 5 6; do
        world "$worlds/trap$seed" $program "$worlds/trap$seed" --task trap --rare 0.015 --seed "$seed"
    done
    world "$worlds/sort1" $program "$worlds/sort1" --seed 1
    SETTINGS="grpo-0.04 adrpo-0.04 grpo-0 grpo-0.08 adrpo-0.04-k2 adrpo-0.04-k0.5" bash $sweep "$worlds" "$runs/text"
    SEEDS="1 2 3 4" SETTINGS="grpo-0.3 adrpo-0.3" bash $sweep "$worlds" "$runs/text"
    $python benchmark/llm_mini_table.py "$worlds" "$runs/text" "$results/llm_mini"
    stamp "$results/llm_mini.md" "bash $sweep WORLDS RUNS"
}

audio() {
    for seed in 2 3 4; do
        world "$worlds/audio$seed" benchmark/mini_world_audio.py "$worlds/audio$seed" --seed "$seed"
    done
    bash benchmark/audio_mini.sh "$worlds" "$runs/audio"
    $python benchmark/audio_mini_table.py "$worlds" "$runs/audio" "$results/audio_mini"
    stamp "$results/audio_mini.md" "bash benchmark/audio_mini.sh WORLDS RUNS"
}

counts() {
    for what in sd3 llm audio; do
        $python benchmark/memory.py $what --output "$results/memory_$what"
        stamp "$results/memory_$what.md" "python benchmark/memory.py $what"
    done
    $python benchmark/speed_llm.py --count --output "$results/llm_launches.json"
    $python benchmark/plug_in_equal.py >"$results/plug_in_equal.txt"
    stamp "$results/plug_in_equal.txt" "python benchmark/plug_in_equal.py"
}

speed() {
    world "$worlds/digits" benchmark/mini_world_sd3.py "$worlds/digits" --data-dir "$data"
    OMP_NUM_THREADS=2 $python benchmark/speed_toy.py >"$results/toy_speed.txt"
    stamp "$results/toy_speed.txt" "OMP_NUM_THREADS=2 python benchmark/speed_toy.py"
    $python benchmark/speed_sd3.py small "$worlds/digits" >"$results/sd3_speed.txt"
    stamp "$results/sd3_speed.txt" "python benchmark/speed_sd3.py small WORLD"
    $python benchmark/speed_llm.py --steps 6 --modes full --output "$results/llm_speed.json"
    $python benchmark/speed_audio.py --output "$results/audio_speed.json"
}

for part in $parts; do
    case $part in
    toy | parts | images | text | audio | counts | speed) ;;
    *) echo "error: no part $part" >&2 && exit 1 ;;
    esac
done
for part in $parts; do
    SECONDS=0
    "$part"
    echo "$part: $((SECONDS / 60)) minutes" | tee -a "$out/times.txt"
done
