"""Teacher-guided saliency curriculum: robustness without an adversary.

Sarkar et al., "Get Fooled for the Right Reason: Improving Adversarial Robustness through a
Teacher-guided Curriculum Learning Approach", 2021. The input gradients of an adversarially trained
teacher show where the object is. Phase 1 aligns the student's saliency with the teacher's (eq. 13).
Phase 2 also makes the gradient of the student's loss agree with the k % most salient pixels of the
teacher's map, k falling (eq. 16). A distance and a discriminator compare the maps:
    min CE + beta L_robust + gamma L_diff  [ + beta L_curr-robust + gamma L_curr-diff ]

    python teacher_saliency.py                     # CIFAR-10, WRN-32-10: teacher, phases 1 and 2
    python teacher_saliency.py --teacher at.pt     # the teacher is at hand
    python teacher_saliency.py --dataset digits    # bundled real digits, minutes on a CPU

Measured: results/saliency.md.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import common

# The paper's settings (section 5, appendix). Momentum, weight decay and the teacher's two drops
# are those of the family of codes that it builds on; validation images are ours. beta2 and gamma2
# are beta and gamma in phase 2. MNIST is not in the paper: shortened. `digits` is a smoke test.
CIFAR10 = dict(
    model="wrn-32-10", normalize="image", augment="crop-flip", batch_size=32, lr=0.1,
    weight_decay=2e-4, momentum=0.9, val=1000, eps=8 / 255, step_size=2 / 255, attack_steps=7,
    beta=2.0, gamma=10.0, beta2=2.0, gamma2=20.0, align_epochs=100, k_epochs=15,
    ks=[90, 80, 70, 60, 50], teacher_epochs=100, teacher_warmup=0)
CIFAR100 = dict(CIFAR10, gamma2=15.0)
TINYIMAGENET = dict(CIFAR10, batch_size=16, gamma2=50.0)
MNIST = dict(
    CIFAR10, model="lenet+", normalize="none", augment="none", batch_size=64, lr=0.01, eps=0.3,
    step_size=0.1, align_epochs=15, k_epochs=3, teacher_epochs=10, teacher_warmup=3)
DIGITS = dict(MNIST, batch_size=32, eps=0.1, step_size=0.03, align_epochs=8, k_epochs=2,
              teacher_epochs=8, teacher_warmup=0)
PAPER = {"cifar10": CIFAR10, "cifar100": CIFAR100, "tinyimagenet": TINYIMAGENET, "mnist": MNIST,
         "digits": DIGITS}

DISCRIMINATORS_EVERY = 5  # steps of the student for each of theirs

# Differences from the paper, and what it leaves open ("the family": the codes that it builds on)
# - --score: section 4 writes the true class's logit; the family has the probability, our default.
#   --score2 is phase 2's, --score unless given.
# - --curriculum-sign: literally eq. 18 asks grad CE to equal the teacher's map, which points the
#   other way: with the probability score grad CE is, per image, minus the saliency divided by the
#   probability. negated, our default, does what the text describes.
# - --ldiff-scale: image, our default; family sums over the batch, with images in [0, 255].
# - --map-mode: BatchNorm's mode in the pass that the student's maps come from. In train mode, our
#   default and the family's, a map counts the influence of the batch's other images, too. eval
#   costs a pass more. Teacher and evaluation are in eval mode; the family evaluates in train mode.
# - The student minimises log(1 - D) alone. The first term of eqs. 11 and 17 would reach it only
#   through the discriminators' BatchNorm.
# - Discriminators as in the family: maps of student and teacher pass as one batch, centred and
#   scaled to length 1; an update every 5 steps. Their loss averages over all maps: half of eqs. 14
#   and 19.
# - k begins at 90, as in one place of section 4; another says 100. A pixel's salience is its
#   channel sum of |J_T|.
# - --normalize image, crop and flip, the teacher's rate and epochs are not printed. --lr,
#   --batch-size, --weight-decay and --augment are the teacher's, too.
# - The family adds noise of 8/255 to images and delays the alignment: --input-noise,
#   --align-delay.
# - The teacher keeps its last epoch, the student the best of both phases by PGD-20 on held-out
#   images. run.align.pt, run.k90.pt ... are the networks after phase 1 and after every k.
# - --precision auto is bfloat16 for the teacher's training alone: it is too coarse for maps, whose
#   discriminators see nothing but relative differences.
# - Phase 2 of a saved phase 1 (--align-epochs 0 --init run.align.pt) takes its discriminators and
#   run.teacher.pt beside it, but not its momentum.
# - Table 9's beta = 0 and gamma = 0 are read as phase 2's, as its gamma = 20 is: --beta2, --gamma2.
# - Table 7's cross-entropies are those of the training images, as they are and with BatchNorm in
#   eval mode; the paper does not say of which images.
# - Tables 13 and 14: a single k trains for --k-epochs, a fifth of phase 2, unless told otherwise.
# - Cost: the paper claims 10 to 20 % of adversarial training's time. A step of phase 1 takes 4
#   forward-backward passes, of phase 2 6, of PGD-7 training 8; the teacher is trained so, too.
# - A teacher of another data set gets a new last layer, trained on clean images, the rest frozen;
#   the paper says that it is fine-tuned on clean data. WRN-32-10 has five blocks per group.


# ---------------------------------------------------------------------------------- saliency maps
# x: images (N, C, H, W), y: labels (N,). A map is a gradient with respect to the images, as x.

def score(logits, y, kind):
    """Psi of the true class, (N,): its logit or its probability."""
    values = logits if kind == "logit" else logits.softmax(1)
    return values.gather(1, y[:, None])[:, 0]


def teacher_maps(teacher, x, y, kind):
    """Eq. 8:  J_T^TCI = grad Psi_y of the teacher, without a graph."""
    maps, _ = common.input_gradient(teacher, x, y, loss=lambda logits, y: score(logits, y, kind))
    return maps


def top_k(maps, k):
    """J_T,k: all but the k % of pixels with the largest channel sum of |J| are set to zero."""
    salience = maps.abs().sum(1).flatten(1)
    pixels = salience.topk(round(k * salience.shape[1] / 100)).indices
    kept = torch.zeros_like(salience).scatter_(1, pixels, 1.0)
    return maps * kept.view(len(maps), 1, *maps.shape[2:])


def squared_distance(a, b, scale):
    """||a - b||^2 of maps: "image": mean over the batch; "family": sum, for images in [0, 255]."""
    total = (a - b).square().flatten(1).sum(1)
    if scale == "image":
        return total.mean()
    return common.joint_sum(total, a) / 255**2  # d / d(255 x) = 1/255 d / dx


class Discriminator(nn.Sequential):
    """Judges maps (N, C, H, W): a logit per map, high for a teacher's.

    Maps are freed of their mean, scaled to unit length, and padded to 32 pixels where smaller.
    """

    def __init__(self, channels, height, width):
        layers = []
        widths = [channels, 16, 32, 64, 128, 256]
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs),
                       nn.LeakyReLU(0.1)]
        features = 256 * (max(height, 32) // 32) * (max(width, 32) // 32)
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, 1))
        self.padding = []
        for missing in (max(0, 32 - width), max(0, 32 - height)):
            self.padding += [missing // 2, missing - missing // 2]

    def forward(self, maps):
        maps = maps - maps.mean((1, 2, 3), keepdim=True)
        length = maps.flatten(1).norm(dim=1).clamp(min=1e-12)
        z = super().forward(F.pad(maps / length.view(-1, 1, 1, 1), self.padding))[:, 0]
        return z.float() if z.dtype == torch.bfloat16 else z


# ------------------------------------------------------------------------------------- the losses
# The losses of the networks return (named scalars, map_pairs): "loss" is the one to minimise;
# map_pairs has (discriminator, student's maps, teacher's maps), detached, for discriminator_loss.

def ce_loss(model, x, y):
    """Normal training, on clean images."""
    ce = common.cross_entropy(model(x), y).mean()
    return dict(loss=ce, ce=ce), []


def pgd_at_loss(model, x, y, eps, step_size, attack_steps, mode="eval"):
    """The teacher's: CE on PGD samples (Madry et al. 2018)."""
    x_adv = common.pgd(model, x, y, eps, step_size, attack_steps, mode=mode)
    return dict(loss=common.cross_entropy(model(x_adv), y).mean()), []


