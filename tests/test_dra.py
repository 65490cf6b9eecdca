"""dra_finetune.py: the attack against a plain loop, the updates one after the other, the dual,
both phases."""

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import dra_finetune
import evaluate
from conftest import Linear, SmallNet, flags_of, plain, run_interrupted, run_main

SHORT = ["--dataset", "digits", "--model", "cnn-small", "--limit", "100", "--batch-size", "25",
         "--val", "100", "--attack-steps", "3"]


def network(seed=0, classes=4):
    """(network, images, labels), small and smooth; the images are whole numbers of 255."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 9), torch.nn.Tanh(),
                              torch.nn.Linear(9, classes))
    x = (255 * (0.3 + 0.4 * torch.rand(10, 1, 4, 4))).round() / 255
    return plain(net), x, torch.randint(0, classes, (10,))


def measured(model, x, y, eps, steps, p):
    """DRA as evaluate.py has it."""
    return evaluate.dra(model, x, y, SimpleNamespace(eps=eps, steps=steps, p=p), y)


each_dra = pytest.mark.parametrize("dra", [dra_finetune.dra_attack, measured],
                               ids=["training", "evaluation"])


def plain_dra(model, image, label, eps, steps, p, linf=None):
    """Algorithm 1 on one image, written out. linf: the largest change of a value at any step."""
    point = image.clone()
    for _ in range(steps):
        point.requires_grad_(True)
        grad, = torch.autograd.grad(F.cross_entropy(model(point), label), point)
        point = point.detach() + eps / steps * grad / (grad.abs().sum() / grad.numel())
        if linf is not None:
            change = (point - image).clamp(-linf, linf)
            point = (image + change).clamp(0, 1)
    order = grad.abs().flatten().argsort(descending=True)
    result = image.clone().flatten()
    for rank in range(round(p * image.numel())):
        result[order[rank]] = point.flatten()[order[rank]]
    return result.view_as(image).clamp(0, 1)


@each_dra
@pytest.mark.parametrize("p", [0.0, 0.3, 1 / 3, 1.0])
def test_dra_against_a_plain_loop(dra, p):
    """Image by image, with an eps of its own for each; exactly round(p N) values differ."""
    model, x, y = network()
    eps = torch.linspace(0.01, 0.05, len(x))
    ours = dra(model, x, y, eps, 5, p)
    for i in range(len(x)):
        one = plain_dra(model, x[i:i + 1], y[i:i + 1], eps[i].item(), 5, p)
        torch.testing.assert_close(ours[i:i + 1], one)
    assert ((ours != x).flatten(1).sum(1) == round(p * 16)).all()


@each_dra
def test_dra_on_a_linear_model(dra):
    """Before the filter the mean change equals eps, along the gradient; the filter keeps its
    largest values; a gradient of zero moves nothing; the result stays in [0, 1]; neither mode nor
    .grad changes."""
    model = Linear(classes=2)
    x = 0.3 + 0.4 * torch.rand(8, 1, 4, 4)
    y = torch.randint(0, 2, (8,))
    delta = (dra(model, x, y, 0.02, 7, 1.0) - x).flatten(1)
    torch.testing.assert_close(delta.abs().mean(1), torch.full((8,), 0.02))
    weight = model.layer.weight.detach()
    assert (F.cosine_similarity(delta, weight[1 - y] - weight[y]) > 0.9999).all()
    half = (dra(model, x, y, 0.02, 7, 0.5) - x).flatten(1)
    assert (half.abs() > 0).sum(1).eq(8).all()
    assert (half.abs().sum(1) > 0.5 * delta.abs().sum(1)).all()
    model.layer.weight.data *= 0
    assert torch.equal(dra(model, x, y, 0.02, 7, 1.0), x)
    net = plain(SmallNet())
    net(torch.rand(4, 1, 6, 6))
    x_adv = dra(net.train(), torch.rand(4, 1, 6, 6), torch.zeros(4, dtype=torch.int64), 0.5, 3, 1.0)
    assert x_adv.min() == 0 and x_adv.max() == 1 and all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_the_bound_on_a_linear_model():
    """There the gradient g is the same at every point: a value's change is eps g / mean |g|, cut
    at +-linf and at [0, 1], and 0 outside the share p. Each image may have a bound of its own; one
    that is not reached changes nothing; without one a value moves by more."""
    model = Linear(classes=2)
    x = 0.3 + 0.4 * torch.rand(8, 1, 4, 4)
    x[0] = 0.99
    x[1] = 0.005
    y = torch.randint(0, 2, (8,))
    weight = model.layer.weight.detach()
    g = (weight[1 - y] - weight[y]).view_as(x)
    change = 0.02 * g / g.abs().mean((1, 2, 3), keepdim=True)
    rank = g.abs().flatten(1).argsort(1, descending=True).argsort(1).view_as(x)
    for linf in (0.03, torch.linspace(0.004, 0.1, 8)):
        bound = torch.as_tensor(linf).expand(8).view(8, 1, 1, 1)
        moved = torch.minimum(torch.maximum(change, -bound), bound)
        wanted = torch.where(rank < 8, x + moved, x).clamp(0, 1)
        ours = dra_finetune.dra_attack(model, x, y, 0.02, 7, 0.5, linf)
        torch.testing.assert_close(ours, wanted)
        assert ((ours - x).abs() <= bound + 1e-6).all()
    free = dra_finetune.dra_attack(model, x, y, 0.02, 7, 0.5)
    assert (free - x).abs().max() > 0.04


def test_the_bound_holds_at_every_step():
    """Against algorithm 1 written out, with each iterate cut: on a curved network that is not the
    same as to cut the last one."""
    model, x, y = network()
    x[:, :, 0] = 0.98
    ours = dra_finetune.dra_attack(model, x, y, 0.3, 5, 2 / 3, 0.1)
    late = []
    for i in range(len(x)):
        image = x[i:i + 1]
        torch.testing.assert_close(ours[i:i + 1],
                                   plain_dra(model, image, y[i:i + 1], 0.3, 5, 2 / 3, 0.1))
        free = plain_dra(model, image, y[i:i + 1], 0.3, 5, 2 / 3)
        late.append(torch.clamp(free, image - 0.1, image + 0.1))
    assert (ours - torch.cat(late)).abs().max() > 0.01
    assert (ours - x).abs().max() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="images in"):
        dra_finetune.dra_attack(model, x + 0.5, y, 0.3, 5, 2 / 3)


@pytest.mark.parametrize("p", [0.25, 1 / 3, 1.0])
def test_training_and_evaluation_make_the_same_images(p):
    """evaluate.py has its own copy of DRA, which an attack's name gives eps, steps and share."""
    torch.manual_seed(0)
    model = plain(SmallNet())
    x = torch.rand(6, 1, 6, 6)
    y = torch.randint(0, 5, (6,))
    model(x)
    facts = common.dataset_facts("digits")
    for mode in (True, False):
        model.train(mode)
        asked, = evaluate.parse_attacks("dra-5:0.1", facts, 0.3, p=p)
        theirs = evaluate.dra(model, x, y, asked, y)
        assert torch.equal(dra_finetune.dra_attack(model, x, y, 0.1, 5, p), theirs)
        assert not torch.equal(dra_finetune.dra_attack(model, x, y, 0.11, 5, p), theirs)
        eps = torch.linspace(0.01, 0.2, len(x))
        theirs = measured(model, x, y, eps, 3, p)
        assert torch.equal(dra_finetune.dra_attack(model, x, y, eps, 3, p), theirs)


