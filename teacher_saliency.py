"""Teacher-guided saliency curriculum: robustness without an adversary.

Teacher-guided saliency-based robust training, 2021. An adversarially trained teacher's input gradients show where the
object is. Phase 1 aligns the student's saliency with it (eq. 13), phase 2 also makes the gradient of the student's loss
agree with the k % most salient pixels of it, k falling (eq. 16); discriminators judge as well as distances:
    min CE + beta L_robust + gamma L_diff  [ + beta L_curr-robust + gamma L_curr-diff ]

    python teacher_saliency.py                              # CIFAR-10, WRN-32-10: teacher, alignment, curriculum
    python teacher_saliency.py --teacher at.pt              # the teacher is at hand
    python teacher_saliency.py --dataset digits             # bundled real digits: no download, minutes on a CPU

Measured, shortened: phase 1 with --score logit passes most of the teacher's robustness on, phase 2 helps a network that
is sure of its classes and harms one that is not (README.md).
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common

# The paper's settings (section 5, appendix); momentum, weight decay and the teacher's two drops are those of the family
# of codes it builds on, validation images ours. beta2 and gamma2 are beta and gamma in phase 2. MNIST is not in the
# paper: shortened; `digits` is a smoke test.
CIFAR10 = dict(model="wrn-32-10", normalize="image", batch_size=32, lr=0.1, weight_decay=2e-4, momentum=0.9, val=1000,
               eps=8 / 255, beta=2.0, gamma=10.0, beta2=2.0, gamma2=20.0, align_epochs=100, k_epochs=15,
               ks="90,80,70,60,50", teacher_epochs=100, teacher_warmup=0, attack_steps=7, step_size=2 / 255)
MNIST = dict(CIFAR10, model="lenet+", normalize="none", batch_size=64, lr=0.01, eps=0.3, align_epochs=15, k_epochs=3,
             teacher_epochs=10, teacher_warmup=3, step_size=0.1)
DIGITS = dict(MNIST, batch_size=32, val=237, eps=0.1, align_epochs=8, k_epochs=2, teacher_epochs=8, teacher_warmup=0,
              step_size=0.03)
PAPER = {"cifar10": CIFAR10, "cifar100": dict(CIFAR10, gamma2=15.0), "mnist": MNIST, "digits": DIGITS}

# Differences from the paper, and what it leaves open
# - --score: section 4 writes the true class's logit, its family of codes differentiates the probability.
# - --curriculum-sign: literally eq. 18 asks grad CE to equal the teacher's map, which points the other way: with the
#   probability score grad CE is, per sample, minus the saliency divided by the probability (where no BatchNorm in
#   training mode mixes samples). negated does what the text describes.
# - --ldiff-scale: image sums over an image and averages over the batch, with images in [0, 1]; family sums over the
#   batch too, with images in [0, 255].
# - The student minimises the second term of eqs. 11 and 17 as printed, log(1 - D); the first moves it only through the
#   BatchNorm of the discriminators, which maps of student and teacher pass as one batch, as in the authors' family of
#   codes, which also update them every 5 steps. They see maps without mean and length, so agree up to both.
# - k begins at 90, as in one place of section 4; another says 100. A pixel's salience is its channel sum of |J_T|.
# - BatchNorm is in eval mode for the teacher's maps and at evaluation; the family's code evaluates in train mode.
# - The best epoch of phase 2 by PGD-20 on held-out images is kept; the network after phase 1 and after every k lies
#   beside it (run.align.pt, run.k90.pt ...).
# - The discriminators' loss averages over the maps of both networks: half of eqs. 14 and 19, the sum of two means.
# - With BatchNorm in training mode a map counts the influence of the other images of the batch, too.
# - TinyImageNet (table 10, teacher A of table 3) is not here yet.
# - --precision auto is bfloat16 for the teacher's training alone: it is too coarse for maps, whose discriminators see
#   nothing but relative differences.
# - Phase 2 of a saved phase 1 (--align-epochs 0 --init run.align.pt) takes its discriminators, but not its momentum.
# - Table 9's gamma = 20 is phase 2's, so its beta = 0 and gamma = 0 are read as phase 2's, too: --beta2 0, --gamma2 0.
# - Tables 13 and 14: a single k trains for --k-epochs, a fifth of phase 2, unless told otherwise.
# - Cost: the paper claims 10 to 20 % of adversarial training's time. By counted passes a step of phase 1 takes 4, of
#   phase 2 6, of PGD-7 training 8; and the teacher is trained so, too.
# - A teacher of another data set gets a new last layer, trained on clean images with the rest frozen.
# - WRN-32-10 has five blocks per group, as in the family's codes.


def parse(argv=None):
    """The resolved flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, PAPER)
    flag = parser.add_argument
    flag("--teacher", metavar="CKPT", help="the teacher, also of another data set; without it one is trained first")
    flag("--score", choices=["logit", "prob"], default="prob", help="whose input gradient is the saliency: the true "
         "class's logit or its probability (%(default)s)")
    flag("--curriculum-sign", choices=["literal", "negated"], default="negated", help="eq. 18 with grad CE or with "
         "minus grad CE; also what the second discriminator sees (%(default)s)")
    flag("--ldiff-scale", choices=["image", "family"], default="image", help="how squared distances of maps are "
         "summed: over an image, or over the batch with images in [0, 255] (%(default)s)")
    flag("--beta", type=common.number(0), help="weight of L_robust in phase 1 (the paper's)")
    flag("--gamma", type=common.number(0), help="weight of L_diff in phase 1 (the paper's)")
    flag("--beta2", type=common.number(0), help="weight of L_robust and L_curr-robust in phase 2 (the paper's)")
    flag("--gamma2", type=common.number(0), help="weight of L_diff and L_curr-diff in phase 2 (the paper's)")
    flag("--align-epochs", type=common.natural, help="epochs of phase 1; 0 with --init: table 8 (the paper's)")
    flag("--ks", help="percentages of pixels in phase 2, in order; one alone: no curriculum (the paper's)")
    flag("--k-epochs", type=common.count, help="epochs of each of them (the paper's)")
    flag("--drop-alignment", action="store_true", help="phase 2 without L_robust and L_diff, tables 5 and 6")
    flag("--align-delay", type=common.natural, default=0, help="first epochs on cross-entropy alone (%(default)s)")
    flag("--input-noise", type=common.number(0, 1), default=0.0, help="half-width of uniform noise on the images of "
         "student and teacher, in [0, 1] units (%(default)s)")
    flag("--teacher-epochs", type=common.count, help="epochs of the teacher's PGD training, or of its new last layer")
    flag("--teacher-warmup", type=common.natural, help="first epochs of it in which the radius grows (the paper's: 0; "
         "on MNIST 3, else it stays at chance)")
    flag("--attack-steps", type=common.count, help="steps of the teacher's PGD (the paper's)")
    flag("--step-size", type=common.unit, help="step of the teacher's PGD and the smallest of "
         "validation's, in [0, 1] units (the paper's; MNIST: ours)")
    args = parser.parse_args(argv)
    if args.epochs:
        raise common.UsageError("--epochs follows from --align-epochs, --ks and --k-epochs")
    if args.teacher and (args.attack_steps or args.teacher_warmup is not None):
        raise common.UsageError("--attack-steps and --teacher-warmup are for a teacher that is trained here, not for "
                                "--teacher")
    common.resolve(args, PAPER[args.dataset])
    try:
        ks = [common.number(1, 100, kind=int)(k) for k in args.ks.split(",")]
    except argparse.ArgumentTypeError as error:
        raise common.UsageError(f"--ks {args.ks}: {error}")
    if len(set(ks)) < len(ks) or args.align_delay > args.align_epochs:
        raise common.UsageError("--ks names a percentage twice, or --align-delay goes beyond --align-epochs")
    if not args.teacher and args.teacher_warmup >= args.teacher_epochs:
        raise common.UsageError("the teacher never sees the full radius: --teacher-epochs beyond --teacher-warmup")
    if not args.align_epochs and not args.init:
        raise common.UsageError("--align-epochs 0 needs --init, the network to begin phase 2 with")
    args.epochs = args.align_epochs + len(ks) * args.k_epochs
    return args


