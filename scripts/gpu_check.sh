#!/usr/bin/env bash
# Checks that need a GPU: the tests on CUDA, a short distillation, the benchmark; then a summary.
#   bash scripts/gpu_check.sh                 # everything
#   bash scripts/gpu_check.sh tests distil    # some of: tests distil benchmark_w32 benchmark_convnet all_tests
# PYTHON=python3.12 chooses the interpreter; it must have the requirements, pytest for `tests`, and for `all_tests` all of
# requirements-dev.txt.
# Logs and JSON are written to OUT (default: assets/results/).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-assets/results}
all=(tests distil benchmark_w32 benchmark_convnet all_tests)
parts=("${@:-${all[@]}}")
for part in "${parts[@]}"; do
    if [[ " ${all[*]} " != *" $part "* ]]; then
        echo "gpu_check: unknown part $part; accepted: ${all[*]}" >&2
        exit 2
    fi
done
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$name" ]; then
    echo "gpu_check: $python sees no CUDA device; run it where torch.cuda.is_available() is true" >&2
    exit 2
fi
mkdir -p "$out"
summary=()
failures=0
step() {
    local what=$1 began=$SECONDS result=passed
    shift
    echo "== $what: $*"
    "$@" || { result=FAILED; failures=$((failures + 1)); }
    summary+=("$result, $((SECONDS - began)) s: $what")
}
common="--dataset Digits --model ConvNetD2 --ipc 1 --method DSA --device cuda"
augment="--dsa_strategy color_crop_cutout_scale_rotate"
work=$(mktemp -d)
tests() {
    step "the engine on CUDA" env TRUSTDD_TEST_DEVICE=cuda "$python" -m pytest -q tests/test_engine.py tests/test_together.py
}
all_tests() { # tests for bit-identity and of several processes need the CPU
    step "all tests, on the CPU" env CUDA_VISIBLE_DEVICES= "$python" -m pytest -q tests
}
distil() {
    local loops="--init real --num_exp 1 --num_eval 2 --epoch_eval_train 200"
    step "stage 1" "$python" main_poe.py $common $augment $loops --Iteration 100 --save_path "$work/1"
    step "stage 1, compiled" "$python" main_poe.py $common $augment $loops --Iteration 20 --outer_loop 3 --inner_loop 3 --compile on --save_path "$work/compiled"
    step "stage 2" "$python" train_model_synthetic_oe.py $common $augment --num_eval 2 --epoch_eval_train 200 --load_path "$work/1" --save_path "$work/2"
    step "stage 3" "$python" test_ood_model_syn.py $common --num_exp 2 --is_load_best --ood_sets patches uniform --load_path "$work/2" --save_path "$work/3"
}
benchmark_w32() {
    step "benchmark, ConvNetW32, ipc 2" "$python" scripts/benchmark.py --device cuda --out "$out/benchmark-$name-w32-ipc2.json"
}
benchmark_convnet() {
    step "benchmark, ConvNet, ipc 10" "$python" scripts/benchmark.py --device cuda --model ConvNet --ipc 10 --repeats 2 --out "$out/benchmark-$name-convnet-ipc10.json"
}
log=$out/gpu_check-$name${*:+-$(IFS=-; echo "$*")}.log
{
    nvidia-smi || true
    for part in "${parts[@]}"; do $part; done
    echo "== summary: $name, $(date -u +%F), $failures failed"
    printf '%s\n' "${summary[@]}"
    for json in "$out/benchmark-$name"-*.json; do
        [ -e "$json" ] && "$python" scripts/benchmark.py --show "$json"
    done
} 2>&1 | tee "$log"
rm -rf "$work"
grep -q '^== summary.* 0 failed$' "$log"
