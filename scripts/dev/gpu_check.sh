#!/usr/bin/env bash
# What only a GPU can show, in parts of less than nine minutes, each alone and in any order.
#   DATA=data bash scripts/dev/gpu_check.sh              # all parts
#   DATA=data bash scripts/dev/gpu_check.sh tests distil # some of them
# Parts:
#   tests       the engine's tests on CUDA (needs pytest)
#   distil      Digits: all stages, compiled and not
#   iterations  ConvNet, ipc 10, POE: an iteration of DSA (2 outer steps of 10 epochs), DM, TGDD and MTT beside the
#               textbook, an expert's epoch, compiled and not, peak memory
#   tgdd dm dsa mtt  CIFAR-10, ConvNet: a whole distillation with stages 2 and 3 (tgdd: with its expert; tgdd, dm, dsa:
#               ipc 10, POE; mtt: ipc 1, plain)
#   expert      two expert trajectories of CIFAR-10
#   all_tests   the whole suite, on the CPU beside the GPU (needs requirements-dev.txt)
# A part that takes longer than LIMIT seconds (500) is interrupted and saved; run it again to resume it.
# DATA is the folder of cifar10.npz or of torchvision's CIFAR-10; OOD, a folder of OOD sets, adds them to those without files.
# TGDD_ITERATIONS (2000), DM_ITERATIONS (2000), DSA_ITERATIONS (1000), MTT_ITERATIONS (1000) and EXPERTS (10) set the length of the distillations.
# PYTHON is the interpreter, OUT (assets/results) the folder of a log and a JSON for each part, WORK (result-gpu-check) that
# of the runs. PYTEST_ADDOPTS="-n 8" runs tests side by side (needs pytest-xdist). pytorch-ood is not needed.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-assets/results}
work=${WORK:-result-gpu-check}
data=${DATA:-data}
limit=${LIMIT:-500}
all=(tests distil iterations tgdd dsa mtt dm expert all_tests)
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then parts=("${all[@]}"); fi
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
mkdir -p "$out" "$work"

sets="gaussian uniform rademacher blob patches"
if [ -n "${OOD:-}" ]; then sets="$sets $(cd "$OOD" && printf '%s\n' * | sed 's/\.[a-z]*$//' | tr '\n' ' ')"; fi

# step WHAT COMMAND: run it within the limit of the part; what follows an interrupted step waits for the next time
step() {
    local what=$1 began=$SECONDS result=passed status=0
    shift
    if [ -n "$stopped" ]; then return; fi
    echo "== $what: $*"
    local left=$((limit - (SECONDS - part_began) + 1))
    if [ "$left" -gt 0 ]; then timeout --signal=INT --kill-after=30 "$left" "$@" || status=$?; else status=124; fi
    case $status in
        0) ;;
        124 | 130) result=interrupted stopped=yes ;;
        *) result=failed stopped=yes failed=$((failed + 1)) ;;
    esac
    lines+=("$what	$result	$((SECONDS - began))")
}

# stage FOLDER COMMAND: a step that writes into FOLDER once; an interrupted one resumes
stage() {
    local folder=$work/$1
    shift
    if [ ! -e "$folder/done" ]; then step "$1 → $folder" "$python" scripts/runner.py "$folder" "$@"; fi
}

# whole NAME IPC METHOD SCRIPT TRAINING FLAGS: a distillation of CIFAR-10 with stages 2 and 3; `trained` has more flags
# of stage 2
trained=
whole() {
    local to=$1 ipc=$2 method=$3 script=$4 training=$5
    shift 5
    local common="--dataset CIFAR10 --data_path $data --model ConvNet --ipc $ipc --method $method --device cuda"
    local augment="--dsa_strategy color_crop_cutout_flip_scale_rotate"
    stage "$to-1" "$script" $common $augment --init real --num_exp 1 --num_eval 2 "$@"
    stage "$to-2" "$training" $common $augment --num_eval 3 $trained --load_path "$work/$to-1"
    stage "$to-3" test_ood_model_syn.py $common --num_exp 3 --is_load_best --ood_sets $sets ${OOD:+--ood_path "$OOD"} \
        --score msp mls energy --load_path "$work/$to-2"
}

