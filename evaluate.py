"""How robust is a checkpoint? Attacks by name on the test set, a table, and a record of every outcome.

    python evaluate.py --ckpt run.pt                                    # a quick look: 1,000 random test images
    python evaluate.py --ckpt run.pt --limit 0 --attacks clean,fgsm,pgd-100x5,un-100x10,aa
    python evaluate.py --ckpt run.pt --protocol common --sanity --plots figures
    python evaluate.py --ckpt run.pt --protocol sat_rx --surrogate c.pt --surrogate d.pt     # a paper's own columns
    python evaluate.py --ckpt state_dict.pt --dataset cifar10 --model my_nets.py:resnet      # somebody else's network

NAME-STEPSxRESTARTS:EPS names an attack. White-box iterative attacks but DRA count a sample as broken at the first step
that misclassifies it and attack it no further: never weaker than judging the last step alone. Evaluation is in float32,
TF32 off, unless told otherwise. Outcomes go to run.eval.json, per-sample facts to run.eval.npz, both under the sha256
of the weights they belong to: nothing of an earlier network on the same path remains, and what was measured is not run
again.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import common

QUICK_LOOK = dict(attacks="clean,fgsm,ifgsm-40,pgd-40,pgd-cw-40", transfer="fgsm,mi-fgsm-40", start="ball", limit=1000)
PLAN = dict(transfer="", start="ball", step=None, limit=0, few={})  # few: attack -> (images on a GPU, images on a CPU)
SAT_RX = dict(PLAN, start="step")  # tables 3 to 5: the whole test set; eq. 6: PGD starts within a step of x
ATLAS = dict(PLAN, transfer="pgd-1000", step=0.007, few={"rays-40000": (1000, 200), "aa": (0, 500)})
MNIST_FEW = {"pgd-1000": (0, 500), "un-50x20": (0, 500), "multi-50x20": (0, 200)}
TARGETED = [f"targeted-1000:{radius}/255" for radius in (4, 8, 12, 16)]
IAAT = dict(PLAN, attacks="clean,pgd-10x5,pgd-100x5,pgd-1000x2", transfer="pgd-1000x2")
SALIENCY = dict(PLAN, attacks="clean,fgsm,pgd-5,pgd-10,pgd-20", few={"aa": (0, 500)})
DRA = dict(PLAN, step="eps/steps")
COMMON = dict(PLAN, attacks="clean,pgd-20,pgd-cw-20,pgd-100,pgd-100x5,aa,multi-20x5,rays-40000", few={
    "pgd-100x5": (1000, 500), "aa": (1000, 500), "multi-20x5": (1000, 200), "rays-40000": (1000, 200)})
PROTOCOLS = {  # the columns of the papers' main tables; their rows are in results/papers.json
    "common": dict.fromkeys(common.DATASETS, COMMON),
    "sat_rx": {
        "mnist": dict(SAT_RX, attacks="clean,fgsm,ifgsm-100,pgd-100,pgd-cw-100", transfer="fgsm,mi-fgsm-100"),
        **dict.fromkeys(["cifar10", "imagenet100"], dict(SAT_RX, attacks="clean,fgsm,ifgsm-20,pgd-20,pgd-cw-20",
                                                         transfer="fgsm,mi-fgsm-20")),
    },
    "atlas": {
        "mnist": dict(ATLAS, attacks="clean,pgd-20,pgd-1000,un-50x20,multi-50x20", step=0.01, few=MNIST_FEW),
        "cifar10": dict(ATLAS, attacks="clean,pgd-20,pgd-1000,un-100x10,multi-20x5,rays-40000,aa"),
        "cifar100": dict(ATLAS, attacks="clean,pgd-20,pgd-1000,un-100x10,rays-40000,aa"),
    },
    "iaat": {"cifar10": dict(IAAT, attacks=IAAT["attacks"] + ",corruptions"), "cifar100": IAAT,
             "imagenet": dict(PLAN, attacks=",".join(["clean", *TARGETED]), step=1 / 255, few=dict.fromkeys(
                 TARGETED, (1000, 100)))},
    "saliency": {"cifar10": dict(SALIENCY, attacks=SALIENCY["attacks"] + ",cw-20,aa"), "cifar100": SALIENCY},
    "dra": {"mnist": dict(DRA, attacks="clean,pgd-20:0.1,pgd-20:0.3"),
            "cifar10": dict(DRA, attacks="clean,pgd-20:2/255,pgd-20:5/255,pgd-20:8/255")},
}


def parse(argv=None):
    """The flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="the checkpoint that training wrote, or a bare state_dict")
    flag("--weights", choices=["best", "last"], default="best", help="which weights of it (%(default)s)")
    flag("--model", help=f"of a bare state_dict: {common.BACKBONES}; also where training had a file of yours")
    flag("--dataset", help=f"of a bare state_dict: its data set, {', '.join(common.DATASETS)} or NAME of NAME.npz")
    flag("--normalize", choices=common.NORMALIZATIONS, default="none", help="of a bare state_dict: the layer "
         "put before the network, which gets images in [0, 1] otherwise (%(default)s)")
    flag("--attacks", help=f"comma-separated: {ATTACK_NAMES} ({QUICK_LOOK['attacks']})")
    flag("--protocol", choices=list(PROTOCOLS), help="the columns of this paper's main tables, its rows beside them, "
         "or the common protocol")
    flag("--surrogate", metavar="CKPT", action="append", default=[], help="also attack by transfer from this network; "
         "may be repeated")
    flag("--transfer", help=f"the attacks made on surrogates ({QUICK_LOOK['transfer']}; with --protocol the paper's, "
         "if it has any)")
    flag("--eps", type=common.unit, help="L-infinity radius in [0, 1] units, 8/255 or 0.031, and dra's mean change (as "
         "in training: of DRA its --pgd-eps and its --eps; with --protocol the data set's usual radius)")
    flag("--step-size", type=common.unit, help="step of PGD in [0, 1] units (the data set's usual one in proportion to "
         "eps, and at least 1.25 eps / steps; with a paper's --protocol its own)")
    flag("--normalized-eps", action="store_true", help="radii and steps are in units of images divided by the data "
         "set's deviation, as the DRA paper's seem to be")
    flag("--p", type=common.number(0, 1), help="share of the values that dra changes (that of training, else 1/3)")
    flag("--start", choices=["ball", "step"], help="PGD starts uniformly in the eps-ball or within a step of x "
         f"({QUICK_LOOK['start']}; with a paper's --protocol its own)")
    flag("--limit", type=common.natural, help="evaluate a fixed random subset of N test images; 0: all "
         f"({QUICK_LOOK['limit']}; with --protocol all, fewer under its slowest attacks)")
    flag("--sanity", action="store_true", help="test whether the robustness is an artefact of masked gradients")
    flag("--alignment", action="store_true", help="alignment and linearised robustness of the saliency paper "
         "(eqs. 4, 6, 7)")
    flag("--per-class", action="store_true", help="accuracy per class under every attack")
    flag("--plots", metavar="DIR", help="write curves, loss surfaces, images and gradients as PNG files")
    flag("--save-adv", metavar="FILE.npz", help="write every attack's images, float32 (runs all attacks anew)")
    flag("--data-dir", default="data", help="folder that holds NAME.npz, imagenet/val, CIFAR-10-C ... (%(default)s)")
    flag("--batch-size", type=common.count, default=250, help="images attacked at once (%(default)s)")
    flag("--seed", type=common.natural, default=0, help="seed of the attacks (%(default)s)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    flag("--precision", choices=["float32", "bfloat16"], default="float32", help="of evaluation (%(default)s)")
    flag("--results", metavar="FILE.json", help="also write the outcomes with training command, commit, hardware, "
         "minutes and history")
    flag("--export", metavar="FILE.pt", help="write the weights as a float16 checkpoint and stop")
    flag("--overwrite", action="store_true", help="replace the files of --results, --export and --save-adv, and "
         "measure anew what is on record")
    common.workers_flag(flag)
    common.wandb_flag(flag)
    args = parser.parse_args(argv)
    if args.protocol and args.attacks:
        raise common.UsageError("--protocol names the attacks itself: give it or --attacks")
    own = [args.ckpt, *args.surrogate, *Path(args.data_dir).glob("*.npz")]
    own += [f"{stem_of(args.ckpt)}{end}" for end in (".pt", ".resume.pt", ".jsonl", ".eval.json", ".eval.npz")]
    own, outputs = [Path(path).resolve() for path in own], []
    if args.transfer and not args.surrogate:
        raise common.UsageError("--transfer needs --surrogate CKPT, the network to make the images on")
    if args.plots:
        need("matplotlib", "--plots")
        try:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise common.UsageError(f"--plots {args.plots}: {error.strerror}")
    for path in filter(None, (args.results, args.export, args.save_adv)):
        if Path(path).resolve() in own + outputs:
            raise common.UsageError(f"{path} belongs to --ckpt {args.ckpt}, or is named twice: choose another name")
        if not Path(path).parent.is_dir() or Path(path).is_dir():
            raise common.UsageError(f"{path}: there is no such folder, or it is one")
        outputs.append(Path(path).resolve())
        if Path(path).exists() and not args.overwrite:
            raise common.UsageError(f"{path} exists: --overwrite replaces it")
    return args


# --------------------------------------------------------------------------------------------------------- attacks

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


def run_pgd(model, x, y, a, labels, loss=common.cross_entropy):
    """PGD with `loss` from the ball, or from within a step of x (SAT-Rx eq. 6)."""
    def near(x, eps):
        return common.uniform_start(x, min(a.step, a.eps))
    start = common.uniform_start if a.start == "ball" else near
    return restarted(model, x, y, a.eps, a.step, a.steps, a.restarts, labels, start, loss=loss)


def restarted(model, x, target, eps, step, steps, restarts, labels, start=common.uniform_start, **options):
    """PGD from several random starts. labels: an image that a restart breaks is attacked no further; None: the last
    restart counts."""
    result = x.clone()
    rows = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        starts = start(x, eps)  # drawn for all: no image's start depends on the others

        def drawn(x, eps):
            return starts[rows]
        wanted = None if labels is None else labels[rows]
        result[rows] = common.pgd(model, x[rows], target[rows], eps, step, steps, drawn, labels=wanted, **options)
        if labels is not None and restarts > 1:
            rows = rows[logits_of(model, result[rows]).argmax(1) == labels[rows]]
            if not len(rows):
                break
    return result


def margin_attack(model, x, y, a, labels):
    """Un-targeted attack on the logits' margin (ATLAS appendix B; C&W's loss): the wrong class may change each step."""
    return run_pgd(model, x, y, a, labels, loss=common.margin)


def random_targeted(model, x, y, a, labels):
    """PGD towards a random wrong class (IAAT, section 4.2), judged as every attack by the true one."""
    classes = logits_of(model, x[:1]).shape[1]
    target = (y + torch.randint(1, classes, y.shape).to(y)) % classes
    return restarted(model, x, target, a.eps, a.step, a.steps, a.restarts, labels, targeted=True)


def multi_targeted(model, x, y, a, labels):
    """PGD on f_i - f_y for every wrong class i in turn (Gowal et al. 2019; ATLAS appendix B)."""
    classes, result = logits_of(model, x[:1]).shape[1], x.clone()
    left = torch.arange(len(x), device=x.device)
    for shift in range(1, classes):
        def toward(logits, y):
            wrong = (y + shift) % classes
            return (logits.gather(1, wrong[:, None]) - logits.gather(1, y[:, None]))[:, 0]
        result[left] = run_pgd(model, x[left], y[left], a, y[left], loss=toward)
        left = left[logits_of(model, result[left]).argmax(1) == y[left]]
        if not len(left):
            break
    return result


def rays(model, x, y, a, labels):
    """RayS, from predicted labels alone (Chen and Gu 2020): a.steps queries per image in search of the sign vector with
    the shortest way to a wrong label. Blocks of signs are flipped, the whole image first, then halves, quarters, down
    to pixels and over again; a flip that is still wrong at the present radius is kept and the radius halved in on."""
    flat, (n, pixels) = x.flatten(1), x.flatten(1).shape
    sign, radius = torch.ones_like(flat), torch.ones(n, device=x.device)  # at radius 1 every pixel is at 0 or at 1
    queries, level, block = torch.zeros(n, device=x.device), 0, -1  # block -1: all signs up
    radius[logits_of(model, x).argmax(1) != y] = 0

    def broken(rows, signs, reach):
        queries[rows] += 1
        images = (flat[rows] + reach[:, None] * signs).clamp(0, 1).view(-1, *x.shape[1:])
        return logits_of(model, images).argmax(1) != y[rows]
    while len(rows := ((queries < a.steps) & (radius > a.eps)).nonzero()[:, 0]):
        size = -(-pixels // 2 ** level)
        trial = sign[rows]
        if block >= 0:
            trial[:, block * size:(block + 1) * size] *= -1
        better = broken(rows, trial, radius[rows])
        rows, trial = rows[better], trial[better]
        sign[rows] = trial
        low, high = torch.zeros_like(radius[rows]), radius[rows]
        while len(rows) and (high - low).max() > 1e-3:
            middle = (low + high) / 2
            wrong = broken(rows, trial, middle)
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        radius[rows] = high
        block += 1
        if block * size >= pixels:
            level, block = level + 1 if size > 1 else level, 0
    return (flat + radius.clamp(max=a.eps)[:, None] * sign).clamp(0, 1).view_as(x)


def autoattack(model, x, y, a, labels):
    """AutoAttack, standard version (Croce and Hein 2020), by the published package; with few classes it takes as many
    targets as there are, and below four it leaves out APGD-T, whose loss compares four logits."""
    from pyautoattack import AutoAttack
    classes = logits_of(model, x[:1]).shape[1]
    adversary = AutoAttack(model, eps=a.eps, seed=a.seed, device=x.device)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, classes - 1)
    if classes < 4:
        adversary.attacks_to_run = ["apgd-ce", "fab-t", "square"]
    return adversary.run_standard_evaluation(x.contiguous(), y, batch_size=len(x))[0]


def minimal_l2(model, x, y, a, labels):
    """DeepFool or C&W in L2 by foolbox: the smallest perturbation found, x itself where none is."""
    from foolbox import PyTorchModel, attacks
    attack = attacks.L2DeepFoolAttack(steps=a.steps) if a.kind == "deepfool" else \
        attacks.L2CarliniWagnerAttack(steps=a.steps)
    x_adv = attack(PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=None)[0]
    model.zero_grad()  # foolbox leaves gradients behind
    fooled = (logits_of(model, x).argmax(1) == y) & (logits_of(model, x_adv).argmax(1) != y)
    return torch.where(fooled[:, None, None, None], x_adv, x)


def dra(model, x, y, a, labels):
    """DRA (algorithm 1 of its paper): steps of eps / T along the gradient divided by its mean magnitude, then all but
    the share p of values with the largest gradient is put back. eps bounds the mean change before this filter, nothing
    bounds the largest. The measurement stays as it is where dra_finetune.py's adversary is changed."""
    x_adv, alpha = x, common.per_image(a.eps, x) / a.steps
    with common.model_mode(model, "eval"):
        for _ in range(a.steps):
            grad, _ = common.input_gradient(model, x_adv, y)
            x_adv = x_adv + alpha * grad / grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
    size = grad.abs().flatten(1)
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept.scatter_(1, size.topk(round(a.p * size.shape[1]), dim=1).indices, True)
    return torch.where(kept.view_as(x), x_adv, x).clamp(0, 1)


class Kind(NamedTuple):
    """A row of the table of attacks."""
    run: Callable  # (model, x, y, attack, labels) -> perturbed images; labels: y, or None to take every step
    steps: int | None = 0  # 0: the name carries a number; None: it has none; else the number it may leave out
    restarts: bool = False
    step: bool = False  # has a step size of its own, PGD's
    norm: str = "linf"
    package: str = "torch"


ATTACKS = {
    "clean": Kind(lambda model, x, y, a, labels: x, steps=None, norm="none"),
    "noise": Kind(lambda model, x, y, a, labels: restarted(model, x, y, a.eps, 0.0, 1, a.restarts, labels),
                  steps=None, restarts=True),
    "fgsm": Kind(lambda model, x, y, a, labels: common.fgsm(model, x, y, a.eps), steps=None),
    "ifgsm": Kind(lambda model, x, y, a, labels: common.ifgsm(model, x, y, a.eps, a.steps, labels=labels)),
    "mi-fgsm": Kind(lambda model, x, y, a, labels: common.mi_fgsm(model, x, y, a.eps, a.steps, labels=labels)),
    "pgd": Kind(run_pgd, restarts=True, step=True),
    "pgd-cw": Kind(margin_attack, restarts=True, step=True),
    "cw": Kind(margin_attack, restarts=True, step=True),
    "un": Kind(margin_attack, restarts=True, step=True),
    "multi": Kind(multi_targeted, restarts=True, step=True),
    "targeted": Kind(random_targeted, restarts=True, step=True),
    "rays": Kind(rays),
    "dra": Kind(dra, norm="mean"),
    "aa": Kind(autoattack, steps=None, package="pyautoattack"),
    "deepfool": Kind(minimal_l2, steps=50, norm="l2", package="foolbox"),
    "cw-l2": Kind(minimal_l2, steps=1000, norm="l2", package="foolbox"),
    "corruptions": Kind(None, steps=None, norm="none"),
}
NORMALISED = " normalised"  # ends the name of an attack whose radius is in units of normalised images
ATTACK_NAMES = ("clean, noise, fgsm, ifgsm-STEPS, mi-fgsm-STEPS, pgd-STEPS, pgd-cw-STEPS (also un-, cw-), multi-STEPS, "
                "targeted-STEPS, rays-QUERIES, aa, dra-STEPS, deepfool, cw-l2, corruptions; xRESTARTS may follow those "
                "that start at random, :EPS any with a radius")


def parse_attacks(text, facts, eps, step=None, start="ball", seed=0, p=1 / 3, scale=1.0, mean_eps=None):
    """The attacks of a comma-separated list, each once; UsageError for a name that is none. facts: the data set's.

    IFGSM and MI-FGSM step by eps / steps. PGD's default step is the data set's usual one (0.01 at eps 0.3 on MNIST,
    2/255 at 8/255 on CIFAR) in proportion to eps, and at least 1.25 eps / steps so that few steps can leave the start;
    step: a number, or "eps/steps". start: "ball" or "step", of PGD with cross-entropy and of pgd-cw alone. p: of DRA,
    mean_eps: its eps, where it is not that of the others. scale: what radii and steps are multiplied by; other than 1,
    the attack's name says so.
    """
    attacks, dataset = [], facts["name"]
    for name in dict.fromkeys(word.strip() for word in text.split(",") if text):
        matches = (re.fullmatch(rf"({kind})(?:-([1-9]\d*))?(?:x([1-9]\d*))?(?::(.+))?", name) for kind in ATTACKS)
        kind, steps, restarts, radius = next(filter(None, matches), re.match("()()()()", "")).groups()
        spec = ATTACKS.get(kind)
        if not spec or bool(steps) > (spec.steps is not None) or (spec.steps == 0 and not steps) or \
                (restarts and not spec.restarts) or (radius and spec.norm not in ("linf", "mean")):
            raise common.UsageError(f"{name!r} is no attack: choose from {ATTACK_NAMES}")
        need(spec.package, name)
        if kind == "multi" and facts["classes"] > 20:
            raise common.UsageError(f"{name}: one attack for each of {facts['classes'] - 1} wrong classes is out of "
                                    "reach, un-STEPSxRESTARTS follows the strongest of them")
        if kind == "corruptions" and dataset not in CORRUPTED:
            raise common.UsageError(f"corruptions: there is no corrupted copy of {dataset}")
        steps = int(steps) if steps else spec.steps
        try:
            usual = dict(linf=eps, mean=mean_eps or eps).get(spec.norm)
            own = common.unit(radius) if radius else usual
        except Exception as error:
            raise common.UsageError(f"{name}: {error}")
        if spec.step:
            size = own / steps if step == "eps/steps" else \
                min(step, own) if step else max(facts["step"] * own / facts["eps"], 1.25 * own / steps)
        else:
            size = own / steps if kind in ("ifgsm", "mi-fgsm") else None
        if scale != 1 and own:
            name, own, size = name + NORMALISED, scale * own, scale * size if size else None
        attacks.append(Attack(name, kind, own, size, steps, int(restarts or 1), (
            start if kind in ("pgd", "pgd-cw") else "ball") if spec.restarts else None, seed,
            p if kind == "dra" else None))
    return attacks


def need(package, what):
    """UsageError where a package is not installed: before an hour of attacks, not after it."""
    if not importlib.util.find_spec(package):
        raise common.UsageError(f"{what} needs {package}: pip install {package}")


@torch.no_grad()
def logits_of(model, x):
    return model(x)


def load_test(facts, data_dir, limit, device, workers=0):
    """The test split, or a fixed random `limit` of it (the first test images of MNIST are easier than the rest); a
    smaller limit is a subset of a larger one."""
    whole = common.load_split(facts, data_dir, "test", device, workers)
    return whole.take(common.subset(len(whole.labels), limit or None))


def evaluate(model, test, attack, batch_size, precision="float32", images=None, stop=True, facts=None, save=None,
             keep=None):
    """Attack every image of a Split; float32 (N, 4): correct (0, 1), linf and l2 of the perturbation in [0, 1] units,
    cross-entropy. A row of NaN is not attacked yet.

    images: perturbed images made elsewhere (transfer), (restarts, N, C, H, W), instead of attacking. stop: broken
    samples are not attacked further. facts: what an interrupted run left, to go on with; save(facts) is called every
    half minute. keep: array (N, C, H, W) for the finished images. Random starts depend on seed, attack and batch alone.
    Predictions are read from the finished images, after a check that they lie in [0, 1] and in the ball.
    """
    facts = np.full((len(test.labels), 4), np.nan, np.float32) if facts is None else facts
    saved = time.monotonic()
    with common.model_mode(model, "eval"), common.autocast(test.labels.device, precision):
        for batch, (x, y, rows) in enumerate(common.eval_batches(test, batch_size, attack.name)):
            rows = rows.cpu()
            if not np.isnan(facts[rows]).any():
                continue
            common.seed_stream(attack.seed, attack.name, step=batch)
            if images is None:
                x_adv = ATTACKS[attack.kind].run(model, x, y, attack, y if stop else None)
            else:
                x_adv = images[0, rows].to(x)
                for other in images[1:]:  # what a restart broke stays broken
                    held = logits_of(model, x_adv).argmax(1) == y
                    x_adv[held] = other[rows].to(x)[held]
            facts[rows] = judge(model, x, y, x_adv, attack).cpu()
            if keep is not None:
                keep[rows] = x_adv.cpu()
            if save and time.monotonic() - saved > 30:
                save(facts)
                saved = time.monotonic()
    return facts


def judge(model, x, y, x_adv, attack):
    """The rows of `evaluate` for a batch; AssertionError where an attack left [0, 1] or its ball."""
    delta = (x_adv - x).flatten(1)
    linf, l2 = delta.abs().amax(1), delta.norm(dim=1)
    if not (x_adv.amin() >= 0 and x_adv.amax() <= 1):
        raise AssertionError(f"{attack.name} left [0, 1]")
    if ATTACKS[attack.kind].norm in ("linf", "none") and not linf.max() <= (attack.eps or 0) + 1e-6:
        raise AssertionError(f"{attack.name} left its ball: {linf.max()} is above {attack.eps}")
    logits = logits_of(model, x_adv)
    return torch.stack([(logits.argmax(1) == y).float(), linf, l2, common.cross_entropy(logits, y)], 1)


def load_array(path, mode=None):
    """An array of ours from a .npy file, mapped to memory where a mode is given."""
    try:
        return np.load(path, mmap_mode=mode)
    except Exception as error:
        raise common.UsageError(f"{path} is damaged ({type(error).__name__}): remove it")


def transfer_images(path, identity, surrogate, test, attack, batch_size):
    """A surrogate's adversarial images for a Split, (restarts, N, C, H, W) float32 on the CPU, judged by no one: all
    steps are taken. They depend on the surrogate alone, so they are made once and kept beside its checkpoint under its
    and the images' identity; what an interruption left in NAME.part.npy is not made again."""
    key = fingerprint(dict(attack._asdict(), **identity, batch_size=batch_size))
    kept = Path(path).with_suffix(f".{attack.name.replace('/', '_')}-{key}.npy")
    part = kept.with_suffix(".part.npy")
    if not kept.exists():
        if not part.exists():
            todo = np.full((attack.restarts, *test.images.shape), np.nan, np.float32)
            common.write_beside(part, lambda file: np.save(file, todo))
        images = load_array(part, "r+")
        for restart in range(attack.restarts):
            for batch, (x, y, rows) in enumerate(common.eval_batches(test, batch_size, f"{attack.name} on {path}")):
                rows = rows.cpu().numpy()
                if np.isnan(images[restart, rows]).any():
                    common.seed_stream(attack.seed, attack.name, restart, batch)
                    once = attack._replace(restarts=1)
                    images[restart, rows] = ATTACKS[attack.kind].run(surrogate, x, y, once, None).cpu()
                    images.flush()
        common.write_beside(kept, lambda file: np.save(file, images))
        part.unlink(missing_ok=True)
    return torch.from_numpy(load_array(kept))


CORRUPTED = {"cifar10": ("CIFAR-10-C", "https://zenodo.org/records/2535967"),
             "cifar100": ("CIFAR-100-C", "https://zenodo.org/records/3555552")}


def corruption_paths(dataset, data_dir):
    """The files TYPE.npy of the corrupted test images; UsageError with their address where they are not at hand."""
    name, address = CORRUPTED[dataset]
    folder = Path(data_dir) / name
    paths = sorted(path for path in folder.glob("*.npy") if path.stem != "labels")
    if not paths:
        raise common.UsageError(f"{folder} holds no TYPE.npy: unpack the archive from {address} there")
    return paths


def corruptions(model, paths, test, batch_size):
    """{type: accuracy over its five severities} of Hendrycks and Dietterich's corrupted images (2019), at the test
    images of a Split; paths: of `corruption_paths`."""
    table = {}
    for path in paths:
        try:
            arrays = np.load(path, mmap_mode="r")  # (severities * images, H, W, C)
        except Exception as error:
            raise common.UsageError(f"{path} cannot be read ({type(error).__name__}): unpack it anew")
        whole, rows, right = len(arrays) // 5, test.index.cpu().numpy(), []
        for severity in range(5):
            images = torch.from_numpy(arrays[severity * whole + rows].transpose(0, 3, 1, 2).copy()).to(test.images)
            right.append(common.accuracy(model, test._replace(images=images), batch_size))
        table[path.stem] = float(np.mean(right))
    return table


# -------------------------------------------------------------------------------------------------------- measures

RADII, STEPS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3), (1, 2, 5, 10, 20, 50, 100, 200)


