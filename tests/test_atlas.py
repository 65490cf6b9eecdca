"""atlas.py: the Jacobian's estimate, eq. 12 term by term, the attack, the rates, launches."""

import argparse
import json

import numpy as np
import pytest
import torch

import atlas
import common
import evaluate
from conftest import (Linear, SmallNet, check_slopes, flags_of, method_loss, plain, run_interrupted,
                      run_main)

SHORT = ["--dataset", "digits", "--model", "cnn-small", "--limit", "100", "--batch-size", "25",
         "--val-steps", "2", "--ramp", "1"]


def small(*flags, seed=0):
    """(network, images, labels, flags, the method's line of main's dictionary).

    All is float64, the network smooth enough for finite differences.
    """
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.Tanh(),
                              torch.nn.Linear(12, 4))
    model = plain(net.double())
    words = ["--dataset", "mnist", "--eps", "0.1", *flags]
    args, loss = method_loss(atlas, *words, model=model)
    return model, torch.rand(6, 1, 4, 4).double(), torch.randint(0, 4, (6,)), args, loss


def attack_of(model, x, y, eps, args):
    """x' of the method with the numbers of the flags."""
    numbers = (eps, args.steps, args.step_size, args.fgsm_step, args.clip_start, args.attack_mode)
    if args.method in ("trades", "tradesjac"):
        return atlas.kl_attack(model, x, *numbers)
    return atlas.attack(model, x, y, *numbers)


def exact_jacobian_norm(model, x):
    """Squared Frobenius norm per sample by torch.func.jacrev."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: model(image[None])[0]))(x)
    return jacobian.flatten(1).square().sum(1)


def test_the_estimate_is_the_exact_norm_in_the_mean():
    model, x, _, _, _ = small()
    exact = exact_jacobian_norm(model, x)
    torch.manual_seed(1)
    copies = x.repeat(4000, 1, 1, 1).requires_grad_(True)
    draws = atlas.squared_jacobian_norm(model(copies), copies).detach().view(4000, 6)
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all() and (error < 0.05 * exact).all()
    x.requires_grad_(True)
    many = atlas.squared_jacobian_norm(model(x), x, projections=500).detach()
    assert ((many - exact).abs() < 5 * draws.std(0) / 500**0.5).all()


CASES = [["--alpha", "0.5", "--beta", "3"], ["--alpha", "0"], ["--beta", "0"], ["--method", "adv"],
         ["--method", "trades", "--beta", "2"], ["--method", "jac", "--alpha", "0.5"],
         ["--method", "tradesjac", "--alpha", "0.5", "--beta", "3"],
         ["--method", "jac", "--projections", "2"],
         ["--steps", "4", "--step-size", "0.01", "--projections", "3"],
         ["--method", "trades", "--steps", "4", "--step-size", "0.01"]]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_loss_equals_the_formula(case, ratio):
    """Eq. 12 and its rivals with the same seed's adversary and projections.

    Terms of weight 0 are not there. The caller's batch stays as it is.
    """
    model, x, y, args, loss = small(*case)
    if args.method == "jac":
        ratio = 1.0  # it has no eps that could grow
    before = x.clone()
    torch.manual_seed(3)
    ours = loss(x, y, ratio)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None
    torch.manual_seed(3)
    x_adv = x
    if args.method != "jac":
        x_adv = attack_of(model, x, y, ratio * args.eps, args)
        assert 0 < (x_adv - x).abs().max() <= ratio * args.eps + 1e-9
    center = x
    other = x_adv
    if args.method in ("atlas", "adv"):
        center = x_adv
        other = x
    z = model(center)
    ce = (z.exp().sum(1).log() - z[torch.arange(6), y]).mean()
    expected = dict(loss=ce, ce=ce)
    if args.alpha:
        norms = 0
        for _ in range(args.projections):
            v = torch.randn(6, 4, dtype=torch.float64)
            v = v / v.norm(dim=1, keepdim=True)
            for i in range(6):
                jacobian = torch.func.jacrev(lambda image: model(image[None])[0])(center[i])
                projected = v[i] @ jacobian.flatten(1)
                norms = norms + 4 * projected.square().sum() / 6 / args.projections
        expected["jacobian"] = norms
        expected["loss"] = expected["loss"] + ratio * args.alpha * norms
    if args.beta:
        p = torch.distributions.Categorical(logits=z)
        q = torch.distributions.Categorical(logits=model(other))
        expected["kl"] = torch.distributions.kl_divergence(p, q).mean()
        expected["loss"] = expected["loss"] + ratio * args.beta * expected["kl"]
    if args.method == "adv":
        del expected["ce"]  # it is the loss
    assert set(ours) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_first_step_leaves_the_batch_as_it_is(case):
    """At eps 0 x' is x itself: it must not come to require a gradient."""
    _, x, y, _, loss = small(*case)
    before = x.clone()
    loss(x, y, 0.0)["loss"].backward()
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_gradient_by_finite_differences(case):
    """Every term, in float64, along a random direction of the weights.

    Through the Jacobian and both sides of KL.
    """
    model, x, y, _, loss = small(*case)

    def terms():
        torch.manual_seed(3)
        return loss(x, y, 1.0)
    check_slopes(model, terms, rel=1e-4)