def phases(monkeypatch, model, images, labels, *words, precision="float32", state=None):
    """What main() trains, a Run-like record of each phase in order, with these images in the place
    of the data set's and this network in the place of --model; nothing is written.

    state: what an interrupted run of the phase had kept.
    """
    begun = []

    class Record:
        def __init__(self, script, flags, defaults, facts, precision_of_machine,
                     earlier_suffixes=()):
            self.args = flags
            self.path = Path("run.pt")
            self.precision = precision
            self.method_state = state
            self.history = []
            self.weights = []  # after every epoch

        def start(self, model, optimizer, best_by=None):
            self.first_weights = copy_of(model)
            begun.append(self)
            return 0

        def tell(self, *_, **__):
            pass

        def finish_epoch(self, model, optimizer, row, method_state):
            self.history.append(row)
            self.weights.append(copy_of(model))
            self.state = method_state

        def close(self):
            pass
    train = common.Split((255 * images).round().to(torch.uint8), labels, torch.arange(len(labels)))
    with monkeypatch.context() as patch:
        patch.setattr(common, "Run", Record)
        patch.setattr(common, "build_model", lambda *_: model)
        patch.setattr(common, "load_train", lambda *_: (train, None))
        run_main(dra_finetune.main, "dra_finetune.py", *words, "--val", 0, "--device", "cpu")
    return begun


def copy_of(model):
    return [p.detach().clone() for p in model.parameters()]


MNIST = ["--dataset", "mnist", "--eps", "0.05", "--attack-steps", "3", "--batch-size", "10",
         "--augment", "none"]
