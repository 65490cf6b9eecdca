"""iaat.py: algorithms 1 and 2 against plain loops, the other methods, rates, cost, launches."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
import iaat
from conftest import SmallNet, flags_of, method_loss, plain, run_interrupted, run_main

METHODS = ["iaat", "line-search", "pgd-at", "mixup", "clean"]
OWN = ["iaat", "line-search"]  # the methods whose images have an eps of their own
SHORT = ["--dataset", "digits", "--limit", "60", "--batch-size", "20", "--attack-steps", "3"]


def setting(*flags, warm=False, n=60):
    """(network, images, labels, memory, flags, the method's line of main's dictionary), float64.

    The network has BatchNorm and dropout, and its predictions change within the ball. In float64
    no result hangs on how many images pass it at once. A tenth of the labels is wrong.
    """
    torch.manual_seed(0)
    model = plain(SmallNet())
    model(torch.rand(8, 1, 6, 6))  # sets the lazy layer
    model.double()
    for p in model.parameters():
        p.data *= 2
    for _ in range(20):
        model(torch.rand(32, 1, 6, 6).double())
    x = torch.rand(n, 1, 6, 6).double()
    y = model.eval()(x).argmax(1)
    y[::10] = (y[::10] + 1) % 5
    words = ["--dataset", "mnist", "--eps", "0.05", *flags]
    args, loss = method_loss(iaat, *words, model=model, epoch=0 if warm else 5)
    args.gamma = 0.03
    args.step_size = 0.03
    args.attack_steps = 4
    args.select_steps = 3
    return model.train(), x, y, torch.linspace(0, 0.1, n).double(), args, loss


def plain_pgd(model, image, label, eps, noise, step_size, steps):
    """PGD on one image in a ball of its own, written out."""
    point = (image + eps * noise).clamp(0, 1)
    step = max(step_size, eps / (0.5 * steps))
    for _ in range(steps):
        point.requires_grad_(True)
        grad, = torch.autograd.grad(F.cross_entropy(model(point), label), point)
        point = (point.detach() + step * grad.sign()).clamp(image - eps, image + eps).clamp(0, 1)
    return point


def plain_algorithm_2(model, x, y, memory, args):
    """(eps, which candidate it came from), image by image, with the noise of a full batch."""
    torch.manual_seed(5)
    noises = [torch.empty_like(x).uniform_(-1, 1) for _ in range(2)]
    chosen = []
    branches = []
    for i in range(len(x)):
        image = x[i:i + 1]
        label = y[i:i + 1]
        before = memory[i].item()
        if args.eps_rule == "authors" and model(image).argmax() != label:
            branches.append(3)
            chosen.append(max(args.eps_min, (1 - args.beta) * before))
            continue
        for branch, eps in enumerate([before + args.gamma, before, before - args.gamma]):
            if branch == 2:
                break
            x_adv = plain_pgd(model, image, label, eps, noises[branch][i:i + 1], args.step_size,
                              args.select_steps)
            if model(x_adv).argmax() == label:
                break
        branches.append(branch)
        if args.eps_rule == "authors":
            chosen.append(max(args.eps_min, (1 - args.beta) * before + args.beta * max(0.0, eps)))
        else:
            chosen.append(max(0.0, (1 - args.beta) * before + args.beta * eps))
    return torch.tensor(chosen).to(x), torch.tensor(branches)


def select_eps(model, x, y, memory, args):
    """iaat.select_eps with the numbers of the flags."""
    return iaat.select_eps(model, x, y, memory, args.gamma, args.beta, args.step_size,
                           args.select_steps, mode=args.attack_mode)


def test_algorithm_2_against_a_plain_loop():
    """Every branch, the smoothing and the bound at 0, on a network that is in training mode."""
    model, x, y, memory, args, _ = setting("--beta", "0.3")
    torch.manual_seed(5)
    ours, attacks = select_eps(model, x, y, memory, args)
    assert all(module.training for module in model.modules())
    expected, branches = plain_algorithm_2(model.eval(), x, y, memory, args)
    assert all((branches == b).sum() >= 5 for b in range(3)) and (memory < args.gamma).sum() > 5
    torch.testing.assert_close(ours, expected)
    assert (ours >= 0).all()
    assert attacks == pytest.approx(1 + (branches > 0).float().mean().item())


def test_skipping_the_second_attack_changes_nothing():
    """Attacking everybody twice, as train mode must, gives in eval mode what skipping gives."""
    model, x, y, memory, args, _ = setting()
    everyone = torch.ones_like(y, dtype=torch.bool)
    results = []
    for skip in (True, False):
        torch.manual_seed(5)
        first, _ = iaat.survives_pgd(model, x, y, memory + args.gamma, everyone, args.step_size,
                                     args.select_steps)
        second, share = iaat.survives_pgd(model, x, y, memory, ~first if skip else everyone,
                                          args.step_size, args.select_steps)
        assert share == (~first if skip else everyone).float().mean()
        results.append((first, second & ~first))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[0][0].any() and results[0][1].any()


@pytest.mark.parametrize("target_classes", [0, 5])
def test_skipping_misclassified_images_changes_nothing(target_classes):
    """Over five updates the loss is that of attacking everybody and picking afterwards."""
    model, x, y, eps, args, _ = setting()
    everybody = copy.deepcopy(model)
    attack = (args.step_size, args.attack_steps, target_classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    optimizer_everybody = torch.optim.SGD(everybody.parameters(), 0.05)
    for step in range(5):
        torch.manual_seed(step)
        terms = iaat.adaptive_loss(model, x, y, eps, *attack)
        torch.manual_seed(step)
        everyone = torch.ones_like(y, dtype=torch.bool)
        attacked, x_adv = iaat.adaptive_pgd(everybody, x, y, eps, everyone, *attack)
        assert attacked.all()
        with torch.no_grad():
            right = everybody.eval()(x).argmax(1) == y
        picked = torch.where(right[:, None, None, None], x_adv, x)
        loss = F.cross_entropy(everybody.train()(picked), y)
        assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
        assert terms["right"].item() == pytest.approx(right.double().mean().item())
        assert 0.1 < terms["right"] < 0.99 and (x_adv != x).any()
        common.update(optimizer, terms["loss"], len(x))
        common.update(optimizer_everybody, loss, len(x))
    for ours, theirs in zip(model.state_dict().values(), everybody.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def count_images(model):
    """A list that gets (how many images, whether for their gradients) of each forward pass."""
    seen = []
    forward = model.forward

    def counted(x):
        seen.append((len(x), x.requires_grad))
        return forward(x)
    model.forward = counted
    return seen


def test_misclassified_images_cost_no_attack():
    """Attacks see the other images alone; nobody is attacked where all are misclassified."""
    model, x, y, eps, args, _ = setting()
    with torch.no_grad():
        predicted = model.eval()(x).argmax(1)
    model.train()
    right = (predicted == y).sum().item()
    assert 10 < right < 60
    seen = count_images(model)
    terms = iaat.adaptive_loss(model, x, y, eps, args.step_size, args.attack_steps)
    assert sorted(seen) == sorted([(right, True)] * args.attack_steps + [(60, False)] * 2)
    assert terms["passes"].item() == pytest.approx(right / 60 * args.attack_steps + 4 / 3)
    seen.clear()
    terms = iaat.adaptive_loss(model, x, (predicted + 1) % 5, eps, args.step_size,
                               args.attack_steps)
    assert seen == [(60, False)] * 2 and terms["passes"].item() == pytest.approx(4 / 3)
    assert terms["right"] == 0 and terms["loss"].requires_grad


@pytest.mark.parametrize("flags", [[], ["--eps-rule", "authors"]], ids=" ".join)
def test_train_mode_attacks_the_whole_batch(flags):
    """The choice of eps twice, the update once: BatchNorm must not see the hard images alone.

    Of other passes there are the one of the clean images and the update's.
    """
    model, x, y, memory, args, loss = setting("--attack-mode", "train", *flags)
    seen = count_images(model)
    _, attacks = select_eps(model, x, y, memory, args)
    assert {images for images, _ in seen} == {len(x)}
    assert len(seen) == 2 * (args.select_steps + 1) and attacks == 2
    seen.clear()
    loss(x, y, memory)
    assert {images for images, _ in seen} == {len(x)}
    assert len(seen) == 2 * (args.select_steps + 1) + args.attack_steps + 2


@pytest.mark.parametrize("warm, flags", [
    (True, []), (False, []), (False, ["--eps-min", "0.04"]), (True, ["--eps-rule", "authors"]),
    (False, ["--eps-rule", "authors"]), (False, ["--eps-rule", "authors", "--eps-min", "0.04"])])
def test_algorithm_1_against_a_plain_loop(warm, flags):
    """The warm-up's eps, their own afterwards, the lower bound; wrong images train clean.

    By the authors' rule they train at their eps, which is 0 in the warm-up.
    """
    model, x, y, memory, args, loss = setting(*flags, warm=warm)
    model.eval()  # the update's forward then is the plain loop's too
    torch.manual_seed(5)
    terms = loss(x, y, memory)
    eps = terms["eps"]
    authors = args.eps_rule == "authors"
    if warm and authors:
        assert eps.tolist() == [args.eps if hit else 0 for hit in model(x).argmax(1) == y]
    elif warm:
        assert torch.equal(eps, memory)
    else:
        torch.testing.assert_close(eps, plain_algorithm_2(model, x, y, memory, args)[0])
    torch.manual_seed(5)
    if not warm:
        for _ in range(2):
            torch.empty_like(x).uniform_(-1, 1)
    noise = torch.empty_like(x).uniform_(-1, 1)
    total = 0
    right = 0
    for i in range(len(x)):
        image = x[i:i + 1]
        label = y[i:i + 1]
        is_right = (model(image).argmax() == label).item()
        right += is_right
        if is_right or authors:
            image = plain_pgd(model, image, label, max(eps[i].item(), args.eps_min),
                              noise[i:i + 1], args.step_size, args.attack_steps)
        total = total + F.cross_entropy(model(image), label) / len(x)
    torch.testing.assert_close(terms["loss"], total)
    assert terms["right"] == pytest.approx(right / len(x)) and 0.5 < right / len(x) < 1


class Recorder(torch.nn.Module):
    """Logits that do not matter; `seen` is what the network was last given."""

    def forward(self, x):
        self.seen = x.clone()
        return x.flatten(1)


# One letter per epoch, the first two of the warm-up. 1: PGD fails at eps + gamma; 2: at eps, and
# not above; 3: at neither; x: the clean image is misclassified, and PGD succeeds at both.
OUTCOMES = ["11111111", "22222222", "33333333", "xxxxxxxx", "1x1x1x1x", "xx111111", "x33xx221"]


def plain_memory(rule, outcomes, eps_min, eps_w=0.1, gamma=0.08, beta=0.1):
    """(memory, eps that is trained with) after each epoch of one image, in numbers."""
    memory = eps_w
    history = []
    for epoch, outcome in enumerate(outcomes):
        step = {"1": gamma, "2": 0, "3": -gamma, "x": -gamma}[outcome]
        if rule == "paper":
            if epoch >= 2:
                memory = max(0, memory + beta * step)
            history.append((memory, 0 if outcome == "x" else max(memory, eps_min)))
            continue
        if epoch < 2:
            memory = 0 if outcome == "x" else eps_w
        elif outcome == "x":
            memory = memory * (1 - beta)
        else:
            memory = memory * (1 - beta) + beta * max(0, memory + step)
        memory = max(memory, eps_min)
        history.append((memory, memory))
    return history


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("eps_min", [0, 0.07])
@pytest.mark.parametrize("rule", ["paper", "authors"])
def test_the_memory_of_each_rule(rule, eps_min, mode, monkeypatch):
    """Hand-made outcomes: each epoch's memory and the eps that the update uses, against numbers."""
    model = Recorder()
    x = torch.full((len(OUTCOMES), 1, 2, 3), 0.5).double()
    y = torch.zeros(len(x), dtype=torch.long)
    memory = torch.full((len(x),), 0.1).double()

    def pgd(model, x, target, eps, *numbers, **options):
        return x + eps[:, None, None, None]
    monkeypatch.setattr(common, "pgd", pgd)
    expected = [plain_memory(rule, outcomes, eps_min) for outcomes in OUTCOMES]
    for epoch in range(8):
        letters = [outcomes[epoch] for outcomes in OUTCOMES]
        tried = []

        def survives(model, x, y, eps, asked, *numbers):
            tried.append(eps)
            holds = torch.tensor([letter == "12"[len(tried) - 1] for letter in letters])
            return holds & asked, asked.float().mean()
        monkeypatch.setattr(iaat, "survives_pgd", survives)
        right = torch.tensor([letter != "x" for letter in letters])
        monkeypatch.setattr(iaat, "is_right", lambda *inputs: right)
        before = memory
        terms = iaat.iaat_loss(model, x, y, memory, epoch < 2, 0.1, 0.08, 0.1, eps_min, rule, 0.01,
                               4, 3, mode=mode)
        memory = terms["eps"]
        used = (model.seen - x).amax((1, 2, 3))
        assert memory.tolist() == pytest.approx([history[epoch][0] for history in expected])
        assert used.tolist() == pytest.approx([history[epoch][1] for history in expected])
        assert terms["right"] == right.float().mean()
        assert len(tried) == (0 if epoch < 2 else 2)
        if tried:
            torch.testing.assert_close(tried[0], before + 0.08)
            torch.testing.assert_close(tried[1], before)


