"""ATLAS: adversarial training via local stability.

Lu and Kumar, "Improving Local Effectiveness for Global robust training", 2021. A weak adversary x'
is worth more when the network is made stable around it: a small Jacobian there (local), and a
prediction that agrees with the one at the clean image (global). Eq. 12, with x' in the eps-ball
around x:
    mean over x of  CE(x') + alpha * ||J(x')||_F^2 + beta * KL(p(x') || p(x))

    python atlas.py --steps 1 --alpha 2e-4 --beta 5    # the paper's one-step ATLAS, CIFAR-10
    python atlas.py --dataset digits                   # bundled real digits, a minute on a CPU

Measured: results/atlas.md.
"""

import argparse
import time

import torch

import common

# The paper's settings (appendix B). A dictionary has a value per method. alpha and beta differ for
# one step of the attack and for several. Not printed: tradesjac for several steps, and on MNIST,
# where it has one-step ATLAS's; what ATLAS-l and ATLAS-g had. MNIST's "4-layer CNN" of two
# convolutional and two fully connected layers is not printed: LeNet+ is one. Momentum on MNIST is
# ours. `digits` is a smoke test, its settings are ours. Two settings are for --guide fixed: the
# number of epochs, and the shares of them after which lr falls. Only MNIST's 70 epochs are printed.
CIFAR10 = dict(
    model="wrn-28-8", normalize="none", augment="crop-flip", epochs=100, batch_size=64, lr=0.1,
    weight_decay=2e-4, momentum=0.9, val=5000, eps=8 / 255, fgsm_step=1.25, clip_start=True,
    step_size=0.007, val_steps=10, ramp={"jac": 0, "else": 15}, epochs_fixed=100,
    drop_at=[1 / 2, 3 / 4],
    alpha={"atlas": 2e-4, "jac": 0.5, "tradesjac": 2e-4},
    beta={"atlas": 5.0, "trades": 2.0, "tradesjac": 0.5},
    alpha_several_steps={"atlas": 1e-4, "jac": 0.5, "tradesjac": 2e-4},
    beta_several_steps={"atlas": 5.0, "trades": 4.0, "tradesjac": 0.5})
CIFAR100 = dict(CIFAR10, beta_several_steps={"atlas": 10.0, "trades": 4.0, "tradesjac": 0.5})
MNIST = dict(
    CIFAR10, model="lenet+", augment="none", batch_size=128, lr=0.01, weight_decay=0.0, eps=0.3,
    step_size=0.01, val_steps=20, clip_start=False, epochs_fixed=70,
    alpha={"atlas": 1e-5, "jac": 0.5, "tradesjac": 1e-5},
    beta={"atlas": 0.3, "trades": 1.0, "tradesjac": 0.3},
    alpha_several_steps={"atlas": 5e-6, "jac": 0.5, "tradesjac": 1e-5},
    beta_several_steps={"atlas": 0.2, "trades": 1.0, "tradesjac": 0.3})
DIGITS = dict(MNIST, epochs=30, epochs_fixed=30, batch_size=32, lr=0.02, eps=0.1, step_size=0.02,
              val_steps=10, ramp={"jac": 0, "else": 4})
PAPER = {"cifar10": CIFAR10, "cifar100": CIFAR100, "mnist": MNIST, "digits": DIGITS}

