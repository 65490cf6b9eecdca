"""How robust is a network? Attacks by name on test images, a table, and a record of every outcome.

    python evaluate.py --ckpt run.pt                             # a quick look: 1,000 test images
    python evaluate.py --ckpt run.pt --limit 0 --attacks clean,fgsm,pgd-100x5,un-100x10,aa
    python evaluate.py --ckpt run.pt --protocol common --sanity --plots figures
    python evaluate.py --ckpt run.pt --protocol sat_rx --surrogate c.pt  # a paper's own columns
    python evaluate.py --ckpt theirs.pth --dataset cifar10 --model nets.py:make  # not our network

NAME-STEPSxRESTARTS:EPS@STEP names an attack. A sample counts as broken at the first step that
misclassifies it, and is attacked no further: never weaker than judging the last step alone.
Evaluation is in float32 or --precision; TF32 is off. Outcomes go to run.eval.json, facts of
each sample to run.eval.npz, both under the sha256 of the weights that they belong to: nothing of
an earlier network on the same path remains, and what was measured is not run again.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import common

# What is attacked without --protocol: 1,000 test images, for a first look.
QUICK_LOOK = dict(attacks="clean,fgsm,ifgsm-40,pgd-40,pgd-cw-40", transfer="fgsm,mi-fgsm-40",
                  start="ball", limit=1000)

# The protocols: the columns of the papers' main tables; their rows are in results/papers.json.
# attacks, transfer: by name; transfer is made on the surrogates. start: of PGD, see --start.
# step: of PGD at the data set's usual eps, None: the usual one. limit: test images, 0: all.
# few: attack -> (images on a GPU, images on a CPU), where it is too slow for all of them.
PLAN = dict(transfer="", start="ball", step=None, limit=0, few={})
SAT_RX = dict(PLAN, start="step")  # tables 3 to 5; eq. 6: PGD starts within a step of x
SAT_RX_MNIST = dict(SAT_RX, attacks="clean,fgsm,ifgsm-100,pgd-100,pgd-cw-100",
                    transfer="fgsm,mi-fgsm-100")
SAT_RX_COLOUR = dict(SAT_RX, attacks="clean,fgsm,ifgsm-20,pgd-20,pgd-cw-20",
                     transfer="fgsm,mi-fgsm-20")
ATLAS = dict(PLAN, transfer="pgd-1000", step=0.007,
             few={"rays-40000": (1000, 200), "aa": (0, 500)})
# The paper prints no step for un and multi: un also at 0.003.
ATLAS_MNIST = dict(
    ATLAS, step=0.01, attacks="clean,pgd-20,pgd-1000,un-50x20,multi-50x20,un-50x20@0.003",
    few={"pgd-1000": (0, 500), "un-50x20": (0, 500), "multi-50x20": (0, 200),
         "un-50x20@0.003": (0, 500)})
IAAT = dict(PLAN, attacks="clean,pgd-10x5,pgd-100x5,pgd-1000x2", transfer="pgd-1000x2")
IAAT_CIFAR10 = dict(IAAT, attacks=IAAT["attacks"] + ",deepfool-linf,corruptions",
                    few={"deepfool-linf": (0, 500)})
TARGETED = [f"targeted-1000:{radius}/255" for radius in (4, 8, 12, 16)]
IAAT_IMAGENET = dict(PLAN, attacks=",".join(["clean", *TARGETED, "corruptions"]), step=1 / 255,
                     few=dict(dict.fromkeys(TARGETED, (1000, 100)), corruptions=(0, 100)))
SALIENCY = dict(PLAN, attacks="clean,fgsm,pgd-5,pgd-10,pgd-20", few={"aa": (0, 500)})
SALIENCY_CIFAR10 = dict(SALIENCY, attacks=SALIENCY["attacks"] + ",cw-20,aa")
DRA = dict(PLAN, step="eps/steps")
COMMON = dict(PLAN, attacks="clean,pgd-20,pgd-cw-20,pgd-100,pgd-100x5,aa,multi-20x5,rays-40000",
              few={"pgd-100x5": (1000, 500), "aa": (1000, 500), "multi-20x5": (1000, 200),
                   "rays-40000": (1000, 200)})
TABLE = dict(PLAN, attacks="clean,fgsm,pgd-20,pgd-100,aa",
             few={"pgd-100": (1000, 1000), "aa": (1000, 1000)})
PROTOCOLS = {  # another data set takes the columns of the one that is most like it
    "table": {"cifar10": TABLE},
    "common": {"cifar10": COMMON},
    "sat_rx": {"mnist": SAT_RX_MNIST, "cifar10": SAT_RX_COLOUR, "imagenet100": SAT_RX_COLOUR},
    "atlas": {
        "mnist": ATLAS_MNIST,
        "cifar10": dict(ATLAS,
                        attacks="clean,pgd-20,pgd-1000,un-100x10,multi-20x5,rays-40000,aa"),
        "cifar100": dict(ATLAS, attacks="clean,pgd-20,pgd-1000,un-100x10,rays-40000,aa")},
    "iaat": {"cifar10": IAAT_CIFAR10, "cifar100": IAAT, "imagenet": IAAT_IMAGENET},
    "saliency": {"cifar10": SALIENCY_CIFAR10, "cifar100": SALIENCY,
                 "tinyimagenet": dict(SALIENCY, attacks="clean,pgd-20")},  # table 10
    "dra": {"digits": dict(DRA, attacks="clean,pgd-20:0.05,pgd-20:0.1"),
            "mnist": dict(DRA, attacks="clean,pgd-20:0.1,pgd-20:0.3"),
            "cifar10": dict(DRA, attacks="clean,pgd-20:2/255,pgd-20:5/255,pgd-20:8/255")}}
MANY_CLASSES = 20  # above it no multi-targeted attack: one PGD for each wrong class
CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


# ------------------------------------------------------------------------------------------ flags

def parse(argv=None):
    """The flags; argv as in argparse. UsageError where they contradict each other."""
    parser = common.Parser(__doc__)
    network_flags(parser.add_argument_group("network").add_argument)
    attack_flags(parser.add_argument_group("attacks").add_argument)
    report_flags(parser.add_argument_group("what else is measured").add_argument)
    file_flags(parser.add_argument_group("files and machines").add_argument)
    args = parser.parse_args(argv)
    if args.protocol and args.attacks:
        raise common.UsageError("--protocol names the attacks itself: give it or --attacks")
    if args.transfer and not args.surrogate:
        raise common.UsageError("--transfer needs --surrogate CKPT, the network to make the "
                                "images on")
    if args.baseline:
        args.sanity = True
    args.surrogate = each_once(args.surrogate, asked_model(args))
    for name in ("attacks", "transfer"):
        text = getattr(args, name)
        if text is not None:
            setattr(args, name, text.strip(" ,"))
    if args.attacks == "" and not (args.sanity or args.alignment or args.plots or args.surrogate):
        raise common.UsageError("--attacks names no attack: there is nothing to measure")
    if args.surrogate and args.transfer == "":
        raise common.UsageError("--transfer names no attack: leave --surrogate out, too")
    if args.batch_size is None:
        args.batch_size = 100 if args.bn_mode == "train" else 250
    if args.plots:
        need("matplotlib", "--plots")
    refuse_own_files(args)
    return args


def each_once(paths, usual):
    """CKPT or CKPT=MODEL, each file with its network once, however it is spelled.

    usual: the network of those that name none, or None.
    """
    found = {}
    for text in paths:
        path, model = common.path_and_model(text)
        file, colon, function = (model or usual or "").rpartition(":")
        network = (Path(file).resolve() if colon else None, function)
        found.setdefault((Path(path).resolve(), network), text)
    return list(found.values())


def network_flags(flag):
    flag("--ckpt", required=True, metavar="CKPT", help="a run of a training script, or anybody's "
         "state_dict: bare, in the usual wrappers, or .safetensors. Every flag that takes a CKPT "
         "takes CKPT=MODEL, too")
    flag("--weights", choices=["best", "last"], default="best", help="which weights of a run "
         "(%(default)s)")
    flag("--model", help=f"of somebody's state_dict: {common.BACKBONES}; also where training had "
         "a file of yours")
    flag("--dataset", help="of somebody's state_dict: its data set, "
         f"{', '.join(common.DATASETS)} or NAME of NAME.npz")
    flag("--normalize", choices=common.NORMALIZATIONS, default="none", help="of somebody's "
         "state_dict: the layer put before the network, which gets images in [0, 1] otherwise "
         "(%(default)s)")
    flag("--bn-mode", choices=["eval", "train"], default="eval", help="train: BatchNorm uses the "
         "statistics of each batch; AutoAttack's images are made in eval mode and judged in train "
         "mode (%(default)s)")


def attack_flags(flag):
    flag("--attacks", help=f"comma-separated: {ATTACK_NAMES} ({QUICK_LOOK['attacks']})")
    flag("--protocol", choices=list(PROTOCOLS), help="table: clean, FGSM, PGD-20 on all images, "
         "PGD-100 and AutoAttack on 1,000; common: the strongest attacks; a script's name: the "
         "columns of its paper's main tables, with the paper's rows")
    flag("--surrogate", metavar="CKPT", action="append", default=[], help="also attack by transfer "
         "from this network; may be repeated")
    flag("--transfer", help="the attacks made on surrogates "
         f"({QUICK_LOOK['transfer']}; with --protocol the paper's, if it has any)")
    flag("--eps", type=common.unit, help="L-infinity radius in [0, 1] units, as 8/255, and "
         "dra's mean change (as in training: of DRA its --pgd-eps and its --eps; with --protocol "
         "the data set's usual radius)")
    flag("--step-size", type=common.unit, help="step of PGD in [0, 1] units (the data set's usual "
         "one in proportion to eps, and at least 1.25 eps / steps; with a paper's --protocol its "
         "own)")
    flag("--normalized-eps", action="store_true", help="radii and steps are in units of images "
         "divided by the data set's deviation, as the DRA paper's seem to be")
    flag("--p", type=common.number(0, 1), help="share of the values that dra changes (that of "
         "training, else 1/3)")
    flag("--start", choices=["ball", "step"], help="PGD starts uniformly in the eps-ball or within "
         f"a step of x ({QUICK_LOOK['start']}; with a paper's --protocol its own)")
    flag("--judge", choices=["any", "last"], default="any", help="a sample is broken by any step "
         "that misclassifies it, or by the last step of a restart alone (%(default)s)")
    flag("--limit", type=common.natural, help="evaluate a fixed random subset of N test images; "
         f"0: all ({QUICK_LOOK['limit']}; with --protocol: all images, fewer under slow attacks)")
    flag("--seed", type=common.number(0, 2 ** 63 - 1, kind=int), default=0, help="seed of the "
         "attacks (%(default)s)")


def report_flags(flag):
    flag("--sanity", action="store_true", help="the verdict: are there signs of masked gradients?")
    flag("--baseline", metavar="CKPT", help="an undefended network on the same data, for the "
         "verdict's test of FGSM; implies --sanity")
    flag("--alignment", action="store_true", help="alignment and linearised robustness of the "
         "saliency paper (eqs. 4, 6, 7)")
    flag("--per-class", action="store_true", help="accuracy per class under every attack")
    flag("--plots", metavar="DIR", help="write curves, loss surfaces, images and gradients as PNG "
         "files")
    flag("--save-adv", metavar="FILE.npz", help="write every attack's images, float32 (runs all "
         "attacks anew)")
    flag("--results", metavar="FILE.json", help="also write the outcomes with training command, "
         "commit, hardware, minutes and history")
    flag("--export", metavar="FILE.pt", help="write the weights as a float16 checkpoint and stop")


def file_flags(flag):
    flag("--data-dir", default="data", help="folder that holds NAME.npz, imagenet/val, "
         "ImageNet-C, CIFAR-10-C ... (%(default)s)")
    flag("--record", metavar="FILE.json", help="where outcomes, facts of samples and transfer "
         "images go, one file for each checkpoint (beside --ckpt; of a checkpoint in "
         "results/weights nothing is kept)")
    flag("--overwrite", action="store_true", help="replace the files of --results, --export and "
         "--save-adv, measure anew what is on record, and drop what --record has of other weights")
    flag("--batch-size", type=common.number(1, 2 ** 31 - 1, kind=int), help="images attacked "
         "at once (250; with --bn-mode train 100)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    flag("--precision", choices=["float32", "bfloat16"], default="float32", help="of evaluation "
         "(%(default)s)")
    common.workers_flag(flag)
    common.wandb_flag(flag)


def refuse_own_files(args):
    """UsageError where an output would replace a file of the user's, or another output."""
    named = [args.ckpt, *args.surrogate]
    if args.baseline:
        named.append(args.baseline)
    networks = [common.path_and_model(path)[0] for path in named]
    own = list(networks)
    models = [args.model, *(common.path_and_model(path)[1] for path in named)]
    own += [model.rpartition(":")[0] for model in models if model and ".py:" in model]
    stem = stem_of(networks[0])
    own += [f"{stem}{end}" for end in (".pt", ".resume.pt", ".jsonl")]
    taken = [Path(path).resolve() for path in own]
    record = record_stem(args)
    for path in record_files(record) if record else ():
        if path.resolve() in taken:
            raise common.UsageError(f"--record {args.record} would replace {path}: choose another "
                                    "name")
        taken.append(path.resolve())
    taken += [path.resolve() for path in record_files(f"{stem}.eval")]
    taken += [path.resolve() for path in Path(args.data_dir).glob("*.npz")]
    for path in filter(None, (args.results, args.export, args.save_adv)):
        if Path(path).resolve() in taken:
            raise common.UsageError(f"{path} belongs to --ckpt {args.ckpt} or to the record, or is "
                                    "named twice: choose another name")
        if not Path(path).parent.is_dir() or Path(path).is_dir():
            raise common.UsageError(f"{path}: there is no such folder, or it is one")
        if Path(path).exists() and not Path(path).is_file():
            raise common.UsageError(f"{path} is a pipe or a device: name a file")
        if Path(path).exists() and not args.overwrite:
            raise common.UsageError(f"{path} exists: --overwrite replaces it")
        taken.append(Path(path).resolve())


def need(package, what):
    """UsageError where a package is not installed: before an hour of attacks, not after it."""
    if not importlib.util.find_spec(package):
        raise common.UsageError(f"{what} needs {package}: pip install {package}")