@pytest.mark.parametrize("fgsm_step", [1.25, 2])
@pytest.mark.parametrize("clip_start", [True, False])
def test_one_step_attack_on_a_linear_model(fgsm_step, clip_start):
    """Two classes: x' = clip(start + fgsm_step eps sign(w_other - w_y)), whatever the start.

    For TRADES's target the sign is that of (p(start) - p(x)) times w_1 - w_0. The batch stays as
    it is.
    """
    model = Linear(classes=2).double()
    weight = model.layer.weight.detach().view(2, 1, 4, 4)
    torch.manual_seed(1)
    x = (1.6 * torch.rand(50, 1, 4, 4).double() - 0.3).clamp(0, 1)  # many pixels are black or white
    assert (x == 0).sum() > 100 and (x == 1).sum() > 100
    y = torch.randint(0, 2, (50,))
    before = x.clone()
    torch.manual_seed(2)
    ours = atlas.one_step_attack(model, x, y, 0.1, fgsm_step, clip_start)
    torch.manual_seed(2)
    ours_kl = atlas.kl_attack(model, x, 0.1, 1, 0.01, fgsm_step, clip_start)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None
    assert not ours.requires_grad and not ours_kl.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())

    torch.manual_seed(2)
    start = x + 0.1 * (2 * torch.rand_like(x) - 1)
    if clip_start:
        start = start.clamp(0, 1)
    with torch.no_grad():
        more = model(start).softmax(1)[:, 1] > model(x).softmax(1)[:, 1]
    uphill = (weight[1 - y] - weight[y]).sign()
    uphill_kl = (2 * more.double() - 1).view(-1, 1, 1, 1) * (weight[1] - weight[0]).sign()
    for x_adv, sign in ((ours, uphill), (ours_kl, uphill_kl)):
        expected = (start + fgsm_step * 0.1 * sign).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        torch.testing.assert_close(x_adv, expected)
        assert x_adv.min() == 0 and x_adv.max() == 1
        if fgsm_step == 2:  # every start reaches the border, but for what clipping took
            torch.testing.assert_close(x_adv, (x + 0.1 * sign).clamp(0, 1))
    assert atlas.one_step_attack(model, x, y, 0, fgsm_step, clip_start) is x


def test_attack():
    """One step: 1.25 eps from a start in the ball; several: no step above eps; eps 0: the image."""
    model, x, y, args, _ = small()
    x = 0.3 + 0.4 * x
    x_adv = attack_of(model, x, y, 0.1, args)
    delta = (x_adv - x).abs()
    # a start s ends at s + 1.25 eps: inside for s < -0.25 eps, 3 in 8
    inside = (delta < 0.1 - 1e-6).double().mean()
    assert delta.max() <= 0.1 + 1e-6 and 0.2 < inside < 0.55
    adv_ce = common.cross_entropy(model(x_adv), y).mean()
    assert adv_ce > common.cross_entropy(model(x), y).mean()
    longer = attack_of(model, x, y, 0.1, flags_of(atlas, "--dataset", "mnist", "--fgsm-step", "2"))
    assert ((longer - x).abs() > 0.1 - 1e-6).all()  # every start reaches the border
    for method in ("atlas", "trades"):
        several = small("--method", method, "--steps", "7", "--step-size", "0.03")[3]
        x_adv = attack_of(model, x, y, 0.02, several)
        assert (x_adv - x).abs().max() == pytest.approx(0.02)
        assert attack_of(model, x, y, 0.0, several) is x
    assert torch.equal(attack_of(model, x, y, 0.0, args), x)


