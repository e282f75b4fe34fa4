#!/usr/bin/env bash
# CIFAR-100, plain / OE / POE, ipc 1, 10 and 50, three seeds. scripts/tables/table.sh lists what can be set.
#   bash scripts/tables/cifar100.sh                                                      # for a GPU
# To try it:
#   OUT=result-tables/try-cifar100 IPC=1 SEEDS=1 MODEL=ConvNetW32 ITERATIONS=2 NETWORKS=1 EPOCHS=20 KINDS="plain poe" STAGE1="--num_eval 1 --epoch_eval_train 20 --batch_real 32" OUTLIERS="--batch_oe 32" OOD_SETS="patches blob" bash scripts/tables/cifar100.sh
DATASET=CIFAR100
AUGMENT="--dsa_strategy color_crop_cutout_flip_scale_rotate"
OOD_SETS=${OOD_SETS:-Textures Places365 TinyImageNet_resize LSUN_resize CIFAR10}
IPC=${IPC:-1 10 50}
MODEL=${MODEL:-ConvNet}
OUT=${OUT:-result-tables/cifar100}
. "$(dirname "$0")/table.sh"
table
