#!/usr/bin/env bash
# What only a GPU can show, in one go: the tests on CUDA, the benchmark, a short distillation; then one summary.
#   bash scripts/gpu_check.sh            # PYTHON=python3.12 chooses the interpreter; it must have the requirements
# Logs and JSON go to assets/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-assets/results}
mkdir -p "$out"
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$name" ]; then
    echo "gpu_check: $python sees no CUDA device; run it where torch.cuda.is_available() is true" >&2
    exit 2
fi
nvidia-smi || true
status=0
step() {
    echo "== $1"
    shift
    "$@" || { status=1; echo "FAILED: $*"; }
}
common="--dataset Digits --model ConvNetD2 --ipc 1 --method DSA --device cuda"
augment="--dsa_strategy color_crop_cutout_scale_rotate"
work=$(mktemp -d)
{
    step "tests" "$python" -m pytest -q tests
    step "tests of the engine on CUDA" env TRUSTDD_TEST_DEVICE=cuda "$python" -m pytest -q tests/test_engine.py tests/test_together.py
    step "distil" "$python" main_poe.py $common $augment --init real --num_exp 1 --num_eval 2 --epoch_eval_train 200 --Iteration 100 --save_path "$work/1"
    step "train" "$python" train_model_synthetic_oe.py $common $augment --num_eval 2 --epoch_eval_train 200 --load_path "$work/1" --save_path "$work/2"
    step "measure" "$python" test_ood_model_syn.py $common --num_exp 2 --is_load_best --ood_sets patches uniform --load_path "$work/2" --save_path "$work/3"
    step "benchmark, ConvNetW32 ipc 2" "$python" scripts/benchmark.py --device cuda --out "$out/benchmark-$name-w32-ipc2.json"
    step "benchmark, ConvNet ipc 10" "$python" scripts/benchmark.py --device cuda --model ConvNet --ipc 10 --out "$out/benchmark-$name-convnet-ipc10.json"
    echo "== summary: $name, $(date -u +%F), $([ $status = 0 ] && echo all passed || echo FAILURES above)"
} 2>&1 | tee "$out/gpu_check-$name.log"
rm -rf "$work"
grep -q '^== summary.*all passed' "$out/gpu_check-$name.log"
