#!/usr/bin/env bash
# Are distilled outliers worth distilling? POE by several recipes, each beside the outliers that it started from or could have
# had without distilling: initial, kcenter, corrupt. scripts/table.sh lists what can be set.
#   bash scripts/outliers.sh                                             # Digits, ipc 1 and 10, DSA
#   TABLE=cifar10 METHOD=DM MODEL=ConvNetW32 IPC=10 bash scripts/outliers.sh
# To try it:
#   OUT=result-tables/try-outliers IPC=1 SEEDS=1 ITERATIONS=3 NETWORKS=1 EPOCHS=20 RECIPES="published clamp" bash scripts/outliers.sh
# RECIPES takes names of the list in flags() below; MORE="--flag value" is added to every recipe. Results go to $OUT/<recipe>,
# and the tables of all recipes to $OUT/study-ipc<n>.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TABLE=${TABLE:-digits}
METHOD=${METHOD:-DSA}
OUT=${OUT:-result-tables/outliers-$TABLE-$METHOD}
IPC=${IPC:-1 10}
KINDS=${KINDS:-poe poe-initial poe-kcenter poe-corrupt}
RECIPES=${RECIPES:-published slow clamp careful careful-pool trained kcenter mixed pool kcenter-pool spread}
SCORE=${SCORE:-msp mls}

# flags RECIPE: its flags of main_poe.py
flags() {
    case $1 in
        published) ;;
        slow) echo "--lr_img_oe 0.01" ;;
        clamp) echo "--clamp_oe" ;;
        trained) echo "--clamp_oe --lr_img_oe 0.05 --network_pool 10" ;;
        careful) echo "--clamp_oe --lr_img_oe 0.01" ;;
        careful-pool) echo "--clamp_oe --lr_img_oe 0.01 --network_pool 10" ;;
        careful-joint) echo "--clamp_oe --lr_img_oe 0.01 --network_pool 10 --matching joint" ;;
        kcenter) echo "--init_oe kcenter" ;;
        mixed) echo "--mix_corruptions" ;;
        pool) echo "--network_pool 10" ;;
        careful-kcenter) echo "--clamp_oe --lr_img_oe 0.01 --network_pool 10 --init_oe kcenter" ;;
        kcenter-pool) echo "--init_oe kcenter --network_pool 10" ;;
        joint) echo "--matching joint" ;;
        joint-pool) echo "--matching joint --network_pool 10" ;;
        spread) echo "--spread_oe 100" ;;
        spread-pool) echo "--spread_oe 100 --network_pool 10" ;;
        moments) echo "--moments_oe 2" ;;
        moments-pool) echo "--moments_oe 2 --network_pool 10" ;;
        *)
            echo "RECIPES: unknown recipe '$1'; scripts/outliers.sh lists them" >&2
            exit 2
            ;;
    esac
}

for recipe in $RECIPES; do flags "$recipe" > /dev/null; done
for recipe in $RECIPES; do
    OUTLIERS="$(flags "$recipe") ${MORE:-}" METHOD=$METHOD OUT=$OUT/$recipe IPC=$IPC KINDS=$KINDS SCORE=$SCORE bash "scripts/$TABLE.sh"
done
for ipc in $IPC; do
    folders=()
    for recipe in $RECIPES; do folders+=("$OUT/$recipe/ipc$ipc"); done
    "$PYTHON" scripts/study.py "${folders[@]}" --prefixes $RECIPES --kinds $KINDS --base poe --scores $SCORE --out "$OUT/study-ipc$ipc.md"
done