part_tests() {
    step "the engine on CUDA" env TRUSTDD_TEST_DEVICE=cuda "$python" -m pytest -q tests/oracle/test_against_textbook.py
}
part_all_tests() { step "all tests, on the CPU" env CUDA_VISIBLE_DEVICES= "$python" -m pytest -q tests; }
part_distil() {
    local common="--dataset Digits --model ConvNetD2 --ipc 1 --method DSA --device cuda" augment="--dsa_strategy color_crop_cutout_scale_rotate"
    local loops="--init real --num_exp 1 --num_eval 2 --epoch_eval_train 200"
    stage digits-1 main_poe.py $common $augment $loops --Iteration 100
    stage digits-compiled main_poe.py $common $augment $loops --Iteration 20 --outer_loop 3 --inner_loop 3 --compile on
    stage digits-2 train_model_synthetic_oe.py $common $augment --num_eval 2 --epoch_eval_train 200 --load_path "$work/digits-1"
    stage digits-3 test_ood_model_syn.py $common --num_exp 2 --is_load_best --ood_sets patches uniform --load_path "$work/digits-2"
}
part_iterations() {
    local flags="--device cuda --model ConvNet --ipc 10 --repeats 2" to="$out/benchmark-$name"
    step "DSA, stages" "$python" scripts/dev/benchmark.py $flags --compile off --outer_loop 2 --inner_loop 10 --works iteration stage2 stage3 --out "$to-dsa.json"
    step "DM, TGDD, experts" "$python" scripts/dev/benchmark.py $flags --compile off --works dm tgdd experts --out "$to-methods.json"
    step "DM, TGDD, compiled" "$python" scripts/dev/benchmark.py $flags --works dm tgdd --out "$to-methods-compiled.json"
    step "MTT" "$python" scripts/dev/benchmark.py $flags --compile off --works mtt --out "$to-mtt.json"
    step "MTT, compiled" "$python" scripts/dev/benchmark.py $flags --works mtt --out "$to-mtt-compiled.json"
    step "DSA, compiled, memory" "$python" scripts/dev/benchmark.py $flags --outer_loop 2 --inner_loop 10 --works iteration memory --out "$to-dsa-compiled.json"
}
part_tgdd() {
    local trained="--protocol ncfm --epoch_eval_train 300"
    whole tgdd 10 TGDD main_poe.py train_model_synthetic_oe.py --train_experts auto --buffer_path "$work/buffers-tgdd" \
        --Iteration "${TGDD_ITERATIONS:-2000}" $trained
}
part_dm() { whole dm 10 DM main_poe.py train_model_synthetic_oe.py --Iteration "${DM_ITERATIONS:-2000}"; }
part_dsa() { whole dsa 10 DSA main_poe.py train_model_synthetic_oe.py --Iteration "${DSA_ITERATIONS:-1000}"; }
experts() {
    step "experts" "$python" train_experts.py --dataset CIFAR10 --data_path "$data" --model ConvNet --device cuda --buffer_path "$work/buffers" \
        --dsa_strategy color_crop_cutout_flip_scale_rotate --num_experts "$1" --train_epochs "$2"
}
part_mtt() {
    experts "${EXPERTS:-10}" 20
    whole mtt 1 MTT main.py train_model_synthetic_no_oe.py --buffer_path "$work/buffers" --syn_steps 50 --max_start_epoch 5 \
        --lr_lr 1e-7 --Iteration "${MTT_ITERATIONS:-1000}" --eval_interval 500
}
part_expert() { experts 2 20; }

failures=0
for part in "${parts[@]}"; do
    log=$out/gpu_check-$name-$part.log
    stopped="" failed=0 lines=()
    {
        nvidia-smi || true
        part_began=$SECONDS
        part_$part
        printf '%s\n' "${lines[@]}" | "$python" -c '
import datetime, json, sys, torch
steps = [dict(zip(("step", "result", "seconds"), line.rstrip("\n").split("\t"))) for line in sys.stdin if line.strip()]
about = {"part": sys.argv[1], "device": sys.argv[2], "date": datetime.date.today().isoformat(), "torch": torch.__version__}
json.dump(about | {"steps": steps}, open(sys.argv[3], "w"), indent=1)
' "$part" "$name" "${log%.log}.json"
        echo "== summary of $part: $name, $(date -u +%F), $failed failed"
        printf '%s\n' "${lines[@]}"
        if [ "$stopped" = yes ] && [ "$failed" = 0 ]; then echo "run the part again to resume it"; fi
    } > >(tee "$log") 2>&1
    wait $! 2>/dev/null
    failures=$((failures + failed))
done
[ "$failures" = 0 ]