# Differences from the paper
# - ||J||_F^2 is C ||v^T d logits / dx'||^2 with v uniform on the unit sphere, squared as the text
#   has it; eqs. 2, 6 and 12 print no square. The public package that the paper cites has a factor
#   of 1/2: an alpha of its authors may mean half of ours.
# - Where the authors normalise outside the network, their J^2 is smaller by std^2, about 1/16.
# - One step: on CIFAR the random start is clipped to [0, 1] before its gradient is taken, on MNIST
#   it is not, as in the code of Wong et al., whose advice the paper follows. Clipped, a black
#   pixel ends at 0 or eps and nowhere between.
# - Attacks see BatchNorm in eval mode. In train mode, as in the one-step ADV that the paper
#   follows: --attack-mode train.
# - x' and x pass BatchNorm in separate forward passes: x' first in ATLAS, x first in its rivals.
# - PGD's step never exceeds the current eps while eps grows.
# - eps grows from step to step. alpha and beta of every method, not of ATLAS alone, grow with it;
#   JAC, which has no eps, starts with its alpha.
# - The count of epochs without a gain starts when eps has reached its value, or the first cut
#   could come before. The best so far counts from the first epoch. Training ends after 100 epochs
#   at the latest.
# - --guide fixed: of its "fixed learning rate scheduler" the paper prints 70 epochs on MNIST and
#   no drops. Ours divide lr by 5, as the guided one does, after 1/2 and 3/4 of the epochs.
# - The validation attack is the paper's. On MNIST its 20 steps of 0.01 move a pixel by 0.2, less
#   than eps: it can take a network that hides its gradient for a robust one, cut the rate and
#   choose the best epoch by that. --val-steps 40 --val-step-size 0.03 is deceived less.
# - The choice of validation images does not depend on --seed.
# - TRADES and TradesJac with several steps start from x plus a Gaussian of deviation 0.001, as
#   TRADES's authors do.
# - CIFAR images are cropped and flipped; MNIST has no weight decay: the paper says nothing of
#   either.
# - With BatchNorm in training mode the estimate of ||J||_F^2 counts the influence of other images
#   of the batch, too.
# - bfloat16 where the hardware has it, also for the validation attack that guides training.


# ------------------------------------------------------------------------------------ the method
# x: images (N, C, H, W), y: labels (N,). Losses return named scalars, the same names at every
# step; "loss" is the one to minimise. mode: of BatchNorm and dropout while an attack runs.

def one_step_attack(model, x, target, eps, fgsm_step=1.25, clip_start=True,
                    loss=common.cross_entropy, mode="eval"):
    """x' of one-step ATLAS and ADV (appendix B): FGSM from a random start, in the eps-ball.

    fgsm_step: length of the step in units of eps. target: what `loss` compares logits with.
    """
    if eps == 0:
        return x
    start = x + eps * common.uniform_like(x)
    if clip_start:
        start = start.clamp(0, 1)
    with common.model_mode(model, mode):
        grad, _ = common.input_gradient(model, start, target, loss)
    x_adv = start + fgsm_step * eps * grad.sign()
    return x_adv.clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))


def attack(model, x, y, eps, steps, step_size, fgsm_step=1.25, clip_start=True, mode="eval"):
    """x' by one step, or by PGD with steps of at most eps."""
    if eps == 0:
        return x
    if steps == 1:
        return one_step_attack(model, x, y, eps, fgsm_step, clip_start, mode=mode)
    return common.pgd(model, x, y, eps, min(step_size, eps), steps, mode=mode)


def kl_attack(model, x, eps, steps, step_size, fgsm_step=1.25, clip_start=True, mode="eval"):
    """x' that maximises KL(p(x) || p(x')), as TRADES has it."""
    if eps == 0:
        return x
    with common.model_mode(model, mode):  # not under no_grad: autocast would keep such weights
        reference = model(x).detach()
    if steps == 1:
        return one_step_attack(model, x, reference, eps, fgsm_step, clip_start, common.kl, mode)
    return common.pgd(model, x, reference, eps, min(step_size, eps), steps,
                      start=common.gaussian_start, loss=common.kl, mode=mode)