@pytest.mark.parametrize("rule", ["largest", "first-failure"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_line_search_on_hand_made_outcomes(rule, mode, monkeypatch):
    """Radii 1, 3 and 4 of 6 hold, all, none, or the last alone."""
    holding = [{1, 3, 4}, {1, 2, 3, 4, 5, 6}, set(), {6}]
    expected = {"largest": [4, 6, 0, 6], "first-failure": [1, 6, 0, 0]}[rule]
    shares = []

    def survives(model, x, y, eps, asked, *numbers):
        level = len(shares) + 1
        assert eps.tolist() == pytest.approx([0.1 * level] * 4)
        shares.append(asked.float().mean())
        return torch.tensor([level in holds for holds in holding]) & asked, shares[-1]
    monkeypatch.setattr(iaat, "survives_pgd", survives)
    eps, mean_attacks = iaat.line_search(None, torch.zeros(4, 1, 1, 1), torch.zeros(4).long(), 0.15,
                                         0.1, rule, 0.01, 3, 0, mode)
    assert eps.tolist() == pytest.approx([0.1 * level for level in expected])
    assert len(shares) == 6 and mean_attacks == sum(shares)
    assert mean_attacks == {"largest": 6, "first-failure": (4 + 2 + 4 * 1) / 4}[rule]


@pytest.mark.parametrize("rule", ["largest", "first-failure"])
def test_line_search_against_a_plain_loop(rule):
    """Of a grid that ends at 4 eps, the largest radius that holds, or the last below a failure."""
    model, x, y, memory, args, loss = setting("--method", "line-search", "--line-search", rule)
    torch.manual_seed(5)
    ours, _ = iaat.line_search(model, x, y, args.eps, args.gamma, rule, args.step_size,
                               args.select_steps)
    torch.manual_seed(5)
    assert torch.equal(loss(x, y, memory)["eps"], ours)
    torch.manual_seed(5)
    noises = [torch.empty_like(x).uniform_(-1, 1) for _ in range(6)]
    model.eval()
    for i in range(len(x)):
        largest = 0
        for level in range(1, 7):
            x_adv = plain_pgd(model, x[i:i + 1], y[i:i + 1], level * args.gamma,
                              noises[level - 1][i:i + 1], args.step_size, args.select_steps)
            if model(x_adv).argmax() == y[i]:
                largest = level
            elif rule == "first-failure":
                break
        assert ours[i].item() == pytest.approx(largest * args.gamma)
    assert len(ours.unique()) > 4 and ours.max() <= 4 * args.eps + 1e-6


@pytest.mark.parametrize("method", ["pgd-at", "mixup", "clean"])
def test_baselines(method):
    """PGD-AT is CE on PGD of one eps; mixup mixes its images and losses; clean has no adversary."""
    model, x, y, memory, args, loss = setting("--method", method)
    model.eval()
    torch.manual_seed(5)
    terms = loss(x, y, memory)
    torch.manual_seed(5)
    x_adv = x
    if method != "clean":
        x_adv = common.pgd(model, x, y, args.eps, args.step_size, args.attack_steps)
        assert (x_adv - x).abs().max() == pytest.approx(args.eps)
    expected = F.cross_entropy(model(x_adv), y)
    if method == "mixup":
        lam = torch.rand(())
        other = torch.randperm(len(x))
        log_p = model(lam * x_adv + (1 - lam) * x_adv[other]).log_softmax(1)
        soft = lam * F.one_hot(y, 5) + (1 - lam) * F.one_hot(y[other], 5)
        expected = -(soft * log_p).sum(1).mean()
    torch.testing.assert_close(terms["loss"], expected)
    assert set(terms) == {"loss"}, "the memory stays as it is"


@pytest.mark.parametrize("flags", [
    [], ["--attack-mode", "train"], ["--eps-rule", "authors"],
    ["--eps-rule", "authors", "--attack-mode", "train"], ["--method", "line-search"],
    ["--method", "line-search", "--line-search", "first-failure"], ["--method", "pgd-at"],
    ["--method", "mixup"], ["--method", "clean"]], ids=" ".join)
def test_cost_is_what_is_counted(flags):
    """A forward-backward pass of all images is 1, a forward pass alone a third.

    IAAT costs at most 3 k + 2, less in eval mode; PGD-AT and mixup k + 1, clean training 1.
    """
    model, x, y, memory, args, loss = setting(*flags)
    args.select_steps = args.attack_steps
    units = []
    forward = model.forward

    def counted(x):
        logits = forward(x)
        share = len(x) / 60
        units.append(share / 3)
        if logits.requires_grad:
            logits.register_hook(lambda grad: units.append(share * 2 / 3))
        return logits
    model.forward = counted
    terms = loss(x, y, memory)
    terms["loss"].backward()
    k = args.attack_steps
    if args.method in OWN:
        assert terms["passes"].item() == pytest.approx(sum(units))
        bound = {"iaat": 3 * k + 2, "line-search": 100}[args.method]
        assert sum(units) <= bound + 1e-6
        if args.method == "iaat" and args.attack_mode == "eval":
            assert sum(units) < 0.95 * bound
    else:
        passes = {"pgd-at": k + 1, "mixup": k + 1, "clean": 1}[args.method]
        assert sum(units) == pytest.approx(passes)


def test_a_large_eps_is_reached_and_a_bound_holds():
    """Each image's perturbation fills its own ball: the step grows with eps."""
    _, x, y, _, args, _ = setting()
    model = plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))).double()
    x = 0.4 + 0.2 * x
    eps = torch.linspace(0, 0.35, len(x)).double()
    _, x_adv = iaat.adaptive_pgd(model, x, y % 2, eps, eps >= 0, args.step_size,
                                 args.attack_steps)
    torch.testing.assert_close((x_adv - x).abs().amax((1, 2, 3)), eps)


