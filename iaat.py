"""IAAT: instance-adaptive adversarial training.

Balaji, Goldstein and Hoffman, "Instance adaptive adversarial training: Improved accuracy tradeoffs
in neural nets", 2019. One eps for all asks for the impossible where classes lie close. So every
training image has its own: it grows a little while PGD (projected gradient descent) fails to
change the prediction, and shrinks where PGD does (algorithm 2). Eq. 2, solved as adversarial
training is (algorithm 1):
    min over weights of  sum over i of  max over |delta_i| <= eps_i of  CE(f(x_i + delta_i), y_i)

    python iaat.py                     # the paper's settings: CIFAR-10, ResNet-18, 200 epochs
    python iaat.py --dataset digits    # bundled real digits, a minute on a CPU
    torchrun --nproc-per-node 8 iaat.py --dataset imagenet --data-dir /data

Measured: results/iaat.md.
"""

import argparse
import time

import torch

import common

# The paper's settings (tables 10 and 11; eps is eps_w of the warm-up and that of PGD-AT). Momentum
# and normalisation are those of the authors' code. drop_at: after which shares of the epochs lr
# falls, by drop_factor. select_steps: None: as attack_steps. MNIST is not in the paper: eps as
# usual there, gamma in proportion to it, the rest ours. `digits` is a smoke test.
CIFAR = dict(
    model="resnet18", normalize="dataset", augment="reflect-flip", epochs=200, batch_size=128,
    lr=0.1, lr_warmup=0, drop_at=[80 / 200, 140 / 200, 170 / 200], drop_factor=0.1,
    weight_decay=2e-4, momentum=0.9, val=0, eps=8 / 255, eps_min=0.0, gamma=1.9 / 255, beta=0.1,
    warmup=5, attack_steps=10, select_steps=None, step_size=2 / 255, targeted=False)
CIFAR_WRN = dict(
    CIFAR, model="wrn-32-10", epochs=110, weight_decay=5e-4, warmup=10,
    drop_at=[70 / 110, 90 / 110, 100 / 110], drop_factor=0.2)
IMAGENET = dict(  # batch_size and lr: 32 for each GPU, and 0.1 for 256 images
    CIFAR, model="resnet50", augment="none", epochs=110, batch_size=None, lr=None, lr_warmup=5,
    drop_at=[35 / 110, 70 / 110, 95 / 110], weight_decay=1e-4, eps=16 / 255, eps_min=4 / 255,
    gamma=4 / 255, warmup=30, attack_steps=30, select_steps=10, step_size=1 / 255, targeted=True)
MNIST = dict(CIFAR, model="lenet+", normalize="none", augment="none", epochs=30, lr=0.02, eps=0.3,
             gamma=0.07, attack_steps=20, step_size=0.03)
DIGITS = dict(MNIST, epochs=20, batch_size=32, lr=0.05, eps=0.1, gamma=0.024, warmup=3,
              attack_steps=10, step_size=0.02)
PAPER = {"cifar10": CIFAR, "cifar100": CIFAR, "mnist": MNIST, "digits": DIGITS,
         "imagenet": IMAGENET}
PAPER_WRN = dict(PAPER, cifar10=CIFAR_WRN, cifar100=CIFAR_WRN)  # table 10: --model wrn-32-10

