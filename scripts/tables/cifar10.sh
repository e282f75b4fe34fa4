#!/usr/bin/env bash
# CIFAR-10, plain / OE / POE, ipc 1, 10 and 50, three seeds: the paper's setting. scripts/tables/table.sh lists what can be set.
#   bash scripts/tables/cifar10.sh                                                       # days on a CPU
# To try it:
#   OUT=result-tables/try-cifar10 IPC=1 SEEDS=1 MODEL=ConvNetW32 ITERATIONS=2 NETWORKS=1 EPOCHS=20 KINDS="plain poe" STAGE1="--num_eval 1 --epoch_eval_train 20 --batch_real 32" OUTLIERS="--batch_oe 32" OOD_SETS="patches blob" bash scripts/tables/cifar10.sh
DATASET=CIFAR10
AUGMENT="--dsa_strategy color_crop_cutout_flip_scale_rotate"
OOD_SETS=${OOD_SETS:-Textures Places365 TinyImageNet_resize LSUN_resize CIFAR100}
IPC=${IPC:-1 10 50}
MODEL=${MODEL:-ConvNet}
OUT=${OUT:-result-tables/cifar10}
. "$(dirname "$0")/table.sh"
table