def drops(args, first=1):
    """The epochs, from 0, at which the learning rate falls."""
    rates = [iaat.learning_rate(args, epoch, 0) for epoch in range(args.epochs)]
    return [epoch for epoch in range(first, args.epochs) if rates[epoch] < rates[epoch - 1]]


def test_paper_settings():
    """Tables 9 and 10: both networks' epochs, decays and warm-ups; shares of other lengths."""
    args = flags_of(iaat)
    assert (args.model, args.epochs, args.weight_decay) == ("resnet18", 200, 2e-4)
    assert (args.warmup, args.batch_size, args.augment) == (5, 128, "reflect-flip")
    assert drops(args) == [80, 140, 170]
    assert iaat.learning_rate(args, 199, 0) == pytest.approx(1e-4)
    args = flags_of(iaat, "--model", "wrn-32-10")
    assert (args.epochs, args.weight_decay, args.warmup) == (110, 5e-4, 10)
    assert drops(args) == [70, 90, 100]
    assert iaat.learning_rate(args, 109, 0) == pytest.approx(0.1 * 0.2**3)
    assert 255 * args.gamma == pytest.approx(1.9)
    assert (args.beta, args.val, args.normalize) == (0.1, 0, "dataset")
    assert flags_of(iaat, "--warmup", "0").warmup == 0
    elsewhere = flags_of(iaat, "--dataset", "imagenet", "--model", "wrn-32-10")
    assert (elsewhere.weight_decay, elsewhere.warmup) == (1e-4, 30), "table 10 is CIFAR's"
    args = flags_of(iaat, "--epochs", "1", "--warmup", "0")
    assert iaat.learning_rate(args, 0, 0) == 0.1