# Differences from the paper
# - The memory starts at eps_w, also without a warm-up: the text says that eps then shrinks, but not
#   from where. The authors' code starts at 0: --eps-start 0.
# - The authors' code has another rule for the images whose f(x_i) is wrong: --eps-rule authors. In
#   the warm-up their eps is 0. After it, line 11 averages 0 in: their memory shrinks by 1 - beta.
#   They train on PGD at this eps. In the paper algorithm 2 updates their eps as any other, and they
#   train clean (algorithm 1, line 11).
# - An eps below 0 is set to 0 after line 11's average; --eps-rule authors does so before it.
# - The lower bound, --eps-min, holds for the eps that is used: algorithm 2 has then written the
#   memory. The authors' code has no bound; its memory is the eps that is used. So the bound is on
#   both with --eps-rule authors, also in the warm-up.
# - Whether f(x_i) is right (line 9) and survives PGD (algorithm 2) is asked with BatchNorm in the
#   attack's mode, eval by default. The authors' code attacks in train mode: --attack-mode train.
# - In eval mode no image is attacked in vain, as by the second eps where the first holds. In train
#   mode all images are attacked, or BatchNorm would see only some.
# - PGD with eps_i steps by max(step size, eps_i / (0.5 steps)), as in the authors' code.
# - Line search: the grid gamma, 2 gamma ... 4 eps is not printed; `first-failure` is ours, cheaper.
# - Mixup: lambda from Beta(1, 1), on adversarial images alone; the cited work adds clean ones.
# - The adversarial and the clean images of line 11 pass the network as one batch. The authors'
#   batch has 256 images. Their padding of CIFAR images by reflection is taken over.
# - bfloat16 where the hardware has it, also for the choice of eps and for validation. The paper
#   makes ImageNet's training attacks in FP-16, nothing else.
# - With --epochs, lr falls after the same shares of the epochs. With --eps, gamma, step size and
#   --eps-min change in proportion; the paper prints one eps_w on CIFAR.
# - Without --val the last epoch is kept; validation attacks by the table's PGD.
# - ImageNet: the length of lr's warm-up is not printed; 5 epochs, rising step by step from 0.1, as
#   in the recipe it cites. Nothing else of that recipe is taken over, nor of the code of Xie et
#   al., whose setting the paper follows: label smoothing, and a PGD that starts at the clean image
#   in a fifth of the batches. Every attack of an image draws its target anew. BatchNorm's
#   statistics are each process's own, and averaged after the epoch.


# ------------------------------------------------------------------------------ adaptive attacks
# x: images (N, C, H, W), y: labels (N,), eps: (N,). target_classes: 0, or for targeted attacks how
# many classes there are. mode: of BatchNorm and dropout while an attack runs.

def attack_labels(y, target_classes):
    """What PGD is given for labels y: y, or for targeted attacks a random wrong class each."""
    if not target_classes:
        return y
    shift = common.drawn_like(y, lambda values: values.random_(1, target_classes))
    return (y + shift) % target_classes


def fixed_pgd(model, x, y, eps, step_size, steps, target_classes=0, mode="eval"):
    """PGD of one eps for all images, from a random start."""
    return common.pgd(model, x, attack_labels(y, target_classes), eps, step_size, steps,
                      targeted=target_classes > 0, mode=mode)


def is_right(model, x, y, mode="eval"):
    """Where f(x) is y, bool (N,)."""
    with common.model_mode(model, mode):  # not under no_grad: autocast would keep such weights
        return model(x).detach().argmax(1) == y


def adaptive_pgd(model, x, y, eps, asked, step_size, steps, target_classes=0, mode="eval"):
    """(which images are attacked, bool (N,); PGD(x_i, y_i, eps_i) of these, x_i of the others).

    In eval mode those that are `asked` for, bool (N,). In train mode all, for BatchNorm. The start
    is random. The step reaches any ball's border in half of the steps; it is at least step_size.
    """
    noise = common.uniform_like(x)  # for all: no image's depends on who is attacked
    target = attack_labels(y, target_classes)
    step = (eps / (0.5 * steps)).clamp(min=step_size)
    attacked = asked if mode == "eval" else torch.ones_like(asked)

    def start(x, eps):
        return (x + eps * noise[attacked]).clamp(0, 1)
    x_adv = x.clone()
    x_adv[attacked] = common.pgd(
        model, x[attacked], target[attacked], eps[attacked], step[attacked], steps, start=start,
        targeted=target_classes > 0, mode=mode)
    return attacked, x_adv


def survives_pgd(model, x, y, eps, asked, step_size, steps, target_classes=0, mode="eval"):
    """(where `asked` and f(PGD(x, y, eps)) still is y, bool (N,); the share that is attacked)."""
    attacked, x_adv = adaptive_pgd(model, x, y, eps, asked, step_size, steps, target_classes, mode)
    survives = torch.zeros_like(asked)
    if attacked.any():
        survives[attacked] = is_right(model, x_adv[attacked], y[attacked], mode)
    return survives & asked, attacked.float().mean()