def test_the_start_on_black_pixels():
    """Clipped, a start s >= 0 takes a black pixel to 0 or eps.

    Open, what rises from s < -eps / 4 stays below eps.
    """
    model, _, y, _, _ = small()
    x = torch.zeros(60, 1, 4, 4).double()
    y = y.repeat(10)
    for flag, share in (("--clip-start", 0), ("--no-clip-start", 3 / 8)):
        args = flags_of(atlas, "--dataset", "mnist", flag)
        x_adv = attack_of(model, x, y, 0.1, args)
        raised = x_adv[x_adv > 1e-6]
        assert x_adv.min() >= 0 and raised.max() == pytest.approx(0.1) and len(raised) > 200
        assert (raised < 0.1 - 1e-6).double().mean() == pytest.approx(share, abs=0.06)
    assert flags_of(atlas, "--dataset", "mnist").clip_start is False
    assert flags_of(atlas).clip_start is True


def test_without_weights_it_is_adv_bit_for_bit():
    results = []
    for flags in (["--method", "adv"], ["--alpha", "0", "--beta", "0"]):
        model, x, y, _, loss_of = small(*flags)
        torch.manual_seed(4)
        loss = loss_of(x, y, 0.7)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("flags, forwards, backwards, second", [
    (["--method", "adv"], 2, 2, 0), (["--alpha", "0"], 3, 3, 0), (["--beta", "0"], 2, 3, 1),
    ([], 3, 4, 1), (["--alpha", "0", "--beta", "0", "--steps", "5"], 6, 6, 0),
    (["--method", "jac"], 1, 2, 1), (["--method", "trades"], 4, 3, 0)], ids=str)
def test_a_term_of_weight_zero_costs_nothing(flags, forwards, backwards, second, monkeypatch):
    """Forwards, flows through each forward's logits and backwards that build a graph, counted."""
    model, x, y, _, loss = small(*flags)
    count = dict(forward=0, backward=0, second=0)
    forward = model.forward
    grad = torch.autograd.grad

    def counted_forward(x):
        logits = forward(x)
        count["forward"] += 1
        if logits.requires_grad:
            logits.register_hook(lambda g: count.update(backward=count["backward"] + 1))
        return logits

    def counted_grad(*arguments, create_graph=False, **options):
        if create_graph:
            count["second"] += 1
        return grad(*arguments, create_graph=create_graph, **options)
    model.forward = counted_forward
    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    loss(x, y, 1.0)["loss"].backward()
    assert count == dict(forward=forwards, backward=backwards, second=second)


def test_bfloat16_keeps_the_jacobian():
    """Under autocast the term and its gradient are there, and close to float32's."""
    torch.manual_seed(0)
    model = common.build_model("lenet+", common.dataset_facts("mnist"))
    _, loss = method_loss(atlas, "--dataset", "mnist", "--method", "jac", "--alpha", "1",
                          model=model)  # at x: the same in both precisions
    x = torch.rand(16, 1, 28, 28)
    y = torch.randint(0, 10, (16,))
    grads = {}
    for precision in ("float32", "bfloat16"):
        model.zero_grad()
        with common.autocast(torch.device("cpu"), precision):
            torch.manual_seed(1)
            terms = loss(x, y, 1.0)
        terms["jacobian"].backward()
        grads[precision] = torch.cat([p.grad.flatten() for p in model.parameters()
                                      if p.grad is not None])
    cosine = torch.nn.functional.cosine_similarity(grads["float32"], grads["bfloat16"], dim=0)
    ratio = grads["bfloat16"].norm() / grads["float32"].norm()
    assert cosine > 0.95 and 0.9 < ratio < 1.1


@pytest.mark.parametrize("method", ["atlas", "trades", "tradesjac"])
def test_bfloat16_trains_every_weight(method):
    """Autocast keeps copies of the weights.

    One made for the attack's target must not cut the loss from the weights.
    """
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", common.dataset_facts("cifar10"))
    _, loss = method_loss(atlas, "--method", method, model=model.train())
    with common.autocast(torch.device("cpu"), "bfloat16"):
        terms = loss(torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,)), 1.0)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("flags, forwards", [
    ([], 2), (["--steps", "3"], 2), (["--method", "adv"], 1), (["--method", "trades"], 2),
    (["--method", "jac"], 1), (["--attack-mode", "train"], 3)], ids=str)