def refuse_unwritable(path, what):
    """UsageError where a file cannot be written at `path`; nothing is left behind."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise common.UsageError(f"{what} {path}: cannot be written ({error.strerror}): --record "
                                "FILE.json says where outcomes go")


# ---------------------------------------------------------------------------------------- attacks
# Each is a function (model, x, y, attack, labels) -> perturbed images. x: (N, C, H, W) in [0, 1],
# y: (N,). labels: y, where an image is attacked no further once it is misclassified; None, where
# all steps are taken and the last one counts.

class Attack(NamedTuple):
    """An attack with its budget: eps and step in [0, 1] units, None where the attack has none."""
    name: str
    kind: str
    eps: float | None
    step: float | None
    steps: int | None
    restarts: int
    start: str | None
    seed: int
    p: float | None = None  # of DRA: the share of values that it changes
    linf: float | None = None  # of DRA: the most by which it changes a value


def stream_of(attack):
    """The name of an attack's random numbers: the same however its radius or step is written."""
    name = attack.kind if ATTACKS[attack.kind].steps is None else f"{attack.kind}-{attack.steps}"
    return name if attack.restarts == 1 else f"{name}x{attack.restarts}"


def run_pgd(model, x, y, a, labels, loss=common.cross_entropy):
    """PGD with `loss` from the ball, or from within a step of x (SAT-Rx eq. 6)."""
    def near(x, eps):
        return common.uniform_start(x, min(a.step, a.eps))
    start = common.uniform_start if a.start == "ball" else near
    return restarted(model, x, y, a.eps, a.step, a.steps, a.restarts, labels, start, loss=loss)


def restarted(model, x, target, eps, step, steps, restarts, labels, start=common.uniform_start,
              **options):
    """PGD from several random starts.

    labels: an image that a restart breaks is attacked no further; None: the last restart counts.
    """
    result = x.clone()
    rows = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        starts = start(x, eps)  # drawn for all: no image's start depends on the others

        def drawn(x, eps):
            return starts[rows]
        wanted = None if labels is None else labels[rows]
        result[rows] = common.pgd(model, x[rows], target[rows], eps, step, steps, drawn,
                                  labels=wanted, **options)
        if labels is not None and restarts > 1:
            rows = rows[right(model, result[rows], labels[rows])]
            if not len(rows):
                break
    return result


def noise(model, x, y, a, labels):
    """Uniform noise in the ball, the first of a.restarts draws that is misclassified."""
    result = x.clone()
    rows = torch.arange(len(x), device=x.device)
    for _ in range(a.restarts):
        result[rows] = common.uniform_start(x, a.eps)[rows]
        if labels is not None:
            rows = rows[right(model, result[rows], labels[rows])]
    return result


def margin_attack(model, x, y, a, labels):
    """Un-targeted attack on the logits' margin (ATLAS appendix B; C&W's loss).

    The wrong class may change at each step.
    """
    return run_pgd(model, x, y, a, labels, loss=common.margin)


def random_targeted(model, x, y, a, labels):
    """PGD towards a random wrong class (IAAT, section 4.2), judged as every attack by the true."""
    classes = logits_of(model, x[:2]).shape[1]
    target = (y + torch.randint(1, classes, y.shape).to(y)) % classes
    return restarted(model, x, target, a.eps, a.step, a.steps, a.restarts, labels, targeted=True)


def multi_targeted(model, x, y, a, labels):
    """PGD on f_i - f_y for every wrong class i in turn (Gowal et al. 2019; ATLAS appendix B)."""
    classes = logits_of(model, x[:2]).shape[1]
    result = x.clone()
    left = torch.arange(len(x), device=x.device)
    for shift in range(1, classes):
        def toward(logits, y):
            wrong = (y + shift) % classes
            return (logits.gather(1, wrong[:, None]) - logits.gather(1, y[:, None]))[:, 0]
        if labels is None:  # the batch stays whole
            x_adv = run_pgd(model, x, y, a, None, loss=toward)
            result[left] = x_adv[left]
            left = left[right(model, x_adv, y)[left]]
        else:
            result[left] = run_pgd(model, x[left], y[left], a, y[left], loss=toward)
            left = left[right(model, result[left], y[left])]
        if not len(left):
            break
    return result


def rays(model, x, y, a, labels):
    """RayS, from predicted labels alone (Chen and Gu 2020), with a.steps queries for an image.

    It searches the sign vector with the shortest way to a wrong label. Blocks of signs are
    flipped: the whole image first, then halves, quarters, down to pixels and over again. A flip
    that is still wrong at the present radius is kept, and the radius is halved in on.
    """
    flat = x.flatten(1)
    n, pixels = flat.shape
    sign = torch.ones_like(flat)
    radius = torch.ones(n, device=x.device)  # at radius 1 every pixel is at 0 or at 1
    radius[~right(model, x, y)] = 0
    queries = torch.zeros(n, device=x.device)
    level = 0
    block = -1  # -1: all signs up

    def broken(rows, signs, reach):
        queries[rows] += 1
        images = (flat[rows] + reach[:, None] * signs).clamp(0, 1).view(-1, *x.shape[1:])
        return ~right(model, images, y[rows])
    while True:
        rows = ((queries < a.steps) & (radius > a.eps)).nonzero()[:, 0]
        if not len(rows):
            break
        size = -(-pixels // 2 ** level)
        trial = sign[rows]
        if block >= 0:
            trial[:, block * size:(block + 1) * size] *= -1
        better = broken(rows, trial, radius[rows])
        rows = rows[better]
        trial = trial[better]
        sign[rows] = trial
        radius[rows] = shortest_way(broken, rows, trial, radius[rows])
        block += 1
        if block * size >= pixels:
            level = level + 1 if size > 1 else level
            block = 0
    return (flat + radius.clamp(max=a.eps)[:, None] * sign).clamp(0, 1).view_as(x)


def shortest_way(broken, rows, signs, high):
    """RayS's binary search: radii below `high`, within 0.001, that are still misclassified."""
    low = torch.zeros_like(high)
    while len(rows) and (high - low).max() > 1e-3:
        middle = (low + high) / 2
        wrong = broken(rows, signs, middle)
        low = torch.where(wrong, low, middle)
        high = torch.where(wrong, middle, high)
    return high


def autoattack(model, x, y, a, labels):
    """AutoAttack (Croce and Hein 2020) by the published package: whole, or one of its parts.

    aa: the standard version; aa-rand: that for randomised networks. With few classes it takes as
    many targets as there are. Below four it leaves out APGD-T, whose loss compares four logits,
    and below three APGD with DLR, which compares three.
    """
    from pyautoattack import AutoAttack
    classes = logits_of(model, x[:2]).shape[1]
    version = "rand" if a.kind == "aa-rand" else "standard"
    seed = a.seed % 2 ** 32  # the package hands it to numpy
    adversary = AutoAttack(model, eps=a.eps, seed=seed, device=x.device, version=version)
    targets = min(9, classes - 1)
    adversary.apgd_targeted.n_target_classes = targets
    adversary.fab.n_target_classes = targets
    if a.kind not in ("aa", "aa-rand"):
        adversary.attacks_to_run = [a.kind]
    least = {"apgd-t": 4, "apgd-dlr": 3}
    adversary.attacks_to_run = [name for name in adversary.attacks_to_run
                                if classes >= least.get(name, 2)]
    return adversary.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]


def minimal(model, x, y, a, labels):
    """DeepFool or C&W by foolbox: the smallest perturbation that it finds, x where none fools.

    deepfool-linf has a radius: what needs a larger change counts as not found (IAAT, table 3).
    """
    from foolbox import PyTorchModel, attacks
    classes = {"deepfool": attacks.L2DeepFoolAttack, "deepfool-linf": attacks.LinfDeepFoolAttack,
               "cw-l2": attacks.L2CarliniWagnerAttack}
    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    x_adv = classes[a.kind](steps=a.steps)(wrapped, x, y, epsilons=None)[0]
    model.zero_grad()  # foolbox leaves gradients behind
    x_adv = torch.where(x_adv.isfinite(), x_adv, x).clamp(0, 1)
    found = right(model, x, y) & ~right(model, x_adv, y)
    if a.eps is not None:
        found &= (x_adv - x).abs().flatten(1).amax(1) <= a.eps
    return torch.where(found[:, None, None, None], x_adv, x)


def dra(model, x, y, a, labels, linf=None):
    """DRA, algorithm 1 of its paper, with the bound on each value that training had, or None.

    It takes steps of eps / T along the gradient divided by its mean magnitude. Then all but the
    share p of values with the largest gradient is put back. eps bounds the mean change before
    this filter. The measurement stays as it is where dra_finetune.py's adversary is changed.
    """
    x_adv = x
    alpha = common.per_image(a.eps, x) / a.steps
    with common.model_mode(model, "eval"):
        for _ in range(a.steps):
            grad, _ = common.input_gradient(model, x_adv, y)
            mean = grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
            x_adv = x_adv + alpha * grad / mean
            if linf is not None:
                x_adv = x_adv.clamp(x - linf, x + linf).clamp(0, 1)
    size = grad.abs().flatten(1)
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept.scatter_(1, size.topk(round(a.p * size.shape[1]), dim=1).indices, True)
    return torch.where(kept.view_as(x), x_adv, x).clamp(0, 1)


class Kind(NamedTuple):
    """A row of the table of attacks."""
    run: Callable | None
    steps: int | None = 0  # 0: the name carries a number; None: it has none; else it may leave out
    restarts: bool = False
    step: bool = False  # has a step size of its own, PGD's
    norm: str = "linf"
    package: str = "torch"


def run_clean(model, x, y, a, labels):
    return x


def run_fgsm(model, x, y, a, labels):
    return common.fgsm(model, x, y, a.eps)


def run_ifgsm(model, x, y, a, labels):
    return common.ifgsm(model, x, y, a.eps, a.steps, labels=labels)


def run_mi_fgsm(model, x, y, a, labels):
    return common.mi_fgsm(model, x, y, a.eps, a.steps, labels=labels)


def run_dra(model, x, y, a, labels):
    return dra(model, x, y, a, labels, a.linf)


AUTOATTACK = Kind(autoattack, steps=None, package="pyautoattack")
ATTACKS = {
    "clean": Kind(run_clean, steps=None, norm="none"),
    "noise": Kind(noise, steps=None, restarts=True),
    "fgsm": Kind(run_fgsm, steps=None),
    "ifgsm": Kind(run_ifgsm),
    "mi-fgsm": Kind(run_mi_fgsm),
    "pgd": Kind(run_pgd, restarts=True, step=True),
    "pgd-cw": Kind(margin_attack, restarts=True, step=True),
    "multi": Kind(multi_targeted, restarts=True, step=True),
    "targeted": Kind(random_targeted, restarts=True, step=True),
    "rays": Kind(rays),
    "dra": Kind(run_dra, norm="mean"),
    "aa": AUTOATTACK, "aa-rand": AUTOATTACK, "apgd-ce": AUTOATTACK, "apgd-dlr": AUTOATTACK,
    "apgd-t": AUTOATTACK, "fab-t": AUTOATTACK, "square": AUTOATTACK,
    "deepfool": Kind(minimal, steps=50, norm="l2", package="foolbox"),
    "deepfool-linf": Kind(minimal, steps=50, package="foolbox"),
    "cw-l2": Kind(minimal, steps=1000, norm="l2", package="foolbox"),
    "corruptions": Kind(None, steps=None, norm="none"),
}
ALIASES = {"un": "pgd-cw", "cw": "pgd-cw"}  # one attack under three names
BLACK_BOX = ("rays", "square", "noise")  # they see no gradient
NORMALISED = " normalised"  # ends the name of an attack whose radius is in these units
ATTACK_NAMES = (
    "clean, noise, fgsm, ifgsm-STEPS, mi-fgsm-STEPS, pgd-STEPS, pgd-cw-STEPS (also un-, cw-), "
    "multi-STEPS, targeted-STEPS, rays-QUERIES, aa, aa-rand, apgd-ce, apgd-dlr, apgd-t, fab-t, "
    "square, dra-STEPS, deepfool, deepfool-linf, cw-l2, corruptions; xRESTARTS may follow those "
    "that start at random, :EPS any with a radius, @STEP those of PGD")
GRAMMAR = (r"(?:-(?P<steps>[1-9]\d*))?(?:x(?P<restarts>[1-9]\d*))?"
           r"(?:(?::(?P<eps>[^:@]+))?(?:@(?P<step>[^:@]+))?|@(?P<first>[^:@]+):(?P<then>[^:@]+))")


def parse_attacks(text, facts, eps, step=None, start="ball", seed=0, p=1 / 3, scale=1.0,
                  mean_eps=None, asked_step=None, linf=None):
    """The attacks of a comma-separated list, each once; UsageError for a name that is none.

    facts: the data set's. step: PGD's default step, a number, "eps/steps", or None for the usual
    one. asked_step: the user's step, which the name then shows where it is another than the
    default. start: "ball" or "step". p, mean_eps, linf: of DRA: its share of values, its eps where
    it is not that of the others, its bound or None. scale: what radii and steps are multiplied by;
    other than 1, the attack's name says so.
    """
    attacks = {}
    for word in text.split(",") if text else ():
        attack = parse_attack(word.strip(), facts, eps, step, mean_eps, asked_step)
        attack = attack._replace(seed=seed)
        if ATTACKS[attack.kind].restarts:
            attack = attack._replace(start=start if attack.kind in ("pgd", "pgd-cw") else "ball")
        if attack.kind == "dra":
            attack = attack._replace(p=p, linf=linf)
        if scale != 1 and attack.eps:
            size = None if attack.step is None else scale * attack.step
            attack = attack._replace(name=attack.name + NORMALISED, eps=scale * attack.eps,
                                     step=size)
        attacks.setdefault(attack._replace(name=""), attack)  # the same under another name: once
    return list(attacks.values())


def parse_attack(name, facts, eps, step, mean_eps, asked_step):
    """One Attack by name, with its radius, steps and step size."""
    kind, steps, restarts, radius, size = named_parts(name)
    spec = ATTACKS[kind]
    need(spec.package, name)
    refuse_senseless(name, kind, facts)
    steps = int(steps) if steps else spec.steps
    try:
        usual = dict(linf=eps, mean=mean_eps or eps).get(spec.norm)
        own = common.unit(radius) if radius else usual
        size = common.unit(size) if size else asked_step
    except Exception as error:
        raise common.UsageError(f"{name}: {error}")
    if spec.step:
        default = default_step(own, steps, step, facts)
        size = default if size is None else min(size, own)
        if abs(size - default) > 1e-9 and "@" not in name:
            name = f"{name}@{common.shown(size)}"
        elif abs(size - default) <= 1e-9:
            name = re.sub("@[^:]*", "", name)
    else:
        size = own / steps if kind in ("ifgsm", "mi-fgsm") else None
    return Attack(name, kind, own, size, steps, int(restarts or 1), None, 0)


def named_parts(name):
    """(kind, steps, restarts, eps, step) of an attack's name, texts or None; else UsageError."""
    kinds = {kind: kind for kind in ATTACKS} | ALIASES
    found = ((kind, re.fullmatch(re.escape(kind) + GRAMMAR, name)) for kind in kinds)
    matches = [(kinds[kind], match) for kind, match in found if match]
    if matches:
        kind, match = matches[0]
        spec = ATTACKS[kind]
        steps = match["steps"]
        restarts = match["restarts"]
        radius = match["eps"] or match["then"]
        size = match["step"] or match["first"]
        wrong = [
            steps and spec.steps is None, not steps and spec.steps == 0,
            restarts and not spec.restarts, radius and spec.norm not in ("linf", "mean"),
            size and not spec.step]
        if not any(wrong):
            return kind, steps, restarts, radius, size
    raise common.UsageError(f"{name!r} is no attack: choose from {ATTACK_NAMES}"
                            f"{near_attack(name)}")