def student_pass(model, x, y, map_mode):
    """(CE, images, logits for maps, their cross-entropies (N,)).

    Maps are gradients with respect to these images. map_mode: "train": all are of one pass.
    "eval": a second pass, with BatchNorm in eval mode, is for the maps.
    """
    x = x.detach().requires_grad_(True)
    if map_mode == "train":
        logits = common.twice_differentiable(model, x)
        ce_each = common.cross_entropy(logits, y)
        return ce_each.mean(), x, logits, ce_each
    ce = common.cross_entropy(model(x), y).mean()
    with common.model_mode(model, "eval"):
        map_logits = model(x)
    return ce, x, map_logits, common.cross_entropy(map_logits, y)


def match(discriminator, j_s, j_t, beta, gamma, scale):
    """beta L_robust + gamma L_diff: (their sum, L_robust, L_diff). Eqs. 11, 12 and 17, 18.

    The student's part of L_robust is the mean of log(1 - f_disc(J_S)). There the teacher's maps
    only share the BatchNorm of the batch. L_diff = ||J_S - J_T||^2.
    """
    z = discriminator(torch.cat([j_s, j_t]))
    robust = F.logsigmoid(-z[:len(j_s)]).mean()
    diff = squared_distance(j_s, j_t, scale)
    return beta * robust + gamma * diff, robust, diff