def test_batchnorm_is_moved_by_training_forwards_alone(flags, forwards):
    """x' and x, not the attack's forwards, unless it is to see BatchNorm in train mode."""
    torch.manual_seed(0)
    model = plain(SmallNet())
    x = torch.rand(8, 1, 6, 6)
    y = torch.randint(0, 5, (8,))
    model(x)
    _, loss = method_loss(atlas, "--dataset", "mnist", "--eps", "0.1", *flags, model=model.train())
    before = model.net[1].num_batches_tracked.item()
    loss(x, y, 1.0)["loss"].backward()
    assert model.net[1].num_batches_tracked.item() == before + forwards
    assert all(module.training for module in model.modules())


def test_the_schedule_is_reduce_on_plateau():
    """Against torch's scheduler on random accuracies, counted from the end of the ramp.

    The best is that of all epochs so far; ten without a gain end training.
    """
    for seed in range(20):
        torch.manual_seed(seed)
        values = (0.5 + 0.4 * torch.rand(40)).tolist()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.2, patience=1, threshold=0, eps=0)
        history = []
        best = -1
        since = 0
        args = argparse.Namespace(lr=0.1, schedule="paper", guide="validation", ramp=5, plateau=2)
        assert atlas.learning_rate(args, history, 0, 0.5) == 0.1
        for epoch, value in enumerate(values, 1):
            history.append({"epoch": epoch, "val/robust": value})
            lr = atlas.learning_rate(args, history, epoch, 0.5)
            finished = atlas.streaks_without_gain(history, ramp=5)[-1] >= 10
            since = 0 if value > best or epoch <= 5 else since + 1
            best = max(best, value)
            if epoch == 5:
                theirs.best = best
            if epoch > 5:
                theirs.step(value)
            assert lr == pytest.approx(optimizer.param_groups[0]["lr"])
            assert finished == (since >= 10)


def test_the_fixed_schedule_falls_after_given_shares():
    """70 epochs on MNIST: 35 at the full rate, 17 at a fifth, 18 at a 25th; else in proportion.

    No accuracy is read. The first epoch has the full rate, however few there are.
    """
    def rates(*words):
        args = flags_of(atlas, "--dataset", "mnist", "--guide", "fixed", *words)
        return [atlas.learning_rate(args, None, epoch, 0.99) for epoch in range(args.epochs)]
    assert rates() == pytest.approx([0.01] * 35 + [0.002] * 17 + [0.0004] * 18)
    assert rates("--epochs", "8", "--lr", "5") == pytest.approx([5] * 4 + [1] * 2 + [0.2] * 2)
    assert rates("--epochs", "1") == [0.01]


def test_overfitting_is_announced(capsys):
    """Once, when robust accuracy is 10 points below its best and the Jacobian at x' has doubled.

    However slowly.
    """
    def say(*rows):
        history = [{"val/robust": robust, "jacobian/x_adv": norm} for robust, norm in rows]
        atlas.announce_overfitting(history)
        return capsys.readouterr().out
    assert say((0.6, 5.0)) == ""
    assert say((0.6, 5.0), (0.55, 30.0)) == say((0.6, 5.0), (0.3, 9.0)) == ""
    said = " ".join(say((0.6, 5.0), (0.3, 30.0)).split())
    assert "from 60.0 to 30.0 %, ||J(x')||^2 has risen from 5 to 30" in said
    assert "from 60.0 to 48.0 %" in say((0.6, 5.0), (0.56, 8.0), (0.52, 9.0), (0.48, 11.0))
    assert say((0.6, 5.0), (0.3, 30.0), (0.2, 40.0)) == ""


def test_validation_takes_the_given_steps():
    """Against a linear model each step of PGD goes uphill: x' is the start plus all, in the ball.

    Two small steps leave more images right than steps that cross the ball.
    """
    model = Linear(classes=2, scale=0.3)
    torch.manual_seed(0)
    images = torch.randint(80, 176, (400, 1, 4, 4), dtype=torch.uint8)  # 0 and 1 are far away
    x = images.float() / 255
    with torch.no_grad():
        y = model(x).argmax(1)
    uphill = (model.layer.weight[1 - y] - model.layer.weight[y]).sign().view_as(x).detach()
    split = common.Split(images, y, torch.arange(len(y)))
    measured = []
    for steps, step_size in ((2, 0.002), (5, 0.008)):
        torch.manual_seed(1)
        row = atlas.validate(plain(model), split, 0.02, step_size, steps, 1.25, True)
        torch.manual_seed(1)
        start = x + 0.02 * (2 * torch.rand_like(x) - 1)
        x_adv = (start + steps * step_size * uphill).clamp(x - 0.02, x + 0.02)
        right = (model(x_adv).argmax(1) == y).float().mean().item()
        measured.append(row["val/robust"])
        assert row["val/clean"] == 1 and measured[-1] == pytest.approx(right, abs=0.003)
    assert 0.2 < measured[1] < measured[0] - 0.1 < 0.9