ONE_STEP = [*MNIST, "--epochs", "1", "--momentum", "0", "--weight-decay", "0"]
SECOND = ["--init", "vanilla.pt"]  # no first phase; `phases` opens no file


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_adversary_attacks_the_updated_network(precision, monkeypatch):
    """Section IV.A: first the clean update, then DRA and the second update on the network that it
    left."""
    model, x, y = network()
    twin, _, _ = network()
    run, = phases(monkeypatch, model, x, y, *ONE_STEP, *SECOND, "--lr", 3, precision=precision)
    row = run.history[0]
    loss = F.cross_entropy(twin(x), y)
    tolerance = dict(rel=1e-5 if precision == "float32" else 0.02)
    assert row["train/ce_clean"] == pytest.approx(loss.item(), **tolerance)
    loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 3.0 * p.grad
    old, _, _ = network()
    stale = F.cross_entropy(old(dra_finetune.dra_attack(old, x, y, 0.05, 3, 2 / 3)), y).item()
    fresh = F.cross_entropy(twin(dra_finetune.dra_attack(twin, x, y, 0.05, 3, 2 / 3)), y).item()
    assert abs(stale - fresh) > 0.05
    assert row["train/ce_adv"] == pytest.approx(fresh, **tolerance)
    assert row["train/loss"] == row["train/ce_adv"] and row["eps"] == 0.05


def by_hand(x, y, epochs, clean_epochs, order=("clean", "adversarial"), attacked="present",
            linf=None):
    """The weights after each epoch of one batch, with momentum 0.9, weight decay 2e-4 and a cosine
    from 0.5, eps from 0.05 to 0.02. attacked: the present network, the "stale" one, as it was
    before the batch, or the "first" one, as it was before the phase."""
    model, _, _ = network()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    after = []
    for epoch in range(epochs):
        lr = 0.5 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        adversarial = epoch < epochs - clean_epochs
        eps = 0.05 - 0.03 * epoch / (epochs - clean_epochs - 1)
        old, _, _ = network()
        if attacked != "first":
            old.load_state_dict(model.state_dict())
        for kind in order if adversarial else ("clean",):
            images = x
            if kind == "adversarial":
                target = model if attacked == "present" else old
                images = torch.cat([plain_dra(target, x[i:i + 1], y[i:i + 1], eps, 3, 2 / 3, linf)
                                    for i in range(len(x))])
            grads = torch.autograd.grad(F.cross_entropy(model(images), y), model.parameters())
            with torch.no_grad():
                for p, grad, v in zip(model.parameters(), grads, velocity):
                    v.mul_(0.9).add_(grad + 2e-4 * p)
                    p -= lr * v
        after.append(copy_of(model))
    return after


def test_a_batch_makes_its_two_updates_in_order(monkeypatch):
    """Two epochs of two steps of SGD for each batch, the second on the network that the first has
    left, and a clean epoch of the first step alone, against steps written out; neither the other
    order, nor an attack on the network before the batch, nor one update alone leads there."""
    model, x, y = network()
    run, = phases(monkeypatch, model, x, y, *MNIST, *SECOND, "--eps-end", "0.02", "--epochs", 3,
                  "--clean-epochs", 1, "--lr", "0.5")
    for ours, expected in zip(run.weights, by_hand(x, y, 3, 1), strict=True):
        for value, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, wanted)
    with_attack = ["train/ce_adv" in row for row in run.history]
    assert with_attack == [True, True, False]
    assert run.history[2]["train/loss"] == run.history[2]["train/ce_clean"]
    others = [by_hand(x, y, 3, 1, order=("adversarial", "clean")),
              by_hand(x, y, 3, 1, attacked="stale"),
              by_hand(x, y, 3, 1, order=("adversarial",)), by_hand(x, y, 3, 1, order=("clean",))]
    for other in others:
        for ours, wrong in zip(run.weights, other):
            assert max((a - b).abs().max() for a, b in zip(ours, wrong)) > 1e-3
    more = by_hand(x, y, 3, 0)  # the last epoch's two updates instead of one
    assert max((a - b).abs().max() for a, b in zip(run.weights[2], more[2])) > 1e-3


@pytest.mark.parametrize("words, linf, attacked", [
    (["--attacked", "first-phase"], None, "first"), (["--linf", 0.04], 0.04, "present"),
    (["--linf", 0.04, "--attacked", "first-phase"], 0.04, "first")], ids=["first", "linf", "both"])
def test_other_readings(words, linf, attacked, monkeypatch):
    """The adversary of the network that the phase began with, and DRA with a bound, against steps
    written out; each leads elsewhere than the default reading does."""
    model, x, y = network()
    words = [*MNIST, *SECOND, "--eps-end", "0.02", "--epochs", 3, "--clean-epochs", 1,
             "--lr", "0.5", *words]
    run, = phases(monkeypatch, model, x, y, *words)
    for ours, expected in zip(run.weights, by_hand(x, y, 3, 1, attacked=attacked, linf=linf)):
        for value, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, wanted)
    usual = by_hand(x, y, 3, 1)[1]
    assert max((a - b).abs().max() for a, b in zip(run.weights[1], usual)) > 1e-4