def curves(model, test, facts, eps, batch_size, seed):
    """Accuracy and mean loss of FGSM and PGD-40 as eps grows (SAT-Rx figs. 5, 8, 9), accuracy of PGD as its steps do
    (fig. 7), without stopping at the first success; accuracy under random noise."""
    def run(name, radius):
        attack, = parse_attacks(name, facts, radius, seed=seed)
        found = evaluate(model, test, attack, batch_size, stop=attack.kind == "noise")
        return found[:, [0, 3]].mean(0).tolist()
    radii = sorted({min(1.0, factor * eps) for factor in RADII} | {1.0})
    table = {name: [run("clean", eps), *(run(name, radius) for radius in radii)] for name in ("fgsm", "pgd-40")}
    return dict(table, radii=[0, *radii], at_eps=1 + radii.index(min(1.0, eps)), noise=run("noisex100", eps)[0],
                steps=[run(f"pgd-{steps}", eps)[0] for steps in STEPS], n=len(test.labels))


def dead_gradients(model, test, batch_size):
    """The share of images whose input gradient of the cross-entropy is zero or not finite: attacks are blind there."""
    dead = 0
    with common.model_mode(model, "eval"):
        for x, y, _ in common.eval_batches(test, batch_size):
            size = common.input_gradient(model, x, y)[0].abs().sum((1, 2, 3))
            dead += ((size == 0) | ~size.isfinite()).sum().item()
    return dead / len(test.labels)