def test_validation_sees_the_one_step_attack():
    """The Jacobian and the accuracy under one step are taken at x', at the full eps.

    BatchNorm's statistics and mode stay as they were, however training attacks.
    """
    model, x, y, args, _ = small("--attack-mode", "train")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1).double(), model).train()
    split = common.Split((255 * x).round().to(torch.uint8), y, torch.arange(len(x)))
    before = model[0].running_mean.clone()
    seen = []

    def jacobian_norm(logits, x, differentiable=True):
        seen.append((logits.detach(), x.detach()))
        assert not differentiable
        return logits.sum(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "squared_jacobian_norm", jacobian_norm)
        row = atlas.validate(model.float(), split, args.eps, args.step_size, args.val_steps,
                             args.fgsm_step, args.clip_start)
    (logits, x_adv), = seen
    clean = split.images.float() / 255
    assert (x_adv - clean).abs().max() == pytest.approx(args.eps, abs=1e-6)
    assert row["val/one-step"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert row["jacobian/x_adv"] == pytest.approx(logits.sum(1).mean().item())
    assert torch.equal(model[0].running_mean, before.float()) and model.training
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(x_adv), logits)
        right = (model(clean).argmax(1) == y).float().mean().item()
    assert row["val/clean"] == pytest.approx(right)


def test_paper_settings():
    """Appendix B: alpha and beta for one and several steps; None where a method has no such term.

    The README's command is the paper's one-step ATLAS.
    """
    for dataset, steps, method, expected in [
            ("cifar10", 1, "atlas", (2e-4, 5)), ("cifar10", 10, "atlas", (1e-4, 5)),
            ("mnist", 1, "jac", (0.5, None)), ("mnist", 1, "atlas", (1e-5, 0.3)),
            ("mnist", 20, "atlas", (5e-6, 0.2)), ("cifar10", 1, "trades", (None, 2)),
            ("cifar10", 10, "trades", (None, 4)), ("cifar10", 1, "tradesjac", (2e-4, 0.5)),
            ("cifar100", 10, "atlas", (1e-4, 10)), ("cifar10", 1, "adv", (None, None))]:
        words = ["--dataset", dataset, "--method", method]
        if method != "jac":
            words += ["--steps", steps]
        args = flags_of(atlas, *words)
        assert (args.alpha, args.beta) == expected
    ours = flags_of(atlas, "--steps", "1", "--alpha", "2e-4", "--beta", "5")
    assert vars(ours) == vars(flags_of(atlas))
    assert flags_of(atlas, "--method", "jac").ramp == 0 and ours.ramp == 15
    assert (ours.dataset, ours.model, ours.lr, ours.batch_size) == ("cifar10", "wrn-28-8", 0.1, 64)
    assert (ours.val, ours.augment, ours.fgsm_step) == (5000, "crop-flip", 1.25)


@pytest.mark.parametrize("flags", [
    ["--method", "adv", "--alpha", "1"], ["--method", "trades", "--alpha", "1"],
    ["--method", "jac", "--beta", "1"], ["--val", "0"], ["--method", "jac", "--steps", "2"],
    ["--method", "adv", "--projections", "2"], ["--method", "jac", "--ramp", "1"],
    ["--steps", "2", "--no-clip-start"], ["--steps", "2", "--fgsm-step", "2"],
    ["--schedule", "onecycle", "--plateau", "3"], ["--schedule", "onecycle", "--patience", "5"],
    ["--schedule", "onecycle", "--guide", "fixed"], ["--guide", "fixed", "--plateau", "3"],
    ["--guide", "fixed", "--patience", "5"], ["--guide", "fixed", "--val", "0", "--val-steps", "5"],
    ["--schedule", "onecycle", "--val", "0", "--val-step-size", "0.01"]],
    ids=" ".join)
