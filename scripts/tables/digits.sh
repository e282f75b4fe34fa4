#!/usr/bin/env bash
# Digits (8x8), plain / OE / POE, ipc 1 and 10, five seeds; for a CPU. scripts/tables/table.sh lists what can be set.
# The OE pool is Fashion-MNIST's training images, shrunk; its test images are one of the OOD sets.
#   bash scripts/tables/digits.sh
# To try it:
#   OUT=result-tables/try-digits IPC=1 SEEDS=1 ITERATIONS=5 NETWORKS=1 EPOCHS=50 KINDS="plain poe" bash scripts/tables/digits.sh
# With ABLATIONS=1 also, at ipc 1: POE with each corruption alone, and lambda_oe 0, 0.1, 0.5 and 1.
DATASET=Digits
AUGMENT="--dsa_strategy color_crop_cutout_scale_rotate"
IPC=${IPC:-1 10}
if [[ -n "${ABLATIONS:-}" && " $IPC " != *" 1 "* ]]; then
    echo "ABLATIONS: they are at ipc 1, and IPC is $IPC; add 1 to IPC or leave ABLATIONS out" >&2
    exit 2
fi
SEEDS=${SEEDS:-1 2 3 4 5}
MODEL=${MODEL:-ConvNetD1}
ITERATIONS=${ITERATIONS:-100}
EPOCHS=${EPOCHS:-300}
NETWORKS=${NETWORKS:-3}
SCORE=${SCORE:-msp mls energy}
OUT=${OUT:-result-tables/digits}
POOL=data/oe/FashionMNIST.npz
OE_DATA=${OE_DATA:-$POOL}
METHOD=${METHOD:-DSA}
STAGE1=${STAGE1:---num_eval 1 --epoch_eval_train 300$([ "$METHOD" = MTT ] || echo " --batch_real 64")}
EXPERTS=${EXPERTS:---num_experts 10 --train_epochs 20 --batch_train 64 --lr_teacher 0.05}
MTT=${MTT:---syn_steps 20 --max_start_epoch 5 --lr_img 10 --lr_teacher 0.05}
OOD_SETS=${OOD_SETS:-patches gaussian uniform rademacher blob FashionMNIST}
. "$(dirname "$0")/table.sh"
files=()
if [[ " $OOD_SETS " == *" FashionMNIST "* && ! -e $OOD/FashionMNIST.npz ]]; then files+=(--ood "$OOD/FashionMNIST.npz"); fi
if [[ " $KINDS" == *" oe"* && $OE_DATA == "$POOL" && ! -e $POOL ]]; then files+=(--oe "$OE_DATA"); fi
if [ ${#files[@]} -gt 0 ]; then
    "$PYTHON" scripts/dataset_outliers.py --dataset FashionMNIST --data_path "$DATA" ${DOWNLOAD:+--download $DOWNLOAD} "${files[@]}"
fi
table

ablations() {
    local seed name all="jigsaw invert pixelate rgb-ghost gauss-speckle uniform-speckle avg-mean geo-mean"
    for seed in $SEEDS; do
        for name in $all; do
            POE="--corruptions $name"
            dir=$OUT/corruptions/$name/seed$seed
            distil poe 1 "$seed" "$dir/1-distilled"
            train poe 1 "$seed" "$dir/1-distilled" "$dir/2-networks"
            measure 1 "$seed" "$dir/2-networks" "$dir/3-ood"
        done
    done
    compare "$OUT/corruptions" $all
    # at ipc 1 distilling by gradients does not use lambda_oe, since no network is trained; MTT depends on it
    if [ "$METHOD" != MTT ]; then KINDS=poe sweep 1 "0 0.1 0.5 1"; fi
}
if [ -n "${ABLATIONS:-}" ]; then ablations; fi