def near_attack(name):
    """", did you mean pgd-20?" for PGD20 and the like, or "" where no attack is near."""
    plain = re.sub(r"([a-z])[-_]?(\d)", r"\1-\2", name.lower(), count=1)
    if plain == "autoattack":
        return ", did you mean aa?"
    if plain != name:
        with contextlib.suppress(common.UsageError):
            named_parts(plain)
            return f", did you mean {plain}?"
    complete = [kind for kind, spec in ATTACKS.items() if spec.steps != 0]
    return "" if re.search(r"\d", plain) else common.did_you_mean(plain, complete)


def refuse_senseless(name, kind, facts):
    """UsageError for an attack that this data set has no use for."""
    if kind == "multi" and facts["classes"] > MANY_CLASSES:
        raise common.UsageError(f"{name}: one attack for each of {facts['classes'] - 1} wrong "
                                "classes is out of reach, un-STEPSxRESTARTS follows the strongest "
                                "of them")
    if kind == "corruptions" and facts["name"] not in CORRUPTED:
        raise common.UsageError(f"corruptions: there is no corrupted copy of {facts['name']}")
    if kind == "corruptions" and facts["chosen"]:
        raise common.UsageError("corruptions: they are of all classes, the network knows some")
    least = {"apgd-t": 4, "apgd-dlr": 3}.get(kind, 2)
    if facts["classes"] < least:
        raise common.UsageError(f"{name} needs {least} classes, {facts['name']} has "
                                f"{facts['classes']}")


def default_step(eps, steps, step, facts):
    """PGD's step size where none is asked for.

    The data set's usual one (0.01 at eps 0.3 on MNIST, 2/255 at 8/255 on CIFAR) is taken in
    proportion to eps, and at least 1.25 eps / steps, so that few steps can leave the start.
    """
    if step == "eps/steps":
        return eps / steps
    if step:
        return min(step, eps)
    return max(facts["step"] * eps / facts["eps"], 1.25 * eps / steps)


@torch.no_grad()
def logits_of(model, x):
    return model(x)


def right(model, x, y):
    """Which images the model classifies as y, bool (N,)."""
    if not len(x):  # networks need not take an empty batch
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    return logits_of(model, x).argmax(1) == y


# -------------------------------------------------------------------------- networks under attack

class FiniteGradient(torch.autograd.Function):
    """The identity. A gradient that is not finite becomes zero on its way back, and is counted."""

    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        finite = grad.isfinite()
        ctx.counts["gradients"] += len(grad)
        ctx.counts["broken"] += (~finite.flatten(1).all(1)).sum().item()
        return torch.where(finite, grad, torch.zeros_like(grad)), None