def seen_attacks(monkeypatch, model, x, y, *words):
    """What main() asks `attack` for at each step: name of an argument -> value."""
    seen = []
    real = dra_finetune.attack

    def watched(*values, **named):
        seen.append(inspect.signature(real).bind(*values, **named).arguments)
        return real(*values, **named)
    with monkeypatch.context() as patch:
        patch.setattr(dra_finetune, "attack", watched)
        phases(patch, model, x, y, *words)
    return seen


@pytest.mark.parametrize("method", ["finetune", "dual", "madry", "trades", "mart"])
def test_the_bound_reaches_every_method(method, monkeypatch):
    """--linf as given; in units of normalised images times the data set's deviation; None without
    the flag. The adversary of the present network is the default."""
    model, x, y = network()
    words = [*MNIST, *SECOND, "--epochs", 1, "--method", method, "--adversary", "dra"]
    scale = common.pixel_scale(common.dataset_facts("mnist"))
    for more, wanted in (([], None), (["--linf", "0.1"], 0.1),
                         (["--linf", "0.1", "--normalized-eps"], 0.1 * scale)):
        asked, = seen_attacks(monkeypatch, model, x, y, *words, *more)
        assert asked["linf"] == (wanted and pytest.approx(wanted))
        assert asked["model"] is model


@pytest.mark.parametrize("method, adversary", [("finetune", "pgd"), ("dual", "dra")])
def test_the_frozen_network(method, adversary, monkeypatch):
    """--attacked first-phase: in every epoch it is the one that the first phase left, also after an
    interruption, when it comes from what the run kept; it is never trained."""
    model, x, y = network()
    words = [*MNIST, "--method", method, "--adversary", adversary, "--attacked", "first-phase",
             "--epochs", 2, "--lr", "0.5"]
    frozen = []
    real = dra_finetune.attack

    def watched(attacked, *values, **named):
        frozen.append((attacked, copy_of(attacked)))
        assert not attacked.training and not any(p.requires_grad for p in attacked.parameters())
        return real(attacked, *values, **named)
    with monkeypatch.context() as patch:
        patch.setattr(dra_finetune, "attack", watched)
        first, second = phases(patch, model, x, y, *words, "--pretrain-epochs", 2,
                               "--pretrain-lr", 1)
        left = first.weights[-1]
        again, _, _ = network(seed=5)
        phases(patch, again, x, y, *words, *SECOND, state=second.state)
    assert len(frozen) == 4
    for attacked, weights in frozen:
        assert attacked not in (model, again)
        assert all(torch.equal(a, b) for a, b in zip(weights, left, strict=True))
    assert not torch.equal(second.weights[0][0], left[0])  # the trained one has moved


