#!/usr/bin/env bash
# The claims of the five papers, each beside the control that would expose it: training, evaluation.
#   results/claims.sh DATA OUT [PART]...     # parts: atlas precision iaat dra saliency sat, or names
# The same updates, steps and epochs; the method's new part switched off. Cheap parts come first.
# See queue.sh for what happens to a run. MORE="--limit 200" tries the training commands out.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
wanted=" $* "
cd "$(dirname "$0")/.."
commit=5fe4c55
judge=5fe4c55
source results/queue.sh

# What a row is judged by: attacks on all test images, attacks on 500 of them, flags of both, and
# attacks with BatchNorm in train mode.
all=clean,fgsm,pgd-20
few=aa
flags=
train_mode=

row() {  # NAME SCRIPT FLAGS...: where its name, or the part that it begins with, is wanted
  local name=$1 script=$2
  shift 2
  if [ "$wanted" = "  " ] || [[ $wanted == *" $name "* || $wanted == *" ${name%%-*} "* ]]; then
    train "$name" "$script" "$@" ${MORE:-}
    if [ -z "${MORE:-}" ]; then judged "$name"; fi
  fi
}

judged() {  # NAME: results/NAME.json
  if [ -n "$train_mode" ]; then
    evaluate "$1" "$1" --limit 0 --attacks "$train_mode" --bn-mode train
  fi
  evaluate "$1" "$1" --limit 0 --attacks "$all" $flags
  publish "$1" "$1" --limit 500 --attacks "$few" $flags
}

# Table 1 of ATLAS, and its Jacobian term (alpha) switched off: ATLAS-g. Validation by PGD-40 takes
# 1,000 images: with the default's 6,000 it costs twice what training does.
table1() {  # SEED
  few=aa
  if [ "$1" = 0 ]; then
    few=aa,pgd-1000@0.01,un-50x20@0.01,un-50x20@0.003,multi-50x20@0.01,multi-50x20@0.003
  fi
  local atlas="atlas.py --dataset mnist --model cnn-small --lr 0.05 --guide fixed --val 1000
    --val-steps 40 --val-step-size 0.03 --precision float32 --seed $1"
  row atlas-adv-s$1 $atlas --method adv
  row atlas-g-s$1 $atlas --method atlas --alpha 0
  row atlas-atlas-s$1 $atlas --method atlas
}
for s in 0 1 2; do
  table1 $s
done
few=aa

# What bfloat16 costs: R2 (lambda 5 and 25) in both precisions, the same seeds.
for s in 0 1 2; do
  for p in float32 bfloat16; do
    row precision-mnist-$p-s$s sat_rx.py --dataset mnist --model cnn-small --method r2 \
      --epochs 20 --precision $p --seed $s
    row precision-cifar-$p-s$s sat_rx.py --dataset cifar10 --model wrn-10-1 --limit 20000 \
      --method r2 --normalize none --schedule onecycle --lr 0.2 --epochs 10 --precision $p --seed $s
  done
done

# IAAT on MNIST: PGD-AT with its steps, and IAAT whose eps never moves (--warmup 30 of 30 epochs).
iaat="iaat.py --dataset mnist --limit 10000 --attack-steps 10 --epochs 30 --val 0"
small="$iaat --model cnn-small --precision float32"
for s in 0 1 2; do
  row iaat-pgd-at-s$s $small --seed $s --method pgd-at --step-size 0.06
  row iaat-fixed-s$s $small --seed $s --method iaat --warmup 30
  row iaat-iaat-s$s $small --seed $s --method iaat
done
lenet="$iaat --precision bfloat16 --seed 0"
row iaat-lenet-pgd-at $lenet --method pgd-at --step-size 0.06
row iaat-lenet-fixed $lenet --method iaat --warmup 30
row iaat-lenet-iaat $lenet --method iaat
# Fig. 3 on CIFAR-10: IAAT beside the trade-off of PGD-AT's eps.
curve="iaat.py --dataset cifar10 --model wrn-10-1 --limit 10000 --epochs 15 --schedule onecycle
  --lr 0.2 --normalize none --precision bfloat16 --seed 0 --attack-steps 7 --val 0"
all=clean,fgsm,pgd-20,pgd-20:4/255
few=aa,aa:4/255
flags="--eps 8/255"
for eps in 3 4 6 8; do
  row iaat-cifar-pgd-at-$eps $curve --method pgd-at --eps $eps/255 --step-size 2/255
done
row iaat-cifar-fixed $curve --method iaat --warmup 15
row iaat-cifar-iaat $curve --method iaat --warmup 2 --beta 0.5

