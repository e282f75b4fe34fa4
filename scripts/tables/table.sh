# Sourced by the scripts of the tables: all three stages for each kind (plain, oe, poe), ipc and seed.
# Finished stages are skipped and interrupted ones resume, so a script can be started again at any time. Seeds can run at
# once, each by a call of its own (SEEDS=1, SEEDS=2, …) with the same OUT; what they share, the experts of MTT and the
# features of herding and kcenter, must be there before.
#
# A script sets DATASET, AUGMENT and defaults. The caller may set these, e.g. IPC="1 10" SEEDS="1 2" bash …:
#   IPC SEEDS KINDS     lists: images per class, seeds, and kinds:
#                       plain oe poe      distilled sets
#                       plain-X oe-X poe-X  the images of plain, oe, poe with outliers that are not distilled; X as
#                                         --outliers: initial kcenter corrupt real none
#                       Y-again           outliers of Y corrupted again in every epoch; Y: oe, poe or …-initial, …-kcenter
#                       B B-X             real images instead: B as --train_on: random herding kcenter whole
#                                         (whole: alone, or with corrupt or real)
#   METHOD              DC, DSA (default), DM or MTT
#   EXPERTS MTT         for METHOD=MTT: flags of train_experts.py, and of stage 1, e.g. MTT="--syn_steps 50"
#   BUFFERS             folder of the experts (left out: $OUT/buffers)
#   EXPERT_LAMBDA       --lambda_oe of the experts, if OUTLIERS has --expert_lambda_oe (left out: LAMBDA; with the recipe strong: 2)
#   MODEL ITERATIONS    the network, and the updates of the synthetic images (left out: 1000, or the method's default)
#   NETWORKS EPOCHS     networks trained on each set, and their epochs; WHOLE_EPOCHS those on the whole training set
#   SCORE OOD_SETS      scores of stage 3, and the OOD sets
#   DATA OE_DATA OOD    --data_path, --oe_data_path, --ood_path
#   STAGE1 STAGE2 STAGE3  further flags of a stage, e.g. STAGE1="--batch_real 64"
#   OUTLIERS POE        further flags of main_oe.py and main_poe.py, and of main_poe.py alone, e.g. OUTLIERS="--batch_oe 64"
#   SOURCE              further flags of stage 2 for outliers that are not distilled, e.g. --mix_corruptions
#   LAMBDA              --lambda_oe
#   LAMBDAS             further weights of the outliers in stage 2, for the same distilled sets: $OUT/ipc<n>/lambda-<x>/<kind>
#   DETECTORS           further scores of stage 3 for the same networks, fitted on the distilled and on the real images:
#                       $OUT/ipc<n>/fit-distilled/<kind> and fit-real/<kind>
#   PRECISION           --precision of all stages and of the experts, e.g. bf16 (left out: each script's default)
#   DOWNLOAD            what may be fetched, as --download: none, data (the data set) or all; left out: the stages' default
#   OUT                 folder for all results
#   PYTHON              the interpreter (left out: that of .venv if there is one, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DATA=${DATA:-data}
OE_DATA=${OE_DATA:-data/300K_random_images.npy}
OOD=${OOD:-data/ood}
KINDS=${KINDS:-plain oe poe}
SEEDS=${SEEDS:-1 2 3}
NETWORKS=${NETWORKS:-5}
EPOCHS=${EPOCHS:-1000}
METHOD=${METHOD:-DSA}
if [[ $METHOD == DC || $METHOD == DSA ]]; then ITERATIONS=${ITERATIONS:-1000}; fi
ITERATIONS=${ITERATIONS:-}
EXPERTS=${EXPERTS:-}
MTT=${MTT:-}
SCORE=${SCORE:-msp}
LAMBDA=${LAMBDA:-0.5}
LAMBDAS=${LAMBDAS:-}
DETECTORS=${DETECTORS:-}
STAGE1=${STAGE1:-}
STAGE2=${STAGE2:-}
STAGE3=${STAGE3:-}
DOWNLOAD=${DOWNLOAD:-}
PRECISION=${PRECISION:-}
OUTLIERS=${OUTLIERS:-}
POE=${POE:-}
EXPERT_LAMBDA=${EXPERT_LAMBDA:-$([[ ${OUTLIERS//-/_} == *__outlier_recipe[=\ ]strong* ]] && echo 2 || true)}
SOURCE=${SOURCE:-}
WHOLE_EPOCHS=${WHOLE_EPOCHS:-30}

# stage DIR BEFORE COMMAND: start or resume a stage that writes into DIR; BEFORE is the folder of the stage that it reads,
# or empty. DIR/done keeps all commands that led to DIR. If the settings now lead to other commands, the script stops, as
# a resumed stage does.
stage() {
    local dir=$1 before=$2 all
    shift 2
    set -- "$@" --save_path "$dir"
    all=$(
        if [ -n "$before" ]; then cat "$before/done"; elif [ "$METHOD" = MTT ]; then echo "EXPERTS $EXPERTS"; fi
        printf '%s\n' "$*"
    )
    if [ -s "$dir/done" ]; then
        if [ "$(cat "$dir/done")" = "$all" ]; then return; fi
        echo "OUT: $dir was made with other settings; set another OUT, or delete $(dirname "$dir")" >&2
        diff <(tr ' ' '\n' < "$dir/done") <(tr ' ' '\n' <<< "$all") >&2 || true
        exit 2
    fi
    if [ "$1" = test_ood_model_syn.py ]; then
        rm -rf "$dir"
    elif [ -n "$(find "$dir" -name args.json 2>/dev/null)" ]; then
        set -- "$@" --resume latest
    fi
    echo "\$ $PYTHON $*"
    "$PYTHON" "$@"
    printf '%s\n' "$all" > "$dir/done.new"
    mv "$dir/done.new" "$dir/done"
}

# buffers KIND: the folder of the experts; each value of POE has its own
buffers() {
    local more=""
    if [ "$1" = poe ]; then more=${POE//[^a-z]/}; fi
    echo "${BUFFERS:-$OUT/buffers}/$1${more:+-$more}"
}

# experts KIND: train the experts of MTT for a kind; existing ones are not trained again
experts() {
    local kind=$1 outliers=$1 more=""
    case $kind in
        plain) outliers=none ;;
        oe) more="--oe_data_path $OE_DATA --lambda_oe ${EXPERT_LAMBDA:-$LAMBDA}" ;;
        poe) more="--lambda_oe ${EXPERT_LAMBDA:-$LAMBDA} $POE" ;;
    esac
    set -- train_experts.py --dataset "$DATASET" --data_path "$DATA" --model "$MODEL" ${DOWNLOAD:+--download $DOWNLOAD} ${PRECISION:+--precision $PRECISION} $AUGMENT \
        --outliers "$outliers" $more --buffer_path "$(buffers "$kind")" $EXPERTS
    echo "\$ $PYTHON $*"
    "$PYTHON" "$@"
}

# distil KIND IPC SEED DIR
distil() {
    local script=main.py more=""
    case $1 in
        plain) ;;
        oe) script=main_oe.py more="--oe_data_path $OE_DATA --lambda_oe $LAMBDA $OUTLIERS" ;;
        poe) script=main_poe.py more="--lambda_oe $LAMBDA $OUTLIERS $POE" ;;
    esac
    if [ "$METHOD" = MTT ]; then
        if [ ! -s "$4/done" ]; then experts "$1"; fi
        more="$more --buffer_path $(buffers "$1") $MTT"
    fi
    stage "$4" "" $script $COMMON $AUGMENT --ipc "$2" --seed "$3" --init real --num_exp 1 ${ITERATIONS:+--Iteration $ITERATIONS} $more $STAGE1
}