def sanity(curve, dead, classes, eps, outcomes):
    """[(passed, finding)]: the tests of Carlini et al. (2019) and of SAT-Rx, sections 4.2 and 5.4 to 5.5."""
    fgsm, pgd = ([accuracy for accuracy, _ in curve[name]] for name in ("fgsm", "pgd-40"))
    here, percent = curve["at_eps"], lambda values: ", ".join(f"{100 * value:.1f}" for value in values)
    gap, rises = fgsm[here] - pgd[here], [max(np.diff(series), default=0) for series in (fgsm, pgd)]
    falls = [min(np.diff([loss for _, loss in curve[name][:here + 1]])) for name in ("fgsm", "pgd-40")]
    tests = [
        (gap > -0.02, f"iterative beats single-step: FGSM {percent([fgsm[here]])}, PGD-40 {percent([pgd[here]])} %"),
        (gap < 0.2, f"FGSM finds most of what PGD finds: {100 * gap:.1f} points between them"),
        (max(rises) < 0.02, f"accuracy never rises with eps: FGSM {percent(fgsm)}, PGD-40 {percent(pgd)} %"),
        (min(falls) > -0.1, f"nor does the loss fall up to eps: by at most {-min(0, *falls):.2f} for FGSM or PGD-40"),
        (pgd[-1] <= 1 / classes, f"at eps 1 no more than chance is left: {percent(pgd[-1:])} % under PGD-40"),
        (curve["steps"][-2] - curve["steps"][-1] < 0.02, f"more steps saturate: PGD-{', '.join(map(str, STEPS))}: "
         f"{percent(curve['steps'])} %"),
        (dead < 0.01, f"gradients live: {100 * dead:.2f} % of them are zero or not finite"),
        (curve["noise"] >= pgd[here], f"random noise is weaker: {percent([curve['noise']])} % in 100 tries")]
    outcomes = [o for o in outcomes if o["eps"] == eps]
    white = [o for o in outcomes if "surrogate_sha256" not in o and o["kind"] not in ("rays", "noise", "dra")]
    strongest = min(white, key=lambda o: o["accuracy"], default=None)

    def weaker(one, other):  # by more than chance allows on the smaller number of images
        return one["accuracy"] > other["accuracy"] + max(0.02, 1 / min(one["n"], other["n"]) ** 0.5)
    for outcome in (o for o in outcomes if "surrogate_sha256" in o and white):
        one = next((o for o in white if o["attack"] == outcome["attack"].split("@")[0]), strongest)
        tests.append((not weaker(one, outcome), "white-box beats black-box: "
                      f"{one['attack']} {percent([one['accuracy']])}, {outcome['attack']} "
                      f"{percent([outcome['accuracy']])} %"))
    for outcome in (o for o in outcomes if o["kind"] == "rays" and white):
        tests.append((not weaker(strongest, outcome), "gradients beat labels alone: "
                      f"{strongest['attack']} {percent([strongest['accuracy']])} %, {outcome['attack']} "
                      f"{percent([outcome['accuracy']])} %"))
    tests += [(False, f"AutoAttack: {note}") for outcome in outcomes for note in outcome.get("warnings", [])]
    return tests