def agreement(j_s, j_t):
    """For the log: relative_diff, ||J_S - J_T||^2 / ||J_T||^2, is 1 for a student without
    gradients; cosine is the mean over images of the maps' cosine."""
    j_s = j_s.detach()
    relative = (j_s - j_t).square().sum() / j_t.square().sum().clamp(min=1e-30)
    cosine = F.cosine_similarity(j_s.flatten(1), j_t.flatten(1)).mean()
    return dict(relative_diff=relative, cosine=cosine)


def align_loss(model, teacher, discriminator, x, y, beta, gamma, kind, scale, map_mode="train"):
    """Phase 1, eq. 13: the student's saliency maps are aligned with the teacher's.

    kind: of `score`; scale: of `squared_distance`.
    """
    # CE + beta L_robust + gamma L_diff
    j_t = teacher_maps(teacher, x, y, kind)
    ce, x, map_logits, _ = student_pass(model, x, y, map_mode)
    # Eq. 9:  J_S^TCI = grad Psi_y
    j_s, = torch.autograd.grad(score(map_logits, y, kind).sum(), x, create_graph=True)
    aligned, robust, diff = match(discriminator, j_s, j_t, beta, gamma, scale)
    terms = dict(loss=ce + aligned, ce=ce, robust=robust, diff=diff, **agreement(j_s, j_t))
    return terms, [(discriminator, j_s.detach(), j_t)]


def curriculum_loss(model, teacher, discriminator, curr_discriminator, x, y, k, beta, gamma, kind,
                    scale, sign, map_mode="train", drop_alignment=False):
    """Phase 2, eq. 16, after phase 1: k % of the pixels, k falling.

    sign: "literal" or "negated" for grad CE or -grad CE in eqs. 15 to 18.
    drop_alignment: leave out L_robust and L_diff (tables 5 and 6).
    """
    # CE + beta L_robust + gamma L_diff + beta L_curr-robust + gamma L_curr-diff
    j_t = teacher_maps(teacher, x, y, kind)
    loss, x, map_logits, map_ce = student_pass(model, x, y, map_mode)
    terms = dict(ce=loss)
    map_pairs = []
    if not drop_alignment:  # as in phase 1
        j_s, = torch.autograd.grad(score(map_logits, y, kind).sum(), x, create_graph=True)
        aligned, robust, diff = match(discriminator, j_s, j_t, beta, gamma, scale)
        loss = loss + aligned
        terms |= dict(robust=robust, diff=diff, **agreement(j_s, j_t))
        map_pairs.append((discriminator, j_s.detach(), j_t))
    # Eq. 15:  J_S^CE = grad CE, of each image alone, to be equal to J_T,k^TCI
    j_ce, = torch.autograd.grad(map_ce.sum(), x, create_graph=True)
    if sign == "negated":
        j_ce = -j_ce
    j_tk = top_k(j_t, k)
    matched, curr_robust, curr_diff = match(curr_discriminator, j_ce, j_tk, beta, gamma, scale)
    terms |= dict(curr_robust=curr_robust, curr_diff=curr_diff)
    map_pairs.append((curr_discriminator, j_ce.detach(), j_tk))
    return dict(loss=loss + matched, **terms), map_pairs