@pytest.mark.parametrize("adversary", ["dra", "pgd"])
def test_methods_from_scratch(adversary, monkeypatch):
    """Madry's is cross-entropy on the adversary alone; TRADES adds KL(p(x) || p(x')); both with
    either adversary."""
    model, x, y = network()
    start, _, _ = network()
    split = common.Split((255 * x).round().to(torch.uint8), y, torch.arange(len(y)))
    run, = phases(monkeypatch, model, x, y, *ONE_STEP, "--method", "madry",
                  "--adversary", adversary)
    batch, labels, _ = next(common.train_batches(split, 10, 0, 0))  # seeds torch, as in training
    x_adv = dra_finetune.attack(start, batch, labels, 0.05, adversary, 3, 2 / 3)
    expected = F.cross_entropy(start(x_adv), labels).item()
    assert run.history[0]["train/loss"] == pytest.approx(expected)
    linf = (x_adv - batch).abs().max().item()
    assert linf == pytest.approx(0.05) if adversary == "pgd" else linf > 0.06

    model, _, _ = network()
    run, = phases(monkeypatch, model, x, y, *ONE_STEP, "--method", "trades", "--lam", 3,
                  "--adversary", adversary)
    row = run.history[0]
    batch, labels, _ = next(common.train_batches(split, 10, 0, 0))
    x_adv = dra_finetune.attack(start, batch, start(batch).detach(), 0.05, adversary, 3, 2 / 3,
                                loss=common.kl, start=common.gaussian_start)
    moved = (x_adv - batch).abs().flatten(1)
    if adversary == "pgd":
        assert moved.max() <= 0.05 + 1e-6
    else:
        assert (moved > 0).sum(1).max() <= round(2 / 3 * 16)
    log_p = start(batch).log_softmax(1)
    kl = F.kl_div(start(x_adv).log_softmax(1), log_p, log_target=True, reduction="batchmean")
    ce = F.cross_entropy(start(batch), labels)
    assert row["train/kl"] > 1e-4 and row["train/kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert row["train/ce_clean"] == pytest.approx(ce.item())
    assert row["train/loss"] == pytest.approx(row["train/ce_clean"] + 3 * row["train/kl"])


def test_mart_against_its_formula():
    """From probabilities in float64, on images of which some are misclassified."""
    model, x, y = network()
    common.seed_stream(0, "mart")
    terms = dra_finetune.mart_loss(model, x, y, 0.05, 5.0, "pgd", 3, 0.5)
    common.seed_stream(0, "mart")
    x_adv = dra_finetune.attack(model, x, y, 0.05, "pgd", 3, 0.5, start=common.gaussian_start)
    p = model(x).detach().double().softmax(1)
    q = model(x_adv).detach().double().softmax(1)
    expected_bce = 0.0
    expected_kl = 0.0
    for i, label in enumerate(y.tolist()):
        wrong = max(q[i, k].item() for k in range(q.shape[1]) if k != label)
        expected_bce -= math.log(q[i, label]) + math.log(1 - wrong)
        kl = (p[i] * (p[i] / q[i]).log()).sum().item()
        expected_kl += kl * (1 - p[i, label].item())
    assert terms["bce"].item() == pytest.approx(expected_bce / len(y), rel=1e-5)
    assert terms["weighted_kl"].item() == pytest.approx(expected_kl / len(y), rel=1e-3)
    assert terms["loss"].item() == pytest.approx(
        (terms["bce"] + 5 * terms["weighted_kl"]).item())
    assert terms["weighted_kl"] > 1e-6


def test_the_dual(monkeypatch):
    """Eqs. 8 and 9: lambda rises while the clean loss exceeds the first phase's, falls otherwise,
    never below 0."""
    model, x, y = network()
    words = [*MNIST, *SECOND, "--method", "dual", "--dual-lr", "0.5", "--epochs", 2,
             "--lr", "1e-12", "--weight-decay", 0]
    state = dict(multiplier=torch.tensor(1.0), std=0.2, before=0.0)
    run, = phases(monkeypatch, model, x, y, *words, state=state)
    first, second = run.history
    excess = first["train/ce_clean"] - 0.2
    assert first["train/ce_clean"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert excess > 0 and first["train/multiplier"] == 1
    assert second["train/multiplier"] == pytest.approx(1 + 0.5 * excess)
    assert run.state["multiplier"].item() == pytest.approx(1 + 2 * 0.5 * excess)
    for row in (first, second):
        penalty = row["train/multiplier"] * excess
        assert row["train/loss"] == pytest.approx(row["train/ce_adv"] + penalty)
    state = dict(multiplier=torch.tensor(1.0), std=50.0, before=0.0)
    run, = phases(monkeypatch, model, x, y, *words, state=state)
    assert run.history[1]["train/multiplier"] == run.state["multiplier"] == 0
    terms = dra_finetune.dual_loss(model, x, y, 0.0, "dra", 3, 2 / 3, torch.tensor(1.0), 0.2, 0.5)
    assert {"ce_adv", "multiplier"} <= terms.keys()  # at eps 0, too
    assert terms["ce_adv"] == terms["ce_clean"]


def test_the_dual_makes_one_update(monkeypatch):
    """lr times the gradient of eq. 8, whose excess is over the first phase's last network."""
    model, x, y = network()
    first, second = phases(monkeypatch, model, x, y, *ONE_STEP, "--method", "dual", "--lr", 2,
                           "--pretrain-epochs", 3, "--pretrain-lr", 1)
    twin, _, _ = network()
    for p, value in zip(twin.parameters(), first.weights[-1]):
        p.data = value
    ce = F.cross_entropy(twin(x), y)
    assert second.state["std"] == pytest.approx(ce.item(), rel=1e-5)
    x_adv = dra_finetune.dra_attack(twin, x, y, 0.05, 3, 2 / 3)
    loss = F.cross_entropy(twin(x_adv), y) + 1.0 * (ce - ce.item())
    grads = torch.autograd.grad(loss, twin.parameters())
    for p, grad, ours in zip(twin.parameters(), grads, second.weights[0]):
        torch.testing.assert_close(ours, p - 2 * grad)
        assert grad.abs().max() > 1e-3


def test_the_first_phases_loss():
    """Over the batches given, BatchNorm by their own statistics, which leave the network's as they
    were."""
    torch.manual_seed(0)
    model = plain(torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(),
                                      torch.nn.Linear(16, 3))).eval()
    batches = [(torch.rand(n, 1, 4, 4), torch.randint(0, 3, (n,)), None) for n in (8, 4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = dra_finetune.mean_clean_loss(model, batches)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert not model.training
    model.train()
    expected = sum(F.cross_entropy(model(x), y).item() * len(y) for x, y, _ in batches) / 12
    assert value == pytest.approx(expected)


def radii(monkeypatch, *words):
    """The adversary's eps in every epoch that main() trains; 0 in epochs without one."""
    torch.manual_seed(0)
    shape = common.DATASETS["mnist" if "mnist" in words else "cifar10"]["shape"]
    model = plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2)))
    images = torch.rand(4, shape[0], 8, 8)
    model(images)
    seen = []

    def watched(model, x, target, eps, *_, **__):
        seen.append(eps)
        return x
    with monkeypatch.context() as patch:
        patch.setattr(dra_finetune, "attack", watched)
        run, = phases(patch, model, images, torch.tensor([0, 1, 0, 1]), *words, *SECOND)
    adversarial = [bool({"train/ce_adv", "train/kl"} & row.keys()) for row in run.history]
    assert len(seen) == adversarial.count(True)
    used = [seen.pop(0) if attacked else 0.0 for attacked in adversarial]
    facts = common.dataset_facts("cifar10")
    scale = common.pixel_scale(facts) if "--normalized-eps" in words else 1
    if "vanilla" not in words:  # the log says eps in the unit of the flag
        assert [scale * row["eps"] for row in run.history] == pytest.approx(used)
        assert list(run.history[0])[:3] == ["epoch", "lr", "eps"]
    return used