def alignment(model, test, batch_size):
    """float32 (N, 3): alignment, binarised alignment and linearised robustness of the saliency paper (eqs. 4, 7, 6),
    in units of the L2 norm of an image in [0, 1]; of a standardised image where the model standardises each: its logits
    ignore an image's scale, and no gradient with respect to the image itself has a part along it."""
    rows, outside = [], model.normalize != "image"
    for x, _, _ in common.eval_batches(test, batch_size, "alignment"):
        x = x if outside else model.normalized(x)
        with common.model_mode(model, "eval"):
            logits = model(x.requires_grad_(True), normalize=outside)
            jacobian = torch.stack([torch.autograd.grad(z.sum(), x, retain_graph=True)[0].flatten(1)
                                    for z in logits.unbind(1)], 1)  # (N, classes, pixels)
        x, logits, each = x.detach().flatten(1), logits.detach(), torch.arange(len(x), device=x.device)
        top = logits.argmax(1)
        saliency, difference = jacobian[each, top], jacobian[each, top][:, None] - jacobian
        distance = (logits[each, top][:, None] - logits) / difference.norm(dim=2).clamp(min=1e-12)
        distance[each, top] = np.inf
        robustness, second = distance.min(1)
        nearest = difference[each, second]
        alpha, binarised = ((x * g).sum(1).abs() / g.norm(dim=1).clamp(min=1e-12) for g in (saliency, nearest))
        rows.append(torch.stack([alpha, binarised, robustness], 1).cpu())
    return torch.cat(rows).numpy()