def discriminator_loss(map_pairs):
    """Eqs. 14 and 19 as binary cross-entropy, summed over the discriminators in use.

    Returns named scalars; "right" is their mean accuracy.
    """
    losses = []
    right = []
    for discriminator, j_s, j_t in map_pairs:
        z = discriminator(torch.cat([j_s, j_t]))
        is_teacher = torch.cat([torch.zeros(len(j_s)), torch.ones(len(j_t))]).to(z)
        losses.append(F.binary_cross_entropy_with_logits(z, is_teacher))
        right.append(((z > 0) == (is_teacher > 0)).float().mean())
    return dict(loss=sum(losses), right=torch.stack(right).mean())


def alternate(optimizer, discriminators, precision, loss, x, y, train_discriminators):
    """A step of the student on (x, y), then perhaps one of the discriminators on its maps.

    loss: function (x, y) -> (terms, map_pairs). SGD leaves networks without gradients alone.
    Returns the student's terms and the discriminators', None without a step.
    """
    discriminators.requires_grad_(False)
    with common.autocast(x.device, precision):
        terms, map_pairs = loss(x, y)
    common.update(optimizer, terms["loss"], len(x))
    if not (train_discriminators and map_pairs):
        return terms, None
    discriminators.requires_grad_(True)
    with common.autocast(x.device, precision):
        own_terms = discriminator_loss(map_pairs)
    common.update(optimizer, own_terms["loss"], len(x))
    return terms, own_terms


# ---------------------------------------------------------------------- stages, rates, the loop

class Stage(NamedTuple):
    """What an epoch trains with. All epochs of a stage have the same."""
    loss: object  # function (x, y) -> (terms, map_pairs)
    name: str | None = None  # of the file that is kept after the stage
    k: int = 100  # percentage of pixels; 100: not phase 2
    mode: str = "train"  # the network's


def student_plan(args, losses):
    """The stage of every epoch. losses: of --method: classification, phase 1, phase 2."""
    if len(losses) == 1:
        return args.align_epochs * [Stage(losses[0])]
    plan = args.align_delay * [Stage(losses[0])]
    plan += (args.align_epochs - args.align_delay) * [Stage(losses[1], "align")]
    if len(losses) > 2:
        for k in args.ks:
            plan += args.k_epochs * [Stage(functools.partial(losses[2], k=k), f"k{k}", k)]
    return plan


def pgd_at_plan(args, teacher):
    """The stages of a teacher that is trained here: the radius grows during the warm-up."""
    plan = []
    for epoch in range(args.teacher_epochs):
        ratio = min(1.0, (epoch + 1) / (args.teacher_warmup + 1))
        plan.append(Stage(functools.partial(
            pgd_at_loss, teacher, eps=ratio * args.eps, step_size=ratio * args.step_size,
            attack_steps=args.attack_steps, mode=args.attack_mode)))
    return plan


def student_rate(args, epoch):
    """The paper's rate at an epoch, from 0: to a hundredth in phase 1, then to a tenth of that."""
    if epoch < args.align_epochs:
        return args.lr * (1 - 0.99 * epoch / max(1, args.align_epochs - 1))
    done = epoch - args.align_epochs
    last = max(1, args.epochs - args.align_epochs - 1)
    return 0.01 * args.lr * (1 - 0.9 * done / last)