def select_eps(model, x, y, memory, gamma, beta, step_size, steps, target_classes=0, mode="eval",
               right=None):
    """Algorithm 2: (new eps (N,), mean number of attacks per image).

    memory: (N,), eps^mem[j - 1, i], every image's eps of the epoch before. right: None, or for the
    authors' rule where f(x) is y, bool (N,): elsewhere line 11 averages 0 in.
    """
    attack = (step_size, steps, target_classes, mode)
    asked = torch.ones_like(y, dtype=torch.bool) if right is None else right
    eps_1 = memory + gamma  # lines 1 to 3
    eps_2 = memory
    eps_3 = memory - gamma
    holds_1, share_1 = survives_pgd(model, x, y, eps_1, asked, *attack)
    holds_2, share_2 = survives_pgd(model, x, y, eps_2, asked & ~holds_1, *attack)
    eps = torch.where(holds_2, eps_2, eps_3)  # lines 4 to 10
    eps = torch.where(holds_1, eps_1, eps)
    if right is not None:
        eps = torch.where(right, eps, 0.0).clamp(min=0)
    eps = ((1 - beta) * memory + beta * eps).clamp(min=0)  # line 11
    return eps, share_1 + share_2


def line_search(model, x, y, eps_w, gamma, rule, step_size, steps, target_classes=0, mode="eval"):
    """The largest radius of the grid gamma, 2 gamma ... 4 eps_w at which f(PGD(x)) is y, or 0.

    (Section 5.2.) rule: "largest", or "first-failure": an image's search ends at the first radius
    that fails. Returns (eps (N,), mean number of attacks per image).
    """
    attack = (step_size, steps, target_classes, mode)
    eps = torch.zeros_like(y, dtype=x.dtype)
    asked = torch.ones_like(y, dtype=torch.bool)
    mean_attacks = 0
    for i in range(1, int(4 * eps_w / gamma + 1e-6) + 1):
        tried = torch.full_like(eps, i * gamma)
        holds, share = survives_pgd(model, x, y, tried, asked, *attack)
        mean_attacks = mean_attacks + share
        eps = torch.where(holds, tried, eps)
        asked = holds if rule == "first-failure" else asked
        if not asked.any():
            break
    return eps, mean_attacks


# ------------------------------------------------------------------------------------- the losses
# Each returns named scalars; "loss" is the one to minimise. "eps", (N,), is the new memory.
# "passes": forward-backward passes, the update's included; a forward pass alone is a third.

def adaptive_loss(model, x, y, eps, step_size, attack_steps, target_classes=0, mode="eval"):
    """Algorithm 1, lines 8 to 11: CE on PGD(x_i, eps_i) where f(x_i) is right, else on x_i."""
    # Lines 8 and 9:  x_i^adv = PGD(x_i, y_i, eps_i);  S+: f(x_i) is right;  S-: it is wrong
    right = torch.ones_like(y, dtype=torch.bool)
    if mode == "eval":
        right = is_right(model, x, y, mode)
    attacked, x_adv = adaptive_pgd(model, x, y, eps, right, step_size, attack_steps,
                                   target_classes, mode)
    if mode == "train":  # the attack moves BatchNorm's statistics: it comes first, as printed
        right = is_right(model, x, y, mode)
    # Lines 10 and 11:  1/N [ sum over S+ of CE(f(x_i^adv), y_i) + sum over S- of CE(f(x_i), y_i) ]
    x_train = torch.where(right[:, None, None, None], x_adv, x)
    loss = common.cross_entropy(model(x_train), y).mean()
    passes = attacked.float().mean() * attack_steps + 1 / 3 + 1
    return dict(loss=loss, right=right.float().mean(), passes=passes)


def iaat_loss(model, x, y, memory, warm, eps_w, gamma, beta, eps_min, rule, step_size,
              attack_steps, select_steps, target_classes=0, mode="eval"):
    """Each image has its own eps, by algorithm 2.

    IAAT, algorithm 1. memory: (N,), every image's eps of the epoch before.
    warm: whether this epoch is in the warm-up; eps stays as it is. rule: "paper" or "authors".
    """
    if rule == "authors":
        return authors_loss(model, x, y, memory, warm, eps_w, gamma, beta, eps_min, step_size,
                            attack_steps, select_steps, target_classes, mode)
    eps = memory
    mean_attacks = 0
    if not warm:  # line 6
        eps, mean_attacks = select_eps(model, x, y, memory, gamma, beta, step_size, select_steps,
                                       target_classes, mode)
    terms = adaptive_loss(model, x, y, eps.clamp(min=eps_min), step_size, attack_steps,
                          target_classes, mode)
    terms["passes"] = terms["passes"] + mean_attacks * (select_steps + 1 / 3)
    return dict(terms, eps=eps)


