#!/usr/bin/env bash
# Five methods on all of CIFAR-10 under one budget: every training command.
#   results/cifar10.sh DATA OUT lr                 # PGD-AT for 3 epochs at three peak rates
#   results/cifar10.sh DATA OUT rows LR [NAME]...  # the rows at the best of them, all or these
# Decided before the search: 0.2, unless another rate wins by more than its 95 % interval.
# See queue.sh for what happens to a run. MORE="--limit 200" tries the commands out.
# Scaled to 10 epochs: ATLAS's ramp of 15 in 100 epochs is 2, IAAT's warm-up of 5 in 200 is 1,
# DRA has 5 clean epochs and 5 of fine-tuning, the last one clean.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2") what=$3
shift 3
cd "$(dirname "$0")/.."
commit=4790eb3
judge=4790eb3
source results/queue.sh
budget="--dataset cifar10 --model wrn-16-2 --normalize none --val 1000
  --batch-size 128 --momentum 0.9 --weight-decay 5e-4 --eps 8/255 --schedule onecycle
  --augment crop-flip --precision bfloat16 --seed 0 ${MORE:-}"
pgd="--attack-steps 7 --step-size 2/255"

run() {  # NAME SCRIPT FLAGS...: with the budget
  train "cifar10-$1" "$2" $budget "${@:3}"
}

row() {  # NAME: one row of the table
  case $1 in
    nt)       run nt       sat_rx.py --method nt $ten ;;
    fgsm-at)  run fgsm-at  sat_rx.py --method fgsm-at $ten ;;
    adv)      run adv      atlas.py --method adv --steps 1 --ramp 2 $ten ;;
    pgd-at)   run pgd-at   sat_rx.py --method pgd-at $pgd $ten ;;
    r1)       run r1       sat_rx.py --method r1 --attack-steps 7 $ten ;;
    r2)       run r2       sat_rx.py --method r2 $ten ;;
    r3)       run r3       sat_rx.py --method r3 $ten ;;
    atlas)    run atlas    atlas.py --method atlas --steps 1 --ramp 2 $ten ;;
    iaat)     run iaat     iaat.py --method iaat --warmup 1 $pgd $ten ;;
    dra)      run dra      dra_finetune.py --pretrain-epochs 5 --pretrain-lr "$lr" --epochs 5 \
                             --clean-epochs 1 --lr "$lr" ;;
    align)    run align    teacher_saliency.py --method align --teacher runs/cifar10-pgd-at.pt \
                             --align-epochs 10 --lr "$lr" ;;
    saliency) run saliency teacher_saliency.py --teacher runs/cifar10-pgd-at.pt --align-epochs 8 \
                             --ks 90,50 --k-epochs 1 --lr "$lr" ;;
    *) echo "no row is called $1" >&2; exit 2 ;;
  esac
}

if [ "$what" = lr ]; then
  for lr in 0.1 0.2 0.3; do
    run "lr-$lr" sat_rx.py --method pgd-at $pgd --lr "$lr" --epochs 3
  done
else
  lr=$1
  shift
  ten="--lr $lr --epochs 10"
  for name in ${*:-nt fgsm-at adv pgd-at r2 r3 atlas iaat r1 dra align saliency}; do
    row "$name"
    keep "cifar10-$name" --protocol table --sanity --baseline runs/cifar10-nt.pt
  done
fi