def teacher_rate(args, epoch):
    """The teacher's rate at an epoch, from 0: a tenth of it after 1/2 and after 3/4 of them."""
    drops = [share for share in (0.5, 0.75) if epoch >= share * args.epochs]
    return args.lr * 0.1 ** len(drops)


def val_step(eps, step_size):
    """The step of validation's PGD. step_size: the teacher's."""
    return max(eps / 4, step_size)


def tell(run, reads, args, train, val):
    """Print what runs and what the columns are."""
    step = common.shown(val_step(args.eps, args.step_size))
    attacks = f"pgd-20 (step {step}): under attack at eps {common.shown(args.eps)}"
    if args.method == "curriculum":
        attacks += "; k: % of pixels, 100 before phase 2"
    run.tell(reads, train, val, attacks, renamed={"val/robust": "pgd-20"})


def validate(model, val, eps, step_size):
    """Accuracy on clean images and under PGD-20."""
    def attack(x, y):
        return common.pgd(model, x, y, eps, val_step(eps, step_size), 20)
    return {"val/clean": common.accuracy(model, val),
            "val/robust": common.accuracy(model, val, attack=attack)}


def train_epoch(args, epoch, stage, rate, precision, model, discriminators, optimizer, train):
    """One epoch; returns its row of the log. rate: function (args, epoch)."""
    started = time.perf_counter()
    steps = common.steps_per_epoch(len(train.labels), args.batch_size)
    meter = common.Meter(epoch)
    own_meter = common.Meter(epoch)
    model.train(stage.mode == "train")
    batches = common.train_batches(train, args.batch_size, args.seed, epoch, args.augment)
    for step, (x, y, _) in enumerate(batches):
        lr = rate(args, epoch)
        if args.schedule == "onecycle":  # one cycle over all stages
            lr = args.lr * common.one_cycle((epoch + (step + 0.5) / steps) / args.epochs)
        common.set_lr(optimizer, lr)
        if args.input_noise:
            x = (x + args.input_noise * common.uniform_like(x)).clamp(0, 1)
        terms, own_terms = alternate(
            optimizer, discriminators, precision, stage.loss, x, y,
            train_discriminators=step % DISCRIMINATORS_EVERY == 0)
        meter.add(len(x), terms)
        if own_terms:
            own_meter.add(len(x), own_terms)

    common.average_buffers(model.net)
    common.average_buffers(discriminators)
    row = {"epoch": epoch + 1, "k": stage.k, "lr": lr}
    row |= {f"train/{name}": value for name, value in meter.read().items()}
    row |= {f"discriminator/{name}": value for name, value in own_meter.read().items()}
    row["seconds"] = time.perf_counter() - started
    return row


def mean_ce(model, split):
    """Mean cross-entropy of a split's clean images, the model in eval mode."""
    total = torch.zeros((), dtype=torch.float64).to(split.labels.device)
    with torch.no_grad(), common.model_mode(model, "eval"):
        for x, y, _ in common.eval_batches(split, name="cross-entropy", shared=True):
            total += common.cross_entropy(model(x), y).sum()
    return common.summed(total).item() / len(split.labels)


def losses_after_phase_1(model, teacher, train, diff):
    """Table 7: the cross-entropy of student and teacher on clean training images.

    diff: L_diff of the epoch, for the line that is printed; the teacher's is 0.
    """
    row = {"phase_1/ce": mean_ce(model, train), "phase_1/teacher_ce": mean_ce(teacher, train)}
    print(f"after phase 1: cross-entropy of the student {row['phase_1/ce']:.4f}, of the teacher "
          f"{row['phase_1/teacher_ce']:.4f}; alignment loss {diff:.4g}")
    return row