@pytest.mark.parametrize("flags, named", [
    (["--epochs", "4"], "--warmup 5 is longer than --epochs 4"),
    (["--eps-start", "0"], "--eps-start is for --method iaat with --warmup 0"),
    (["--method", "line-search", "--warmup", "0", "--eps-start", "0"], "--eps-start is for"),
    (["--method", "line-search", "--eps-rule", "authors"], "no use for --eps-rule"),
    (["--line-search", "first-failure"], "no use for --line-search"),
    (["--eps-min", "9/255"], "--eps-min is above --eps 8/255"),
    (["--method", "line-search", "--gamma", "0.5"], "the grid ends at 4 eps"),
    (["--method", "line-search", "--beta", "0.1"], "no use for --beta"),
    (["--method", "pgd-at", "--beta", "0"], "no use for --beta"),
    (["--method", "pgd-at", "--warmup", "0"], "no use for --warmup"),
    (["--method", "mixup", "--select-steps", "2"], "no use for --select-steps"),
    (["--method", "clean", "--targeted"], "no use for --targeted")], ids=str)
def test_what_has_no_use_is_refused(flags, named):
    with pytest.raises(common.UsageError, match=named):
        flags_of(iaat, *flags)


def test_what_depends_on_eps_follows_it():
    """gamma, the step and the lower bound in proportion to --eps, but for what is given."""
    for words in ([], ["--model", "wrn-32-10"], ["--dataset", "imagenet"], ["--dataset", "digits"],
                  ["--method", "pgd-at"], ["--method", "line-search"]):
        usual = flags_of(iaat, *words)
        for ratio in (0.5, 1.5):
            args = flags_of(iaat, *words, "--eps", ratio * usual.eps)
            assert args.eps == pytest.approx(ratio * usual.eps)
            for name in ("gamma", "step_size", "eps_min"):
                assert getattr(args, name) == pytest.approx(ratio * getattr(usual, name)), name
    args = flags_of(iaat, "--eps", "4/255", "--gamma", "3/255", "--eps-min", "1/255")
    assert (args.gamma, args.eps_min, args.step_size) == (3 / 255, 1 / 255, pytest.approx(1 / 255))
    assert flags_of(iaat, "--dataset", "imagenet", "--eps", "8/255").eps_min > 0