class Guarded(torch.nn.Module):
    """A network whose gradients with respect to the image are finite, as every attack sees it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.counts = dict(gradients=0, broken=0)
        self.training = False  # foolbox warns otherwise; the model keeps its own mode

    def forward(self, x):
        if x.requires_grad:
            x = FiniteGradient.apply(x, self.counts)
        try:
            return self.model(x)
        except (common.UsageError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of a network of the user's own
            if "allocate" in str(error):
                raise
            raise refused("the network", f"fails on a batch of {len(x)} images", error)

    def share(self):
        """The share of gradients since the last time that were not finite somewhere."""
        share = self.counts["broken"] / max(1, self.counts["gradients"])
        self.counts.update(gradients=0, broken=0)
        return share


class BatchStatistics(torch.nn.Module):
    """A network whose BatchNorm uses each batch's statistics in any mode; its buffers stay."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        kind = torch.nn.modules.batchnorm._BatchNorm
        self.layers = [module for module in model.modules() if isinstance(module, kind)]
        if not self.layers:
            raise common.UsageError("--bn-mode train: the network has no BatchNorm")

    def forward(self, x):
        before = [(layer.training, layer.track_running_stats) for layer in self.layers]
        for layer in self.layers:
            layer.training = True
            layer.track_running_stats = False
        try:
            return self.model(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise common.UsageError("--bn-mode train: one image alone has no statistics, take a "
                                    "larger --batch-size or --limit")
        finally:
            for layer, (training, tracks) in zip(self.layers, before):
                layer.training = training
                layer.track_running_stats = tracks


class Nature(NamedTuple):
    """What the probe found: are the logits a function of the image alone? Are they logits?"""
    randomised: bool = False
    batch_dependent: bool = False
    accuracy: float = 1.0
    n: int = 0
    classes: int = 2
    probabilities: bool = False  # all of them lie in [0, 1]
    sets_seed: bool = False  # see common.sets_seed
    changes: bool = False  # a forward changes the network's own buffers

    @property
    def too_few(self):
        """Whether of so few images not even all would be more than chance."""
        return wilson(1.0, self.n)[0] <= 1 / self.classes

    @property
    def at_chance(self):
        return not self.too_few and wilson(self.accuracy, self.n)[0] <= 1 / self.classes

    def words(self):
        names = dict(randomised=self.randomised, batch_dependent=self.batch_dependent)
        return [name.replace("_", "-") for name, found in names.items() if found]


def probe(model, test, classes, name, precision="float32"):
    """The Nature of a network, in eval mode, on the images of a Split.

    UsageError where it cannot be attacked: its logits are not finite, or not (N, classes), or do
    not depend differentiably on the image.
    """
    x, y, _ = next(common.eval_batches(test, 100))
    buffers = copies(model.buffers())
    with common.model_mode(model, "eval"), common.autocast(x.device, precision):
        try:
            logits = logits_of(model, x)
        except Exception as error:  # a network of the user's own may raise anything
            raise refused(name, f"fails on a batch of {len(x)} images", error)
        if logits.shape != (len(x), classes):
            raise common.UsageError(f"{name}: gives {tuple(logits.shape)} for {len(x)} images, it "
                                    f"must be ({len(x)}, {classes})")
        if not logits.isfinite().all():
            bad = (~logits.isfinite().all(1)).sum()
            raise common.UsageError(f"{name}: its logits are not finite on {bad} of {len(x)} "
                                    f"clean images: {way_out(model, logits)}")
        refuse_without_gradient(model, x, name)
        own = next(model.parameters(), x).dtype
        low = precision == "bfloat16" or own in (torch.float16, torch.bfloat16)
        passes = [logits_of(model, x) for _ in range(3)]
        randomised = any(differ(logits, other, 1e-5) for other in passes)
        dependent = not randomised and depends_on_batch(model, x, logits, 0.05 if low else 1e-3)
        n = len(test.labels)
        correct = common.correct(Guarded(model), test).float().mean().item()
    changes = not all(map(same, buffers, model.buffers()))
    return Nature(randomised, dependent, correct, n, classes, seem_probabilities(logits),
                  model.sets_seed, changes)


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def same(a, b):
    """Whether two tensors have the same values; NaN is like NaN."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def seem_probabilities(logits):
    """Whether all logits lie in [0, 1]; those of a network that gives one constant do not count.

    A few logits may lie there by chance: they must add up to 1, too.
    """
    between = bool(0 <= logits.min() < logits.max() <= 1)
    return between and (logits.numel() >= 100 or not differ(logits.sum(1), 1 + 0 * logits[:, 0],
                                                            1e-2))


def way_out(model, logits):
    """What to do about a Classifier's logits that are not finite."""
    broken = common.weights_with_nan(model)
    if broken:
        return f"its weights hold NaN in {common.shortened(', '.join(broken))}"
    if (logits == -np.inf).any() and (logits.isfinite() | (logits == -np.inf)).all():
        return "mask a class by -1e4, not by -inf"
    return "it cannot be judged"


def refused(name, what, error):
    """The UsageError for a network that raised one of its own."""
    reason = (str(error).splitlines() or [""])[0]
    return common.UsageError(f"{name}: {what} ({type(error).__name__}: {reason})")


def refuse_without_gradient(model, x, name):
    """UsageError where logits do not depend differentiably on the image."""
    x = x.detach().clone().requires_grad_(True)
    message = f"{name}: its logits do not depend differentiably on the image"
    try:
        with torch.enable_grad():
            logits = model(x)
            if not logits.requires_grad:
                raise common.UsageError(f"{message} (no_grad, or a detached tensor?)")
            grad, = torch.autograd.grad(logits.sum(), x, allow_unused=True)
    except common.UsageError:
        raise
    except Exception as error:
        raise refused(name, "has no gradient with respect to the image", error)
    if grad is None:
        raise common.UsageError(f"{message} (a detached tensor?)")


def differ(a, b, tolerance):
    """Whether two tensors of logits differ by more than a share of the largest of them."""
    near = (a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-30)
    return not bool(near)  # NaN is near nothing


def depends_on_batch(model, x, logits, tolerance):
    """Whether an image has other logits alone, or in another order, than it has in its batch."""
    rows = torch.arange(0, len(x), max(1, len(x) // 5), device=x.device)
    try:
        alone = torch.cat([logits_of(model, x[row:row + 1]) for row in rows])
    except Exception:  # BatchNorm1d cannot normalise one image
        return True
    turned = logits_of(model, x.flip(0)).flip(0)
    return differ(logits[rows], alone, tolerance) or differ(logits, turned, tolerance)


class Rescaled(torch.nn.Module):
    """A Classifier's network on scale * x + shift, without its own normalisation."""

    def __init__(self, model, scale, shift):
        super().__init__()
        self.model = model
        self.scale = scale
        self.shift = shift

    def forward(self, x):
        return self.model(self.scale * x + self.shift, normalize=False)


def accuracies_as(model, test):
    """{what the user may change: clean accuracy with it}; the model is left as it was.

    What the network does not take is left out.
    """
    found = {}
    normalize = model.normalize

    def measure(words, model):
        with contextlib.suppress(common.UsageError):
            found[words] = common.accuracy(Guarded(model), test)
    with common.buffers_kept(model):
        for other in common.NORMALIZATIONS:
            model.normalize = other
            measure(f"--normalize {other}", model)
        model.normalize = normalize
        for words, scale, shift in (("2 * x - 1", 2, -1), ("255 * x", 255, 0)):
            measure(f"{words} before the network", Rescaled(model, scale, shift))
    return found


def advice(model, test, nature):
    """One line where a network is no better than chance, or other images suit it far better.

    Images in another range, or labels in another order. None where nothing speaks for either.
    """
    test = test.take(torch.arange(min(100, len(test.labels))))
    found = accuracies_as(model, test)
    highest = max(found.values())
    line = f"clean accuracy is {100 * nature.accuracy:.1f} % of {nature.n} images"
    line += ", no better than chance" if nature.at_chance else ""
    far_better = highest > found[f"--normalize {model.normalize}"] + 0.1
    if far_better and wilson(highest, len(test.labels))[0] > 1 / nature.classes:
        best = [f"{words} gives {percent(share)} %" for words, share in found.items()
                if share > highest - 0.05]
        return f"{line}: {', '.join(best)}"
    if not nature.at_chance:
        return None
    for later in range(1, nature.classes):
        labels = (test.labels + later) % nature.classes
        moved = common.accuracy(model, test._replace(labels=labels))
        if wilson(moved, len(labels))[0] > 0.5:
            return f"{line}: its class is the label + {later}, with that {percent(moved)} %"
    return f"{line}: other weights, another --normalize or other classes?"


# ------------------------------------------------------------------------------------- evaluation

def wilson(share, n, z=1.96):
    """(low, high): the 95 % interval of a share of n independent trials (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    middle = (share + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    half = z / (1 + z ** 2 / n) * (share * (1 - share) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def load_test(facts, data_dir, limit, device, workers=0):
    """The test split, or a fixed random `limit` of it; a smaller limit is a subset of a larger.

    The first test images of MNIST are easier than the rest.
    """
    whole = common.load_split(facts, data_dir, "test", device, workers)
    return whole.take(common.subset(len(whole.labels), limit or None))


def batch_without_leftover(n, batch_size):
    """The largest batch size up to `batch_size` that leaves no single image of n at the end."""
    while batch_size > 2 and n % batch_size == 1:
        batch_size -= 1
    return batch_size


def perturbed(model, x, y, attack, stop):
    """The images of an attack on one batch. stop: broken images are attacked no further.

    Otherwise no image is dropped: each restart's last step is judged in the whole batch, and the
    first restart that breaks an image counts for it.
    """
    run = ATTACKS[attack.kind].run
    if stop:
        return run(model, x, y, attack, y)
    result = None
    for _ in range(attack.restarts):
        x_adv = run(model, x, y, attack._replace(restarts=1), None)
        wrong = ~right(model, x_adv, y)
        if result is None:
            result = x_adv.clone()
            broken = wrong
        else:
            result[wrong & ~broken] = x_adv[wrong & ~broken]
            broken |= wrong
    return result


def evaluate(model, test, attack, batch_size, precision="float32", images=None, stop=True,
             facts=None, save=None, keep=None):
    """Attack every image of a Split; returns float32 (N, 5), a row of NaN is not attacked yet.

    Columns: correct (0, 1), linf and l2 of the perturbation in [0, 1] units, cross-entropy, and
    the share of the batch's gradients that were not finite.

    images: perturbed images made elsewhere (transfer), (restarts, N, C, H, W), instead of an
    attack. stop: broken samples are attacked no further. facts: what an interrupted run left, to
    go on with. save(facts) is called every half minute. keep: array (N, C, H, W) for the finished
    images. Random starts depend on seed, attack and batch alone. Predictions are read from the
    finished images, a whole batch at once, after a check that they lie in [0, 1] and in the ball.
    """
    if facts is None:
        facts = np.full((len(test.labels), 5), np.nan, np.float32)
    guarded = Guarded(attacked_network(model, attack))
    judged = Guarded(model)
    saved = time.monotonic()
    with common.model_mode(model, "eval"), common.autocast(test.labels.device, precision):
        batches = common.eval_batches(test, batch_size, attack.name)
        for batch, (x, y, rows) in enumerate(batches):
            rows = rows.cpu()
            if not np.isnan(facts[rows]).any():
                continue
            common.seed_stream(attack.seed, stream_of(attack), step=batch)
            if images is None:
                x_adv = perturbed(guarded, x, y, attack, stop)
            else:
                x_adv = first_that_fools(judged, images[:, rows], x, y)
            found = judge(judged, x, y, x_adv, attack)
            broken = torch.full((len(x), 1), guarded.share(), device=x.device)
            facts[rows] = torch.cat([found, broken], 1).cpu()
            if keep is not None:
                keep[rows] = x_adv.cpu()
            if save and time.monotonic() - saved > 30:
                save(facts)
                saved = time.monotonic()
    return facts


def attacked_network(model, attack):
    """The network on which images are made: AutoAttack's in eval mode, also of --bn-mode train."""
    of_package = ATTACKS[attack.kind].package == "pyautoattack"
    return model.model if of_package and isinstance(model, BatchStatistics) else model


def first_that_fools(model, images, x, y):
    """Of several restarts' images, (restarts, N, C, H, W): for each sample the first that fools."""
    x_adv = images[0].to(x)
    for other in images[1:]:  # what a restart broke stays broken
        held = right(model, x_adv, y)
        x_adv[held] = other.to(x)[held]
    return x_adv


def judge(model, x, y, x_adv, attack):
    """The first four columns of `evaluate` for a batch.

    AssertionError where an attack left [0, 1] or its ball, UsageError where logits are not finite.
    """
    delta = (x_adv - x).flatten(1)
    linf = delta.abs().amax(1)
    l2 = delta.norm(dim=1)
    if not (x_adv.amin() >= 0 and x_adv.amax() <= 1):
        raise AssertionError(f"{attack.name} left [0, 1]")
    bounded = ATTACKS[attack.kind].norm in ("linf", "none")
    eps = attack.eps or 0  # clean has none
    if bounded and not linf.max() <= eps + 1e-6:
        raise AssertionError(f"{attack.name} left its ball: {linf.max()} is above {attack.eps}")
    logits = logits_of(model, x_adv)
    bad = (~logits.isfinite().all(1)).sum().item()
    if bad:
        raise common.UsageError(f"{attack.name}: the network's logits are not finite on {bad} of "
                                f"{len(x)} images: it cannot be judged")
    correct = (logits.argmax(1) == y).float()
    return torch.stack([correct, linf, l2, common.cross_entropy(logits, y)], 1)


def load_array(path, mode=None):
    """An array of ours from a .npy file, mapped to memory where a mode is given."""
    try:
        return np.load(path, mmap_mode=mode)
    except Exception as error:
        raise common.UsageError(f"{path} is damaged ({type(error).__name__}): remove it")


def transfer_images(place, identity, surrogate, test, attack, batch_size):
    """A surrogate's adversarial images for a Split, (restarts, N, C, H, W) float32 on the CPU.

    They are judged by no one: all steps are taken. They depend on the surrogate alone, so they are
    made once and kept at `place`, a path without its ending, under its and the images' identity.
    What an interruption left in NAME.part.npy is not made again. place None: nothing is kept.
    """
    shape = (attack.restarts, *test.images.shape)
    if place is None:
        images = np.full(shape, np.nan, np.float32)
        make_images(images, place, surrogate, test, attack, batch_size)
        return torch.from_numpy(images)
    budget = {name: value for name, value in attack._asdict().items() if name != "name"}
    key = fingerprint(dict(budget, **identity, batch_size=batch_size))
    kept = Path(f"{place}.{attack.name.replace('/', '_')}-{key}.npy")
    part = kept.with_suffix(".part.npy")
    if not kept.exists():
        if not part.exists():
            todo = np.full(shape, np.nan, np.float32)
            common.write_beside(part, lambda file: np.save(file, todo))
        images = load_array(part, "r+")
        make_images(images, place, surrogate, test, attack, batch_size)
        common.write_beside(kept, lambda file: np.save(file, images))
        part.unlink(missing_ok=True)
    return torch.from_numpy(load_array(kept))


def make_images(images, place, surrogate, test, attack, batch_size):
    """Fill the rows of `images`, (restarts, N, C, H, W), that are NaN."""
    guarded = Guarded(surrogate)
    once = attack._replace(restarts=1)
    for restart in range(attack.restarts):
        batches = common.eval_batches(test, batch_size, f"{attack.name} on {place}")
        for batch, (x, y, rows) in enumerate(batches):
            rows = rows.cpu().numpy()
            if np.isnan(images[restart, rows]).any():
                common.seed_stream(attack.seed, stream_of(attack), restart, batch)
                made = ATTACKS[attack.kind].run(guarded, x, y, once, None)
                images[restart, rows] = made.cpu()
                if isinstance(images, np.memmap):
                    images.flush()


CORRUPTED = {"cifar10": ("CIFAR-10-C", "https://zenodo.org/records/2535967"),
             "cifar100": ("CIFAR-100-C", "https://zenodo.org/records/3555552"),
             "imagenet": ("ImageNet-C", "https://zenodo.org/records/2235448")}
# ImageNet-C's types: AlexNet's error on each, the mean of five severities, by its authors.
ALEXNET_ERRORS = dict(
    gaussian_noise=0.886428, shot_noise=0.894468, impulse_noise=0.922640, defocus_blur=0.819880,
    glass_blur=0.826268, motion_blur=0.785948, zoom_blur=0.798360, snow=0.866816, frost=0.826572,
    fog=0.819324, brightness=0.564592, contrast=0.853204, elastic_transform=0.646056,
    pixelate=0.717840, jpeg_compression=0.606500)
SEVERITIES = (1, 2, 3, 4, 5)


def corruption_paths(dataset, data_dir):
    """The corrupted test images as downloaded, a path for each type: TYPE.npy, or a folder TYPE.

    UsageError with their address where they are missing.
    """
    name, address = CORRUPTED[dataset]
    folder = Path(data_dir) / name
    if dataset == "imagenet":
        paths = [folder / kind for kind in ALEXNET_ERRORS]
        parts = [path / str(severity) for path in paths for severity in SEVERITIES]
        missing = [part for part in parts if not part.is_dir()]
        if missing:
            raise common.UsageError(
                f"{missing[0]} is missing, one of {len(missing)}: unpack the archives from "
                f"{address} so that there are {folder}/CORRUPTION/SEVERITY/WNID/NAME.JPEG")
        return paths
    paths = sorted(path for path in folder.glob("*.npy") if path.stem != "labels")
    if not paths:
        raise common.UsageError(f"{folder} holds no TYPE.npy: unpack the archive from {address} "
                                "there")
    return paths


def corruptions(model, paths, test, batch_size):
    """{type: accuracy over its five severities} of Hendrycks and Dietterich's images (2019).

    They are those at the test images of a Split. paths: of `corruption_paths`.
    """
    table = {}
    for path in paths:
        images_of = corrupted_array if path.suffix == ".npy" else corrupted_files
        shares = []
        for severity in SEVERITIES:
            corrupted = test._replace(images=images_of(path, severity, test))
            shares.append(common.accuracy(model, corrupted, batch_size))
        table[path.stem] = float(np.mean(shares))
    return table


def corrupted_array(path, severity, test):
    """A severity's images at those of a Split, from an array (severities * images, H, W, C)."""
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:
        raise common.UsageError(f"{path} cannot be read ({type(error).__name__}): unpack it anew")
    first = (severity - 1) * (len(array) // len(SEVERITIES))
    chosen = array[first + test.index.cpu().numpy()].transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(chosen).to(test.images)


def corrupted_files(path, severity, test):
    """A severity's images at those of a Split, from files of the same names; they are cut already.

    path: folder that holds SEVERITY/WNID/NAME.JPEG.
    """
    originals = [Path(os.fsdecode(original)) for original in test.images.paths]
    corrupted = [os.fsencode(path / str(severity) / original.parent.name / original.name)
                 for original in originals]
    return common.ImageFiles(np.array(corrupted), test.images.shape[1:], test.images.workers,
                             resize=False)


def corruption_summary(types, dataset):
    """An outcome's numbers from what `corruptions` returns.

    Of ImageNet-C also ce, each type's error divided by AlexNet's, and mce, their mean (lower is
    better; Hendrycks and Dietterich 2019).
    """
    measured = dict(accuracy=float(np.mean(list(types.values()))), largest=None, types=types,
                    nonfinite=0.0)
    if dataset == "imagenet":
        ce = {name: (1 - types[name]) / error for name, error in ALEXNET_ERRORS.items()}
        measured.update(ce=ce, mce=float(np.mean(list(ce.values()))))
    return measured


# ------------------------------------------------------------------------------------ the verdict

# Signs of masked gradients. Points of accuracy are shares. The networks on which these bounds were
# measured are in results/verdict-*.json, what they showed in results/README.md.
RADII = (0.25, 0.5, 0.75, 1, 1.5, 2, 3)  # multiples of eps
STEPS = (1, 2, 5, 10, 20, 50, 100, 200)
RISE = 0.15  # FGSM accuracy may rise by so much between two radii up to eps
FALL = 0.5  # the mean loss along the gradient's sign may fall to this share of its highest
DEAD = 0.05  # so many images may hold under PGD without a gradient to follow
FAR_ABOVE = 0.2  # of the baseline's FGSM accuracy
PROBABILITIES = "probabilities instead of logits"
BLACK_BOX_ATTACK = "rays-1000"  # the black-box attack of every verdict
BLACK_BOX_IMAGES = 200
GAIN = 0.05  # so many images more may fall to it than to PGD-40


class Finding(NamedTuple):
    """A line of the verdict. passed: True, False, or None where it was not tested."""
    sign: str
    passed: bool | None
    text: str


def curve_of(model, test, facts, name, radii, batch_size, seed, stop=False):
    """[(accuracy, mean loss)] of an attack by name at each radius; stop: of `evaluate`."""
    points = []
    for radius in radii:
        attack, = parse_attacks(name, facts, radius, seed=seed)
        found = evaluate(model, test, attack, batch_size, stop=stop)
        points.append(tuple(found[:, [0, 3]].mean(0).tolist()))
    return points


def curves(model, test, facts, eps, batch_size, seed, stop=True, figures=False):
    """What the verdict looks at; figures: and what they show. stop: of noise, see `evaluate`.

    Accuracy and mean loss of FGSM as eps grows (SAT-Rx figs. 5, 8, 9), of PGD-40 at eps and at 1;
    accuracy under noise at eps. figures: of PGD-40 at every radius, and accuracy as PGD's steps
    grow (fig. 7).
    """
    radii = sorted({min(1.0, factor * eps) for factor in RADII} | {1.0})
    here = radii.index(min(1.0, eps))

    def curve(name, radii, stop=False):
        return curve_of(model, test, facts, name, radii, batch_size, seed, stop)
    clean, = curve("clean", [eps])
    table = dict(radii=[0, *radii], at_eps=1 + here, n=len(test.labels))
    table["fgsm"] = [clean, *curve("fgsm", radii)]
    if figures:
        table["pgd-40"] = [clean, *curve("pgd-40", radii)]
        table["steps"] = [curve(f"pgd-{steps}", [eps])[0][0] for steps in STEPS]
        table["pgd"] = table["pgd-40"][1 + here]
        table["pgd_at_1"] = table["pgd-40"][-1]
    else:
        table["pgd"], = curve("pgd-40", [eps])
        table["pgd_at_1"], = curve("pgd-40", [1.0])
    table["noise"] = curve("noisex100", [eps], stop)[0][0]
    return table


def black_box(model, test, facts, eps, seed):
    """Which images hold under PGD-40, and which under the verdict's black-box attack: bool (N,)."""
    test = test.take(torch.arange(min(BLACK_BOX_IMAGES, len(test.labels))))
    held = []
    for name in ("pgd-40", BLACK_BOX_ATTACK):
        attack, = parse_attacks(name, facts, eps, seed=seed)
        held.append(evaluate(model, test, attack, len(test.labels))[:, 0] == 1)
    return held


def dead_gradients(model, test, batch_size):
    """Which images have a cross-entropy whose gradient is zero or not finite, bool (N,).

    Attacks are blind there.
    """
    dead = []
    with common.model_mode(model, "eval"):
        for x, y, _ in common.eval_batches(test, batch_size):
            size = common.input_gradient(Guarded(model), x, y)[0].abs().sum((1, 2, 3))
            dead.append((size == 0) | ~size.isfinite())
    return torch.cat(dead).cpu().numpy()


def held_without_gradient(dead, model, test, facts, eps, batch_size, seed, stop=True):
    """The share of images that have a dead gradient and hold under PGD-40: perhaps unattacked.

    dead: of `dead_gradients`.
    A sure network has dead gradients, too; from a random start PGD breaks it all the same.
    """
    attack, = parse_attacks("pgd-40", facts, eps, seed=seed)
    held = evaluate(model, test, attack, batch_size, stop=stop)[:, 0] == 1
    return float((dead & held).mean())


def percent(*shares):
    return ", ".join(f"{100 * share:.1f}" for share in shares)


def sanity(curve, unattacked, nature, eps, outcomes, baseline=None):
    """The findings: signs of masked gradients (Carlini et al. 2019; SAT-Rx 4.2, 5.4 and 5.5).

    curve: of `curves`. unattacked: of `held_without_gradient`. outcomes: what was measured, with
    attack, kind, eps, n and accuracy. baseline: the FGSM accuracy at eps of an undefended network,
    or None. A mere gap between FGSM and PGD is no sign: undefended networks have one.
    """
    here = curve["at_eps"]
    accuracies = [accuracy for accuracy, _ in curve["fgsm"][:here + 1]]
    losses = [loss for _, loss in curve["fgsm"][:here + 1]]
    rise = max(later - min(accuracies[:i + 1]) for i, later in enumerate(accuracies))
    fallen = min(later / max(max(losses[:i + 1]), 1e-12) for i, later in enumerate(losses))
    pgd = curve["pgd"][0]
    chance = 1 / nature.classes
    findings = [
        Finding("FGSM accuracy rises with eps", rise < RISE,
                f"{percent(*accuracies)} % at 0 to eps"),
        Finding("loss falls along the gradient's sign", fallen > FALL,
                f"{', '.join(f'{loss:.2f}' for loss in losses)} at 0 to eps"),
        Finding("dead gradients", unattacked < DEAD, f"{percent(unattacked)} % of images have no "
                "gradient and hold under PGD-40"),
        Finding("noise beats PGD", noise_is_weaker(curve), f"{percent(curve['noise'])} % in 100 "
                f"tries, PGD-40 {percent(pgd)} %"),
        Finding("PGD fails at eps 1", wilson(curve["pgd_at_1"][0], curve["n"])[0] <= chance,
                f"{percent(curve['pgd_at_1'][0])} % are left, chance is {percent(chance)} %"),
        Finding("randomised", not nature.randomised, "the same image twice"),
        Finding("batch-dependent", not nature.batch_dependent, "an image alone and in a batch"),
        chance_finding(nature)]
    if nature.probabilities:
        findings.append(Finding(PROBABILITIES, False, "all outputs lie in [0, 1], attacks may be "
                                "weaker on them"))
    findings.append(black_box_finding(curve))
    findings += black_box_findings([outcome for outcome in outcomes if outcome["eps"] == eps])
    return findings + [baseline_finding(accuracies[-1], pgd, baseline, curve["n"],
                                       chance)]


def chance_finding(nature):
    """Clean accuracy is above chance; of too few images nothing is said."""
    words = f"{percent(nature.accuracy)} % of {nature.n} images"
    if nature.too_few:
        return Finding("clean accuracy at chance", None, f"not tested: {words} are too few")
    return Finding("clean accuracy at chance", not nature.at_chance, words)


def noise_is_weaker(curve):
    """Whether PGD-40 leaves no more than noise does, chance set aside."""
    low, _ = wilson(curve["pgd"][0], curve["n"])
    return low <= curve["noise"]


def black_box_finding(curve):
    """PGD-40 breaks what the verdict's own black-box attack breaks, but for GAIN and chance."""
    sign = "black-box beats white-box"
    if "black_box" not in curve:
        return Finding(sign, None, f"{BLACK_BOX_ATTACK}: not tested, logits depend on more than "
                       "the image")
    white, blind = curve["black_box"]
    by_blind = int((white & ~blind).sum())
    by_white = int((blind & ~white).sum())
    more = by_blind - by_white >= GAIN * len(white)
    beaten = more and sign_test(by_blind, by_white) < 0.025
    return Finding(sign, not beaten, f"of {len(white)} images {by_blind} fall to "
                   f"{BLACK_BOX_ATTACK} alone, {by_white} to PGD-40 alone")


def sign_test(more, fewer):
    """How likely `more` or still more of all are, if both were as likely (one-sided)."""
    n = more + fewer
    return sum(math.comb(n, k) for k in range(more, n + 1)) / 2 ** n


def baseline_finding(fgsm, pgd, baseline, n, chance):
    """FGSM accuracy far above an undefended network's, where PGD leaves no more than chance."""
    sign = "FGSM far above the baseline's"
    if baseline is None:
        return Finding(sign, None, "not tested: --baseline CKPT, an undefended network")
    nothing_left = wilson(pgd, n)[0] <= chance
    masked = nothing_left and wilson(fgsm, n)[0] > baseline + FAR_ABOVE
    return Finding(sign, not masked, f"{percent(fgsm)} %, the baseline's {percent(baseline)} %, "
                   f"PGD-40 {percent(pgd)} %")


def black_box_findings(outcomes):
    """Attacks without the network's gradient must not beat those with it."""
    blind = [o for o in outcomes if "surrogate_sha256" in o or o["kind"] in BLACK_BOX]
    white = [o for o in outcomes if o not in blind and o["kind"] not in ("clean", "dra")]
    strongest = min(white, key=lambda o: o["accuracy"], default=None)
    findings = []
    for outcome in blind if white else ():
        if outcome.get("surrogate_at_chance"):
            findings.append(Finding("black-box beats white-box", None, f"{outcome['attack']}: not "
                                    "evidence, the surrogate is no better than chance"))
            continue
        low, _ = wilson(strongest["accuracy"], strongest["n"])
        _, high = wilson(outcome["accuracy"], outcome["n"])
        findings.append(Finding(
            "black-box beats white-box", low <= high, f"{strongest['attack']} "
            f"{percent(strongest['accuracy'])} %, {outcome['attack']} "
            f"{percent(outcome['accuracy'])} %"))
    return findings


def verdict(findings, nature):
    """One line: sound, or what speaks against the numbers."""
    failed = list(dict.fromkeys(finding.sign for finding in findings if finding.passed is False))
    tested = sum(finding.passed is not None for finding in findings)
    if not failed and nature.too_few:
        return f"verdict: none, {nature.n} images are too few"
    if not failed:
        return f"verdict: sound, no sign of masked gradients in {tested} tests"
    if "clean accuracy at chance" in failed:
        return "verdict: nothing to attack, clean accuracy is at chance"
    if failed == [PROBABILITIES]:
        return f"verdict: not sound, the network gives {PROBABILITIES}"
    other = ("randomised", "batch-dependent", PROBABILITIES)
    masked = [sign for sign in failed if sign not in other]
    word = "masked gradients" if masked else "not a function of the image alone"
    return f"verdict: {word}: {'; '.join(failed)}"


# -------------------------------------------------------------------------------------- alignment

def alignment(model, test, batch_size):
    """float32 (N, 3): alignment, binarised alignment and linearised robustness (eqs. 4, 7, 6).

    Of the saliency paper, in units of the L2 norm of an image in [0, 1]. Where the model
    standardises each image, of a standardised image: its logits ignore an image's scale, and no
    gradient with respect to the image itself has a part along it.
    """
    rows = []
    outside = model.normalize != "image"
    for x, _, _ in common.eval_batches(test, batch_size, "alignment"):
        x = x if outside else model.normalized(x)
        with common.model_mode(model, "eval"):
            logits = model(x.requires_grad_(True), normalize=outside)
            jacobian = torch.stack([  # (N, classes, pixels)
                torch.autograd.grad(z.sum(), x, retain_graph=True)[0].flatten(1)
                for z in logits.unbind(1)], 1)
        rows.append(alignment_of(x.detach().flatten(1), logits.detach(), jacobian).cpu())
    return torch.cat(rows).numpy()


def alignment_of(x, logits, jacobian):
    """The rows of `alignment` from flat images (N, pixels), logits and their Jacobian."""
    each = torch.arange(len(x), device=x.device)
    top = logits.argmax(1)
    saliency = jacobian[each, top]
    difference = saliency[:, None] - jacobian
    gap = logits[each, top][:, None] - logits
    distance = gap / difference.norm(dim=2).clamp(min=1e-12)
    distance[each, top] = np.inf
    robustness, second = distance.min(1)
    nearest = difference[each, second]
    alpha, binarised = [(x * g).sum(1).abs() / g.norm(dim=1).clamp(min=1e-12)
                        for g in (saliency, nearest)]
    return torch.stack([alpha, binarised, robustness], 1)


# ------------------------------------------------------------------------------------------ plots

class Scene(NamedTuple):
    """What the figures show."""
    model: torch.nn.Module
    checkpoint: dict
    test: common.Split
    curve: dict  # of `curves`
    eps: float
    seed: int
    data_dir: str
    teacher: torch.nn.Module | None = None  # of a student of teacher_saliency.py


def plots(directory, scene):
    """Write the figures as PNG files, and say so; returns their paths."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    paths = []
    for draw in (draw_curves, draw_surface, draw_images, draw_maps, draw_dra, draw_dra_images,
                 draw_training, draw_eps):
        figure = draw(plt, scene)
        if figure:
            paths.append(Path(directory) / f"{draw.__name__[5:]}.png")
            common.write_beside(paths[-1],
                                lambda file: figure.savefig(file, dpi=130, format="png"))
            plt.close(figure)
    print("figures:", *paths)
    return paths


def draw_curves(plt, scene):
    """Accuracy against PGD's steps and eps, loss against eps (SAT-Rx figs. 5, 7 to 9; IAAT 4).

    eps up to the largest multiple in RADII; what happens at 1 is in the verdict.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    eps = common.shown(scene.eps)
    clean = 100 * scene.curve["fgsm"][0][0]
    left.semilogx(STEPS, [100 * value for value in scene.curve["steps"]], "o-", label="PGD")
    left.set(title=f"at eps {eps}", xlabel="steps of PGD", ylabel="accuracy (%)", ylim=(0, 102))
    radii = [radius for radius in scene.curve["radii"] if radius <= max(RADII) * scene.eps]
    for name, style in (("fgsm", "s--"), ("pgd-40", "o-")):
        accuracy, loss = zip(*scene.curve[name][:len(radii)])
        middle.plot(radii, [100 * value for value in accuracy], style, label=name.upper())
        right.plot(radii, loss, style, label=name.upper())
    middle.set(title="as eps grows", xlabel="eps", ylabel="accuracy (%)", ylim=(0, 102))
    right.set(title="as eps grows", xlabel="eps", ylabel="mean cross-entropy", yscale="log")
    for ax in (left, middle):
        ax.axhline(clean, color="grey", linestyle=":", label=f"clean, {clean:.1f} %")
    for ax in (middle, right):
        ax.axvline(scene.eps, color="grey", linewidth=0.8, label=f"eps {eps}")
    for ax in (left, middle, right):
        ax.legend(fontsize=8)
    figure.suptitle(f"{network_name(scene.checkpoint)}, {scene.curve['n']} test images")
    return figure


def network_name(checkpoint):
    """Script, method, network and data set of a checkpoint, for a figure's title."""
    flags = checkpoint["args"]
    methods = [flags[name] for name in ("method", "loss", "strategy") if name in flags]
    words = [checkpoint["script"], *methods[:1], checkpoint["model"], "on", checkpoint["dataset"]]
    return " ".join(words)


def draw_surface(plt, scene):
    """Loss around three images, along the gradient's sign and a random sign (SAT-Rx 3, 4, 10)."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    common.seed_stream(scene.seed, "surface")
    x, y, _ = next(common.eval_batches(scene.test, 3))
    grid = torch.linspace(-2 * scene.eps, 2 * scene.eps, 41, device=x.device)
    losses = []
    with common.model_mode(scene.model, "eval"):
        along = common.input_gradient(scene.model, x, y)[0].sign()
        across = torch.randn_like(x).sign()
        for row in range(len(x)):
            plane = grid[:, None, None, None, None] * across[row]
            moved = x[row] + plane + grid[:, None, None, None] * along[row]
            labels = y[row].expand(len(grid))
            loss = [common.cross_entropy(logits_of(scene.model, line.clamp(0, 1)), labels)
                    for line in moved]
            losses.append(torch.stack(loss))
    highest = max(loss.max().item() for loss in losses)
    for ax, loss, label in zip(axes, losses, y):
        drawn = draw_plane(ax, grid, loss, scene.eps, highest)
        ax.set_title(f"an image of class {label}")
    figure.colorbar(drawn, ax=axes, label="cross-entropy", ticks=plt.MaxNLocator(5))
    figure.suptitle(f"{network_name(scene.checkpoint)}: loss around an image; dashed: the ball of "
                    f"eps {common.shown(scene.eps)}")
    return figure


def draw_plane(ax, grid, loss, eps, highest):
    """Filled contours of a loss (across, along) from 0 to `highest`; the eps-ball in this plane."""
    ticks = grid.cpu().numpy()
    levels = np.linspace(0, max(highest, 1e-6), 31)
    drawn = ax.contourf(ticks, ticks, loss.cpu().numpy(), levels, cmap="viridis")
    ax.set(xlabel="along the gradient's sign", ylabel="along a random sign")
    ax.plot([-eps, 0, eps, 0, -eps], [0, eps, 0, -eps, 0], "w--", linewidth=1)
    return drawn


def show(ax, image):
    """An image (C, H, W) in [0, 1], grey or coloured, without ticks."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1).cpu().numpy()
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def true_logit(logits, y):
    """The true class's logit, (N,): its gradient is the saliency."""
    return logits.gather(1, y[:, None])[:, 0]


def true_probability(logits, y):
    """The true class's probability, (N,)."""
    return logits.softmax(1).gather(1, y[:, None])[:, 0]


def map_pictures(maps):
    """Maps (N, C, H, W) as images in [0, 1]: 0 is grey, an image's largest value black or white."""
    size = maps.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    return 0.5 + maps / (2 * size)


def draw_images(plt, scene):
    """Clean and PGD-40 images, their difference, and the saliency.

    After figs. 4 and 6 of the saliency paper.
    """
    model = scene.model
    x, y, _ = next(common.eval_batches(scene.test, 8))
    facts = common.checkpoint_facts(scene.checkpoint)
    attack, = parse_attacks("pgd-40", facts, scene.eps)
    common.seed_stream(scene.seed, "images")
    with common.model_mode(model, "eval"):
        x_adv = run_pgd(model, x, y, attack, y)
        gradient, _ = common.input_gradient(model, x, y, loss=true_logit)
        names = {"clean": logits_of(model, x).argmax(1).tolist(),
                 "adversarial": logits_of(model, x_adv).argmax(1).tolist()}
    rows = dict(clean=x, adversarial=x_adv, difference=0.5 + (x_adv - x) / (2 * scene.eps),
                saliency=map_pictures(gradient))
    figure = image_rows(plt, rows, names, y)
    figure.suptitle(f"{network_name(scene.checkpoint)}: PGD-40 at eps {common.shown(scene.eps)}; "
                    "red: misclassified")
    return figure


def image_rows(plt, rows, predicted, y):
    """A figure with a row of images for each name; predicted: name -> classes above its images."""
    figure, axes = plt.subplots(len(rows), len(y), figsize=(1.4 * len(y), 1.65 * len(rows)),
                                layout="constrained", squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for column, (ax, image) in enumerate(zip(line, images)):
            show(ax, image)
            if name in predicted:
                name_prediction(ax, predicted[name][column], y[column].item())
        line[0].set_ylabel(name)
    return figure


def name_prediction(ax, predicted, label):
    """The predicted class above an image, red where it is wrong."""
    ax.set_title(f"{predicted} (true {label})", fontsize=9,
                 color="tab:green" if predicted == label else "tab:red")


def teacher_beside(args, checkpoint, device):
    """The network of common.teacher_beside; None without it, and beside a teacher."""
    path, _ = common.path_and_model(args.ckpt)
    found = common.teacher_beside(path)
    if not found or path.endswith(".teacher.pt"):
        return None
    try:
        facts = common.checkpoint_facts(checkpoint)
        return common.load_model(found, device=device, facts=facts,
                                 architecture=asked_model(args))[0]
    except common.UsageError as error:
        print(f"no maps of the teacher: {error}")
        return None


def draw_maps(plt, scene):
    """Saliency maps of teacher and student side by side (saliency paper, figs. 4, 7 and 8).

    Of the score that the student was aligned by. Each map is divided by its largest value. The
    number is the cosine of both. None without a teacher.
    """
    if scene.teacher is None:
        return None
    x, y, _ = next(common.eval_batches(scene.test, 8))
    by_probability = scene.checkpoint["args"].get("score") == "prob"
    rows = {"image": x}
    for name, model in dict(teacher=scene.teacher, student=scene.model).items():
        with common.model_mode(model, "eval"):
            loss = true_probability if by_probability else true_logit
            rows[name], _ = common.input_gradient(model, x, y, loss=loss)
    cosine = torch.nn.functional.cosine_similarity(rows["teacher"].flatten(1),
                                                   rows["student"].flatten(1))
    for name in ("teacher", "student"):
        rows[name] = map_pictures(rows[name])
    figure = image_rows(plt, rows, {}, y)
    for ax, value in zip(figure.axes[2 * len(x):], cosine.tolist()):
        ax.set_title(f"cosine {value:.2f}", fontsize=8)
    figure.suptitle(f"{network_name(scene.checkpoint)}: saliency maps, eps "
                    f"{trained_radius(scene.checkpoint)}")
    return figure


def draw_dra(plt, scene):
    """Success of DRA-5 against the share p of values that it changes (fig. 4); of DRA's runs.

    At an eighth and a quarter of the data set's usual eps: 1/255 and 2/255 on CIFAR.
    """
    if "adversary" not in scene.checkpoint["args"]:
        return None
    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    shares = [0, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1]
    facts = common.checkpoint_facts(scene.checkpoint)
    for eps in (facts["eps"] / 8, facts["eps"] / 4):
        attacks = [parse_attacks("dra-5", facts, eps, p=p)[0] for p in shares]
        correct = [evaluate(scene.model, scene.test, attack, 250)[:, 0].mean()
                   for attack in attacks]
        ax.plot(shares, [100 * (1 - value) for value in correct], "o-",
                label=f"DRA-5, eps {common.shown(eps)}")
    wrong = 100 * (1 - scene.curve["fgsm"][0][0])
    ax.axhline(wrong, color="grey", linestyle=":", label="clean images")
    ax.set(title=network_name(scene.checkpoint), xlabel="share p of the values changed",
           ylabel="misclassified (%)", ylim=(0, 102))
    ax.legend()
    return figure


def draw_dra_images(plt, scene):
    """Images under PGD-5 and DRA-5, and what each changes (fig. 3 of DRA's paper); of its runs.

    PGD at 2.55 and DRA at 1 of an eighth of the data set's usual eps: 2.55/255 and 1/255 on CIFAR,
    which the paper finds equally strong. The changes of an image have one scale.
    """
    if "adversary" not in scene.checkpoint["args"]:
        return None
    x, y, _ = next(common.eval_batches(scene.test, 8))
    facts = common.checkpoint_facts(scene.checkpoint)
    rows = {"clean": x}
    with common.model_mode(scene.model, "eval"):
        for name, share in (("pgd-5", 2.55), ("dra-5", 1)):
            eps = share * facts["eps"] / 8
            attack, = parse_attacks(name, facts, eps, p=scene.checkpoint["args"]["p"])
            common.seed_stream(scene.seed, "dra_images")
            rows[f"{name}, {common.shown(eps)}"] = ATTACKS[attack.kind].run(
                scene.model, x, y, attack, y)
        predicted = {name: logits_of(scene.model, images).argmax(1).tolist()
                     for name, images in rows.items()}
    changes = torch.stack([images - x for images in list(rows.values())[1:]])
    largest = changes.abs().amax((0, 2, 3, 4)).clamp(min=1e-30)[:, None, None, None]
    for name, change in zip(list(rows)[1:], changes):
        rows[f"by {name.partition(',')[0]}"] = 0.5 + change / (2 * largest)
    figure = image_rows(plt, rows, predicted, y)
    figure.suptitle(f"{network_name(scene.checkpoint)}: red: misclassified; below: the changes")
    return figure


def draw_training(plt, scene):
    """Training terms, validation accuracies and signals of masking by epoch; best epoch marked.

    None where there is no history.
    """
    history = scene.checkpoint["history"]
    if not history:
        return None
    panels = {"train/": ("terms of the loss, without their weights", 1),
              "val/": ("validation accuracy (%)", 100), "masking/": ("signals of masking", 1)}
    panels = {prefix: panel for prefix, panel in panels.items() if series_of(history, prefix)}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False,
                                layout="constrained")
    epochs = [row["epoch"] for row in history]
    best = scene.checkpoint["best"]["epoch"]
    for ax, (prefix, (label, scale)) in zip(axes[0], panels.items()):
        series = series_of(history, prefix)
        for name, values in series.items():
            ax.plot(epochs, [scale * value for value in values], label=name[len(prefix):])
        positive = all(value > 0 for values in series.values() for value in values)
        if prefix != "val/" and positive:
            ax.set_yscale("log")  # terms of several sizes
        ax.axvline(best, color="grey", linestyle=":", label=f"best epoch, {best}")
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8)
    figure.suptitle(f"{network_name(scene.checkpoint)}, eps {trained_radius(scene.checkpoint)}")
    return figure


def trained_radius(checkpoint):
    """The eps of training as its flag has it."""
    return common.shown(checkpoint["args"]["eps"])


def series_of(history, prefix):
    """{name: values by epoch} of the log's columns with a prefix; of val/ accuracies alone."""
    series = {}
    for name in history[-1]:
        if name.startswith(prefix):
            values = [row.get(name, np.nan) for row in history]
            if prefix != "val/" or (max(values) <= 1 and "jacobian" not in name):
                series[name] = values
    return series


def draw_eps(plt, scene):
    """IAAT's eps (figs. 2, 5, 7, 8); None where the checkpoint has no memory of them.

    Histograms of the images' eps as training goes, its mean and three images' over epochs, and the
    training images of the lowest and highest eps, clean and under PGD-40 at 16/255, or at the eps
    of evaluation where it is larger.
    """
    state = scene.checkpoint.get("method_state") or {}
    if not state.get("snapshots"):
        return None
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2])
    left, right = above.subplots(1, 2)
    panels = below.subplots(4, 10)
    own = scene.checkpoint["args"]
    facts = common.checkpoint_facts(scene.checkpoint)
    train, _ = common.load_train(facts, scene.data_dir, own["val"], own["limit"],
                                 scene.test.labels.device)
    used = train.index.cpu()

    def eps_of(memory):  # what was used of it, of 255
        return 255 * memory.cpu()[used].clamp(min=own["eps_min"])
    memory = eps_of(state["memory"])
    low = memory.min().item()
    edges = np.linspace(low, max(memory.max().item(), low + 1), 40)
    for epoch in list(state["snapshots"])[1::2]:
        left.hist(eps_of(state["snapshots"][epoch]).numpy(), edges, histtype="step",
                  label=f"epoch {epoch}")
    left.set(xlabel="eps (of 255)", ylabel="training images")
    left.legend(fontsize=7)
    draw_eps_over_epochs(right, scene.checkpoint["history"])
    draw_extremes(panels, scene, train, memory)
    return figure


def draw_eps_over_epochs(ax, history):
    """The mean eps, and that of three images."""
    for name in history[-1]:
        if name == "eps/mean" or name.startswith("eps/image"):
            ax.plot([row["epoch"] for row in history], [row[name] for row in history],
                    label=name[4:].replace("_", " "))
    ax.set(xlabel="epoch", ylabel="eps (of 255)")
    ax.legend(fontsize=7)


def draw_extremes(panels, scene, train, memory):
    """The ten training images of the lowest and of the highest eps, clean and attacked.

    memory: eps of 255, (N,).
    """
    order = memory.argsort()
    facts = common.checkpoint_facts(scene.checkpoint)
    attack, = parse_attacks("pgd-40", facts, max(16 / 255, scene.eps))
    common.seed_stream(scene.seed, "eps")
    for line, (name, rows) in enumerate({"lowest": order[:10], "highest": order[-10:]}.items()):
        x = next(common.read(train, [rows]))
        y = train.labels[rows]
        with common.model_mode(scene.model, "eval"):
            x_adv = run_pgd(scene.model, x, y, attack, None)
            wrong = logits_of(scene.model, x_adv).argmax(1)
        above = panels[2 * line]
        below = panels[2 * line + 1]
        for column in range(len(rows)):
            show(above[column], x[column])
            above[column].set_title(f"eps {memory[rows[column]]:.1f}", fontsize=8)
            show(below[column], x_adv[column])
            name_prediction(below[column], wrong[column].item(), y[column].item())
        above[0].set_ylabel(f"{name} eps", fontsize=8)
        below[0].set_ylabel(f"PGD-40, {common.shown(attack.eps)}", fontsize=8)


# ------------------------------------------------------------------------------------- the record

def weights_sha256(state_dict):
    """sha256 over names and values: the identity of a network in all that is measured of it."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name]
        if torch.is_tensor(value):
            flat = value.detach().cpu().contiguous().flatten()
            content = flat.view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
        else:
            content = repr(value).encode()  # what get_extra_state keeps
        digest.update(name.encode() + content)
    return digest.hexdigest()


def images_sha256(test):
    """sha256 over the images of a Split, or their files' names and classes, and its labels."""
    if torch.is_tensor(test.images):
        images = test.images.cpu().numpy().tobytes()
    else:
        separator = os.fsencode(os.sep)
        names = (b"/".join(path.split(separator)[-2:]) for path in test.images.paths)
        images = b"\n".join(names)
    return hashlib.sha256(images + test.labels.cpu().numpy().tobytes()).hexdigest()


def fingerprint(settings):
    """16 hex digits that stand for a dictionary of plain values."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    common.write_beside(path, lambda file: file.write(text.encode()))


def stem_of(path):
    """What the names of a checkpoint's other files begin with: a.pt and a.pth do not share them."""
    return str(path).removesuffix(".pt")


def is_committed(path):
    """Whether a checkpoint is one of results/weights, where nothing is written unasked."""
    weights = Path(__file__).resolve().parent / "results" / "weights"
    return weights in Path(path).resolve().parents


def record_files(stem):
    """The files of a record: outcomes, facts of samples, and what keeps two writers apart."""
    return [Path(f"{stem}{end}") for end in (".json", ".npz", ".lock")]


def record_stem(args):
    """Where the record goes, without the ending; None: nowhere."""
    if args.record:
        return str(args.record).removesuffix(".json")
    path, _ = common.path_and_model(args.ckpt)
    return None if is_committed(path) else f"{stem_of(path)}.eval"


def refuse_other_arrays(names, path):
    """UsageError where a .npz file holds arrays that are none of a Record's facts."""
    other = [name for name in names if not re.match("[0-9a-f]{8}-", name)]
    if other:
        raise common.UsageError(f"{path} holds {common.shortened(', '.join(other))}, not facts of "
                                "samples: --record must name another file")


class Record:
    """Outcomes and facts of samples (see `evaluate`) of a checkpoint's present networks alone.

    They are in STEM.json and STEM.npz. An attack that was interrupted has facts, and seconds, but
    no outcome. stem None: they are in memory only.
    """

    def __init__(self, path, shas, stem):
        self.kept = stem is not None
        self.json_path, self.npz_path, self.lock_path = record_files(stem)
        self.path = Path(path)
        self.shas = list(shas)
        self.stamp = self.path.stat().st_mtime_ns
        self.outcomes = []
        self.facts = {}
        self.dropped = 0  # outcomes in the file of other weights
        self.read()

    def read(self):
        """What is on disk of these networks; another evaluation may have added to it.

        Where the checkpoint has been replaced since, what is there of the new networks stays, too.
        """
        if not self.kept:
            return
        self.outcomes = []
        self.facts = {}
        replaced = not self.path.exists() or self.path.stat().st_mtime_ns != self.stamp
        marks = [sha[:8] for sha in self.shas]
        try:
            stored = self.stored_outcomes()
            self.outcomes = [o for o in stored if replaced or o["weights_sha256"] in self.shas]
            self.dropped = len(stored) - len(self.outcomes)
            if self.npz_path.exists():
                with np.load(self.npz_path) as arrays:
                    refuse_other_arrays(arrays.files, self.npz_path)
                    self.facts = {name: arrays[name] for name in arrays.files
                                  if replaced or name.split("-")[0] in marks}
        except common.UsageError:
            raise
        except Exception as error:
            raise common.UsageError(f"{self.json_path} or its .npz is damaged, or no record "
                                    f"({type(error).__name__}): remove both, or name another "
                                    "--record")

    def stored_outcomes(self):
        """What NAME.json holds; UsageError where it is not evaluate.py's."""
        if not self.json_path.exists():
            return []
        stored = json.loads(self.json_path.read_text())
        names = {"attack", "accuracy", "n"}
        if not isinstance(stored, list) or any(names - set(outcome) for outcome in stored):
            raise common.UsageError(f"{self.json_path} is no record of outcomes: --record must "
                                    "name another file")
        return [outcome for outcome in stored if "key" in outcome]

    def key(self, settings):
        """Begins with the weights' mark; the same for an attack under each of its names."""
        budget = {name: value for name, value in settings.items() if name != "attack"}
        return f"{settings['weights_sha256'][:8]}-{fingerprint(budget)}"

    def find(self, settings):
        """(outcome or None, facts or None, seconds spent, warnings so far) of these settings."""
        key = self.key(settings)
        outcome = next((o for o in self.outcomes if o["key"] == key), None)
        facts = self.facts.get(key)
        complete = facts is not None and not np.isnan(facts).any()
        if outcome:
            outcome = dict(outcome, attack=settings["attack"])
        seconds = float(self.facts.get(f"{key}-seconds", 0))
        warnings = [str(text) for text in self.facts.get(f"{key}-warnings", ())]
        return outcome if complete else None, facts, seconds, warnings

    def save(self, settings, facts, seconds, warnings, measured=None):
        """Keep an attack's facts so far, or with `measured` its outcome, replacing an older one."""
        if not self.kept:
            return self.add(settings, facts, seconds, warnings, measured)
        with open(self.lock_path, "a") as lock:
            if common.fcntl:
                with contextlib.suppress(OSError):  # some network file systems have no locks
                    common.fcntl.flock(lock, common.fcntl.LOCK_EX)
            self.read()
            outcome = self.add(settings, facts, seconds, warnings, measured)
            common.write_beside(self.npz_path,
                                lambda file: np.savez_compressed(file, **self.facts))
            write_json(self.json_path, self.outcomes)
        return outcome

    def add(self, settings, facts, seconds, warnings, measured):
        """As `save`, in memory; returns the outcome or None."""
        key = self.key(settings)
        self.facts[key] = facts
        self.facts[f"{key}-seconds"] = np.float64(seconds)
        self.facts[f"{key}-warnings"] = np.array(warnings, str)
        outcome = dict(settings, **measured, warnings=warnings, key=key) if measured else None
        self.outcomes = [o for o in self.outcomes if o["key"] != key]
        if outcome:
            self.outcomes.append(outcome)
        return outcome


def results(checkpoint, outcomes, device):
    """The content of results/NAME.json: the outcomes, and how the network came to be."""
    history = checkpoint["history"]
    minutes = sum(row["seconds"] for row in history) / 60
    return dict(script=checkpoint["script"], model=checkpoint["model"],
                dataset=checkpoint["dataset"], args=checkpoint["args"],
                best_epoch=checkpoint["best"]["epoch"], training=checkpoint["provenance"],
                training_minutes=round(minutes, 1), evaluation=common.provenance(device),
                outcomes=outcomes, history=history)


def in_half(value):
    """A tensor in float16, or as it is: of whole numbers, or where float16 would lose them."""
    if not (torch.is_tensor(value) and value.is_floating_point() and value.numel()):
        return value
    half = value.half()
    lost = (half.to(value) - value).abs().max()
    return half if lost <= 1e-3 * value.abs().max() else value


def export(args, checkpoint):
    """Write --export: one set of weights in float16, as the best; it is read like any other run."""
    refuse_unwritable(args.export, "--export")
    kept = checkpoint[args.weights]
    half = {name: in_half(value) for name, value in kept["state_dict"].items()}
    best = dict(kept, metric=kept.get("metric"), state_dict=half)
    saved = dict(checkpoint, best=best, last=None, method_state=None)
    common.write_beside(args.export, lambda file: torch.save(saved, file))
    print(f"{args.export}: the {args.weights} weights of {args.ckpt} in float16")


# ---------------------------------------------------------------------------------------- opening

def open_checkpoint(args, device):
    """(Classifier, checkpoint dictionary) of a run's file or of somebody else's weights."""
    facts = common.dataset_facts(args.dataset, args.data_dir) if args.dataset else None
    model, checkpoint = common.load_model(args.ckpt, args.weights, device, foreign_facts=facts,
                                          architecture=args.model, normalize=args.normalize)
    own_code = ".py:" in checkpoint["model"]
    if args.model and not own_code and args.model != checkpoint["model"] and "=" not in args.ckpt:
        raise common.UsageError(f"{args.ckpt}: its network is {checkpoint['model']}, not "
                                f"{args.model}")
    if args.dataset not in (None, checkpoint["dataset"]):
        raise common.UsageError(f"{args.ckpt}: was trained on {checkpoint['dataset']}, not on "
                                f"{args.dataset}")
    return model, checkpoint


def trained_eps(checkpoint, normalized):
    """(the L-infinity radius that training aimed at, of DRA PGD's; the eps of its DRA or None).

    In [0, 1] units, or in those of normalised images where --normalized-eps asks for it.
    """
    args = checkpoint["args"]
    factor = units(checkpoint, normalized)
    mean_eps = factor * args["eps"] if args.get("adversary") == "dra" else None
    return factor * args.get("pgd_eps", args["eps"]), mean_eps


def trained_linf(checkpoint):
    """The most by which training's DRA changed a value, in [0, 1] units; None: no bound."""
    linf = checkpoint["args"].get("linf") or None  # 0: no bound
    return units(checkpoint, False) * linf if linf else None


def units(checkpoint, normalized):
    """What a radius of training is multiplied by to be in the units that evaluation asks for."""
    scale = common.pixel_scale(common.checkpoint_facts(checkpoint))
    trained = bool(checkpoint["args"].get("normalized_eps"))
    return scale ** (int(trained) - int(bool(normalized)))


def asked_model(args):
    """The network that the command line names: after --ckpt's =, or by --model; or None."""
    return common.path_and_model(args.ckpt)[1] or args.model


class Surrogate(NamedTuple):
    """A network that images are made on."""
    label: str  # in attacks' names
    model: torch.nn.Module
    identity: dict
    at_chance: bool
    place: str | None  # of its images, without the ending; None: they are not kept
    foreign: bool  # whether the file alone does not say what its network computes


def open_surrogates(args, facts, device, look, record):
    """path -> Surrogate; UsageError for one that is of other data, or cannot be attacked."""
    found = {}
    for path in args.surrogate:
        model, source = common.load_model(path, device=device, facts=facts,
                                          architecture=asked_model(args),
                                          normalize=args.normalize)
        nature = probe(model, look, facts["classes"], path)
        if nature.at_chance:
            print(f"{path}: {percent(nature.accuracy)} % clean, at chance: its images are no "
                  "evidence")
        sha = weights_sha256(source["best"]["state_dict"])
        identity = dict(sha=sha, model=source["model"], normalize=source["normalize"])
        file, name = common.path_and_model(path)
        if ".py:" in source["model"]:
            identity["code"] = common.code_sha256(name or asked_model(args))
        place = None if is_committed(file) else str(Path(file).with_suffix(""))
        if args.record:
            place = str(record.json_path.parent / Path(file).stem)
        if place:
            refuse_unwritable(place, "--surrogate")
        foreign = source["script"] == "state_dict" or "code" in identity
        found[path] = Surrogate(source["model"], model, identity, nature.at_chance, place, foreign)
    labels = [surrogate.label for surrogate in found.values()]
    if len(set(labels)) < len(labels):
        found = {path: surrogate._replace(label=stem_of(path))
                 for path, surrogate in found.items()}
    return found


def refuse_bad_places(args, record):
    """UsageError where something cannot be written; before the first attack."""
    if record.kept:
        refuse_unwritable(record.json_path, "the record")
        lock = record.lock_path
        if lock.exists() and not (lock.is_file() and os.access(lock, os.W_OK)):
            raise common.UsageError(f"{lock}: cannot be written, the record needs it: --record "
                                    "must name another file")
    for path, flag in ((args.results, "--results"), (args.save_adv, "--save-adv")):
        if path:
            refuse_unwritable(path, flag)
    if args.plots:
        try:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise common.UsageError(f"--plots {args.plots}: {error.strerror}")
        refuse_unwritable(Path(args.plots) / "curves.png", "--plots")


# --------------------------------------------------------------------------------------- the plan

def columns_of(protocol, facts):
    """A protocol's settings for a data set: its own, or those of the data set most like it."""
    table = PROTOCOLS[protocol]
    known = [name for name in (facts["name"], facts["like"]) if name in table]
    like = known[0] if known else next(iter(table))
    settings = dict(table[like])
    if like != facts["name"]:
        print(f"{facts['name']}: the attacks of --protocol {protocol} are those on {like}")
        if isinstance(settings["step"], float):
            settings["step"] *= facts["eps"] / common.DATASETS[like]["eps"]
    return settings


def sensible(words, args, facts, nature):
    """The names of a protocol's attacks without those that this data set has no use for."""
    kept = []
    for word in words:
        if word.startswith("multi-") and facts["classes"] > MANY_CLASSES:
            print(f"no multi-targeted attack: {facts['name']} has too many wrong classes")
        elif word == "corruptions" and facts["name"] not in CORRUPTED:
            print(f"no corruptions: there is no corrupted copy of {facts['name']}")
        elif word == "corruptions" and facts["chosen"]:
            print("no corruptions: they are of all classes, the network knows some")
        elif word == "corruptions" and not has_corruptions(facts["name"], args.data_dir):
            name, address = CORRUPTED[facts["name"]]
            print(f"no corruptions: {name} is not in {args.data_dir}, it is at {address}")
        else:
            kept.append(word)
    return kept


def has_corruptions(dataset, data_dir):
    """Whether the corrupted test images of a data set are at hand."""
    try:
        return bool(corruption_paths(dataset, data_dir))
    except common.UsageError:
        return False


def plan(args, facts, eps, mean_eps, device, nature=Nature(), linf=None):
    """What is to be run: [(Attack, surrogate's path or None, number of test images, 0: all)].

    mean_eps, linf: of dra.
    """
    chosen = dict(PLAN)
    chosen.update(columns_of(args.protocol, facts) if args.protocol else QUICK_LOOK)
    chosen["transfer"] = chosen["transfer"] or QUICK_LOOK["transfer"]
    for name in QUICK_LOOK:
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    words = [word.strip() for word in chosen["attacks"].split(",")]
    if args.protocol:
        words = sensible(words, args, facts, nature)
    if nature.randomised and any(word.partition(":")[0] == "aa" for word in words):
        print("aa: the network is randomised, AutoAttack's version for such networks runs")
        words = [re.sub("^aa(?=:|$)", "aa-rand", word) for word in words]
    budget = dict(step=chosen["step"], start=chosen["start"], seed=args.seed, p=args.p,
                  scale=common.pixel_scale(facts) if args.normalized_eps else 1.0,
                  mean_eps=mean_eps, asked_step=args.step_size, linf=linf)
    todo = [(attack, None) for attack in parse_attacks(",".join(words), facts, eps, **budget)]
    for path in args.surrogate:
        attacks = parse_attacks(chosen["transfer"], facts, eps, **budget)
        todo += [(attack, path) for attack in attacks]
    few = {name: sizes[device.type == "cpu"] for name, sizes in chosen["few"].items()}
    return [(attack, path, images_for(attack.name, few, chosen["limit"]))
            for attack, path in todo]


def images_for(name, few, limit):
    """How many test images an attack gets, 0: all. few: name -> number, of slow attacks."""
    name = name.removesuffix(NORMALISED)
    slow = few.get(name, few.get(name.partition("@")[0], 0))
    return min([n for n in (limit, slow) if n], default=0)


# ----------------------------------------------------------------------------------------- report

COLUMNS = {"attack": 20, "accuracy": 8, "95 %": 13, "n": 6, "eps": 7, "step": 7, "steps": 5,
           "restarts": 8, "largest": 7, "seconds": 8}


def print_outcome(outcome, header):
    """One aligned line, accuracy in %; the first comes with the names of the columns."""
    if header:
        print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    low, high = outcome["interval"]
    shown = dict(outcome, accuracy=f"{100 * outcome['accuracy']:.2f}",
                 seconds=f"{outcome['seconds']:.1f}")
    shown["95 %"] = f"{100 * low:.2f}-{100 * high:.2f}"
    cells = []
    for name, width in COLUMNS.items():
        value = shown[name]
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        cells.append(f"{'-' if value is None else text:>{width}}")
    print(" ".join(cells), flush=True)
    if outcome.get("mean_l2"):
        print(f"{'':>20} mean L2 of what fools: {outcome['mean_l2']:.4f}")
    if outcome["nonfinite"]:
        print(f"{'':>20} gradients that were not finite, taken as zero: "
              f"{100 * outcome['nonfinite']:.2f} %")
    for name, accuracy in outcome.get("types", {}).items():
        print(f"{name:>20} {100 * accuracy:8.2f}")
    if "mce" in outcome:
        print(f"{'mCE':>20} {100 * outcome['mce']:8.2f} (errors divided by AlexNet's, in %)")


def print_protocol(protocol, dataset, outcomes):
    """The paper's rows and ours, in the paper's columns; a column that was not run is a dash."""
    try:
        file = Path(__file__).parent / "results" / "papers.json"
        table = json.loads(file.read_text())[protocol][dataset]
    except (OSError, KeyError):
        print("the rows of the paper are not at hand (results/papers.json has none for "
              f"{protocol}, {dataset})")
        return
    ours = our_columns(outcomes)
    names = list(table["columns"])
    known = [canonical(name) for name in names]
    names += [outcome["attack"] for name, outcome in ours.items()  # at another step size
              if re.fullmatch(r"[^@]+@[\d./e-]+", name) and name.partition("@")[0] in known]
    rows = {label: [*row, *[None] * (len(names) - len(row))]
            for label, row in table["rows"].items()}
    found = [ours.get(canonical(name.replace(NORMALISED, ""))) for name in names]
    rows["this network"] = [outcome and 100 * outcome["mce" if name == "mCE" else "accuracy"]
                            for name, outcome in zip(names, found)]
    rows["its n"] = [outcome and str(outcome["n"]) for outcome in found]
    largest = max(outcome["eps"] or 0 for outcome in outcomes)
    text = (f"\n{table['table']} of the paper ({protocol}, {dataset}, eps {table['eps']}), "
            f"accuracy in %. This network's eps: {largest:.4g}")
    if any(outcome.get("judge", "any") == "any" for outcome in outcomes):
        text += "; its white-box attacks may succeed at any step"
    if any(NORMALISED in outcome["attack"] for outcome in outcomes):
        text += "; its radii are in units of normalised images"
    print(f"{text}.")
    print_rows(names, rows)
    others = [other["table"] for other in table.get("more", [])]
    if others:
        print(f"More of the paper on {dataset}: {', '.join(others)}. Their rows are in "
              "results/papers.json, their commands in results/tables.md.")


def canonical(name):
    """An attack's name with its aliases resolved: un-50x20 is pgd-cw-50x20."""
    head, dash, rest = name.partition("-")
    return f"{ALIASES.get(head, head)}{dash}{rest}"


def our_columns(outcomes):
    """Column -> outcome; transfer from the strongest of several surrogates is @surrogate, too.

    That of ImageNet-C is under mCE, too.
    """
    ours = {}
    for outcome in sorted(outcomes, key=lambda outcome: -outcome["accuracy"]):
        name = canonical(outcome["attack"].replace(NORMALISED, ""))
        if "surrogate_sha256" in outcome:
            ours[f"{name.rpartition('@')[0]}@surrogate"] = outcome
        ours[name] = outcome
        if "mce" in outcome:
            ours["mCE"] = outcome
    return ours


def print_rows(columns, rows):
    """A table of texts, numbers and dashes, as wide as its columns' names."""
    name_width = max(map(len, rows)) + 2
    widths = [max(len(column), 6) + 2 for column in columns]
    print(" " * name_width + "".join(f"{c:>{w}}" for c, w in zip(columns, widths)))
    for label, row in rows.items():
        line = f"{label:<{name_width}}"
        for value, width in zip(row, widths):
            text = f"{value:.2f}" if isinstance(value, float) else value
            line += f"{'-' if text is None else text:>{width}}"
        print(line)


def print_verdict(findings, nature):
    """The findings, a line each, and the verdict; returns the verdict."""
    print("\nsanity:")
    words = {True: "passed", False: "FAILED", None: "  -   "}
    for finding in findings:
        print(f"  {words[finding.passed]}  {finding.sign}: {finding.text}")
    line = verdict(findings, nature)
    print(line)
    return line


def print_more(args, model, look, checkpoint, eps, outcomes, nature, baseline):
    """The verdict, alignment and plots, where asked for; name -> number, and figures' paths.

    model: as attacked; it has a Classifier inside. look: the images for all of it.
    """
    facts = common.checkpoint_facts(checkpoint)
    classifier = getattr(model, "model", model)
    batch_size = batch_without_leftover(len(look.labels), args.batch_size)
    stop = not (nature.randomised or nature.batch_dependent or args.bn_mode == "train")
    dead = dead_gradients(model, look, batch_size)
    numbers = dict(dead_gradients=float(dead.mean()))
    paths = []
    print(f"images with a zero or non-finite gradient: {percent(numbers['dead_gradients'])} %")
    if args.sanity or args.plots:
        curve = curves(model, look, facts, eps, batch_size, args.seed, stop, bool(args.plots))
    if args.sanity:
        held = held_without_gradient(dead, model, look, facts, eps, batch_size, args.seed, stop)
        if stop:
            curve["black_box"] = black_box(model, look, facts, eps, args.seed)
        above = None
        if baseline:
            above = curve_of(baseline, look, facts, "fgsm", [eps], batch_size, 0)[0][0]
        findings = sanity(curve, held, nature, eps, outcomes, above)
        numbers["verdict"] = print_verdict(findings, nature)
        numbers["sanity_failures"] = sum(finding.passed is False for finding in findings)
        numbers["findings"] = [finding._asdict() for finding in findings]
        notes = {note for outcome in outcomes for note in outcome.get("warnings", [])}
        for note in sorted(notes):
            print(f"AutoAttack notes: {note}")
    if args.alignment:
        means = alignment(classifier, look, batch_size).mean(0).tolist()
        names = ("alignment", "binarised_alignment", "linearised_robustness")
        numbers.update(zip(names, means))
        print("mean alignment {:.4f} (eq. 4), binarised {:.4f} (eq. 7), linearised robustness "
              "{:.4f} (eq. 6)".format(*means), f"of {len(look.labels)} images")
    if args.plots:
        scene = Scene(model, checkpoint, look, curve, eps, args.seed, args.data_dir,
                      teacher_beside(args, checkpoint, look.labels.device))
        paths = plots(args.plots, scene)
    return numbers, paths


def print_classes(dataset, labels, correct, chosen):
    """Accuracy per class under an attack, in %. labels, correct: arrays (N,)."""
    shares = []
    for label in np.unique(labels):
        number = chosen[label] if chosen else label
        name = CIFAR10_NAMES[number] if dataset == "cifar10" else str(number)
        shares.append(f"{name} {100 * correct[labels == label].mean():.1f}")
    print(f"{'by class':>20} {', '.join(shares)}")


def print_worst(flags, eps):
    """The worst case over attacks at eps, sample by sample. flags: [(index, correct)]."""
    if len(flags) < 2:
        return
    shared = min((index for index, _ in flags), key=len)  # a smaller subset lies in a larger one
    worst = np.all([correct[np.isin(index, shared)] for index, correct in flags], 0)
    low, high = wilson(worst.mean(), len(worst))
    print(f"worst case of these {len(flags)} at eps {eps:.4g}, sample by sample: "
          f"{100 * worst.mean():.2f} % ({100 * low:.2f}-{100 * high:.2f}) of {len(shared)} images")


def alike(text):
    """What warnings that differ in numbers alone have in common."""
    return re.sub(r"[\d.]+", "#", text)


class Notes(logging.Handler):
    """Collects AutoAttack's warnings: randomised outputs, zero gradients, each kind once."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = {}
        logging.getLogger("auto-attack").addHandler(self)

    def begin(self, texts):
        """Forget all but `texts`, which an interrupted attack left."""
        self.texts = {alike(text): text for text in texts}

    def emit(self, record):
        text = record.getMessage().split(" See ")[0]
        if not text.startswith("Square Attack has decreased"):  # that is for a whole test set
            self.texts.setdefault(alike(text), text)


# ------------------------------------------------------------------------------------------- main

class Task(NamedTuple):
    """One line of the plan, ready to run."""
    attack: Attack
    test: common.Split
    settings: dict  # what the outcome depends on
    images: Callable | None  # makes the images of a transfer attack
    batch_size: int
    stop: bool  # whether broken images are attacked no further


def measure(model, task, corrupted, args, record, notes):
    """One attack, or what is on record of it: (outcome, facts of `evaluate`, --save-adv's images).

    It is saved as it goes, and goes on. corrupted: the files of `corruptions`.
    """
    anew = args.overwrite or args.save_adv
    outcome = None
    facts = None
    spent = 0.0
    warnings = []
    if not anew:
        outcome, facts, spent, warnings = record.find(task.settings)
    if outcome:
        return outcome, facts, None
    notes.begin(warnings)
    started = time.perf_counter() - spent

    def save(facts, measured=None):
        seconds = time.perf_counter() - started
        return record.save(task.settings, facts, seconds, list(notes.texts.values()), measured)
    keep = None
    if task.attack.kind == "corruptions":
        types = corruptions(model, corrupted, task.test, task.batch_size)
        facts = np.empty((0, 5))
        measured = corruption_summary(types, task.settings["dataset"])
    else:
        keep = np.empty(task.test.images.shape, np.float32) if args.save_adv else None
        images = task.images() if task.images else None
        facts = evaluate(model, task.test, task.attack, task.batch_size, args.precision, images,
                         task.stop, facts=facts, save=save, keep=keep)
        measured = summary(facts, task.attack)
    measured["interval"] = wilson(measured["accuracy"], len(task.test.labels))
    measured["seconds"] = round(time.perf_counter() - started, 2)
    return save(facts, measured), facts, keep


def summary(facts, attack):
    """An outcome's numbers from the facts of its samples."""
    measured = dict(accuracy=float((facts[:, 0] == 1).mean()), largest=float(facts[:, 1].max()),
                    ce=float(facts[:, 3].mean()), nonfinite=float(facts[:, 4].mean()))
    if ATTACKS[attack.kind].norm == "l2":  # of what it fools, not what was wrong before
        fooled = (facts[:, 0] == 0) & (facts[:, 2] > 0)
        measured["mean_l2"] = float(facts[fooled, 2].mean()) if fooled.any() else None
    return measured


def tasks(args, todo, facts, device, shared, surrogates, nature):
    """The plan's lines as Tasks. shared: settings that all outcomes have."""
    sizes = {n for _, _, n in todo}
    tests = {n: load_test(facts, args.data_dir, n, device, args.workers) for n in sizes}
    pixels = {n: images_sha256(test) for n, test in tests.items()}
    whole = nature.randomised or nature.batch_dependent or args.bn_mode == "train"
    stop = args.judge == "any" and not whole
    lines = []
    for attack, path, n in todo:
        test = tests[n]
        batch_size = args.batch_size
        if nature.batch_dependent or args.bn_mode == "train":
            batch_size = batch_without_leftover(len(test.labels), batch_size)
        settings = dict(attack=attack.name)
        settings.update({k: v for k, v in attack._asdict().items() if k != "name"})
        settings.update(n=len(test.labels), batch_size=batch_size, images_sha256=pixels[n],
                        judge="any" if stop else "last", **shared)
        images = None
        if path:
            surrogate = surrogates[path]
            settings.update(attack=f"{attack.name}@{surrogate.label}",
                            surrogate_sha256=surrogate.identity["sha"],
                            surrogate_at_chance=surrogate.at_chance)
            if surrogate.foreign:  # the same weights may be those of another network
                settings["surrogate"] = fingerprint(surrogate.identity)
            identity = dict(surrogate.identity, images=pixels[n])
            images = functools.partial(transfer_images, surrogate.place, identity,
                                       surrogate.model, test, attack, batch_size)
        lines.append(Task(attack, test, settings, images, batch_size, stop))
    return lines


def run_tasks(args, model, lines, eps, corrupted, record, facts):
    """Measure and print every line; returns the outcomes. eps: of the worst case."""
    notes = Notes()
    outcomes = []
    flags = []
    adversarial = {}
    for task in lines:
        if task.attack.kind == "corruptions":
            task.settings["files"] = [file.stem for file in corrupted]
        outcome, found, keep = measure(model, task, corrupted, args, record, notes)
        index = task.test.index.cpu().numpy()
        labels = task.test.labels.cpu().numpy()
        if keep is not None:
            arrays = dict(images=keep, index=index, labels=labels)
            for name, array in arrays.items():
                adversarial[f"{outcome['attack']}/{name}"] = array
        outcomes.append(outcome)
        print_outcome(outcome, header=len(outcomes) == 1)
        norm = ATTACKS[task.attack.kind].norm
        if len(found) and task.attack.eps in (None, eps) and norm in ("linf", "none"):
            flags.append((index, found[:, 0] == 1))
        if args.per_class and len(found):
            print_classes(facts["name"], labels, found[:, 0], facts["chosen"])
    print_worst(flags, eps)
    if args.save_adv:
        common.write_beside(args.save_adv, lambda file: np.savez(file, **adversarial))
    return outcomes


def log_to_wandb(args, checkpoint, record, outcomes, numbers, paths):
    """One W&B run for one evaluation; it names the run of training."""
    file = Path(common.path_and_model(args.ckpt)[0])
    mode = os.environ.get("WANDB_MODE") or args.wandb
    place = record.kept or os.environ.get("WANDB_DIR")
    if mode == "auto" and not place and not common.wandb_key_is_configured():
        return  # it would be offline, and a file that nobody asked for
    if mode == "disabled" or args.wandb == "disabled":
        return
    folder = record.json_path.parent if record.kept else Path(tempfile.mkdtemp())
    config = dict(vars(args), training_run=checkpoint.get("wandb_id"),
                  training_script=checkpoint["script"], training=checkpoint["provenance"])
    run = common.wandb_run(config, "evaluate", folder / file.name)
    if not run:
        return
    try:
        import wandb
        for outcome in outcomes:
            low, high = outcome["interval"]
            name = f"eval/{outcome['attack']}"
            run.summary.update({name: outcome["accuracy"], f"{name}/low": low,
                                f"{name}/high": high})
        run.summary.update({f"eval/{name}": value for name, value in numbers.items()
                            if name != "findings"})
        if paths:
            run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})
        run.finish()
    except Exception as error:
        print(f"W&B failed: {error}")