def train_epochs(run, args, plan, rate, model, discriminators, optimizer, train, val,
                 teacher=None):
    """All epochs that are left. plan: the stage of each one; rate: function (args, epoch).

    teacher: of the student.
    """
    for epoch in range(run.first, args.epochs):
        if epoch and plan[epoch].name != plan[epoch - 1].name:
            keep_stage(run, plan[epoch - 1])
        row = train_epoch(args, epoch, plan[epoch], rate, run.precision, model, discriminators,
                          optimizer, train)
        if args.val:
            common.seed_stream(args.seed, "validation", epoch)
            with common.autocast(train.labels.device, run.precision):
                row |= validate(model, val, args.eps, args.step_size)
        names = [stage.name for stage in plan[epoch:epoch + 2]]
        if names[0] == "align" and names[1:] != ["align"]:
            with common.autocast(train.labels.device, run.precision):
                row |= losses_after_phase_1(model, teacher, train, row["train/diff"])
        state = dict(discriminators=common.copy_of_weights(discriminators))
        run.finish_epoch(model, optimizer, row, method_state=state)
    keep_stage(run, plan[-1])
    run.close()


def keep_stage(run, stage):
    """Keep the network after a stage in a file of its own, where the stage has a name."""
    if stage.name:
        run.keep_last(run.path.with_suffix(f".{stage.name}.pt"))


# ------------------------------------------------------------------------------------ the teacher

def with_new_head(given, name, normalize, facts, device):
    """A network of another data set with a new last layer; only that layer may be trained."""
    teacher = common.build_model(name, facts, normalize, device)
    heads = [name for name, module in teacher.net.named_modules() if isinstance(module, nn.Linear)]
    fresh = {name: value for name, value in teacher.net.state_dict().items()
             if name.startswith(f"{heads[-1]}.")}
    common.load_weights(teacher, given.net.state_dict() | fresh, "--teacher")
    teacher.requires_grad_(False)
    teacher.net.get_submodule(heads[-1]).requires_grad_(True)
    return teacher


def same_task(checkpoint, args, facts):
    """Whether a checkpoint's network knows this run's classes."""
    return (checkpoint["dataset"] == args.dataset
            and checkpoint["args"].get("classes") == args.classes
            and checkpoint["num_classes"] == facts["classes"])


def get_teacher(args, defaults, facts, precision, path, train, val):
    """The teacher in eval mode, its weights frozen: --teacher, or one that is trained here.

    path: where one that is trained here is written.
    """
    device = train.labels.device
    common.seed_stream(args.seed, "teacher")
    own = argparse.Namespace(**vars(args))  # the flags of the teacher's run
    own.method = "teacher"
    own.epochs = args.teacher_epochs
    own.ckpt = str(path)
    own.init = None
    own.keep_epochs = None
    own.input_noise = 0.0
    if args.teacher:
        given, checkpoint = common.load_model(args.teacher, "best", device, foreign_facts=facts,
                                              architecture=args.model, normalize=args.normalize)
        if same_task(checkpoint, args, facts):
            return given.eval().requires_grad_(False)
        if Path(args.teacher).resolve() == path.resolve():
            raise common.UsageError(f"--teacher {path} would be replaced by its own fine-tuning: "
                                    "another --ckpt")
        if ".py:" not in checkpoint["model"]:
            own.model = checkpoint["model"]
        own.normalize = checkpoint["normalize"]
        teacher = with_new_head(given, own.model, own.normalize, facts, device)
        plan = own.epochs * [Stage(functools.partial(ce_loss, teacher), mode="eval")]
    else:
        teacher = common.build_model(args.model, facts, args.normalize, device)
        plan = pgd_at_plan(args, teacher)
    weights = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=args.weight_decay,
                                fused=True)
    run = common.Run(__file__, own, defaults, facts, precision)
    run.start(teacher, optimizer)
    tell(run, () if args.teacher else ("attack_steps", "step_size"), own, train, val)
    train_epochs(run, own, plan, teacher_rate, teacher, nn.ModuleList(), optimizer, train, val)
    return teacher.eval().requires_grad_(False)


# -------------------------------------------------------------------------------- flags and loop

def settings(flags, facts):
    """The defaults for the data set, the method and the eps of the command line."""
    table = common.table_settings(PAPER, flags, facts, with_eps=("step_size",))
    chosen = {name: value for name, value in vars(flags).items() if value is not None}
    both = {**table, **chosen}
    table["score2"] = flags.score
    table["epochs"] = both["align_epochs"]
    if flags.method == "curriculum":
        table["epochs"] += len(both["ks"]) * both["k_epochs"]
    return table