def test_eps_in_every_epoch(monkeypatch):
    """Section V.A: eps 2 to 0.5 of 255 over 50 epochs, then ten clean ones; MNIST constant;
    normalised units."""
    eps = [255 * value for value in radii(monkeypatch)]
    assert len(eps) == 60
    assert (eps[0], eps[49]) == (pytest.approx(2), pytest.approx(0.5)) and eps[50:] == [0] * 10
    steps = [a - b for a, b in zip(eps, eps[1:50])]
    assert max(steps) == pytest.approx(min(steps))
    scaled = radii(monkeypatch, "--normalized-eps")
    assert 255 * scaled[0] == pytest.approx(2 * (0.2470 + 0.2435 + 0.2616) / 3)
    mnist = radii(monkeypatch, "--dataset", "mnist")
    assert len(mnist) == 50 and set(mnist) == {0.1}
    large = radii(monkeypatch, "--dataset", "mnist", "--eps", "0.3")
    assert len(large) == 50 and set(large) == {0.3}
    pgd = radii(monkeypatch, "--adversary", "pgd", "--eps", "2.55/255", "--eps-end", "2.55/255")
    assert 255 * pgd[0] == pytest.approx(2.55) == pytest.approx(255 * pgd[49])
    madry = radii(monkeypatch, "--method", "madry")
    assert len(madry) == 100 and set(madry) == {8 / 255}  # table I
    trades = radii(monkeypatch, "--dataset", "mnist", "--method", "trades", "--eps", "0.2")
    assert set(trades) == {0.2}
    tuned = radii(monkeypatch, "--adversary", "pgd")
    assert [255 * tuned[0], 255 * tuned[49]] == [pytest.approx(5.1), pytest.approx(5.1 / 4)]
    dual = [255 * value for value in radii(monkeypatch, "--method", "dual")]
    assert (dual[0], dual[59]) == (pytest.approx(2), pytest.approx(0.5))
    assert set(radii(monkeypatch, "--method", "vanilla")) == {0.0}
    first, _ = phases(monkeypatch, *network(), *ONE_STEP, "--pretrain-epochs", 1)
    assert "eps" not in first.history[0]  # nothing is attacked