class Discriminator(nn.Sequential):
    """Judges saliency maps (N, C, H, W): a logit per map, high for a teacher's. Maps are freed of their mean and scaled
    to unit length, and padded to 32 pixels where they are smaller."""

    def __init__(self, channels, pixels):
        widths, layers = [channels, 16, 32, 64, 128, 256], []
        for inside, out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(inside, out, 4, 2, 1), nn.BatchNorm2d(out), nn.LeakyReLU(0.1)]
        self.margin = max(0, 32 - pixels)
        super().__init__(*layers, nn.Flatten(), nn.Linear(256 * ((pixels + self.margin) // 32) ** 2, 1))

    def forward(self, maps):
        maps = maps - maps.mean((1, 2, 3), keepdim=True)
        maps = maps / maps.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        near, far = self.margin // 2, self.margin - self.margin // 2
        z = super().forward(F.pad(maps, [near, far, near, far]))[:, 0]
        return z.float() if z.dtype == torch.bfloat16 else z


def top_k(maps, k):
    """J_T,k: maps (N, C, H, W) with all but the k % of pixels of largest channel sum of |J| set to zero."""
    salience = maps.abs().sum(1).flatten(1)
    kept = torch.zeros_like(salience).scatter_(1, salience.topk(round(k * salience.shape[1] / 100)).indices, 1.0)
    return maps * kept.view(len(maps), 1, *maps.shape[2:])


def score(logits, y, kind):
    """Psi of the true class, per sample: the logit or the probability."""
    return (logits if kind == "logit" else logits.softmax(1)).gather(1, y[:, None])[:, 0]


def squared_distance(a, b, args):
    """||a - b||_2^2 of maps, as --ldiff-scale has it."""
    total = (a - b).square().flatten(1).sum(1)
    return total.mean() if args.ldiff_scale == "image" else total.sum() / 255**2  # d / d(255 x) = 1/255 d / dx


def saliency_loss(model, teacher, discriminators, x, y, k, args):
    """Eqs. 13 (k None) and 16 on x (N, C, H, W), y (N,): (named scalars, [(student's, teacher's maps)] for each
    discriminator, detached); "loss" is the one to minimise."""
    # Eq. 8:  J_T^TCI, without a graph
    j_t = common.input_gradient(teacher, x, y, loss=lambda logits, y: score(logits, y, args.score))[0]

    x = x.detach().requires_grad_(True)
    logits = model(x)
    ce = common.cross_entropy(logits, y)
    beta, gamma = (args.beta2, args.gamma2) if k else (args.beta, args.gamma)
    terms, pairs = dict(ce=ce.mean()), [None]
    loss, terms["teacher_norm"] = terms["ce"], squared_distance(j_t, torch.zeros_like(j_t), args)  # ||J_T||^2

    # Eqs. 9, 11, 12:  J_S^TCI = grad Psi_y;  L_robust = log(1 - f_disc(J_S^TCI)), the student's part;
    # L_diff = ||J_S^TCI - J_T^TCI||^2
    if not (k and args.drop_alignment):
        j_s, = torch.autograd.grad(score(logits, y, args.score).sum(), x, create_graph=True)
        terms["robust"] = F.logsigmoid(-discriminators[0](torch.cat([j_s, j_t]))[:len(x)]).mean()
        terms["diff"] = squared_distance(j_s, j_t, args)
        loss, pairs = loss + beta * terms["robust"] + gamma * terms["diff"], [(j_s.detach(), j_t)]

    # Eqs. 15, 17, 18:  the same with +-J_S^CE = +-grad CE and J_T,k^TCI
    if k:
        j_ce, = torch.autograd.grad(ce.sum(), x, create_graph=True)
        j_tk, j_curr = top_k(j_t, k), j_ce if args.curriculum_sign == "literal" else -j_ce
        terms["curr_robust"] = F.logsigmoid(-discriminators[1](torch.cat([j_curr, j_tk]))[:len(x)]).mean()
        terms["curr_diff"] = squared_distance(j_curr, j_tk, args)
        loss = loss + beta * terms["curr_robust"] + gamma * terms["curr_diff"]
        pairs.append((j_curr.detach(), j_tk))
    return dict(loss=loss, **terms), pairs


def discriminator_loss(discriminators, pairs):
    """Eqs. 14 and 19 as binary cross-entropy, summed over the discriminators in use; and their mean accuracy."""
    losses, right = [], []
    for discriminator, pair in zip(discriminators, pairs):
        if pair:
            z = discriminator(torch.cat(pair))
            true = torch.cat([torch.zeros_like(z[:len(z) // 2]), torch.ones_like(z[len(z) // 2:])])
            losses.append(F.binary_cross_entropy_with_logits(z, true))
            right.append(((z > 0) == (true > 0)).float().mean())
    return sum(losses), torch.stack(right).mean()


def phase(epoch, args):
    """(k or None, learning rate) of an epoch, from 0: lr falls linearly to a hundredth, then to a tenth of that."""
    if epoch < args.align_epochs:
        return None, args.lr * (1 - 0.99 * epoch / max(1, args.align_epochs - 1))
    done, left = epoch - args.align_epochs, max(1, args.epochs - args.align_epochs - 1)
    return int(args.ks.split(",")[done // args.k_epochs]), 0.01 * args.lr * (1 - 0.9 * done / left)


def passes(k, args):
    """Forward-backward passes of a batch per step: the teacher's map, the update, two for every map of the student that
    is differentiated; the discriminators are small."""
    return 2 + 2 * ((not (k and args.drop_alignment)) + bool(k))


def validate(model, val, args, device, precision):
    """Accuracy on clean images and under PGD-20."""
    def attack(x, y):
        return common.pgd(model, x, y, args.eps, max(args.eps / 4, args.step_size), 20)
    with common.autocast(device, precision):
        clean, robust = (common.accuracy(model, val, attack=a) for a in (None, attack))
    return {"val/clean": clean, "val/robust": robust}


def train_teacher(args, name, model, train, val, device, precision):
    """PGD training of all weights, or of the last layer on clean images where the teacher comes from elsewhere; name:
    its backbone."""
    path = Path(args.ckpt).with_suffix(".teacher.pt")
    if args.teacher and Path(args.teacher).resolve() == path.resolve():
        raise common.UsageError(f"--teacher {path} would be replaced by its own fine-tuning: another --ckpt")
    own = dict(epochs=args.teacher_epochs, ckpt=str(path), model=name, normalize=model.normalize, init=None)
    run = common.Run("teacher_saliency", dict(vars(args), precision=precision, **own), device)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    for epoch in range(run.restore(model, optimizer), args.teacher_epochs):
        started, meter = time.perf_counter(), common.Meter(epoch)
        for group in optimizer.param_groups:  # two drops
            group["lr"] = args.lr * 0.1 ** sum(epoch >= share * args.teacher_epochs for share in (0.5, 0.75))
        ramp = min(1.0, (epoch + 1) / (args.teacher_warmup + 1))
        model.train(not args.teacher)
        augment = common.DATASETS[args.dataset]["augment"]
        for x, y, _ in common.train_batches(train, args.batch_size, args.seed, epoch, augment):
            with common.autocast(device, precision):
                if not args.teacher:
                    x = common.pgd(model, x, y, ramp * args.eps, ramp * args.step_size, args.attack_steps,
                                   mode=args.attack_mode)
                loss = common.cross_entropy(model(x), y).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.add(len(x), dict(loss=loss))
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "train/loss": meter.read()["loss"]}
        row["seconds"] = time.perf_counter() - started
        row |= {"cost/ms_per_batch": 1000 * row["seconds"] * args.batch_size / len(train.labels),
                "cost/passes": 1 if args.teacher else args.attack_steps + 1}
        if args.val:
            row |= validate(model, val, args, device, precision)
        run.finish_epoch(model, optimizer, row)
    run.close()


def get_teacher(args, train, val, device, precision):
    """The teacher in eval mode, its weights frozen: --teacher, that with a new last layer, or one trained here."""
    common.seed_stream(args.seed, "teacher")
    if args.teacher:
        given, checkpoint = common.load_model(args.teacher, "best", device)
        name = checkpoint["model"]
        if checkpoint["dataset"] == args.dataset:
            return given.requires_grad_(False)
        teacher = common.build_model(name, args.dataset, checkpoint["normalize"], device)
        head = [name for name, module in teacher.net.named_modules() if isinstance(module, nn.Linear)][-1]
        fresh = {name: value for name, value in teacher.net.state_dict().items() if name.startswith(f"{head}.")}
        common.load_weights(teacher, given.net.state_dict() | fresh, args.teacher)
        teacher.requires_grad_(False).net.get_submodule(head).requires_grad_(True)
    else:
        name, teacher = args.model, common.build_model(args.model, args.dataset, args.normalize, device)
    train_teacher(args, name, teacher, train, val, device, precision)
    return teacher.eval().requires_grad_(False)


def phase_path(ckpt, k):
    """Where the network after a k, or after alignment (None), is kept."""
    return Path(ckpt).with_suffix(f".k{k}.pt" if k else ".align.pt")


def keep_phase(run, epoch, args):
    """Keep the network after the last epoch of a k, or of alignment, in a file of its own."""
    k = phase(epoch, args)[0]
    if epoch + 1 < args.epochs and phase(epoch + 1, args)[0] == k:
        return
    checkpoint = common.load_checkpoint(run.path)
    if checkpoint["last"]["epoch"] == epoch + 1:  # killed later, the file is there and run.pt is ahead of it
        checkpoint["best"] = dict(checkpoint["last"], metric=run.history[-1].get("val/robust"))
        common.write_beside(phase_path(run.path, k), lambda file: torch.save(checkpoint, file))


def main():
    args = parse()
    device, precision = common.set_up(args.device, args.precision)
    args.ckpt = args.ckpt or common.default_path("teacher_saliency", args.dataset)
    lock = common.claim(args.ckpt, args.resume, args.overwrite)
    kept = [path for path in (phase_path(args.ckpt, phase(e, args)[0]) for e in range(args.epochs)) if path.exists()]
    if kept and not args.overwrite and not common.going_on(args.ckpt, args.resume):
        raise common.UsageError(f"{kept[0]} exists: --overwrite replaces it")
    train, val = common.load_train(args.dataset, args.data_dir, args.val, args.limit, device)
    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, args.dataset, args.normalize, device)
    judges = None
    if args.init and not common.going_on(args.ckpt, args.resume):  # before a teacher takes its hours
        judges = common.load_init(model, args.init).get("method_state")
    teacher = get_teacher(args, train, val, device, precision)
    lock.close()  # the run takes it
    precision = "float32" if args.precision == "auto" else precision
    run = common.Run("teacher_saliency", dict(vars(args), precision=precision), device)
    common.seed_stream(args.seed, "discriminators")
    channels, pixels, _ = common.DATASETS[args.dataset]["shape"]
    discriminators = nn.ModuleList(Discriminator(channels, pixels) for _ in range(2)).to(device)
    groups = [dict(params=module.parameters()) for module in (model, *discriminators)]
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)

    first, judges = run.restore(model, optimizer), run.method_state or judges
    if judges and "discriminators" in judges:
        discriminators.load_state_dict(judges["discriminators"])
    if first:
        keep_phase(run, first - 1, args)  # killed after the epoch, it had not been
    for epoch in range(first, args.epochs):
        if epoch == args.align_epochs:
            run.best = None  # the best of phase 2
        started, meter, judged = time.perf_counter(), common.Meter(epoch), common.Meter(epoch)
        k, lr = phase(epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        augment = common.DATASETS[args.dataset]["augment"]
        for step, (x, y, _) in enumerate(common.train_batches(train, args.batch_size, args.seed, epoch, augment)):
            x = (x + args.input_noise * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
            discriminators.requires_grad_(False)  # the student's step leaves them alone
            with common.autocast(device, precision):
                if epoch < args.align_delay:
                    terms, pairs = dict(loss=common.cross_entropy(model(x), y).mean()), []
                else:
                    terms, pairs = saliency_loss(model, teacher, discriminators, x, y, k, args)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            meter.add(len(x), terms)
            if pairs and step % 5 == 0:
                discriminators.requires_grad_(True)
                with common.autocast(device, precision):
                    loss, right = discriminator_loss(discriminators, pairs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                judged.add(len(x), dict(loss=loss, right=right))

        row = {"epoch": epoch + 1, "k": k or 100, "lr": lr}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        if pairs:
            row |= {f"discriminator/{name}": value for name, value in judged.read().items()}
        row["seconds"] = time.perf_counter() - started
        row |= {"cost/ms_per_batch": 1000 * row["seconds"] * args.batch_size / len(train.labels),
                "cost/passes": passes(k, args) if pairs else 1}
        if args.val:
            common.seed_stream(args.seed, "validation", epoch)
            row |= validate(model, val, args, device, precision)
        state = {name: value.cpu().clone() for name, value in discriminators.state_dict().items()}
        run.finish_epoch(model, optimizer, row, row.get("val/robust"), dict(discriminators=state))
        keep_phase(run, epoch, args)
    run.close()


if __name__ == "__main__":
    common.cli(main)