def test_one_cycle_replaces_the_drops():
    """Up for 30 % of all steps, then down to 0, whatever the data set's drops are."""
    args = flags_of(iaat, "--schedule", "onecycle")
    rates = [iaat.learning_rate(args, epoch, 0.5) for epoch in range(200)]
    expected = np.interp((np.arange(200) + 0.5) / 200, [0, 0.3, 1], [0, args.lr, 0])
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_launch_resume_evaluate(tmp_path, method):
    """Three epochs in one go equal two, an interruption, and another, the memory included.

    Each image's eps moves by at most beta gamma an epoch after the warm-up; evaluate.py reads what
    is written.
    """
    words = [*(SHORT[:-2] if method == "clean" else SHORT), "--method", method, "--epochs", "3",
             "--val", "20"]
    if method in OWN:
        words += ["--warmup", "1"]
    if method == "line-search":
        words += ["--gamma", "0.1"]
    run_main(iaat.main, "iaat.py", *words, "--ckpt", tmp_path / "whole.pt")
    run_interrupted(iaat.main, "iaat.py", (3,), *words, "--ckpt", tmp_path / "cut.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    cut = torch.load(tmp_path / "cut.pt", weights_only=True)
    for name, value in whole["last"]["state_dict"].items():
        assert torch.equal(value, cut["last"]["state_dict"][name])
    memory = whole["method_state"]["memory"]
    assert torch.equal(memory, cut["method_state"]["memory"])
    snapshots = whole["method_state"]["snapshots"]
    assert snapshots.keys() == cut["method_state"]["snapshots"].keys()
    assert list(snapshots) == ([1, 2, 3] if method in OWN else [])
    train, _ = common.load_train(common.dataset_facts("digits"), "data", 20, 60, "cpu")
    others = torch.ones(len(memory), dtype=torch.bool)
    others[train.index] = False
    assert (memory[others] == memory[others][0]).all()
    moved = (memory[train.index] - 0.1).abs()
    row = whole["history"][0]
    logged = {"eps", "eps/mean", "eps/5%", "cost/passes", "train/right"}
    if method == "iaat":
        assert 0 < moved.max() <= 2 * 0.1 * 0.024 + 1e-6 and (moved > 0).float().mean() > 0.5
    if method in OWN:
        assert logged <= row.keys() and 255 * row["eps"] == pytest.approx(row["eps/mean"])
    else:
        assert moved.max() < 1e-6 and not logged & row.keys()
    assert {"val/clean", "val/robust", "lr"} <= row.keys()
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.pt", "--attacks",
             "clean,pgd-3", "--limit", 20)
    outcomes = json.loads((tmp_path / "cut.eval.json").read_text())
    assert [outcome["attack"] for outcome in outcomes] == ["clean", "pgd-3"]


@pytest.mark.parametrize("words", [
    [], ["--eps-rule", "authors"], ["--method", "line-search"]], ids=" ".join)
def test_a_warmup_of_all_epochs_leaves_eps_alone(tmp_path, words):
    """--warmup equal to --epochs: the memory is eps throughout, no attack selects an eps.

    By the authors' rule it is 0 for the images that are misclassified at that moment.
    """
    words = [*SHORT, *words, "--epochs", "2", "--warmup", "2", "--ckpt", tmp_path / "run.pt"]
    run_main(iaat.main, "iaat.py", *words)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    state = saved["method_state"]
    assert list(state["snapshots"]) == [1, 2] and len(saved["history"]) == 2
    for row in saved["history"]:
        assert row["cost/passes"] == pytest.approx(3 * row["train/right"] + 4 / 3)
    if "authors" in words:
        train, _ = common.load_train(common.dataset_facts("digits"), "data", 0, 60, "cpu")
        for row, memory in zip(saved["history"], state["snapshots"].values()):
            eps = memory[train.index]
            assert ((eps == 0) | (eps == 0.1)).all() and row["eps"] == pytest.approx(eps.mean())
            assert row["eps"] == pytest.approx(0.1 * row["train/right"]) and 0 < row["eps"] < 0.1
        return
    for memory in (state["memory"], *state["snapshots"].values()):
        assert torch.equal(memory, torch.full_like(memory, 0.1))
    for row in saved["history"]:
        assert [row["eps/5%"], row["eps/95%"], 255 * row["eps"]] == pytest.approx([25.5] * 3)


