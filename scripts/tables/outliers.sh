#!/usr/bin/env bash
# Are distilled outliers worth distilling? POE by several recipes, each beside outliers that were not distilled: random ones
# (initial, which a recipe starts from unless its name holds kcenter), kcenter and corrupt. scripts/tables/table.sh lists what can be set.
#   bash scripts/tables/outliers.sh                                             # Digits, ipc 1 and 10, DSA
#   TABLE=cifar10 METHOD=DM MODEL=ConvNetW32 IPC=10 bash scripts/tables/outliers.sh
# To try it:
#   OUT=result-tables/try-outliers IPC=1 SEEDS=1 ITERATIONS=3 NETWORKS=1 EPOCHS=20 RECIPES="published clamp" bash scripts/tables/outliers.sh
# RECIPES takes names of the list in flags() below; left out: those that METHOD knows. Results go to $OUT/<recipe>, and the
# tables of all recipes to $OUT/study-ipc<n>.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TABLE=${TABLE:-digits}
METHOD=${METHOD:-DSA}
OUT=${OUT:-result-tables/outliers-$TABLE-$METHOD}
IPC=${IPC:-1 10}
KINDS=${KINDS:-poe poe-initial poe-kcenter poe-corrupt}
SCORE=${SCORE:-msp mls}
GIVEN=${OUTLIERS:-}
EXPERTS_IN=${BUFFERS:-$OUT/buffers}
half=0.05 tenth=0.01 # of the published learning rate
case $METHOD in
    DC | DSA) known="published slow clamp careful careful-pool trained kcenter mixed pool kcenter-pool spread mixed-spread" ;;
    DM) known="published slow clamp careful careful-pool trained kcenter mixed pool kcenter-pool spread mixed-spread" half=0.5 tenth=0.1 ;;
    *) known="published clamp kcenter strong strong-kcenter" ;;
esac
RECIPES=${RECIPES:-$known}

# flags RECIPE: its flags of main_poe.py
flags() {
    case $1 in
        published) ;;
        slow) echo "--lr_img_oe $tenth" ;;
        clamp) echo "--clamp_oe" ;;
        careful) echo "--clamp_oe --lr_img_oe $tenth" ;;
        careful-pool) echo "--clamp_oe --lr_img_oe $tenth --network_pool 10" ;;
        trained) echo "--clamp_oe --lr_img_oe $half --network_pool 10" ;;
        kcenter) echo "--init_oe kcenter" ;;
        kcenter-pool) echo "--init_oe kcenter --network_pool 10" ;;
        mixed) echo "--mix_corruptions" ;;
        pool) echo "--network_pool 10" ;;
        spread) echo "--spread_oe 100" ;;
        mixed-spread) echo "--mix_corruptions --spread_oe 100" ;;
        strong) echo "--outlier_recipe strong" ;;
        strong-kcenter) echo "--outlier_recipe strong --init_oe kcenter" ;;
    esac
}

for recipe in $RECIPES; do
    if ! [[ " $known " == *" $recipe "* ]]; then
        echo "RECIPES: METHOD=$METHOD has no recipe '$recipe'. Accepted: $known" >&2
        exit 2
    fi
done

for recipe in $RECIPES; do
    # undistilled outliers are drawn as the recipe draws its own
    source=$([[ $recipe == mixed* ]] && echo --mix_corruptions || true)
    # the experts of MTT serve all recipes but the strong ones, whose experts weigh outliers more
    export BUFFERS=$EXPERTS_IN$([[ $recipe == strong* ]] && echo -strong || true)
    OUTLIERS="$(flags "$recipe") $GIVEN" SOURCE=$source METHOD=$METHOD OUT=$OUT/$recipe IPC=$IPC KINDS=$KINDS SCORE=$SCORE \
        bash "scripts/tables/$TABLE.sh"
done
base=$([[ " $KINDS " == *" poe "* && $KINDS == *" "* ]] && echo "--base poe" || true)
for ipc in $IPC; do
    folders=() names=()
    for recipe in $RECIPES; do
        folders+=("$OUT/$recipe/ipc$ipc") names+=("$recipe")
    done
    "$PYTHON" scripts/study.py "${folders[@]}" --prefixes "${names[@]}" --kinds $KINDS $base --scores $SCORE --out "$OUT/study-ipc$ipc.md"
done