def test_settings():
    """The paper's for each method and adversary; what a method has no use for is refused."""
    args = flags_of(dra_finetune)
    assert (args.model, args.attack_steps, args.batch_size) == ("resnet50", 5, 128)
    assert args.p == pytest.approx(1 / 3) and args.method == "finetune" and args.adversary == "dra"
    scaled = flags_of(dra_finetune, "--normalized-eps")
    stored = dict(dataset="cifar10", num_classes=10, input_shape=(3, 32, 32), args=vars(scaled))
    aimed = [evaluate.trained_eps(stored, asked)[0] for asked in (False, True)]
    scale = common.pixel_scale(common.dataset_facts("cifar10"))
    assert [255 * eps for eps in aimed] == [pytest.approx(5.1 * scale), pytest.approx(5.1)]
    aimed, _ = evaluate.trained_eps(dict(stored, args=vars(args)), False)
    assert 255 * aimed == pytest.approx(5.1)
    assert flags_of(dra_finetune, "--epochs", "6").clean_epochs == 1
    madry = flags_of(dra_finetune, "--method", "madry")
    assert (madry.epochs, madry.lr, madry.clean_epochs, madry.adversary) == (100, 0.1, 0, "pgd")
    trades = flags_of(dra_finetune, "--dataset", "mnist", "--method", "trades", "--eps", "0.2")
    assert trades.pgd_eps == 0.2
    mnist = ["--dataset", "mnist", "--eps", "0.3"]
    assert flags_of(dra_finetune, *mnist).pgd_eps == pytest.approx(0.9)
    assert flags_of(dra_finetune, *mnist, "--pgd-eps", "0.2", "--linf", "0.25").pgd_eps == 0.2
    bounded = flags_of(dra_finetune, *mnist, "--linf", "0.25", "--normalized-eps")
    assert (bounded.linf, bounded.pgd_eps, args.linf, args.attacked) == (0.25, 0.25, 0, "present")
    stored = dict(stored, dataset="mnist", input_shape=(1, 28, 28), args=vars(bounded))
    assert evaluate.trained_eps(stored, True)[0] == 0.25
    dual = flags_of(dra_finetune, "--method", "dual")
    assert (dual.clean_epochs, dual.epochs, dual.lr, dual.adversary) == (0, 60, 0.01, "dra")
    assert flags_of(dra_finetune, "--strategy", "dual") == dual
    for words in (["--constraint", "dual"], ["--clean-epochs", "60"], ["--p", "2"],
                  ["--method", "finetune", "--adversary", "pgd", "--p", "0.5"],
                  ["--adversary", "pgd", "--p", "1/3"], ["--method", "trades", "--p", "0.5"],
                  ["--lam", "1"], ["--dual-lr", "0.1"], ["--method", "madry", "--dual-lr", "0.1"],
                  ["--method", "vanilla", "--pretrain-epochs", "3"],
                  ["--method", "madry", "--pretrain-lr", "0.1"],
                  ["--method", "vanilla", "--attack-steps", "5"],
                  ["--init", "v.pt", "--pretrain-lr", "0.1"],
                  ["--eps", "1/255", "--eps-end", "2/255"],
                  ["--method", "dual", "--clean-epochs", "1"],
                  ["--method", "madry", "--clean-epochs", "1"],
                  ["--method", "madry", "--attacked", "present"],
                  ["--method", "trades", "--attacked", "first-phase"],
                  ["--method", "vanilla", "--linf", "0.1"], ["--linf", "2"],
                  ["--adversary", "pgd", "--linf", "0.1"], ["--method", "trades", "--linf", "0.1"],
                  ["--attacked", "first-phase", "--attack-mode", "train"]):
        with pytest.raises(common.UsageError):
            flags_of(dra_finetune, *words)