@pytest.mark.parametrize("words, start", [
    ([], 0.1), (["--eps-start", "0"], 0), (["--eps-rule", "authors"], 0),
    (["--eps-rule", "authors", "--eps-start", "eps-w"], 0.1)], ids=str)
def test_the_start_without_a_warmup(tmp_path, words, start):
    """eps starts at eps_w, or at 0, by the authors' rule at 0; the first epoch moves it."""
    words = [*SHORT, *words, "--epochs", "1", "--warmup", "0", "--ckpt", tmp_path / "run.pt"]
    run_main(iaat.main, "iaat.py", *words)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    train, _ = common.load_train(common.dataset_facts("digits"), "data", 0, 60, "cpu")
    memory = saved["method_state"]["memory"]
    others = torch.ones(len(memory), dtype=torch.bool)
    others[train.index] = False
    assert others.any() and torch.equal(memory[others], torch.full_like(memory[others], start))
    moved = memory[train.index] - start
    steps = torch.tensor([-0.1, -0.024, 0, 0.024]) * 0.1  # the first where f(x) is wrong
    allowed = torch.where(start + steps < 0, 0.0, steps)
    assert (moved[:, None] - allowed).abs().amin(1).max() < 1e-6
    assert (moved < 0).any() if start else (moved >= 0).all()


def test_the_eps_of_the_images_are_drawn(tmp_path):
    """evaluate.py's figure from the memory in the checkpoint; none where there is no memory."""
    words = [*SHORT, "--epochs", "8", "--warmup", "0", "--limit", "30"]
    run_main(iaat.main, "iaat.py", *words, "--ckpt", tmp_path / "run.pt")
    model, checkpoint = common.load_model(tmp_path / "run.pt")
    args = checkpoint["args"]
    assert list(checkpoint["method_state"]["snapshots"]) == list(range(1, 9))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    test = evaluate.load_test(common.dataset_facts("digits"), "data", 20, "cpu")
    scene = evaluate.Scene(model, checkpoint, test, {}, 0.1, 0, "data")
    figure = evaluate.draw_eps(pyplot, scene)
    assert len(figure.axes) == 2 + 40
    assert len(figure.axes[1].lines) == 4 and len(figure.axes[0].patches) == 4
    without = dict(checkpoint, method_state=None)
    assert evaluate.draw_eps(pyplot, scene._replace(checkpoint=without)) is None
    state = checkpoint["method_state"]
    memory = torch.full_like(state["memory"], 0.1)  # within a warm-up
    state = dict(memory=memory, snapshots=dict.fromkeys(state["snapshots"], memory))
    warm = dict(checkpoint, method_state=state)
    figure = evaluate.draw_eps(pyplot, scene._replace(checkpoint=warm))
    bars = figure.axes[0].patches[0].get_xy()
    assert bars[:, 1].max() == args["limit"], "every image that was trained on, no other"


# -------------------------------------------------------------- ImageNet and several processes

SMALL = """import common
common.DATASETS["imagenet"].update(classes=3, shape=(3, 32, 32))
import iaat
{extra}
if __name__ == "__main__":
    common.cli(iaat.main)
"""
BY_CLASS = """
import torch
turn = 1
def survives(model, x, y, eps, candidates, *rest):
    global turn
    turn = 1 - turn  # algorithm 2 tries two candidates: 0 with class 0, then 1 with class 1
    return candidates & (y == turn), candidates.float().mean()
iaat.survives_pgd = survives

def assert_same(value):
    every = [torch.zeros_like(value) for _ in range(2)]
    torch.distributed.all_gather(every, value.contiguous())
    assert torch.equal(*every)

merged = iaat.merged
def checked(memory, seen):
    whole = merged(memory, seen)
    visits = torch.zeros(41).index_add_(0, seen, torch.ones(len(seen)))
    torch.distributed.all_reduce(visits)
    assert torch.equal(whole[seen], memory[seen]) and (visits == 1).all()
    assert_same(whole)
    print("memories agree")
    return whole
iaat.merged = checked

finish_epoch = common.Run.finish_epoch
def finished(run, model, *rest, **named):
    finish_epoch(run, model, *rest, **named)
    for value in model.net.state_dict().values():
        assert_same(value)
    print("networks agree")
common.Run.finish_epoch = finished
"""
STOPPED = """
batches = common.train_batches
def stopped(*args):
    if args[3] == 1:
        raise KeyboardInterrupt
    return batches(*args)
common.train_batches = stopped
"""
BLIND = """
import os
if os.environ["RANK"] == "1":
    common.going_on = lambda path, resume: False
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of JPEG files as ImageNet's: 41 training and 12 test images, three classes.

    The classes are told apart by colour.
    """
    from PIL import Image
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, n in (("train", 41), ("val", 12)):
        for i in range(n):
            path = root / "imagenet" / split / f"n{i % 3}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (70 + i, 90, 3), dtype=np.uint8)
            pixels[..., i % 3] += 110
            Image.fromarray(pixels).convert("L" if i == 4 else "RGB").save(path)
    return root


@pytest.fixture
def small(monkeypatch):
    """ImageNet of three classes and 32 x 32 pixels, in this process."""
    for name, value in dict(classes=3, shape=(3, 32, 32)).items():
        monkeypatch.setitem(common.DATASETS["imagenet"], name, value)


def load_imagenet(folder, val=0):
    """The training and validation split of the folder."""
    return common.load_train(common.dataset_facts("imagenet"), folder, val, None, "cpu", 2)