def authors_loss(model, x, y, memory, warm, eps_w, gamma, beta, eps_min, step_size, attack_steps,
                 select_steps, target_classes=0, mode="eval"):
    """IAAT by the authors' code: all train on PGD(x_i, eps_i). Arguments as in `iaat_loss`."""
    right = is_right(model, x, y, mode)
    mean_attacks = 0
    if warm:
        eps = torch.where(right, torch.full_like(memory, eps_w), 0.0)
    else:
        eps, mean_attacks = select_eps(model, x, y, memory, gamma, beta, step_size, select_steps,
                                       target_classes, mode, right)
    eps = eps.clamp(min=eps_min)
    attacked, x_adv = adaptive_pgd(model, x, y, eps, eps > 0, step_size, attack_steps,
                                   target_classes, mode)
    loss = common.cross_entropy(model(x_adv), y).mean()
    passes = mean_attacks * (select_steps + 1 / 3) + attacked.float().mean() * attack_steps + 4 / 3
    return dict(loss=loss, right=right.float().mean(), passes=passes, eps=eps)


def line_search_loss(model, x, y, memory, warm, eps_w, gamma, eps_min, rule, step_size,
                     attack_steps, select_steps, target_classes=0, mode="eval"):
    """Each image's eps is the largest of a grid that it withstands (table 7).

    Algorithm 1 with eps by `line_search`; memory and warm as in `iaat_loss`.
    """
    eps = memory
    mean_attacks = 0
    if not warm:
        eps, mean_attacks = line_search(model, x, y, eps_w, gamma, rule, step_size, select_steps,
                                        target_classes, mode)
    terms = adaptive_loss(model, x, y, eps.clamp(min=eps_min), step_size, attack_steps,
                          target_classes, mode)
    terms["passes"] = terms["passes"] + mean_attacks * (select_steps + 1 / 3)
    return dict(terms, eps=eps)


def clean_loss(model, x, y):
    """Clean images, no adversary."""
    return dict(loss=common.cross_entropy(model(x), y).mean())


def pgd_at_loss(model, x, y, eps, step_size, attack_steps, target_classes=0, mode="eval"):
    """PGD-AT: one eps for all images (Madry et al. 2018)."""
    x_adv = fixed_pgd(model, x, y, eps, step_size, attack_steps, target_classes, mode)
    return dict(loss=common.cross_entropy(model(x_adv), y).mean())


def mixup_loss(model, x, y, eps, step_size, attack_steps, target_classes=0, mode="eval"):
    """PGD-AT with mixed-up images and labels (table 8).

    lambda ~ Beta(1, 1).
    """
    x_adv = fixed_pgd(model, x, y, eps, step_size, attack_steps, target_classes, mode)
    lam = torch.rand(()).to(x)
    other = torch.randperm(common.joint_size(x)).to(y)[common.own_rows()]
    logits = model(lam * x_adv + (1 - lam) * common.joint_batch(x_adv)[other])
    ce = common.cross_entropy(logits, y).mean()
    ce_other = common.cross_entropy(logits, common.joint_batch(y)[other]).mean()
    return dict(loss=lam * ce + (1 - lam) * ce_other)


# -------------------------------------------------------------------------------- flags and loop

def settings(flags, facts):
    """The defaults for the data set, the network and the eps of the command line."""
    tables = PAPER_WRN if flags.model == "wrn-32-10" else PAPER
    table = common.table_settings(tables, flags, facts, with_eps=("gamma", "eps_min", "step_size"))
    if table["batch_size"] is None:
        table["batch_size"] = 32 * common.ranks()[1]
    if table["lr"] is None:
        batch_size = flags.batch_size or table["batch_size"]
        table["lr"] = 0.1 * batch_size / 256
    if table["select_steps"] is None:
        table["select_steps"] = flags.attack_steps or table["attack_steps"]
    table["eps_start"] = "0" if flags.eps_rule == "authors" else "eps-w"
    return table