# ----------------------------------------------------------------------------------------------------------- plots

class Scene(NamedTuple):
    """What the figures show."""
    model: torch.nn.Module
    checkpoint: dict
    test: common.Split
    curve: dict  # of `curves`
    eps: float
    seed: int
    data_dir: str


def plots(directory, scene):
    """Write the figures as PNG files; returns their paths."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    paths = []
    for draw in (draw_curves, draw_surface, draw_images, draw_dra, draw_training, draw_eps):
        if figure := draw(plt, scene):
            paths.append(Path(directory) / f"{draw.__name__[5:]}.png")
            common.write_beside(paths[-1], lambda file: figure.savefig(file, dpi=130, format="png"))
            plt.close(figure)
    return paths


def draw_curves(plt, scene):
    """Accuracy against PGD's steps and against eps, loss against eps (SAT-Rx figs. 5, 7, 8, 9; IAAT fig. 4)."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    left.semilogx(STEPS, [100 * value for value in scene.curve["steps"]], "o-")
    left.set(xlabel=f"steps of PGD, eps {scene.eps:.3g}", ylabel="accuracy (%)", ylim=(0, 100))
    for name, style in (("fgsm", "s--"), ("pgd-40", "o-")):
        accuracy, loss = zip(*scene.curve[name])
        middle.plot(scene.curve["radii"], [100 * value for value in accuracy], style, label=name.upper())
        right.plot(scene.curve["radii"], loss, style, label=name.upper())
    middle.axvline(scene.eps, color="grey", linewidth=0.8)
    middle.set(xlabel="eps (images in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    right.set(xlabel="eps (images in [0, 1])", ylabel="mean cross-entropy", yscale="log")
    middle.legend(), right.legend()
    flags = scene.checkpoint["args"]
    method = next((f" {flags[name]}" for name in ("method", "loss", "strategy") if name in flags), "")
    who = "{script}{method}, {model} on {dataset}".format(method=method, **scene.checkpoint)
    figure.suptitle(f"{who}, {scene.curve['n']} images", fontsize=10)
    return figure


def draw_surface(plt, scene):
    """Loss around three images, along the gradient's sign and a random sign (SAT-Rx figs. 3, 4, 10)."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    common.seed_stream(scene.seed, "surface")
    model, eps, (x, y, _) = scene.model, scene.eps, next(common.eval_batches(scene.test, 3))
    grid = torch.linspace(-2 * eps, 2 * eps, 41, device=x.device)
    ticks = grid.cpu().numpy()
    with common.model_mode(model, "eval"):
        along = common.input_gradient(model, x, y)[0].sign()
        across = torch.randn_like(x).sign()
        for ax, image, label, first, second in zip(axes, x, y, along, across):
            moved = image + grid[:, None, None, None, None] * second + grid[:, None, None, None] * first
            labels = label.expand(len(grid))
            loss = torch.stack([common.cross_entropy(logits_of(model, row.clamp(0, 1)), labels) for row in moved])
            shown = ax.contourf(ticks, ticks, loss.cpu().numpy(), 30, cmap="viridis")
            ax.set(xlabel="along the gradient's sign", ylabel="along a random sign", title=f"class {label}")
            ax.plot([-eps, 0, eps, 0, -eps], [0, eps, 0, -eps, 0], "w--", linewidth=0.8)  # the eps-ball in this plane
            figure.colorbar(shown, ax=ax, label="cross-entropy")
    return figure


def show(ax, image):
    """An image (C, H, W) in [0, 1], grey or coloured, without ticks."""
    ax.imshow(image.clamp(0, 1).permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def draw_images(plt, scene):
    """Clean and PGD-40 images, their difference, and the saliency, the gradient of the true class's logit (after figs.
    4 and 6 of the saliency paper and fig. 3 of DRA's)."""
    model, eps, (x, y, _) = scene.model, scene.eps, next(common.eval_batches(scene.test, 8))
    attack, = parse_attacks("pgd-40", common.checkpoint_facts(scene.checkpoint), eps)
    common.seed_stream(scene.seed, "images")
    with common.model_mode(model, "eval"):
        x_adv = run_pgd(model, x, y, attack, y)
        gradient = common.input_gradient(model, x, y, loss=lambda logits, y: logits.gather(1, y[:, None]))[0]
        names = [logits_of(model, images).argmax(1).tolist() for images in (x, x_adv)]
    size = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    rows = dict(clean=x, adversarial=x_adv, difference=0.5 + (x_adv - x) / (2 * eps),
                saliency=0.5 + gradient / (2 * size))
    figure, axes = plt.subplots(4, len(x), figsize=(1.25 * len(x), 5.6), layout="constrained", squeeze=False)
    for line, (row, images) in zip(axes, rows.items()):
        for column, (ax, image) in enumerate(zip(line, images)):
            show(ax, image)
            if row in ("clean", "adversarial"):
                ax.set_title(f"{names[row != 'clean'][column]} (true {y[column]})", fontsize=8)
        line[0].set_ylabel(row)
    return figure


def draw_dra(plt, scene):
    """Success of DRA-5 against the share p of values that it changes, at an eighth and a quarter of the data set's
    usual eps: 1/255 and 2/255 on CIFAR (fig. 4)."""
    figure, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    shares = [0, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1]
    facts = common.checkpoint_facts(scene.checkpoint)
    for eps in (facts["eps"] / 8, facts["eps"] / 4):
        attacks = [parse_attacks("dra-5", facts, eps, p=p)[0] for p in shares]
        right = [evaluate(scene.model, scene.test, attack, 250)[:, 0].mean() for attack in attacks]
        ax.plot(shares, [100 * (1 - value) for value in right], "o-", label=f"DRA-5, eps {255 * eps:.3g}/255")
    ax.set(xlabel="share p of the values changed", ylabel="misclassified (%)", ylim=(0, 100))
    ax.legend()
    return figure


def draw_training(plt, scene):
    """The history's training terms and validation accuracies by epoch; None where there is no history."""
    history = scene.checkpoint["history"]
    if not history:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, prefix, label in zip(axes, ("train/", "val/"), ("training terms", "validation accuracy (%)")):
        for name in (name for name in history[-1] if name.startswith(prefix)):
            values = [row.get(name, np.nan) for row in history]
            if prefix == "train/" or max(values) <= 1 and "jacobian" not in name:
                scale = 1 if prefix == "train/" else 100
                ax.plot([row["epoch"] for row in history], [scale * v for v in values], label=name[len(prefix):])
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8) if ax.lines else ax.set_axis_off()
    return figure