# White-box, and by transfer from the first phase, with the paper's steps of eps / 20.
steps=pgd-20:0.1@0.005,pgd-20:0.3@0.015
all=clean,$steps
few=aa:0.1,aa
flags="--eps 0.3"
# DRA on MNIST without crop. One first phase for all; the printed adversary, the bounded one, that
# of the frozen first phase, TRADES, and fine-tuning with PGD.
dra="dra_finetune.py --dataset mnist --augment none --val 1000 --seed 0"
long="$dra --model cnn-small --precision float32 --epochs 50"
row dra-small-vanilla $dra --model cnn-small --precision float32 --method vanilla
flags="--eps 0.3 --surrogate runs/dra-small-vanilla.pt --transfer $steps"
row dra-small-printed $long --init runs/dra-small-vanilla.pt
row dra-small-linf $long --init runs/dra-small-vanilla.pt --linf 0.3
row dra-small-frozen $long --init runs/dra-small-vanilla.pt --attacked first-phase
flags="--eps 0.3"
lenet="$dra --precision bfloat16 --epochs 10 --attack-steps 10"
row dra-vanilla $dra --precision bfloat16 --method vanilla
flags="--eps 0.3 --surrogate runs/dra-vanilla.pt --transfer $steps"
row dra-printed $lenet --init runs/dra-vanilla.pt
row dra-linf $lenet --init runs/dra-vanilla.pt --linf 0.3
row dra-frozen $lenet --init runs/dra-vanilla.pt --attacked first-phase
row dra-pgd $lenet --init runs/dra-vanilla.pt --adversary pgd
row dra-trades $lenet --method trades --adversary pgd

all=clean,fgsm,pgd-20
few=aa
flags=
train_mode=clean,pgd-20
# Saliency on three classes of CIFAR-10: maps of train and eval mode, logit and prob, phase 1 alone
# and both phases at equal epochs. The first run of a seed trains the teacher of all.
for s in 0 1 2; do
  sal="teacher_saliency.py --dataset cifar10 --classes 0,1,6 --model wrn-10-1 --limit 6000
    --val 500 --precision float32 --seed $s --teacher-epochs 20 --attack-steps 7"
  row saliency-teacher-s$s $sal --method align --align-epochs 1
  teacher=saliency-teacher-s$s.teacher
  if [ -e "$out/saliency-teacher-s$s.done" ] && [ -z "${MORE:-}" ]; then
    touch "$out/$teacher.done"
    judged $teacher
  fi
  given="--teacher runs/saliency-teacher-s$s.teacher.pt"
  sal=${sal/--teacher-epochs 20 --attack-steps 7/}
  for score in logit prob; do
    for mode in train eval; do
      maps="--score $score --map-mode $mode"
      row saliency-align-$score-$mode-s$s $sal $given $maps --method align --align-epochs 13
      row saliency-both-$score-$mode-s$s $sal $given $maps --align-epochs 8 --k-epochs 1
    done
  done
  row saliency-both-logit-prob-s$s $sal $given --score logit --score2 prob --align-epochs 8 \
    --k-epochs 1
  row saliency-nt-s$s $sal --method nt --align-epochs 13
done

train_mode=
few=aa,ifgsm-100,pgd-100,pgd-cw-100
# SAT-Rx on MNIST, LeNet+: the ablations at 20 epochs, both FGSM-AT, multi-step baselines, the two
# sequences of table 9, and three seeds.
sat="sat_rx.py --dataset mnist --precision bfloat16 --epochs 20"
ten="--attack-steps 10 --step-size 0.06"
row sat-r3-1-lr-0.01 $sat --method r3 --lam 0 --lr 0.01
row sat-r2-1-alpha-0.01 $sat --method r2 --lam 0 --ce-all --rfgsm-alpha 0.01
row sat-r2-1-alpha-0.15 $sat --method r2 --lam 0 --ce-all --rfgsm-alpha 0.15
row sat-fgsm-at-fixed $sat --method fgsm-at
if [ "$wanted" = "  " ]; then
  publish sat-fgsm-at-fixed-last sat-fgsm-at-fixed --weights last --limit 500 \
    --attacks "clean,fgsm,$few"
fi
row sat-fgsm-at-random $sat --method fgsm-at --fgsm-eps random
row sat-pgd-at $sat --method pgd-at $ten
row sat-trades $sat --method trades $ten
part="sat_rx.py --dataset mnist --precision bfloat16 --schedule-epochs 20"
row sat-table9-r1 $part --method r1 --epochs 5
row sat-table9-r1-r3 $part --method r3 --epochs 15 --schedule-start 5 --init runs/sat-table9-r1.pt
row sat-table9-r3 $part --method r3 --epochs 15
row sat-table9-r3-r2 $part --method r2 --epochs 5 --schedule-start 15 --init runs/sat-table9-r3.pt
for s in 0 1 2; do
  [ $s = 0 ] || few=aa
  row sat-r2-s$s $sat --method r2 --seed $s
  row sat-r3-s$s $sat --method r3 --seed $s
done
few=aa,ifgsm-100,pgd-100,pgd-cw-100
row sat-r1-1 $sat --method r1 --lam 0 --ce-all
for s in 0 1 2; do
  [ $s = 0 ] || few=aa
  row sat-r1-s$s $sat --method r1 --seed $s
done
few=aa
row atlas-jac-lenet atlas.py --dataset mnist --method jac --precision bfloat16

for s in 3 4; do  # table 1's last two seeds
  table1 $s
done
