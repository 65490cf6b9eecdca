#!/usr/bin/env bash
# Five methods on all of CIFAR-10 under one budget: every training command.
#   results/cifar10.sh DATA OUT lr                 # PGD-AT for 3 epochs at three peak rates
#   results/cifar10.sh DATA OUT rows LR [NAME]...  # WRN-16-2, 10 epochs: all rows, or these
#   results/cifar10.sh DATA OUT gpu LR [NAME]...   # the same rows for a GPU: ResNet-18, 30 epochs
# See queue.sh for what happens to a run. MORE="--limit 200" tries the commands out.
# Decided before the search: 0.2, unless another rate wins by more than its 95 % interval.
# Scaled to the epochs: ATLAS's ramp, 15 in 100; IAAT's warm-up, 5 in 200, is 1. DRA: one half is
# clean epochs, the other fine-tuning, a tenth of all at its end clean.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2") what=$3
shift 3
cd "$(dirname "$0")/.."
commit=4790eb3
judge=4790eb3
source results/queue.sh
model=wrn-16-2 epochs=10 prefix=cifar10
if [ "$what" = gpu ]; then model=resnet18 epochs=30 prefix=cifar10-resnet18; fi
half=$((epochs / 2)) tenth=$((epochs / 10)) ramp=$(((15 * epochs + 50) / 100))
budget="--dataset cifar10 --model $model --normalize none --val 1000
  --batch-size 128 --momentum 0.9 --weight-decay 5e-4 --eps 8/255 --schedule onecycle
  --augment crop-flip --precision bfloat16 --seed 0 ${MORE:-}"
pgd="--attack-steps 7 --step-size 2/255"

run() {  # NAME SCRIPT FLAGS...: with the budget
  train "$prefix-$1" "$2" $budget --lr "$lr" "${@:3}"
}

row() {  # NAME: one row of the table
  local all="--epochs $epochs" teacher="--teacher runs/$prefix-pgd-at.pt"
  case $1 in
    nt)       run nt       sat_rx.py --method nt $all ;;
    fgsm-at)  run fgsm-at  sat_rx.py --method fgsm-at $all ;;
    adv)      run adv      atlas.py --method adv --steps 1 --ramp $ramp $all ;;
    pgd-at)   run pgd-at   sat_rx.py --method pgd-at $pgd $all ;;
    r1)       run r1       sat_rx.py --method r1 --attack-steps 7 $all ;;
    r2)       run r2       sat_rx.py --method r2 $all ;;
    r3)       run r3       sat_rx.py --method r3 $all ;;
    atlas)    run atlas    atlas.py --method atlas --steps 1 --ramp $ramp $all ;;
    iaat)     run iaat     iaat.py --method iaat --warmup 1 $pgd $all ;;
    dra)      run dra      dra_finetune.py --pretrain-epochs $half --pretrain-lr "$lr" \
                             --epochs $half --clean-epochs $tenth ;;
    align)    run align    teacher_saliency.py --method align $teacher --align-epochs $epochs ;;
    saliency) run saliency teacher_saliency.py $teacher --align-epochs $((8 * tenth)) \
                             --ks 90,50 --k-epochs $tenth ;;
    *) echo "no row is called $1" >&2; exit 2 ;;
  esac
}

if [ "$what" = lr ]; then
  for lr in 0.1 0.2 0.3; do run "lr-$lr" sat_rx.py --method pgd-at $pgd --epochs 3; done
  python results/budget.py "$out"
else
  lr=$1
  shift
  for name in ${*:-nt fgsm-at adv pgd-at r2 r3 atlas iaat r1 dra align saliency}; do
    row "$name"
    keep "$prefix-$name" --protocol table --sanity --baseline "runs/$prefix-nt.pt"
  done
fi