def method_flags(flag, methods):
    """The flags of this script. flag: add_argument of a group; methods: the names."""
    flag("--method", metavar="NAME", choices=methods, default="iaat", help="one of the above "
         "(%(default)s)")
    flag("--gamma", type=common.unit, help="how far an eps is tried to grow or shrink, and the "
         "line search's grid step, in [0, 1] units (%(default)s)")
    flag("--beta", type=common.number(0, 1), help="weight of the new eps in an "
         "image's running average (%(default)s)")
    flag("--eps-rule", choices=["paper", "authors"], default="paper", help="paper: misclassified "
         "images train clean; authors: their eps shrinks, and they train at it (%(default)s)")
    flag("--warmup", type=common.natural, help="epochs with --eps for all images; 0: none, tables "
         "5 and 6; as many as --epochs: eps never moves (%(default)s)")
    flag("--eps-start", choices=["eps-w", "0"], help="IAAT's eps before the first epoch where it "
         "has no warm-up; eps-w: that of --eps (%(default)s)")
    flag("--eps-min", type=common.number(0, 1), help="lower bound on the eps that is used, in "
         "[0, 1] units (%(default)s)")
    flag("--line-search", choices=["largest", "first-failure"], default="largest", help="first-"
         "failure: no radius is tried above an image's first one that fails (%(default)s)")
    flag("--attack-steps", type=common.count, help="steps of the training PGD (%(default)s)")
    flag("--select-steps", type=common.count, help="steps of the PGD that sets eps (%(default)s)")
    flag("--step-size", type=common.unit, help="step of the training PGD, the least one where "
         "eps differs, in [0, 1] units (%(default)s)")
    flag("--targeted", action=argparse.BooleanOptionalAction, help="attack towards a random wrong "
         "class in training (%(default)s)")
    flag("--lr-warmup", type=common.natural, help="epochs in which lr, where it is above 0.1, "
         "rises from there (%(default)s)")


def parse(losses, argv=None):
    """(flags, facts, defaults): see common.parse_flags. losses: the dictionary of main."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, dataset="cifar10", notes=dict(
        schedule="paper: falls after shares of the epochs, tables 10 and 11",
        eps="IAAT: that of the warm-up"))
    group = parser.add_argument_group("method", common.method_lines(losses))
    method_flags(group.add_argument, losses)
    args, facts, defaults, given = common.parse_flags(parser, argv, settings, losses)
    if args.method in ("iaat", "line-search") and args.warmup > args.epochs:
        raise common.UsageError(f"--warmup {args.warmup} is longer than --epochs {args.epochs}")
    if args.eps_start != defaults["eps_start"] and (args.method != "iaat" or args.warmup):
        raise common.UsageError("--eps-start is for --method iaat with --warmup 0")
    if args.eps_min > args.eps:
        raise common.UsageError(f"--eps-min is above --eps {common.shown(args.eps)}")
    if args.schedule == "onecycle" and "lr_warmup" in given:
        raise common.UsageError("--lr-warmup is for --schedule paper")
    if args.method == "line-search" and args.gamma > 4 * args.eps:
        raise common.UsageError(f"--gamma: the grid ends at 4 eps, {common.shown(4 * args.eps)}")
    return args, facts, defaults


def learning_rate(args, epoch, step_share):
    """The rate at an epoch, from 0, of whose steps the share `step_share` is done.

    The paper's (tables 10, 11) falls after shares of the epochs. Where lr is above 0.1, it first
    rises from 0.1, over --lr-warmup epochs.
    """
    if args.schedule == "onecycle":
        return args.lr * common.one_cycle((epoch + step_share) / args.epochs)
    lr = args.lr
    warmup_done = epoch + step_share
    if warmup_done < args.lr_warmup and lr > 0.1:
        lr = 0.1 + (lr - 0.1) * warmup_done / args.lr_warmup
    drops = [share for share in args.drop_at if epoch >= max(1, round(share * args.epochs))]
    return lr * args.drop_factor ** len(drops)


def merged(memory, seen):
    """The memory with all processes' updates. seen: (N,), the images that this one updated."""
    if common.ranks()[1] == 1:
        return memory
    fresh = torch.full_like(memory, -1).index_copy_(0, seen, memory[seen])
    torch.distributed.all_reduce(fresh, torch.distributed.ReduceOp.MAX)
    return torch.where(fresh < 0, memory, fresh)


def eps_row(memory, index):
    """What figs. 7 and 8 show of the images' eps, of 255. "eps": their mean in [0, 1] units."""
    of_255 = 255 * memory[index]
    row = {"eps": memory[index].mean().item(), "eps/mean": of_255.mean().item()}
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        row[f"eps/{100 * share:.0f}%"] = torch.quantile(of_255.cpu(), share).item()
    for i in index[common.subset(len(index), 3)].tolist():
        row[f"eps/image_{i}"] = 255 * memory[i].item()
    return row