def launch(folder, path, *words, extra="", launcher=True, fails=False):
    """Run iaat.py on the folder as two processes, after `extra` lines: (stdout, stderr).

    launcher: whether torchrun starts them. Without it, which is faster, they are started here.
    """
    script = path.with_suffix(".py")
    script.write_text(SMALL.format(extra=extra))
    words = [script, "--dataset", "imagenet", "--data-dir", folder, "--ckpt", path, *words]
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1")
    if launcher:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *words]
        env_of_each = [env]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env_of_each = [dict(env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    started = [subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=env) for env in env_of_each]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs):
        assert (process.returncode != 0) == fails, errors
    return ["".join(texts) for texts in zip(*outputs)]


def test_two_processes_train_what_one_does(folder, tmp_path, small):
    """Without chance in the loss two processes' weights and means are one's.

    Also after an interruption, with which a process that does not find the run is refused.
    """
    words = ["--method", "clean", "--model", "cnn-small", "--batch-size", "7", "--epochs", "3",
             "--workers", "1", "--precision", "float32", "--lr", "0.05", "--resume"]
    run_main(iaat.main, "iaat.py", "--dataset", "imagenet", "--data-dir", folder, "--ckpt",
             tmp_path / "one.pt", *words)
    path = tmp_path / "two.pt"
    launch(folder, path, *words, extra=STOPPED, launcher=False, fails=True)
    _, errors = launch(folder, path, *words, extra=BLIND, launcher=False, fails=True)
    assert errors.count("not every process finds") == 2
    out, _ = launch(folder, path, *words, launcher=False)
    assert "goes on after epoch 1" in out
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    two = torch.load(path, weights_only=True)
    assert one["history"][-1]["train/loss"] < one["history"][0]["train/loss"]
    assert len(two["history"]) == 3
    for name, value in one["last"]["state_dict"].items():
        torch.testing.assert_close(two["last"]["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(two["history"], one["history"]):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert two["provenance"]["hardware"].startswith("2 x CPU")


def test_two_processes_share_one_memory(folder, tmp_path, small):
    """Two epochs past the warm-up, the eps of each class is exactly what algorithm 2 says.

    PGD is replaced: class 0 survives memory + gamma, class 1 the memory, class 2 nothing. Memory,
    weights and BatchNorm's buffers are the same on both, every image is visited once an epoch, one
    of them prints, and evaluate.py reads the files.
    """
    words = ["--model", "resnet18", "--batch-size", "14", "--warmup", "1", "--epochs", "3",
             "--attack-steps", "2", "--workers", "0"]
    out, _ = launch(folder, tmp_path / "run.pt", *words, extra=BY_CLASS)
    assert out.count("memories agree") == 3 and out.count("networks agree") == 3
    assert out.count("evaluate.py takes the weights") == 1 and "nan" not in out
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    gamma = saved["args"]["gamma"]
    beta = saved["args"]["beta"]
    labels = load_imagenet(folder)[0].labels
    expected = torch.full((41,), 16 / 255)
    for _ in range(2):
        tried = expected + torch.tensor([gamma, 0, -gamma])[labels]
        expected = (1 - beta) * expected + beta * tried
    assert torch.equal(saved["method_state"]["memory"], expected)
    assert len(expected.unique()) == 3 and labels.bincount().tolist() == [14, 14, 13]
    assert any("running_var" in name for name in saved["last"]["state_dict"])
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "run.pt", "--data-dir", folder,
             "--attacks", "clean,targeted-2:4/255", "--workers", 1)
    outcomes = json.loads((tmp_path / "run.eval.json").read_text())
    assert [(o["attack"], o["n"]) for o in outcomes] == [("clean", 12), ("targeted-2:4/255", 12)]


def test_each_process_gets_its_share(folder, small, monkeypatch):
    """Every image once an epoch over three processes, none of them without work.

    Files are cropped the same whoever reads them.
    """
    train, _ = load_imagenet(folder)

    def epoch(rank, size, n=7):
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size).items():
            monkeypatch.setenv(name, str(value))
        return list(common.train_batches(train, n, 0, 1))
    alone = epoch(0, 1)
    images = {i.item(): image for x, _, index in alone for image, i in zip(x, index)}
    shares = [epoch(rank, 3) for rank in range(3)]
    visited = [i for share in shares for _, _, index in share for i in index.tolist()]
    assert sorted(visited) == list(range(41))
    assert {len(share) for share in shares} == {6}
    assert min(len(x) for share in shares for x, _, _ in share) >= 2
    assert {len(epoch(rank, 3, n=8)) for rank in range(3)} == {5}  # 41 = 5 x 8 + 1
    assert common.steps_per_epoch(41, 8) == 5 and common.steps_per_epoch(41, 7) == 6
    with pytest.raises(common.UsageError, match="41 training images are too few for 42 processes"):
        epoch(0, 42, n=100)
    for share in shares:
        for x, y, index in share:
            assert all(torch.equal(image, images[i]) for image, i in zip(x, index.tolist()))
            assert torch.equal(y, train.labels[index])