def parse(losses, argv=None):
    """(flags, facts, defaults): see common.parse_flags. losses: the dictionary of main."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, dataset="cifar10", notes=dict(
        epochs="not to be given, follows from --align-epochs, --ks and --k-epochs",
        schedule="paper: falls linearly, to 1/100 in phase 1 and to 1/10 of that in phase 2"))
    last = {method: stages[-1] for method, stages in losses.items()}
    method_flags(parser.add_argument_group("method", common.method_lines(last)).add_argument, last)
    teacher_flags(parser.add_argument_group("teacher").add_argument)
    args, facts, defaults, given = common.parse_flags(parser, argv, settings, losses)
    if args.init and not args.teacher and args.method != "nt":
        args.teacher = common.teacher_beside(args.init)
    check(args, given)
    return args, facts, defaults


def method_flags(flag, methods):
    """The flags of the methods. flag: the add_argument of a group."""
    flag("--method", metavar="NAME", choices=methods, default="curriculum", help="one of the above "
         "(%(default)s)")
    flag("--score", choices=["logit", "prob"], default="prob", help="saliency is the input "
         "gradient of the true class's logit or probability (%(default)s)")
    flag("--score2", choices=["logit", "prob"], help="the same in phase 2 (%(default)s)")
    flag("--map-mode", choices=["train", "eval"], default="train", help="BatchNorm's mode in the "
         "pass that the student's maps come from (%(default)s)")
    flag("--curriculum-sign", choices=["literal", "negated"], default="negated", help="eq. 18 with "
         "grad CE or with minus grad CE (%(default)s)")
    flag("--ldiff-scale", choices=["image", "family"], default="image", help="squared distances "
         "are summed over an image, or over the batch with images in [0, 255] (%(default)s)")
    flag("--beta", type=common.number(0), help="weight of L_robust in phase 1 (%(default)s)")
    flag("--gamma", type=common.number(0), help="weight of L_diff in phase 1 (%(default)s)")
    flag("--beta2", type=common.number(0), help="weight of both L_robust in phase 2 (%(default)s)")
    flag("--gamma2", type=common.number(0), help="weight of both L_diff in phase 2 (%(default)s)")
    flag("--align-epochs", type=common.natural, help="epochs of phase 1, or of nt; 0 with --init: "
         "table 8 (%(default)s)")
    flag("--ks", type=common.several(1, 100), help="percentages of pixels in phase 2, in order; "
         "one alone: no curriculum (%(default)s)")
    flag("--k-epochs", type=common.count, help="epochs of each of them (%(default)s)")
    flag("--drop-alignment", action="store_true", help="phase 2 without L_robust and L_diff, "
         "tables 5 and 6")
    flag("--align-delay", type=common.natural, default=0, help="first epochs of phase 1 on "
         "cross-entropy alone (%(default)s)")
    flag("--input-noise", type=common.number(0, 1), default=0.0, help="half-width of uniform noise "
         "on the images of student and teacher, in [0, 1] units (%(default)s)")


def teacher_flags(flag):
    """The flags of the teacher and of its training."""
    flag("--teacher", metavar="CKPT", help="the teacher, also of another data set; without it the "
         "one beside --init, or one that is trained first")
    flag("--teacher-epochs", type=common.count, help="epochs of the teacher's PGD (projected "
         "gradient descent) training, or of its new last layer (%(default)s)")
    flag("--teacher-warmup", type=common.natural, help="first epochs of it in which the radius "
         "grows; without, it stays at chance on MNIST (%(default)s)")
    flag("--attack-steps", type=common.count, help="steps of the teacher's PGD (%(default)s)")
    flag("--step-size", type=common.unit, help="step of the teacher's PGD, and the least of "
         "validation's, in [0, 1] units (%(default)s)")


def check(args, given):
    """UsageError where flags contradict each other or do nothing. given: of the command line."""
    unread = set()
    because = f"--method {args.method}"
    if args.method == "nt":
        unread |= given & {"teacher", "teacher_epochs", "teacher_warmup", "attack_steps",
                           "attack_mode", "align_delay"}
    if args.method != "curriculum":
        unread |= given & {"ks", "k_epochs"}
    if args.teacher and not unread:
        because = f"--teacher {args.teacher}"
        unread |= given & {"attack_steps", "attack_mode", "teacher_warmup"}
    if not args.align_epochs and not unread:
        because = "--align-epochs 0"
        unread |= given & {"beta", "gamma", "align_delay"}
    if unread:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unread))
        raise common.UsageError(f"{because} has no use for {names}")
    if "epochs" in given:
        raise common.UsageError("--epochs follows from --align-epochs, --ks and --k-epochs")
    if args.align_epochs and args.align_delay >= args.align_epochs:
        raise common.UsageError("--align-delay leaves none of --align-epochs for the alignment")
    if not args.teacher and args.method != "nt" and args.teacher_warmup >= args.teacher_epochs:
        raise common.UsageError("the teacher never sees the full radius: --teacher-epochs beyond "
                                "--teacher-warmup")
    if not args.align_epochs and not (args.init and args.method == "curriculum"):
        raise common.UsageError("--align-epochs 0 needs --method curriculum and --init, the "
                                "network to begin phase 2 with")


def main():
    # One line per method. A flag that only other methods' lines read is refused. The lines run
    # later: args, model and the like are set below.
    # Each has the losses of its stages: classification, phase 1, phase 2.
    def nt(x, y):
        return ce_loss(model, x, y)

    def align(x, y):
        return align_loss(model, teacher, discriminators[0], x, y, args.beta, args.gamma,
                          args.score, args.ldiff_scale, args.map_mode)

    def curriculum(x, y, k):
        return curriculum_loss(model, teacher, discriminators[0], discriminators[1], x, y, k,
                               args.beta2, args.gamma2, args.score2, args.ldiff_scale,
                               args.curriculum_sign, args.map_mode, args.drop_alignment)

    losses = {"curriculum": [nt, align, curriculum], "align": [nt, align], "nt": [nt]}
    args, facts, defaults = parse(losses)
    plan = student_plan(args, losses[args.method])
    device, precision = common.set_up(args.device, args.precision, tf32=args.tf32)
    train, val = common.load_train(facts, args.data_dir, args.val, args.limit, device, args.workers)
    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, facts, args.normalize, device)
    for_maps = "float32" if args.precision == "auto" else precision
    names = dict.fromkeys(stage.name for stage in plan if stage.name)
    files = [Path(args.ckpt).with_suffix(f".{name}.pt") for name in names if args.ckpt]
    run = common.Run(__file__, args, defaults, facts, for_maps, files=files,
                     earlier_suffixes=[".teacher.pt"])
    teacher_path = run.path.with_suffix(".teacher.pt")
    written = [path.resolve() for path in (run.path, *files)]
    if args.teacher and Path(args.teacher).resolve() in written:
        raise common.UsageError(f"--teacher {args.teacher} would be replaced: another --ckpt")
    state = run.method_state
    if args.init and not state:  # read early: a wrong file fails before the teacher is trained
        state = common.load_init(model, args.init).get("method_state")

    teacher = None
    if len(losses[args.method]) > 1:
        teacher = get_teacher(args, defaults, facts, precision, teacher_path, train, val)
    common.seed_stream(args.seed, "discriminators")
    discriminators = nn.ModuleList(Discriminator(*facts["shape"]) for _ in range(2)).to(device)
    groups = [dict(params=module.parameters()) for module in (model, *discriminators)]
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay,
                                fused=True)
    run.start(model, optimizer, "val/clean" if args.method == "nt" else "val/robust")
    tell(run, common.flags_read(losses[args.method]), args, train, val)
    if state and state.get("discriminators"):
        discriminators.load_state_dict(state["discriminators"])
    train_epochs(run, args, plan, student_rate, model, discriminators, optimizer, train, val,
                 teacher)


if __name__ == "__main__":
    common.cli(main)
