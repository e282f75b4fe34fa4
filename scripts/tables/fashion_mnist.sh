#!/usr/bin/env bash
# Fashion-MNIST, plain / OE / POE, ipc 1, 10 and 50, three seeds. scripts/tables/table.sh lists what can be set.
# The default OOD sets need no files; OOD_SETS="MNIST …" takes others from --ood_path (OOD).
#   bash scripts/tables/fashion_mnist.sh                                                 # for a GPU
# To try it:
#   OUT=result-tables/try-fashion_mnist IPC=1 SEEDS=1 MODEL=ConvNetW32 ITERATIONS=10 NETWORKS=1 EPOCHS=50 KINDS="plain poe" STAGE1="--num_eval 1 --epoch_eval_train 20" bash scripts/tables/fashion_mnist.sh
DATASET=FashionMNIST
AUGMENT="--dsa_strategy color_crop_cutout_flip_scale_rotate"
OOD_SETS=${OOD_SETS:-patches gaussian uniform rademacher blob}
IPC=${IPC:-1 10 50}
MODEL=${MODEL:-ConvNet}
OUT=${OUT:-result-tables/fashion_mnist}
. "$(dirname "$0")/table.sh"
table