# train KIND IPC SEED DISTILLED DIR; DISTILLED is the folder of the distilled set, or empty
train() {
    local kind=$1 before=$4 script=train_model_synthetic_oe.py more="" epochs=$EPOCHS
    local base=${kind%%-*} outliers=""
    if [[ $kind == *-again ]]; then more=--corrupt_again kind=${kind%-again}; fi
    if [ "$kind" != "$base" ]; then outliers=${kind#*-}; fi
    case $base in
        plain) outliers=${outliers:-none} more="--load_path $before $more" ;;
        oe | poe) more="--load_path $before $more" ;;
        herding | kcenter) outliers=${outliers:-none} more="--train_on $base --features $OUT/features $more" ;;
        *) outliers=${outliers:-none} more="--train_on $base $more" ;;
    esac
    if [ "$base" = whole ]; then epochs=$WHOLE_EPOCHS; fi
    if [ "$outliers" = none ]; then
        script=train_model_synthetic_no_oe.py
    else
        more="$more --lambda_oe $LAMBDA${outliers:+ --outliers $outliers}"
        if [[ -n "$outliers" || "$more" == *--corrupt_again* ]]; then more="$more $SOURCE"; fi
        if [ "$base" = oe ] && [[ " initial kcenter real " == *" $outliers "* ]]; then more="$more --oe_data_path $OE_DATA"; fi
    fi
    stage "$5" "$before" $script $COMMON $AUGMENT --ipc "$2" --seed "$3" --num_eval "$NETWORKS" --epoch_eval_train "$epochs" $more $STAGE2
}

# place KIND IPC: the folder of a kind; the whole training set does not depend on ipc
place() {
    case $1 in whole*) echo "$OUT/$1" ;; *) echo "$OUT/ipc$2/$1" ;; esac
}

# check_kinds: every kind is known before the first hours are spent, and paths are single words
check_kinds() {
    local kind name
    for name in OUT DATA OE_DATA OOD BUFFERS; do
        if [[ ${!name:-} == *[[:space:]]* ]]; then
            echo "$name: '${!name}' has a space in it; give a path without one" >&2
            exit 2
        fi
    done
    for kind in $KINDS; do
        if ! [[ $kind =~ ^(plain|oe|poe|random|herding|kcenter|whole)$|^(plain|oe|poe|random|herding|kcenter)-(initial|kcenter|corrupt|real|none)$|^whole-(corrupt|real)$|^(oe|poe)-again$|^(plain|oe|poe|random|herding|kcenter)-(initial|kcenter)-again$ ]]; then
            echo "KINDS: unknown kind '$kind'. Accepted: plain oe poe random herding kcenter, alone or with -X, X out of" \
                "initial kcenter corrupt real none; whole whole-corrupt whole-real; with -again: oe poe …-initial …-kcenter" >&2
            exit 2
        fi
    done
}

