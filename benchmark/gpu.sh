#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes, ordered by worth; each part has its own time limit,
# and its result is a file of its own with the card's name in it. From the repository's root, after
# `pip install -r tests/requirements.txt`:
#   bash benchmark/gpu.sh OUT
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/card.txt"
git rev-parse HEAD >>"$out/card.txt"

part() { # SECONDS NAME COMMAND...
    local limit=$1 name=$2 begin=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    echo "$name: status $? after $((SECONDS - begin)) s (limit $limit s)" | tee -a "$out/parts.txt"
}

# 1. Tiny checkpoints of all four scripts, in bfloat16, beside the CPU's figures.
part 100 smoke "$python" benchmark/gpu_smoke.py "$out/smoke.json"
# 2. Text: tokens a second with a growing cache, the static one (compiled), `generate`, continuous batching.
part 110 decode "$python" benchmark/speed_llm.py --gpu --decode --output "$out/decode.json"
# 3. SD3 medium's shapes, 512 px: seconds an image and a training point, peak memory.
part 150 sd3 "$python" benchmark/speed_sd3.py full "$work/sd3"
# 4. Text: a whole step against TRL's.
part 80 llm "$python" benchmark/speed_llm.py --gpu --steps 4 --modes full --lengths 850,100 --output "$out/llm.json"
# 5. The 7B thinker of Qwen2.5-Omni with a LoRA, random weights.
part 70 audio "$python" benchmark/speed_audio.py --gpu --steps 3 --lengths 310,100 --output "$out/audio.json"
# 6. The toy's demo.
part 30 toy "$python" toy_mnist_flow.py --quick --dataset digits --output-dir "$work/toy"
