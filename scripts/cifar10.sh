#!/usr/bin/env bash
# CIFAR-10, plain / OE / POE, ipc 1, 10 and 50, three seeds: the paper's setting. scripts/table.sh lists what can be set.
#   bash scripts/cifar10.sh                                                       # days on a CPU
#   OUT=result-tables/try IPC=1 SEEDS=1 MODEL=ConvNetW32 ITERATIONS=10 NETWORKS=1 EPOCHS=50 KINDS="plain poe" bash scripts/cifar10.sh
DATASET=CIFAR10
AUGMENT="--dsa_strategy color_crop_cutout_flip_scale_rotate"
OOD_SETS=${OOD_SETS:-Textures Places365 TinyImageNet_resize LSUN_resize iSUN CIFAR100}
IPC=${IPC:-1 10 50}
MODEL=${MODEL:-ConvNet}
OUT=${OUT:-result-tables/cifar10}
. "$(dirname "$0")/table.sh"
table