@pytest.mark.parametrize("schedule", ["paper", "onecycle"])
def test_learning_rates(schedule, monkeypatch):
    """onecycle: one cycle per phase, a new rate at every step; paper: a cosine per phase, a new
    rate at every epoch."""
    model, x, y = network()
    seen = []
    real = common.set_lr

    def watched(optimizer, lr):
        seen.append(lr)
        real(optimizer, lr)
    with monkeypatch.context() as patch:
        patch.setattr(common, "set_lr", watched)
        runs = phases(patch, model, x, y, *MNIST, "--batch-size", 5, "--schedule", schedule,
                      "--pretrain-epochs", 3, "--pretrain-lr", "0.2", "--epochs", 5, "--lr", "0.1",
                      "--clean-epochs", 1)
    expected = []
    for highest, epochs in ((0.2, 3), (0.1, 5)):
        steps = np.arange(2 * epochs)
        if schedule == "onecycle":
            share = np.interp((steps + 0.5) / (2 * epochs), [0, 0.3, 1], [0, 1, 0])
        else:
            share = (1 + np.cos(np.pi * (steps // 2) / epochs)) / 2
        expected += list(highest * share)
    assert seen == pytest.approx(expected)
    rows = [row["lr"] for run in runs for row in run.history]
    assert rows == seen[1::2]


def test_crops_without_flips(monkeypatch):
    """MNIST's augmentation moves the digits and never mirrors them, in both phases and where the
    dual measures the first one's loss; --augment none leaves the images as they are."""
    torch.manual_seed(0)
    x = torch.zeros(400, 1, 8, 8)
    x[:, :, 4, 4:6] = torch.tensor([0.2, 0.9])  # dark before bright

    def mirrored(images):
        return ((images[..., :-1] == 0.9) & (images[..., 1:] == 0.2)).flatten(1).any(1)
    moved = common.crop_and_flip(x, "crop")
    flipped = common.crop_and_flip(x)
    assert not mirrored(moved).any() and 0.2 < mirrored(flipped).float().mean() < 0.6
    assert not torch.equal(moved, x) and (moved.sum((1, 2, 3)) > 1).float().mean() > 0.4
    used = []
    model, x, y = network()

    def watched(x, augment):
        used.append(augment)
        return x
    with monkeypatch.context() as patch:
        patch.setattr(common, "crop_and_flip", watched)
        words = ["--dataset", "mnist", "--epochs", 2, "--pretrain-epochs", 1]
        for method, times in (("finetune", 3), ("dual", 4)):
            phases(patch, model, x, y, *words, "--method", method)
            assert used == ["crop"] * times
            phases(patch, model, x, y, *words, "--method", method, "--augment", "none")
            assert len(used) == times
            used.clear()
    assert flags_of(dra_finetune).augment == "crop-flip"


FROZEN = ["--adversary", "pgd", "--attacked", "first-phase"]


@pytest.mark.parametrize("flags", [[], ["--method", "dual"], FROZEN,
                                   ["--strategy", "trades"], ["--method", "madry"],
                                   ["--method", "vanilla"]], ids=" ".join)
def test_launch_resume_evaluate(tmp_path, flags, capsys):
    """Both phases in one go equal two interruptions, one in each phase; the first phase's network
    is a run of its own, from which --init starts the second."""
    script = [dra_finetune.main, "dra_finetune.py"]
    vanilla = "vanilla" in flags
    two = flags in ([], ["--method", "dual"], FROZEN)
    words = [*(SHORT[:-2] if vanilla else SHORT), *flags, "--epochs", "3"]
    if two and "dual" not in flags:
        words += ["--clean-epochs", "0"]
    whole_words = [*words, "--pretrain-epochs", "2"] if two else words
    run_main(*script, *whole_words, "--ckpt", tmp_path / "whole.pt")
    at = (2, 5) if two else (2,)
    run_interrupted(*script, at, *whole_words, "--ckpt", tmp_path / "cut.pt")
    whole, cut = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "cut.pt"))
    assert_same_weights(whole, cut)
    assert whole["method_state"]["multiplier"] == cut["method_state"]["multiplier"]
    assert (tmp_path / "whole.vanilla.pt").exists() == two
    assert [row.get("val/lost") for row in whole["history"]] == [
        whole["method_state"]["before"] - row["val/clean"] if two else None
        for row in cut["history"]]
    if two:
        first = torch.load(tmp_path / "whole.vanilla.pt", weights_only=True)
        assert "val/lost" not in first["history"][0]
        assert ("first_phase" in cut["method_state"]) == (flags == FROZEN)
        for name, value in cut["method_state"].get("first_phase", {}).items():
            assert torch.equal(value, first["last"]["state_dict"][name])
        capsys.readouterr()
        second = [*words, "--ckpt", tmp_path / "third.pt", "--init", tmp_path / "whole.vanilla.pt"]
        run_main(*script, *second)
        third = torch.load(tmp_path / "third.pt", weights_only=True)
        assert_same_weights(whole, third)
        assert "% before," in capsys.readouterr().out
        assert not (tmp_path / "third.vanilla.pt").exists()
        (tmp_path / "whole.vanilla.pt").unlink()  # third.resume.pt alone suffices to go on
        run_main(*script, *second, "--resume")
    with pytest.raises(common.UsageError, match="--overwrite replaces it"):
        run_main(*script, *words, "--ckpt", tmp_path / "whole.pt")
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.pt", "--limit", 50,
             "--attacks", "clean,pgd-3,dra-3:0.02", "--p", "0.5", "--normalized-eps")
    outcomes = json.loads((tmp_path / "cut.eval.json").read_text())
    outcomes = {outcome["attack"]: outcome for outcome in outcomes}
    assert list(outcomes) == ["clean", "pgd-3 normalised", "dra-3:0.02 normalised"]
    # that of training, which was in pixels
    assert outcomes["pgd-3 normalised"]["eps"] == pytest.approx(0.1)
    scale = common.pixel_scale(common.dataset_facts("digits"))
    assert outcomes["dra-3:0.02 normalised"]["eps"] == pytest.approx(0.02 * scale)
    assert outcomes["dra-3:0.02 normalised"]["p"] == 0.5


def assert_same_weights(one, other):
    """Bit for bit, after the last epoch of two checkpoints."""
    one = one["last"]["state_dict"]
    other = other["last"]["state_dict"]
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