def test_image_files(folder, small, tmp_path, monkeypatch):
    """The middle of each test image, in order; crops change with the epoch; errors are said."""
    facts = common.dataset_facts("imagenet")
    test = evaluate.load_test(facts, folder, None, "cpu")
    (x, y, _), = common.eval_batches(test, 12)
    assert x.shape == (12, 3, 32, 32) and 0 <= x.min() and x.max() <= 1
    assert x.is_contiguous(memory_format=torch.channels_last)
    coloured = [i for i, path in enumerate(test.images.paths) if not path.endswith(b"/4.JPEG")]
    assert (x.mean((2, 3)).argmax(1) == y)[coloured].all() and y.bincount().tolist() == [4, 4, 4]
    five = evaluate.load_test(facts, folder, 5, "cpu")
    assert torch.equal(five.labels, y[common.subset(12, 5)])
    train, held = load_imagenet(folder, val=10)
    assert (len(train.images), len(held.images), held.images.workers) == (31, 10, 2)
    rows = torch.arange(4)
    first, again, later = (next(common.read(train, [rows], (0, epoch))) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    for workers in (0, 1):
        broken = common.ImageFiles(np.array([b"/nowhere/x.JPEG"]), (3, 32, 32), workers)
        split = common.Split(broken, torch.zeros(1).long(), torch.zeros(1).long())
        named = "^/nowhere/x.JPEG cannot be read .FileNotFoundError"
        with pytest.raises(common.UsageError, match=named):
            list(common.eval_batches(split, 1))
    with pytest.raises(common.UsageError, match="image-net.org"):
        common.load_split(facts, tmp_path, "train", "cpu")
    two_classes = dict(common.DATASETS["imagenet"], classes=2)
    monkeypatch.setitem(common.DATASETS, "imagenet100", two_classes)
    some = common.load_split(common.dataset_facts("imagenet100"), folder, "val", "cpu")
    chosen = [f"n{i}".encode() for i in common.subset(3, 2).tolist()]
    folders = [path.split(b"/")[-2] for path in some.images.paths]
    assert [chosen[y] for y in some.labels] == folders
    assert some.labels.bincount().tolist() == [4, 4]
    monkeypatch.setitem(common.DATASETS["imagenet"], "classes", 4)
    with pytest.raises(common.UsageError, match="holds 3 classes, ImageNet has 4"):
        common.load_split(facts, folder, "train", "cpu")


def test_imagenet_settings(monkeypatch):
    """Table 11, lr in proportion to the batch, its warm-up from 0.1, its decay."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=64).items():
        monkeypatch.setenv(name, str(value))
    args = flags_of(iaat, "--dataset", "imagenet")
    assert (args.batch_size, args.lr, args.epochs, args.warmup) == (2048, 0.8, 110, 30)
    assert (args.model, args.weight_decay, args.targeted) == ("resnet50", 1e-4, True)
    in_255 = [round(255 * v) for v in (args.eps, args.gamma, args.step_size, args.eps_min)]
    assert in_255 == [16, 4, 1, 4]
    assert (args.attack_steps, args.select_steps) == (30, 10)
    assert iaat.learning_rate(args, 0, 0) == pytest.approx(0.1)
    assert iaat.learning_rate(args, 2, 0.5) == pytest.approx(0.45)
    assert drops(args, first=6) == [35, 70, 95] and iaat.learning_rate(args, 5, 0) == 0.8
    for epochs in range(1, 21):
        args.epochs = epochs
        assert all(0 < iaat.learning_rate(args, epoch, 0) <= 0.8 for epoch in range(epochs))
    with pytest.raises(common.UsageError, match="--batch-size 63 is for all 64 processes"):
        flags_of(iaat, "--dataset", "imagenet", "--batch-size", "63")
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = flags_of(iaat, "--dataset", "imagenet")
    assert (args.batch_size, args.lr) == (32, 0.0125)
    assert iaat.learning_rate(args, 0, 0) == 0.0125
    assert flags_of(iaat, "--dataset", "imagenet", "--batch-size", "512").lr == 0.2


def test_targeted_attacks_aim_at_wrong_classes():
    """Every wrong class and no right one; targeted PGD makes the target likelier."""
    y = torch.arange(10).repeat(200)
    target = iaat.attack_labels(y, 10)
    assert (target != y).all() and len(torch.unique(10 * y + target)) == 90
    assert iaat.attack_labels(y, 0) is y
    model, x, y, _, args, _ = setting()
    eps = torch.full((len(x),), 0.05)
    torch.manual_seed(5)
    _, x_adv = iaat.adaptive_pgd(model, x, y, eps, eps > 0, args.step_size, 3, target_classes=5)
    torch.manual_seed(5)
    torch.empty_like(x).uniform_(-1, 1)
    target = iaat.attack_labels(y, 5)
    model.eval()
    before = F.cross_entropy(model(x), target, reduction="none")
    after = F.cross_entropy(model(x_adv), target, reduction="none")
    assert (after < before).float().mean() > 0.9


@pytest.mark.parametrize("method", ["iaat", "line-search", "pgd-at", "mixup"])
def test_targeted_reaches_every_attack_of_training(method, monkeypatch):
    """With --targeted each PGD of the loss is targeted, at wrong classes alone."""
    _, x, y, memory, _, _ = setting()
    model = plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 10))).double()
    with torch.no_grad():
        y = model(x).argmax(1)
    _, loss = method_loss(iaat, "--dataset", "mnist", "--method", method, "--attack-steps", 2,
                          "--targeted", model=model, epoch=5)
    calls = []
    real = common.pgd

    def pgd(model, x, target, *numbers, targeted=False, **options):
        calls.append((x, target, targeted))
        return real(model, x, target, *numbers, targeted=targeted, **options)
    monkeypatch.setattr(common, "pgd", pgd)
    loss(x, y, memory)
    assert (len(calls) == 1) == (method in ("pgd-at", "mixup"))
    for images, target, targeted in calls:
        with torch.no_grad():
            assert targeted and (target != model(images).argmax(1)).all()