def squared_jacobian_norm(logits, x, projections=1, differentiable=True):
    """Unbiased estimate of ||d logits / dx||_F^2 per image, (N,) (appendix A.1).

    logits: (N, C), computed from x, (N, ...), which requires a gradient. differentiable: whether
    the estimate has a gradient with respect to the weights. It is C ||v^T d logits / dx||^2, with v
    uniform on the unit sphere of R^C for each image, averaged over the projections.
    """
    total = 0
    for _ in range(projections):
        v = torch.nn.functional.normalize(common.normal_like(logits), dim=1)
        projected, = torch.autograd.grad((v * logits).sum(), x, create_graph=differentiable,
                                         retain_graph=True)
        total = total + projected.flatten(1).square().sum(1)
    return logits.shape[1] * total / projections


def atlas_loss(model, x, x_adv, y, alpha, beta, eps_ratio=1.0, projections=1):
    """ATLAS, eq. 12; with --beta 0 ATLAS-l (local), with --alpha 0 ATLAS-g (global).

    x_adv: x' of `attack`. A term of weight 0 is not computed.
    eps_ratio: the current eps / eps, in [0, 1]; alpha and beta grow with it (appendix A.3).
    """
    # CE(x') + alpha ||J(x')||^2 + beta KL(p(x') || p(x))
    x_adv = x_adv.detach().requires_grad_(alpha > 0)  # for the Jacobian
    logits_adv = common.twice_differentiable(model, x_adv)
    ce = common.cross_entropy(logits_adv, y).mean()
    terms = dict(loss=ce, ce=ce)
    if alpha:
        terms["jacobian"] = squared_jacobian_norm(logits_adv, x_adv, projections).mean()
        terms["loss"] = terms["loss"] + eps_ratio * alpha * terms["jacobian"]
    if beta:
        terms["kl"] = common.kl(model(x), reference=logits_adv).mean()
        terms["loss"] = terms["loss"] + eps_ratio * beta * terms["kl"]
    return terms


# ---------------------------------------------------------------------- its rivals (appendix D.1)

def adv_loss(model, x_adv, y):
    """ADV: CE(x'), adversarial training."""
    return dict(loss=common.cross_entropy(model(x_adv), y).mean())


def trades_loss(model, x, x_adv, y, beta, eps_ratio=1.0):
    """TRADES: CE(x) + beta KL(p(x) || p(x')).

    x_adv: x' of `kl_attack`.
    """
    logits = model(x)
    ce = common.cross_entropy(logits, y).mean()
    kl = common.kl(model(x_adv), reference=logits).mean()
    return dict(loss=ce + eps_ratio * beta * kl, ce=ce, kl=kl)


def jac_loss(model, x, y, alpha, projections=1):
    """Zero-step JAC: CE(x) + alpha ||J(x)||^2."""
    x = x.detach().requires_grad_(True)
    logits = common.twice_differentiable(model, x)
    ce = common.cross_entropy(logits, y).mean()
    jacobian = squared_jacobian_norm(logits, x, projections).mean()
    return dict(loss=ce + alpha * jacobian, ce=ce, jacobian=jacobian)


def tradesjac_loss(model, x, x_adv, y, alpha, beta, eps_ratio=1.0, projections=1):
    """TradesJac: CE(x) + alpha ||J(x)||^2 + beta KL(p(x) || p(x')).

    x_adv: x' of `kl_attack`.
    """
    x = x.detach().requires_grad_(True)
    logits = common.twice_differentiable(model, x)
    ce = common.cross_entropy(logits, y).mean()
    jacobian = squared_jacobian_norm(logits, x, projections).mean()
    kl = common.kl(model(x_adv), reference=logits).mean()
    loss = ce + eps_ratio * alpha * jacobian + eps_ratio * beta * kl
    return dict(loss=loss, ce=ce, jacobian=jacobian, kl=kl)


# -------------------------------------------------- validation and the learning rate that it guides