def shared_settings(args, checkpoint, nature, sha):
    """What all outcomes of an evaluation depend on."""
    name = checkpoint["model"]
    code = asked_model(args) or name
    settings = dict(precision=args.precision, weights=args.weights, weights_sha256=sha,
                    dataset=checkpoint["dataset"], model=name,
                    normalize=checkpoint["normalize"], bn_mode=args.bn_mode,
                    randomised=nature.randomised, batch_dependent=nature.batch_dependent)
    if nature.sets_seed:
        settings["sets_seed"] = True
    if ".py:" in name:
        settings["model"] = code
        settings["model_sha256"] = common.code_sha256(code)
    return settings


def print_advice(classifier, look, nature, checkpoint):
    """Print `advice`, if there is any, of somebody's weights and of what is at chance."""
    if nature.at_chance or checkpoint["script"] == "state_dict":
        line = advice(classifier, look, nature)
        if line:
            print(line)


def print_head(args, checkpoint, nature, record):
    """What is evaluated, and what is special about it."""
    print(f"{args.ckpt}: {checkpoint['script']}, {checkpoint['model']} on {checkpoint['dataset']}, "
          f"{args.weights} weights of epoch {checkpoint[args.weights]['epoch']}; {args.precision}")
    if not record.kept:
        print("nothing is written beside a committed checkpoint: --record FILE.json keeps a record")
    if nature.randomised:
        print("the network is randomised: the same image has other logits on a second pass; each "
              "attack's last step is judged")
    if nature.probabilities:
        print("the network's outputs lie in [0, 1] and seem to be probabilities: attacks may be "
              "weaker on them, let it return logits")
    if nature.changes:
        print("the network's forward changes its own buffers (a layer in train mode?): outcomes "
              "may depend on what ran before")
    if nature.sets_seed:
        print("the network sets torch's seed in its forward: the attacks' random numbers go on "
              "all the same")
    if nature.batch_dependent:
        print("the network is batch-dependent: an image's logits depend on the other images; "
              "batches stay whole")
    if args.bn_mode == "train":
        print(f"BatchNorm in train mode, batches of {args.batch_size}; AutoAttack's images are "
              "made in eval mode and judged in train mode")
    elif args.judge == "last":
        print("the last step of each restart is judged alone")