# measure IPC SEED NETWORKS DIR
measure() {
    stage "$4" "$3" test_ood_model_syn.py $COMMON --ipc "$1" --seed "$2" --num_exp "$NETWORKS" --is_load_best --ood_path "$OOD" --ood_sets $OOD_SETS --score $SCORE --load_path "$3" $STAGE3
}

# sweep IPC LAMBDAS: stages 2 and 3 once more with other weights of the outliers, of all kinds that have any (not of whole)
sweep() {
    local ipc=$1 kind seed dir base distilled LAMBDA folders=() measured=""
    for LAMBDA in $2; do
        folders+=("$OUT/ipc$ipc/lambda-$LAMBDA")
        for seed in $SEEDS; do
            for kind in $KINDS; do
                base=${kind%%-*} distilled="" dir=$OUT/ipc$ipc/lambda-$LAMBDA/$kind/seed$seed
                if ! [[ $kind == oe || $kind == poe || $kind == *-* ]] || [[ $kind == *-none || $base == whole ]]; then continue; fi
                if [[ " plain oe poe " == *" $base "* ]]; then distilled=$OUT/ipc$ipc/$base/seed$seed/1-distilled; fi
                train "$kind" "$ipc" "$seed" "$distilled" "$dir/2-networks"
                measure "$ipc" "$seed" "$dir/2-networks" "$dir/3-ood"
                measured=yes
            done
        done
    done
    if [ -z "$measured" ]; then return; fi
    "$PYTHON" scripts/study.py "${folders[@]}" --prefixes $2 --scores $SCORE --of_networks accuracy ece nll --out "$OUT/ipc$ipc/lambda.md"
}

# detect IPC: stage 3 once more with the scores of DETECTORS, fitted on either set; not of whole, which has but one
detect() {
    local ipc=$1 kind seed fit SCORE more=$STAGE3 STAGE3
    for fit in distilled real; do
        STAGE3="$more --fit_on $fit"
        # networks are right on all images that they were trained on, so that no temperature fits
        if [ $fit = distilled ]; then SCORE=${DETECTORS//tscaling/}; else SCORE=$DETECTORS; fi
        if [ -z "${SCORE// /}" ]; then continue; fi
        for seed in $SEEDS; do
            for kind in $KINDS; do
                if [ "${kind%%-*}" = whole ]; then continue; fi
                measure "$ipc" "$seed" "$OUT/ipc$ipc/$kind/seed$seed/2-networks" "$OUT/ipc$ipc/fit-$fit/$kind/seed$seed/3-ood"
            done
        done
    done
}

check_kinds

# The whole table: $OUT/ipc<n>/<kind>/seed<s>/{1-distilled,2-networks,3-ood}, and the comparison of the kinds for each ipc.
table() {
    COMMON="--dataset $DATASET --data_path $DATA --model $MODEL --method $METHOD${DOWNLOAD:+ --download $DOWNLOAD}${PRECISION:+ --precision $PRECISION}"
    local ipc kind seed dir base distilled size pool=""
    if [[ " $KINDS " == *" oe"* ]]; then pool="--oe_data_path $OE_DATA"; fi
    "$PYTHON" scripts/tables/check_inputs.py --dataset "$DATASET" --data_path "$DATA" --ood_path "$OOD" --ood_sets $OOD_SETS \
        $pool ${DOWNLOAD:+--download $DOWNLOAD}
    for ipc in $IPC; do
        for seed in $SEEDS; do
            for kind in $KINDS; do
                dir=$(place "$kind" "$ipc")/seed$seed
                base=${kind%%-*} distilled="" size=$ipc
                if [ "$base" = whole ]; then size=1; fi # it stands in the names of folders alone
                if [[ " plain oe poe " == *" $base "* ]]; then
                    distilled=$OUT/ipc$ipc/$base/seed$seed/1-distilled
                    distil "$base" "$ipc" "$seed" "$distilled"
                fi
                train "$kind" "$size" "$seed" "$distilled" "$dir/2-networks"
                measure "$size" "$seed" "$dir/2-networks" "$dir/3-ood"
            done
        done
        compare "$OUT/ipc$ipc" $KINDS
        if [ -n "$LAMBDAS" ]; then sweep "$ipc" "$LAMBDAS"; fi
        if [ -n "$DETECTORS" ]; then detect "$ipc"; fi
    done
}

# compare DIR NAMES: the folders of these names in DIR (or in OUT) as columns
compare() {
    local dir=$1 name folders=()
    shift
    for name in "$@"; do
        if [ -d "$dir/$name" ]; then folders+=("$dir/$name"); else folders+=("$OUT/$name"); fi
    done
    "$PYTHON" scripts/compare.py "${folders[@]}" --names "$@" --out "$dir/table" --html
}
