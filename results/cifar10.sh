#!/usr/bin/env bash
# Five methods on all of CIFAR-10 under one budget: every training command.
#   results/cifar10.sh DATA OUT lr                 # PGD-AT for 3 epochs at three peak rates
#   results/cifar10.sh DATA OUT rows LR [NAME]...  # the rows at the best of them, all or these
# A killed run goes on, a finished one is skipped. MORE="--limit 200" tries the commands out.
# Scaled to 10 epochs: ATLAS's ramp of 15 in 100 epochs is 2, IAAT's warm-up of 5 in 200 is 1,
# DRA has 5 clean epochs and 5 of fine-tuning, the last one clean.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2") what=$3
shift 3
cd "$(dirname "$0")/.."
mkdir -p "$out"
budget="--dataset cifar10 --data-dir $data --model wrn-16-2 --normalize none --val 1000
  --batch-size 128 --momentum 0.9 --weight-decay 5e-4 --eps 8/255 --schedule onecycle
  --augment crop-flip --precision bfloat16 --seed 0 ${MORE:-}"
pgd="--attack-steps 7 --step-size 2/255"

train() {  # NAME SCRIPT FLAGS...: OUT/NAME.pt, its log beside it
  local name=$1 script=$2
  shift 2
  echo "$(date +%T) $name"
  python "$script" $budget --ckpt "$out/$name.pt" --resume "$@" >> "$out/$name.log" 2>&1
}

row() {  # NAME: one row of the table
  case $1 in
    nt)       train nt       sat_rx.py --method nt $ten ;;
    fgsm-at)  train fgsm-at  sat_rx.py --method fgsm-at $ten ;;
    adv)      train adv      atlas.py --method adv --steps 1 --ramp 2 $ten ;;
    pgd-at)   train pgd-at   sat_rx.py --method pgd-at $pgd $ten ;;
    r1)       train r1       sat_rx.py --method r1 --attack-steps 7 $ten ;;
    r2)       train r2       sat_rx.py --method r2 $ten ;;
    r3)       train r3       sat_rx.py --method r3 $ten ;;
    atlas)    train atlas    atlas.py --method atlas --steps 1 --ramp 2 $ten ;;
    iaat)     train iaat     iaat.py --method iaat --warmup 1 $pgd $ten ;;
    dra)      train dra      dra_finetune.py --pretrain-epochs 5 --pretrain-lr "$lr" --epochs 5 \
                             --clean-epochs 1 --lr "$lr" ;;
    align)    train align    teacher_saliency.py --method align --teacher "$out/pgd-at.pt" \
                             --align-epochs 10 --lr "$lr" ;;
    saliency) train saliency teacher_saliency.py --teacher "$out/pgd-at.pt" --align-epochs 8 \
                             --ks 90,50 --k-epochs 1 --lr "$lr" ;;
    *) echo "no row is called $1" >&2; exit 2 ;;
  esac
}

if [ "$what" = lr ]; then
  for lr in 0.1 0.2 0.3; do
    train "lr-$lr" sat_rx.py --method pgd-at $pgd --lr "$lr" --epochs 3
  done
else
  lr=$1
  shift
  ten="--lr $lr --epochs 10"
  for name in ${*:-nt fgsm-at adv pgd-at r2 r3 atlas iaat r1 dra align saliency}; do
    row "$name"
  done
fi