def draw_eps(plt, scene):
    """IAAT: histograms of the images' eps as training goes, its mean and three images' over epochs, and the training
    images of the lowest and highest eps after the last, clean and under PGD-40 at 16/255, or at the eps of evaluation
    where it is larger (IAAT figs. 2, 5, 7, 8)."""
    state, history = scene.checkpoint.get("method_state") or {}, scene.checkpoint["history"]
    if not state.get("snapshots"):
        return None
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2])
    (left, right), panels = above.subplots(1, 2), below.subplots(4, 10)
    own = scene.checkpoint["args"]
    facts = common.checkpoint_facts(scene.checkpoint)
    train, _ = common.load_train(facts, scene.data_dir, own["val"], own["limit"], scene.test.labels.device)
    used = train.index.cpu()

    def eps_of(memory):  # what was used of it, of 255
        return 255 * memory.cpu()[used].clamp(min=own["eps_min"])
    memory = eps_of(state["memory"])
    low, high = memory.min().item(), memory.max().item()
    edges = np.linspace(low, max(high, low + 1), 40)
    for epoch in list(state["snapshots"])[1::2]:
        left.hist(eps_of(state["snapshots"][epoch]).numpy(), edges, histtype="step", label=f"epoch {epoch}")
    for name in (name for name in history[-1] if name == "eps/mean" or name.startswith("eps/image")):
        right.plot([row["epoch"] for row in history], [row[name] for row in history], label=name[4:].replace("_", " "))
    left.set(xlabel="eps (of 255)", ylabel="training images")
    right.set(xlabel="epoch", ylabel="eps (of 255)")
    left.legend(fontsize=7), right.legend(fontsize=7)
    draw_extremes(panels, scene, train, memory)
    return figure


def draw_extremes(panels, scene, train, memory):
    """The ten training images of the lowest and of the highest eps, clean and attacked; memory: eps of 255, (N,)."""
    order = memory.argsort()
    attack, = parse_attacks("pgd-40", common.checkpoint_facts(scene.checkpoint), max(16 / 255, scene.eps))
    common.seed_stream(scene.seed, "eps")
    for line, (name, rows) in enumerate({"lowest": order[:10], "highest": order[-10:]}.items()):
        x, y = next(common.read(train, [rows])), train.labels[rows]
        with common.model_mode(scene.model, "eval"):
            x_adv = run_pgd(scene.model, x, y, attack, None)
            wrong = logits_of(scene.model, x_adv).argmax(1)
        for column in range(len(rows)):
            for row, image in enumerate((x[column], x_adv[column])):
                ax = panels[2 * line + row, column]
                show(ax, image)
                ax.set_title(f"as {wrong[column]}" if row else f"{y[column]}: {memory[rows[column]]:.1f}", fontsize=8)
                if not column:
                    ax.set_ylabel(f"PGD {attack.eps:.2g}" if row else f"{name} eps", fontsize=8)


# ---------------------------------------------------------------------------------------------------------- record

def weights_sha256(state_dict):
    """sha256 over names and values: the identity of a network in everything that is measured of it."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode() + state_dict[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def images_sha256(test):
    """sha256 over the images of a Split, or their files' names and classes, and its labels."""
    images = test.images.cpu().numpy().tobytes() if torch.is_tensor(test.images) else b"\n".join(
        b"/".join(path.split(os.fsencode(os.sep))[-2:]) for path in test.images.paths)
    return hashlib.sha256(images + test.labels.cpu().numpy().tobytes()).hexdigest()


def fingerprint(settings):
    """16 hex digits that stand for a dictionary of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    common.write_beside(path, lambda file: file.write(text.encode()))


def stem_of(path):
    """What the names of a checkpoint's other files begin with: a.pt and a.pth do not share them."""
    return str(path).removesuffix(".pt")


class Record:
    """run.eval.json and run.eval.npz: outcomes and per-sample facts (see `evaluate`) of a checkpoint's present networks
    alone. An attack that was interrupted has facts, and seconds, but no outcome."""

    def __init__(self, path, shas):
        self.json_path, self.npz_path = (Path(f"{stem_of(path)}.eval.{end}") for end in ("json", "npz"))
        self.path, self.shas, self.stamp = Path(path), list(shas), Path(path).stat().st_mtime_ns
        self.read()

    def read(self):
        """What is on disk of these networks; another evaluation of the same checkpoint may have added to it. Where the
        checkpoint has been replaced since, what is there of the new networks stays, too."""
        self.outcomes, self.facts = [], {}
        replaced = not self.path.exists() or self.path.stat().st_mtime_ns != self.stamp
        marks = [sha[:8] for sha in self.shas]
        try:
            if self.json_path.exists():
                self.outcomes = [o for o in json.loads(self.json_path.read_text()) if "key" in o and (
                    replaced or o["weights_sha256"] in self.shas)]
            if self.npz_path.exists():
                with np.load(self.npz_path) as arrays:
                    self.facts = {k: arrays[k] for k in arrays.files if replaced or k.split("-")[0] in marks}
        except Exception as error:
            raise common.UsageError(f"{self.json_path} or its .npz is damaged ({type(error).__name__}): remove both")

    def key(self, settings):
        """Begins with the weights' mark, by which `read` knows whose facts they are."""
        return f"{settings['weights_sha256'][:8]}-{fingerprint(settings)}"

    def find(self, settings):
        """(outcome or None, facts or None, seconds spent, warnings so far) of these settings."""
        key = self.key(settings)
        outcome, facts = next((o for o in self.outcomes if o["key"] == key), None), self.facts.get(key)
        complete = facts is not None and not np.isnan(facts).any()
        seconds, warnings = float(self.facts.get(f"{key}-seconds", 0)), self.facts.get(f"{key}-warnings", ())
        return outcome if complete else None, facts, seconds, [str(text) for text in warnings]

    def save(self, settings, facts, seconds, warnings, measured=None):
        """Keep an attack's facts so far, or with `measured` its outcome, replacing that of the same settings."""
        key = self.key(settings)
        with open(self.npz_path.with_suffix(".lock"), "w") as lock:
            if common.fcntl:
                common.fcntl.flock(lock, common.fcntl.LOCK_EX)
            self.read()
            self.facts |= {key: facts, f"{key}-seconds": np.float64(seconds)}
            self.facts[f"{key}-warnings"] = np.array(warnings, str)
            common.write_beside(self.npz_path, lambda file: np.savez_compressed(file, **self.facts))
            outcome = [dict(settings, **measured, warnings=warnings, key=key)] if measured else []
            self.outcomes = [o for o in self.outcomes if o["key"] != key] + outcome
            write_json(self.json_path, self.outcomes)
            return outcome[0] if outcome else None


def results(checkpoint, outcomes, device):
    """The content of results/NAME.json: the outcomes, and how the network came to be."""
    history = checkpoint["history"]
    return dict(script=checkpoint["script"], model=checkpoint["model"], dataset=checkpoint["dataset"],
                args=checkpoint["args"], best_epoch=checkpoint["best"]["epoch"], training=checkpoint["provenance"],
                training_minutes=round(sum(row["seconds"] for row in history) / 60, 1),
                evaluation=common.provenance(device), outcomes=outcomes, history=history)