def validate(model, val, eps, step_size, val_steps, fgsm_step, clip_start):
    """Accuracy on clean images, under PGD and under the one-step attack, all at the full eps.

    step_size, val_steps: of PGD. jacobian/x_adv: the estimate of ||J||^2 at the images of the
    one-step attack (fig. 11).
    """
    def by_pgd(x, y):
        return common.pgd(model, x, y, eps, step_size, val_steps)
    row = {"val/clean": common.accuracy(model, val),
           "val/robust": common.accuracy(model, val, attack=by_pgd)}
    right = []
    norms = []
    with common.model_mode(model, "eval"):
        for x, y, _ in common.eval_batches(val, 100):
            x_adv = one_step_attack(model, x, y, eps, fgsm_step, clip_start).requires_grad_(True)
            logits = model(x_adv)
            right.append(logits.argmax(1) == y)
            norms.append(squared_jacobian_norm(logits, x_adv, differentiable=False))
    row["val/one-step"] = torch.cat(right).float().mean().item()
    row["jacobian/x_adv"] = torch.cat(norms).mean().item()
    return row


def is_guided(args):
    """Whether validation cuts the learning rate and ends training."""
    return args.schedule == "paper" and args.guide == "validation"


def streaks_without_gain(history, ramp):
    """Lengths of the runs of epochs without a gain in val/robust, oldest first.

    The last one is the present one, 0 if the last epoch gained. Epochs of the ramp count as gains:
    eps has not reached its value.
    """
    best = -1.0
    streaks = [0]
    for row in history:
        gain = row["val/robust"] > best
        best = max(best, row["val/robust"])
        if gain or row["epoch"] <= ramp:
            streaks.append(0)
        else:
            streaks[-1] += 1
    return streaks