def main():
    """Evaluate; out of memory on a CPU ends in one line, too."""
    try:
        run()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise common.UsageError("out of memory: try a smaller --batch-size")


def open_record(args, checkpoint):
    """(Record of this checkpoint's networks, sha256 of the weights that are evaluated)."""
    shas = {weights: weights_sha256(checkpoint[weights]["state_dict"])
            for weights in ("best", "last") if checkpoint[weights]}
    path, _ = common.path_and_model(args.ckpt)
    record = Record(path, shas.values(), record_stem(args))
    if args.record and record.dropped and not args.overwrite:
        raise common.UsageError(f"--record {args.record} holds outcomes of other weights: "
                                "choose another name, or --overwrite replaces them")
    return record, shas[args.weights]


def radii(args, checkpoint, facts):
    """(eps of the attacks, eps of dra or None), in the units that --normalized-eps asks for."""
    eps, mean_eps = trained_eps(checkpoint, args.normalized_eps)
    if args.eps:
        return args.eps, args.eps
    return facts["eps"] if args.protocol else eps, mean_eps


def open_baseline(args, facts, device, look):
    """The network of --baseline, or None; UsageError for one that cannot be attacked."""
    if not args.baseline:
        return None
    model, _ = common.load_model(args.baseline, device=device, facts=facts,
                                 architecture=asked_model(args), normalize=args.normalize)
    if probe(model, look, facts["classes"], args.baseline).at_chance:
        raise common.UsageError(f"--baseline {args.baseline}: its clean accuracy is at chance, it "
                                "tells nothing")
    return model