def export(path, checkpoint, weights):
    """A float16 checkpoint of one set of weights, under `best`; evaluate.py reads it like any other."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint[weights]["state_dict"].items()}
    best = dict(checkpoint[weights], metric=checkpoint[weights].get("metric"), state_dict=half)
    common.write_beside(path, lambda file: torch.save(dict(checkpoint, best=best, last=None, method_state=None), file))


def open_checkpoint(args, device):
    """(Classifier, checkpoint dictionary) of a run's file or of somebody else's bare state_dict."""
    content = common.load_file(args.ckpt)
    if isinstance(content, dict) and "format" not in content:  # the usual wrappers of a state_dict
        content = next((content[key] for key in ("state_dict", "model_state_dict") if key in content), content)
    if not (isinstance(content, dict) and content and all(torch.is_tensor(value) for value in content.values())):
        model, checkpoint = common.load_model(args.ckpt, args.weights, device, architecture=args.model)
        if args.model and ".py:" not in checkpoint["model"] and args.model != checkpoint["model"]:
            raise common.UsageError(f"{args.ckpt}: its network is {checkpoint['model']}, not {args.model}")
        if args.dataset not in (None, checkpoint["dataset"]):
            raise common.UsageError(f"{args.ckpt}: was trained on {checkpoint['dataset']}, not on {args.dataset}")
        return model, checkpoint
    if not (args.model and args.dataset):
        raise common.UsageError(f"{args.ckpt} is a bare state_dict: --model and --dataset say what it belongs to")
    if args.weights == "last":
        raise common.UsageError(f"{args.ckpt} is a bare state_dict: it holds no last weights")
    facts = common.dataset_facts(args.dataset, args.data_dir)
    model = common.build_model(args.model, facts, args.normalize, device).eval()
    common.load_weights(model, content, args.ckpt)
    return model, dict(format=common.FORMAT, script="state_dict", model=args.model, dataset=args.dataset,
                       num_classes=facts["classes"], input_shape=facts["shape"], mean=facts["mean"], std=facts["std"],
                       normalize=args.normalize, args=dict(eps=facts["eps"]), provenance=None, history=[],
                       best=dict(epoch=None, state_dict=model.net.state_dict()), last=None)


def trained_eps(checkpoint, normalized):
    """(the L-infinity radius that training aimed at, of DRA PGD's, the eps of its DRA or None): in [0, 1] units, or in
    those of normalised images where --normalized-eps asks for it."""
    args, scale = checkpoint["args"], common.pixel_scale(common.checkpoint_facts(checkpoint))
    factor = scale ** (bool(args.get("normalized_eps")) - bool(normalized))
    return factor * args.get("pgd_eps", args["eps"]), factor * args["eps"] if args.get("adversary") == "dra" else None


# ---------------------------------------------------------------------------------------------------------- report

COLUMNS = {"attack": 20, "accuracy": 9, "n": 6, "eps": 8, "step": 8, "steps": 6, "restarts": 9, "start": 6, "seed": 5,
           "largest": 8, "seconds": 8}


def plan(args, facts, eps, mean_eps, device):
    """What is to be run: [(Attack, surrogate's path or None, number of test images, 0: all)]. mean_eps: of dra."""
    dataset = facts["name"]
    if args.protocol and dataset not in PROTOCOLS[args.protocol]:
        raise common.UsageError(f"--protocol {args.protocol} has no columns for {dataset}")
    chosen = PLAN | (PROTOCOLS[args.protocol][dataset] if args.protocol else QUICK_LOOK)
    chosen["transfer"] = chosen["transfer"] or QUICK_LOOK["transfer"]
    chosen |= {name: getattr(args, name) for name in QUICK_LOOK if getattr(args, name) is not None}
    if args.protocol and facts["classes"] > 20 and ",multi-" in chosen["attacks"]:
        chosen["attacks"] = re.sub(r",multi-\d+x\d+", "", chosen["attacks"])
        print(f"no multi-targeted attack: {dataset} has too many wrong classes")
    scale = common.pixel_scale(facts) if args.normalized_eps else 1.0
    budget = facts, eps, args.step_size or chosen["step"], chosen["start"], args.seed, args.p, scale, mean_eps
    todo = [(attack, None) for attack in parse_attacks(chosen["attacks"], *budget)]
    todo += [(attack, path) for path in args.surrogate for attack in parse_attacks(chosen["transfer"], *budget)]
    few = {name: sizes[device.type == "cpu"] for name, sizes in chosen["few"].items()}
    sizes = ([n for n in (chosen["limit"], few.get(attack.name.removesuffix(NORMALISED))) if n] for attack, _ in todo)
    return [(attack, path, min(size, default=0)) for (attack, path), size in zip(todo, sizes)]


def print_outcome(outcome, header):
    """One aligned line, accuracy in %; the first comes with the names of the columns."""
    if header:
        print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    shown = dict(outcome, accuracy=f"{100 * outcome['accuracy']:.2f}", seconds=f"{outcome['seconds']:.1f}")
    cells = {name: f"{shown[name]:.4f}" if isinstance(shown[name], float) else shown[name] for name in COLUMNS}
    cells = {name: "-" if cell is None else cell for name, cell in cells.items()}
    more = f"   mean L2 of what fools: {outcome['mean_l2']:.4f}" if outcome.get("mean_l2") else ""
    print(" ".join(f"{cells[name]:>{width}}" for name, width in COLUMNS.items()) + more, flush=True)
    for name, accuracy in outcome.get("types", {}).items():
        print(f"{name:>20} {100 * accuracy:9.2f}")


def print_protocol(protocol, dataset, outcomes):
    """The paper's rows and ours, in the paper's columns; a column that was not run stays a dash."""
    try:
        table = json.loads((Path(__file__).parent / "results" / "papers.json").read_text())[protocol][dataset]
    except (OSError, KeyError):
        return print(f"the rows of the paper are not at hand (results/papers.json has none for {protocol}, {dataset})")
    strongest_last = sorted(outcomes, key=lambda o: -o["accuracy"])  # of several surrogates
    ours = {re.sub("@.*", "@surrogate", o["attack"]): o for o in strongest_last} | {o["attack"]: o for o in outcomes}
    ours = {name.replace(NORMALISED, ""): o for name, o in ours.items()}
    ours = [ours.get(column) for column in table["columns"]]
    rows = dict(table["rows"], **{"this network": [o and 100 * o["accuracy"] for o in ours], "its n": [
        o and str(o["n"]) for o in ours]})
    print(f"\n{table['table']} of the paper ({protocol}, {dataset}, eps {table['eps']}), accuracy in %. This network's "
          f"eps: {max(o['eps'] or 0 for o in outcomes):.4g}; its white-box attacks may succeed at any step." + (
              any(NORMALISED in o["attack"] for o in outcomes) * " Its radii are in units of normalised images."))
    name = max(map(len, rows)) + 2
    print(f"{'':<{name}}" + "".join(f"{column:>{len(column) + 2}}" for column in table["columns"]))
    for label, row in rows.items():
        cells = ("-" if value is None else value if isinstance(value, str) else f"{value:.2f}" for value in row)
        print(f"{label:<{name}}" + "".join(f"{cell:>{len(c) + 2}}" for cell, c in zip(cells, table["columns"])))


def print_more(args, model, test, checkpoint, eps, outcomes):
    """The sanity tests, alignment and plots, where asked for; returns name -> number and the figures' paths."""
    numbers, paths, curve = dict(dead_gradients=dead_gradients(model, test, args.batch_size)), [], None
    print(f"images with a zero or non-finite gradient: {100 * numbers['dead_gradients']:.2f} %")
    if args.sanity or args.plots:
        curve = curves(model, test, common.checkpoint_facts(checkpoint), eps, args.batch_size, args.seed)
    if args.sanity:
        classes = checkpoint["num_classes"]
        tests = sanity(curve, numbers["dead_gradients"], classes, eps, outcomes)
        print(f"\nsanity, {len(test.labels)} images:")
        for passed, finding in tests:
            print(f"  {'passed' if passed else 'FAILED'}  {finding}")
        numbers["sanity_failures"] = failed = sum(not passed for passed, _ in tests)
        print("verdict: " + (f"masked gradients or a broken attack, {failed} of {len(tests)} tests fail" if failed else
                             f"no sign of masked gradients in {len(tests)} tests"))
    if args.alignment:
        alpha, binarised, robustness = alignment(model, test, args.batch_size).mean(0).tolist()
        print(f"mean alignment {alpha:.4f} (eq. 4), binarised {binarised:.4f} (eq. 7), linearised robustness "
              f"{robustness:.4f} (eq. 6) of {len(test.labels)} images")
        numbers |= dict(alignment=alpha, binarised_alignment=binarised, linearised_robustness=robustness)
    if args.plots:
        paths = plots(args.plots, Scene(model, checkpoint, test, curve, eps, args.seed, args.data_dir))
        print("figures:", *paths)
    return numbers, paths


def alike(text):
    """What warnings that differ in numbers alone have in common."""
    return re.sub(r"[\d.]+", "#", text)


class Notes(logging.Handler):
    """Collects what AutoAttack warns of: randomised outputs, zero gradients. Texts that differ in numbers are one."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = {}
        logging.getLogger("auto-attack").addHandler(self)

    def begin(self, texts):
        """Forget all but `texts`, which an interrupted attack left."""
        self.texts = {alike(text): text for text in texts}

    def emit(self, record):
        text = record.getMessage().split(" See ")[0]
        if text.startswith("Square Attack has decreased"):  # its threshold is for a whole test set, not for a batch
            return
        self.texts.setdefault(alike(text), text)


def measure(model, attack, test, images, corrupted, settings, args, record, notes):
    """One attack, or what is on record of it: (outcome, facts of `evaluate`, its images with --save-adv). It is saved
    as it goes, and goes on. images: makes those of a transfer attack; corrupted: the files of `corruptions`.
    """
    anew, keep = args.overwrite or args.save_adv, None
    outcome, facts, spent, warnings = (None, None, 0, []) if anew else record.find(settings)
    if outcome:
        return outcome, facts, keep
    notes.begin(warnings)
    started = time.perf_counter() - spent

    def save(facts, measured=None):
        return record.save(settings, facts, time.perf_counter() - started, list(notes.texts.values()), measured)
    if attack.kind == "corruptions":
        types = corruptions(model, corrupted, test, args.batch_size)
        measured = dict(accuracy=float(np.mean(list(types.values()))), largest=None, types=types)
        facts = np.empty((0, 4))
    else:
        keep = np.empty(test.images.shape, np.float32) if args.save_adv else None
        facts = evaluate(model, test, attack, args.batch_size, args.precision, images and images(), facts=facts,
                         save=save, keep=keep)
        measured = dict(accuracy=float((facts[:, 0] == 1).mean()), largest=float(facts[:, 1].max()))
        if ATTACKS[attack.kind].norm == "l2":  # of the images it fools; not those that were misclassified before
            fooled = (facts[:, 0] == 0) & (facts[:, 2] > 0)
            measured["mean_l2"] = float(facts[fooled, 2].mean()) if fooled.any() else None
    return save(facts, dict(measured, seconds=round(time.perf_counter() - started, 2))), facts, keep


def main():
    args = parse()
    device, args.precision = common.set_up(args.device, args.precision)
    model, checkpoint = open_checkpoint(args, device)
    if args.export:
        export(args.export, checkpoint, args.weights)
        return print(f"{args.export}: the {args.weights} weights of {args.ckpt} in float16")
    dataset = checkpoint["dataset"]
    facts = common.checkpoint_facts(checkpoint)
    own, mean_eps = trained_eps(checkpoint, args.normalized_eps)
    eps, mean_eps = args.eps or (facts["eps"] if args.protocol else own), args.eps or mean_eps
    args.p = checkpoint["args"].get("p", 1 / 3) if args.p is None else args.p
    if args.alignment and facts["classes"] > 100:
        raise common.UsageError(f"--alignment takes every logit's gradient: {dataset} has too many classes")
    todo = plan(args, facts, eps, mean_eps, device)
    eps *= common.pixel_scale(facts) if args.normalized_eps else 1  # from here on in [0, 1] units
    corrupted = corruption_paths(dataset, args.data_dir) if any(a.kind == "corruptions" for a, _, _ in todo) else []
    surrogates = {path: common.load_model(path, device=device, facts=facts) for path in args.surrogate}
    names = {path: source["model"] for path, (_, source) in surrogates.items()}
    if len(set(names.values())) < len(names):
        names = {path: stem_of(path) for path in names}
    identities = {path: dict(sha=weights_sha256(source["best"]["state_dict"]), model=source["model"],
                             normalize=source["normalize"]) for path, (_, source) in surrogates.items()}
    tests = {n: load_test(facts, args.data_dir, n, device, args.workers) for n in {n for _, _, n in todo}}
    few = min(args.limit or 1000, 500 if device.type == "cpu" else 1000)
    pixels = {n: images_sha256(test) for n, test in tests.items()}
    network = dict(dataset=dataset, model=args.model or checkpoint["model"], normalize=checkpoint["normalize"])
    if ".py:" in network["model"]:
        code = Path(network["model"].rpartition(":")[0]).read_bytes()
        network["model_sha256"] = hashlib.sha256(code).hexdigest()

    shas = {w: weights_sha256(checkpoint[w]["state_dict"]) for w in ("best", "last") if checkpoint[w]}
    record, notes, outcomes, flags, adversarial = Record(args.ckpt, shas.values()), Notes(), [], [], {}
    print(f"{args.ckpt}: {checkpoint['script']}, {checkpoint['model']} on {dataset}, {args.weights} weights of epoch "
          f"{checkpoint[args.weights]['epoch']}; {args.precision}")
    for attack, path, n in todo:
        test, images = tests[n], None
        settings = dict(attack=attack.name) | {k: v for k, v in attack._asdict().items() if k != "name"}
        settings |= dict(n=len(test.labels), precision=args.precision, batch_size=args.batch_size, weights=args.weights,
                         weights_sha256=shas[args.weights], images_sha256=pixels[n], **network)
        if attack.kind == "corruptions":
            settings["files"] = [file.stem for file in corrupted]
        if path:
            settings |= dict(attack=f"{attack.name}@{names[path]}", surrogate_sha256=identities[path]["sha"])
            images = functools.partial(transfer_images, path, dict(identities[path], images=pixels[n]),
                                       surrogates[path][0], test, attack, args.batch_size)
        outcome, found, keep = measure(model, attack, test, images, corrupted, settings, args, record, notes)
        if keep is not None:
            arrays = dict(images=keep, index=test.index.cpu().numpy(), labels=test.labels.cpu().numpy())
            adversarial |= {f"{settings['attack']}/{name}": array for name, array in arrays.items()}
        outcomes.append(outcome)
        print_outcome(outcome, header=len(outcomes) == 1)
        if len(found) and attack.eps in (None, eps) and ATTACKS[attack.kind].norm in ("linf", "none"):
            flags.append((test.index.cpu().numpy(), found[:, 0] == 1))
        if args.per_class and len(found):
            each = (100 * found[(test.labels == c).cpu().numpy(), 0].mean() for c in test.labels.unique())
            print(f"{'by class':>20} " + " ".join(f"{value:.1f}" for value in each))
    if len(flags) > 1:
        shared = min((index for index, _ in flags), key=len)  # a smaller subset lies within a larger one
        worst = np.all([correct[np.isin(index, shared)] for index, correct in flags], 0)
        print(f"worst case of these {len(flags)} at eps {eps:.4g}, sample by sample: {100 * worst.mean():.2f} % of "
              f"{len(shared)} images")
    if args.save_adv:
        common.write_beside(args.save_adv, lambda file: np.savez(file, **adversarial))
    few = load_test(facts, args.data_dir, few, device, args.workers)
    numbers, paths = print_more(args, model, few, checkpoint, eps, outcomes)
    if args.results:
        kept = [outcome for outcome in record.outcomes if outcome["weights"] == args.weights]
        write_json(args.results, results(checkpoint, kept, device))
    if args.protocol and args.protocol != "common":
        print_protocol(args.protocol, dataset, outcomes)
    if run := common.wandb_run(vars(args), "evaluate", Path(args.ckpt)):
        import wandb
        run.summary.update({f"eval/{o['attack']}": o["accuracy"] for o in outcomes})
        run.summary.update({f"eval/{name}": value for name, value in numbers.items()})
        run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in paths})
        run.finish()


if __name__ == "__main__":
    common.cli(main)