def test_what_has_no_use_is_refused(flags):
    names = [word for word in flags if word.startswith("--")]
    with pytest.raises(common.UsageError) as error:
        flags_of(atlas, *flags)
    assert any(name in str(error.value) for name in names + ["--clip-start"])


def test_the_step_follows_eps():
    """--step-size in proportion to --eps, unless it is given; fgsm_step is in units of eps."""
    for words in ([], ["--dataset", "mnist"], ["--method", "adv", "--steps", "10"],
                  ["--method", "jac"]):
        usual = flags_of(atlas, *words)
        for ratio in (0.5, 1.5):
            args = flags_of(atlas, *words, "--eps", ratio * usual.eps)
            assert args.eps == pytest.approx(ratio * usual.eps)
            assert args.step_size == pytest.approx(ratio * usual.step_size)
            assert args.fgsm_step == 1.25
    assert flags_of(atlas, "--eps", "4/255", "--step-size", "2/255").step_size == 2 / 255


def test_the_validation_step_is_the_training_step_unless_given():
    """Both follow --eps; a given --val-step-size leaves training's alone."""
    for words, expected in [([], (0.01, 0.01)), (["--eps", "0.15"], (0.005, 0.005)),
                            (["--step-size", "0.02"], (0.02, 0.02)),
                            (["--val-step-size", "0.03"], (0.01, 0.03)),
                            (["--eps", "0.15", "--val-step-size", "0.03"], (0.005, 0.03))]:
        args = flags_of(atlas, "--dataset", "mnist", *words)
        assert (args.step_size, args.val_step_size) == pytest.approx(expected)
        assert args.val_steps == 20


def test_the_guide_sets_the_number_of_epochs():
    """70 on MNIST with a fixed rate, at most 100 with a guided one."""
    assert flags_of(atlas, "--dataset", "mnist").epochs == 100
    assert flags_of(atlas, "--dataset", "mnist", "--guide", "fixed").epochs == 70
    assert flags_of(atlas, "--guide", "fixed").epochs == 100
    assert flags_of(atlas, "--dataset", "mnist", "--guide", "fixed", "--epochs", "9").epochs == 9
    assert flags_of(atlas, "--guide", "fixed", "--val", "0").val == 0


def test_loss_is_still_a_name_of_method():
    for method in ("atlas", "adv", "trades", "jac", "tradesjac"):
        old = flags_of(atlas, "--loss", method)
        assert old.method == method and vars(old) == vars(flags_of(atlas, "--method", method))
    with pytest.raises(common.UsageError, match="did you mean trades"):
        flags_of(atlas, "--loss", "trade")


@pytest.mark.parametrize("method", ["atlas", "adv", "trades", "jac", "tradesjac"])
def test_launch_resume_evaluate(tmp_path, method):
    """Two epochs in one go equal one, an interruption, and another; evaluate.py reads the files."""
    short = SHORT[:-2] if method == "jac" else SHORT
    words = [*short, "--method", method, "--epochs", "2"]
    run_main(atlas.main, "atlas.py", *words, "--ckpt", tmp_path / "whole.pt")
    run_interrupted(atlas.main, "atlas.py", (2,), *words, "--ckpt", tmp_path / "cut.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    cut = torch.load(tmp_path / "cut.pt", weights_only=True)
    for name, value in whole["last"]["state_dict"].items():
        assert torch.equal(value, cut["last"]["state_dict"][name])
    logged = {"val/clean", "val/robust", "val/one-step", "jacobian/x_adv",
              "eps", "lr", "train/loss"}
    assert logged <= whole["history"][0].keys()
    if method != "jac":
        assert [row["eps"] for row in whole["history"]] == pytest.approx([0.1 * 3 / 4, 0.1])
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.pt", "--attacks",
             "clean,pgd-3", "--limit", 50)
    outcomes = json.loads((tmp_path / "cut.eval.json").read_text())
    assert [outcome["attack"] for outcome in outcomes] == ["clean", "pgd-3"]


def no_gain(*arguments):
    """What atlas.validate returns where validation never improves."""
    return {"val/clean": 0.5, "val/robust": 0.5, "val/one-step": 0.5, "jacobian/x_adv": 1.0}


def record_rates(monkeypatch):
    """A list that gets the learning rate of every step."""
    rates = []
    set_lr = common.set_lr

    def recorded(optimizer, lr):
        set_lr(optimizer, lr)
        rates.append(optimizer.param_groups[0]["lr"])
    monkeypatch.setattr(common, "set_lr", recorded)
    return rates