def tell(run, reads, args, defaults, train, val):
    """Print what runs and what the columns are."""
    pgd = f"pgd-{defaults['attack_steps']}"
    kind = "targeted, " if defaults["targeted"] else ""
    attacks = (f"{pgd} ({kind}step {common.shown(defaults['step_size'])}): under attack at eps "
               f"{common.shown(args.eps)}")
    run.tell(reads, train, val, attacks, renamed={"val/robust": pgd})
    if args.method in ("iaat", "line-search"):
        print("eps: mean over the training images; right: share of them classified correctly")


def main():
    # One line per method. A flag that only other methods' lines read is refused. The lines run
    # later: args, model and the like are set below. memory: the eps of the epoch before, (N,).
    losses = {
        "iaat": lambda x, y, memory: iaat_loss(
            model, x, y, memory, epoch < args.warmup, args.eps, args.gamma, args.beta,
            args.eps_min, args.eps_rule, args.step_size, args.attack_steps, args.select_steps,
            facts["classes"] if args.targeted else 0, args.attack_mode),
        "line-search": lambda x, y, memory: line_search_loss(
            model, x, y, memory, epoch < args.warmup, args.eps, args.gamma, args.eps_min,
            args.line_search, args.step_size, args.attack_steps, args.select_steps,
            facts["classes"] if args.targeted else 0, args.attack_mode),
        "pgd-at": lambda x, y, memory: pgd_at_loss(
            model, x, y, args.eps, args.step_size, args.attack_steps,
            facts["classes"] if args.targeted else 0, args.attack_mode),
        "mixup": lambda x, y, memory: mixup_loss(
            model, x, y, args.eps, args.step_size, args.attack_steps,
            facts["classes"] if args.targeted else 0, args.attack_mode),
        "clean": lambda x, y, memory: clean_loss(model, x, y),
    }
    args, facts, defaults = parse(losses)
    device, precision = common.set_up(args.device, args.precision, tf32=args.tf32)
    train, val = common.load_train(facts, args.data_dir, args.val, args.limit, device, args.workers)

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, facts, args.normalize, device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    run = common.Run(__file__, args, defaults, facts, precision)
    first = run.start(model, optimizer,
                      "val/clean" if args.method == "clean" else "val/robust")
    tell(run, common.flags_read(losses[args.method]), args, defaults, train, val)

    # eps of every image, by its index in the training set; snapshots of it for fig. 8
    start_eps = 0.0 if args.eps_start == "0" else args.eps
    state = run.method_state or dict(
        memory=torch.full((int(train.index.max()) + 1,), start_eps), snapshots={})
    memory = state["memory"].to(device)
    steps = common.steps_per_epoch(len(train.labels), args.batch_size)
    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        meter = common.Meter(epoch)
        seen = []
        model.train()
        batches = common.train_batches(train, args.batch_size, args.seed, epoch, args.augment)
        for step, (x, y, index) in enumerate(batches):
            lr = learning_rate(args, epoch, (step + 0.5) / steps)
            common.set_lr(optimizer, lr)
            with common.autocast(device, run.precision):
                terms = losses[args.method](x, y, memory[index])
            if "eps" in terms:
                memory[index] = terms.pop("eps")
            common.update(optimizer, terms["loss"], len(x))
            meter.add(len(x), terms)
            seen.append(index)

        common.average_buffers(model.net)
        memory = merged(memory, torch.cat(seen))
        row = {"epoch": epoch + 1, "lr": lr}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        row["seconds"] = time.perf_counter() - started
        if "train/passes" in row:  # a method with an eps of each image's own
            row["cost/passes"] = row.pop("train/passes")
            row |= eps_row(memory.clamp(min=args.eps_min), train.index)
            if (epoch + 1) % max(1, args.epochs // 8) == 0:
                state["snapshots"][epoch + 1] = memory.cpu().clone()
        if args.val:
            common.seed_stream(args.seed, "validation", epoch)
            with common.autocast(device, run.precision):
                row["val/clean"] = common.accuracy(model, val)
                row["val/robust"] = common.accuracy(model, val, attack=lambda x, y: fixed_pgd(
                    model, x, y, args.eps, defaults["step_size"], defaults["attack_steps"],
                    facts["classes"] if defaults["targeted"] else 0))
        run.finish_epoch(model, optimizer, row, dict(state, memory=memory.cpu()),
                         histograms={"eps/all": 255 * memory[train.index]})
    run.close()


if __name__ == "__main__":
    common.cli(main)