def write_results(args, checkpoint, record, numbers, device):
    """The file of --results: all outcomes on record of these weights, and the verdict."""
    kept = [outcome for outcome in record.outcomes if outcome["weights"] == args.weights
            and outcome["weights_sha256"] in record.shas]
    content = results(checkpoint, kept, device)
    content.update({name: numbers[name] for name in ("verdict", "findings") if name in numbers})
    write_json(args.results, content)


def run():
    args = parse()
    device, args.precision = common.set_up(args.device, args.precision, parallel=False)
    classifier, checkpoint = open_checkpoint(args, device)
    if args.export:
        export(args, checkpoint)
        return
    facts = common.checkpoint_facts(checkpoint)
    if args.alignment and facts["classes"] > 100:
        raise common.UsageError(f"--alignment takes every logit's gradient: {facts['name']} has "
                                "too many classes")
    record, sha = open_record(args, checkpoint)
    model = BatchStatistics(classifier) if args.bn_mode == "train" else classifier
    eps, mean_eps = radii(args, checkpoint, facts)
    args.p = checkpoint["args"].get("p", 1 / 3) if args.p is None else args.p

    few = min(args.limit or 1000, 500 if device.type == "cpu" else 1000)
    look = load_test(facts, args.data_dir, few, device, args.workers)
    nature = probe(classifier, look, facts["classes"], args.ckpt, args.precision)
    print_advice(classifier, look, nature, checkpoint)
    todo = plan(args, facts, eps, mean_eps, device, nature, trained_linf(checkpoint))
    if args.normalized_eps:
        eps *= common.pixel_scale(facts)  # from here on in [0, 1] units
    refuse_bad_places(args, record)
    corrupted = []
    if any(attack.kind == "corruptions" for attack, _, _ in todo):
        corrupted = corruption_paths(facts["name"], args.data_dir)
    surrogates = open_surrogates(args, facts, device, look, record)
    baseline = open_baseline(args, facts, device, look)
    shared = shared_settings(args, checkpoint, nature, sha)
    lines = tasks(args, todo, facts, device, shared, surrogates, nature)

    print_head(args, checkpoint, nature, record)
    try:
        outcomes = run_tasks(args, model, lines, eps, corrupted, record, facts)
    except KeyboardInterrupt:
        if record.kept:
            print(f"\n{record.json_path} keeps what is measured: the same command goes on")
        raise
    numbers, paths = print_more(args, model, look, checkpoint, eps, outcomes, nature, baseline)
    if args.results:
        write_results(args, checkpoint, record, numbers, device)
    if args.protocol not in (None, "common", "table"):
        print_protocol(args.protocol, facts["name"], outcomes)
    log_to_wandb(args, checkpoint, record, outcomes, numbers, paths)


if __name__ == "__main__":
    common.cli(main)