def test_no_gain_ends_training(tmp_path, monkeypatch):
    """An accuracy that never rises cuts the rate by 5, and with patience 3 ends training.

    The first epoch, that of the ramp, counts as a gain.
    """
    monkeypatch.setattr(atlas, "validate", no_gain)
    rates = record_rates(monkeypatch)
    words = [*SHORT, "--method", "adv", "--epochs", "9", "--ckpt", tmp_path / "run.pt"]
    run_main(atlas.main, "atlas.py", *words, "--patience", "1")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["last"]["epoch"] == 2
    rates.clear()
    run_main(atlas.main, "atlas.py", *words, "--patience", "3", "--overwrite")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["last"]["epoch"] == 4
    assert rates == pytest.approx([0.02] * 4 * 3 + [0.004] * 4)


def test_one_cycle(tmp_path, monkeypatch):
    """The rate rises for 30 % of the steps, then falls to 0, and no lack of gains ends training."""
    monkeypatch.setattr(atlas, "validate", no_gain)
    rates = record_rates(monkeypatch)
    words = ["--dataset", "digits", "--model", "cnn-small", "--limit", "40", "--batch-size", "20",
             "--ramp", "1", "--method", "adv", "--schedule", "onecycle", "--lr", "0.05", "--ckpt",
             tmp_path / "run.pt"]
    run_main(atlas.main, "atlas.py", *words, "--epochs", "15")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["last"]["epoch"] == 15 and len(rates) == 30, "10 without a gain end the paper's"
    done = (np.arange(30) + 0.5) / 30
    assert rates == pytest.approx(np.interp(done, [0, 0.3, 1], [0, 0.05, 0]))
    assert np.argmax(rates) in (8, 9) and 0 < rates[-1] < 0.002 and rates[0] < 0.01
    assert saved["history"][-1]["lr"] == rates[-1]
    with pytest.raises(common.UsageError, match="the schedule depends on --epochs"):
        run_main(atlas.main, "atlas.py", *words, "--epochs", "16", "--resume")
    run_main(atlas.main, "atlas.py", *words, "--epochs", "1", "--val", "0", "--overwrite")
    row, = torch.load(tmp_path / "run.pt", weights_only=True)["history"]
    assert "val/robust" not in row, "without a guide validation may be empty"


def test_a_fixed_schedule_runs_all_epochs_and_keeps_the_best(tmp_path, monkeypatch, capsys):
    """Eleven epochs without a gain do not end it; the best epoch is that of val/robust.

    The validation attack has the numbers of its flags, and the log says which ones.
    """
    seen = []

    def validate(model, val, eps, step_size, val_steps, *others):
        seen.append((eps, step_size, val_steps))
        return no_gain() | {"val/robust": 0.6 if len(seen) == 3 else 0.5}
    monkeypatch.setattr(atlas, "validate", validate)
    rates = record_rates(monkeypatch)
    words = ["--dataset", "digits", "--model", "cnn-small", "--limit", "40", "--batch-size", "40",
             "--ramp", "0", "--method", "adv", "--guide", "fixed", "--lr", "0.05", "--ckpt",
             tmp_path / "run.pt"]
    run_main(atlas.main, "atlas.py", *words, "--epochs", "14", "--val-steps", "7",
             "--val-step-size", "0.03")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert (saved["last"]["epoch"], saved["best"]["epoch"]) == (14, 3)
    assert rates == pytest.approx([0.05] * 7 + [0.01] * 3 + [0.002] * 4)
    assert seen == [(0.1, 0.03, 7)] * 14
    out = " ".join(capsys.readouterr().out.split())
    assert "pgd-7 (step 0.03), one-step (as --steps 1): under attack at eps 0.1" in out
    assert "clean % pgd-7 % one-step %" in out and "the best epoch is 3, by pgd-7 %" in out
    with pytest.raises(common.UsageError, match="the schedule depends on --epochs"):
        run_main(atlas.main, "atlas.py", *words, "--epochs", "15", "--val-steps", "7",
                 "--val-step-size", "0.03", "--resume")
    run_main(atlas.main, "atlas.py", *words, "--epochs", "2", "--val", "0", "--overwrite")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["best"]["epoch"] == 2 and "val/robust" not in saved["history"][0]
    out = capsys.readouterr().out
    assert "pgd" not in out and "the weights of the last epoch, 2:" in out
