#!/usr/bin/env bash
# All three stages on handwritten digits, twice: plain dataset distillation, and TrustDD with pseudo-outliers (POE).
# Needs Python 3.11+ and nothing else; one and a half to six minutes on two cores after installing.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements.txt
python=.venv/bin/python
out=result-quickstart/$(date +%Y%m%d-%H%M%S)

# ConvNetD2, not the default ConvNet: on 8x8 images its third block would normalise maps of 2x2.
common="--dataset Digits --model ConvNetD2 --ipc 1 --method DSA"
augment="--dsa_strategy color_crop_cutout_scale_rotate"
distil="$common $augment --init real --num_exp 1 --num_eval 2 --epoch_eval_train 200 --Iteration 100 --eval_interval 100 --batch_real 128"
train="$common $augment --num_eval 3 --epoch_eval_train 400"
ood="$common --num_exp 3 --is_load_best --ood_sets patches blob gaussian uniform --score msp"

run() {
    echo "\$ python $*"
    $python "$@"
}

run main.py $distil --save_path $out/plain/1-distilled
run train_model_synthetic_no_oe.py $train --load_path $out/plain/1-distilled --save_path $out/plain/2-networks
run test_ood_model_syn.py $ood --load_path $out/plain/2-networks --save_path $out/plain/3-ood
run main_poe.py $distil --batch_oe 128 --save_path $out/poe/1-distilled
run train_model_synthetic_oe.py $train --load_path $out/poe/1-distilled --save_path $out/poe/2-networks
run test_ood_model_syn.py $ood --load_path $out/poe/2-networks --save_path $out/poe/3-ood

echo
$python scripts/compare.py $out/plain/3-ood $out/poe/3-ood --names plain POE --out $out --html
echo "distilled images and outliers, before and after:"
find $out -name 'vis*.png' | sort
echo "score histograms:"
find $out -name 'scores_*.png' | sort