def learning_rate(args, history, epoch, step_share):
    """The rate at an epoch, from 0, of whose steps the share `step_share` is done.

    Each cut divides it by 5. The paper's guided rate is cut after each --plateau epochs in a row
    without a gain, the fixed one after given shares of the epochs.
    """
    if args.schedule == "onecycle":
        return args.lr * common.one_cycle((epoch + step_share) / args.epochs)
    if args.guide == "fixed":
        drops = [share for share in args.drop_at if epoch >= max(1, round(share * args.epochs))]
        return args.lr / 5 ** len(drops)
    cuts = sum(streak // args.plateau for streak in streaks_without_gain(history, args.ramp))
    return args.lr / 5 ** cuts


def overfits(history):
    """The best epoch's row where the last one shows catastrophic overfitting, else None.

    A rule of ours (after appendix E): since the best epoch robust accuracy has fallen by 10 points
    and the Jacobian's estimate at the one-step images has doubled.
    """
    best = max(history, key=lambda row: row["val/robust"])
    now = history[-1]
    has_fallen = now["val/robust"] < best["val/robust"] - 0.1
    if has_fallen and now["jacobian/x_adv"] > 2 * best["jacobian/x_adv"]:
        return best
    return None


def announce_overfitting(history):
    """Say so where an epoch overfits and the one before did not."""
    best = overfits(history)
    if best is None or (len(history) > 1 and overfits(history[:-1])):
        return
    now = history[-1]
    print("catastrophic overfitting: accuracy under PGD has fallen from "
          f"{100 * best['val/robust']:.1f} to {100 * now['val/robust']:.1f} %,\n  ||J(x')||^2 has "
          f"risen from {best['jacobian/x_adv']:.3g} to {now['jacobian/x_adv']:.3g}", flush=True)


# -------------------------------------------------------------------------------- flags and loop

def settings(flags, facts):
    """The defaults for the data set, the method, and other flags of the command line."""
    table = common.table_settings(PAPER, flags, facts, with_eps=("step_size",))
    if flags.steps > 1:
        table["alpha"] = table["alpha_several_steps"]
        table["beta"] = table["beta_several_steps"]
    if flags.guide == "fixed":
        table["epochs"] = table["epochs_fixed"]
    del table["alpha_several_steps"], table["beta_several_steps"], table["epochs_fixed"]
    table["val_step_size"] = flags.step_size or table["step_size"]
    return table


def parse(losses, argv=None):
    """(flags, facts, defaults): see common.parse_flags. losses: the dictionary of main."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, dataset="cifar10", notes=dict(schedule="paper: see --guide"))
    group = parser.add_argument_group("method", common.method_lines(losses))
    method_flags(group.add_argument, losses)
    guide_flags(parser.add_argument_group("validation and schedule").add_argument)
    args, facts, defaults, given = common.parse_flags(parser, argv, settings, losses,
                                                      always=("eps", "step_size"))
    refuse_contradictions(args, given)
    return args, facts, defaults


def method_flags(flag, losses):
    """The flags on the loss and its attack. flag: the add_argument of a group."""
    flag("--method", "--loss", metavar="NAME", choices=losses, default="atlas", help="one of the "
         "above (%(default)s)")
    flag("--steps", type=common.count, default=1, help="steps of the training attack; 1: FGSM "
         "(fast gradient sign method) from a random start; more: PGD (projected gradient "
         "descent), the paper's with 10 on CIFAR and 20 on MNIST (%(default)s)")
    flag("--fgsm-step", type=common.number(0, above=True), help="length of the one step in units "
         "of eps; the paper also tries 1.5 and 1.8 (%(default)s)")
    flag("--clip-start", action=argparse.BooleanOptionalAction, help="clip the one step's random "
         "start to [0, 1] before its gradient is taken (%(default)s)")
    flag("--step-size", type=common.unit, help="PGD's step where --steps is more than 1, in [0, 1] "
         "units (%(default)s)")
    flag("--alpha", type=common.number(0), help="weight of the Jacobian term (%(default)s)")
    flag("--beta", type=common.number(0), help="weight of the KL term (%(default)s)")
    flag("--projections", type=common.count, default=1, help="random projections of the Jacobian "
         "(%(default)s)")
    flag("--ramp", type=common.natural, help="epochs over which eps grows from 0 (%(default)s)")


def guide_flags(flag):
    """The flags on validation and what it decides. flag: the add_argument of a group."""
    flag("--guide", choices=["validation", "fixed"], default="validation", help="what "
         "cuts lr under --schedule paper. validation: epochs without a gain in accuracy under PGD "
         "on validation images; they also end training. fixed: lr falls after 1/2 and 3/4 of "
         "--epochs, and all epochs run, 70 on MNIST. The paper has a fixed schedule on MNIST, but "
         "does not say when lr falls: 1/2 and 3/4 are ours (%(default)s)")
    flag("--plateau", type=common.count, default=2, help="--guide validation: epochs without a "
         "gain that divide lr by 5 (%(default)s)")
    flag("--patience", type=common.count, default=10, help="--guide validation: epochs without a "
         "gain that end training (%(default)s)")
    flag("--val-steps", type=common.count, help="steps of PGD on validation images (%(default)s)")
    flag("--val-step-size", type=common.unit, help="its step, in [0, 1] units; by default that of "
         "--step-size. A stronger guide: 40 steps of 0.03 on MNIST, 20 of 2/255 on CIFAR "
         "(%(default)s)")


def refuse_contradictions(args, given):
    """UsageError where flags do not go together. given: the names of those that were given."""
    if args.steps > 1 and given & {"fgsm_step", "clip_start"}:
        raise common.UsageError("--fgsm-step and --clip-start are for --steps 1")
    if args.method == "jac" and "ramp" in given:
        raise common.UsageError("--method jac has no eps that could grow: no --ramp")
    if args.schedule == "onecycle" and given & {"guide", "plateau", "patience"}:
        raise common.UsageError("--guide, --plateau and --patience are for --schedule paper")
    if args.guide == "fixed" and given & {"plateau", "patience"}:
        raise common.UsageError("--plateau and --patience are for --guide validation")
    if args.val == 0 and is_guided(args):
        raise common.UsageError("--val 0: validation guides the learning rate and ends training, "
                                "it cannot be empty (--guide fixed does without)")
    if args.val == 0 and given & {"val_steps", "val_step_size"}:
        raise common.UsageError("--val 0: nothing is validated, so no --val-steps and no "
                                "--val-step-size")


def tell(run, reads, args, train, val):
    """Print what runs and what the columns are."""
    pgd = f"pgd-{args.val_steps}"
    attacks = (f"{pgd} (step {common.shown(args.val_step_size)}), one-step (as --steps 1): under "
               f"attack at eps {common.shown(args.eps)}")
    run.tell(reads, train, val, attacks, renamed={"val/robust": pgd})


def main():
    # One line per method. A flag that only other methods' lines read is refused. The lines run
    # later: args, model and the like are set below.
    # ratio: the current eps / eps, in [0, 1].
    losses = {
        "atlas": lambda x, y, ratio: atlas_loss(
            model, x, attack(model, x, y, ratio * args.eps, args.steps, args.step_size,
                             args.fgsm_step, args.clip_start, args.attack_mode),
            y, args.alpha, args.beta, ratio, args.projections),
        "adv": lambda x, y, ratio: adv_loss(
            model, attack(model, x, y, ratio * args.eps, args.steps, args.step_size,
                          args.fgsm_step, args.clip_start, args.attack_mode), y),
        "trades": lambda x, y, ratio: trades_loss(
            model, x, kl_attack(model, x, ratio * args.eps, args.steps, args.step_size,
                                args.fgsm_step, args.clip_start, args.attack_mode),
            y, args.beta, ratio),
        "jac": lambda x, y, ratio: jac_loss(model, x, y, args.alpha, args.projections),
        "tradesjac": lambda x, y, ratio: tradesjac_loss(
            model, x, kl_attack(model, x, ratio * args.eps, args.steps, args.step_size,
                                args.fgsm_step, args.clip_start, args.attack_mode),
            y, args.alpha, args.beta, ratio, args.projections),
    }
    args, facts, defaults = parse(losses)
    device, precision = common.set_up(args.device, args.precision, tf32=args.tf32)
    train, val = common.load_train(facts, args.data_dir, args.val, args.limit, device, args.workers)

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, facts, args.normalize, device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    guided = is_guided(args)
    run = common.Run(__file__, args, defaults, facts, precision, epochs_may_grow=guided)
    first = run.start(model, optimizer, "val/robust")
    tell(run, common.flags_read(losses[args.method]), args, train, val)

    steps = common.steps_per_epoch(len(train.labels), args.batch_size)
    for epoch in range(first, args.epochs):
        if guided and streaks_without_gain(run.history, args.ramp)[-1] >= args.patience:
            print(f"no gain for {args.patience} epochs: training ends")
            break
        started = time.perf_counter()
        meter = common.Meter(epoch)
        model.train()
        batches = common.train_batches(train, args.batch_size, args.seed, epoch, args.augment)
        for step, (x, y, _) in enumerate(batches):
            lr = learning_rate(args, run.history, epoch, (step + 0.5) / steps)
            common.set_lr(optimizer, lr)
            ratio = 1.0
            if args.ramp:
                ratio = min(1.0, (epoch * steps + step) / (args.ramp * steps))
            with common.autocast(device, run.precision):
                terms = losses[args.method](x, y, ratio)
            common.update(optimizer, terms["loss"], len(x))
            meter.add(len(x), terms)

        common.average_buffers(model.net)
        row = {"epoch": epoch + 1, "lr": lr, "eps": ratio * args.eps}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        row["seconds"] = time.perf_counter() - started
        if args.val:
            common.seed_stream(args.seed, "validation", epoch)
            with common.autocast(device, run.precision):
                row |= validate(model, val, args.eps, args.val_step_size, args.val_steps,
                                args.fgsm_step, args.clip_start)
        run.finish_epoch(model, optimizer, row)
        if args.val:
            announce_overfitting(run.history)
    run.close()


if __name__ == "__main__":
    common.cli(main)
