"""iaat.py: algorithms 1 and 2 against a plain loop over images, the other methods, the schedule, cost, launches."""

import json

import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
import iaat
from conftest import SmallNet, plain, run_interrupted, run_main

SHORT = ["--dataset", "digits", "--limit", "100", "--batch-size", "25", "--attack-steps", "3"]


def setting(*flags, n=60):
    """(network with BatchNorm and dropout whose predictions change within the ball, images, labels, memory, flags)."""
    torch.manual_seed(0)
    model = plain(SmallNet())
    model(torch.rand(8, 1, 6, 6))  # sets the lazy layer
    for p in model.parameters():
        p.data *= 2
    for _ in range(20):
        model(torch.rand(32, 1, 6, 6))
    x = torch.rand(n, 1, 6, 6)
    y = model.eval()(x).argmax(1)
    y[::10] = (y[::10] + 1) % 5
    args = iaat.parse(["--dataset", "mnist", "--eps", "0.05", "--gamma", "0.03", "--attack-steps", "4", *flags])
    return model.train(), x, y, torch.linspace(0, 0.1, n), args


def plain_pgd(model, image, label, eps, noise, args):
    """PGD on one image in a ball of its own, written out."""
    point, step = (image + eps * noise).clamp(0, 1), max(args.step_size, eps / (0.5 * args.attack_steps))
    for _ in range(args.attack_steps):
        point.requires_grad_(True)
        grad, = torch.autograd.grad(F.cross_entropy(model(point), label), point)
        point = (point.detach() + step * grad.sign()).clamp(image - eps, image + eps).clamp(0, 1)
    return point


def plain_algorithm_2(model, x, y, memory, args):
    """Image by image, with the noise that a full batch draws."""
    torch.manual_seed(5)
    noises, chosen, branches = [torch.empty_like(x).uniform_(-1, 1) for _ in range(2)], [], []
    for i in range(len(x)):
        image, label, before = x[i:i + 1], y[i:i + 1], memory[i].item()
        for branch, eps in enumerate([before + args.gamma, before, before - args.gamma]):
            if branch == 2 or (model(plain_pgd(model, image, label, eps, noises[branch][i:i + 1], args)).argmax()
                               == label).item():
                break
        branches.append(branch)
        chosen.append(max(0.0, (1 - args.beta) * before + args.beta * eps))
    return torch.tensor(chosen), torch.tensor(branches)


def test_algorithm_2_against_a_plain_loop():
    """Every branch, the smoothing, the bound at 0, on a network with BatchNorm and dropout that is in training mode."""
    model, x, y, memory, args = setting("--beta", "0.3")
    torch.manual_seed(5)
    ours, attacks = iaat.select_eps(model, x, y, memory, args)
    assert all(module.training for module in model.modules())
    expected, branches = plain_algorithm_2(model.eval(), x, y, memory, args)
    assert all((branches == b).sum() >= 5 for b in range(3)) and (memory < args.gamma).sum() > 5
    torch.testing.assert_close(ours, expected)
    assert (ours >= 0).all() and attacks == pytest.approx(1 + (branches > 0).float().mean().item())


def test_skipping_the_second_attack_changes_nothing():
    """Attacking everybody twice, as train mode must, gives in eval mode what skipping gives."""
    model, x, y, memory, args = setting()
    results = []
    for skip in (True, False):
        torch.manual_seed(5)
        everyone = torch.ones_like(y, dtype=torch.bool)
        first = iaat.holds(model, x, y, memory + args.gamma, everyone, args)
        second = iaat.holds(model, x, y, memory, ~first if skip else everyone, args) & ~first
        results.append((first, second))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and results[0][1].any() and results[0][0].any()


def test_train_mode_attacks_the_whole_batch():
    model, x, y, memory, args = setting("--attack-mode", "train")
    seen, forward = [], model.forward
    model.forward = lambda x: (seen.append(len(x)), forward(x))[1]
    _, attacks = iaat.select_eps(model, x, y, memory, args)
    assert set(seen) == {len(x)} and len(seen) == 2 * (args.attack_steps + 1) and attacks == 2


def test_algorithm_1_against_a_plain_loop():
    """The warm-up's eps, its own eps afterwards with the lower bound, the clean loss on misclassified images."""
    for warm, flags in ((True, []), (False, []), (False, ["--eps-min", "0.04"])):
        model, x, y, memory, args = setting(*flags)
        model.eval()  # the update's forward then is the plain loop's too
        torch.manual_seed(5)
        terms, eps = iaat.iaat_loss(model, x, y, memory, warm, args)
        if warm:
            assert torch.equal(eps, memory)
        else:
            torch.testing.assert_close(eps, plain_algorithm_2(model, x, y, memory, args)[0])
        torch.manual_seed(5)
        if not warm:
            [torch.empty_like(x).uniform_(-1, 1) for _ in range(2)]
        noise, total, right = torch.empty_like(x).uniform_(-1, 1), 0, 0
        for i in range(len(x)):
            image, label = x[i:i + 1], y[i:i + 1]
            if model(image).argmax() == label:
                radius, right = max(eps[i].item(), args.eps_min), right + 1
                image = plain_pgd(model, image, label, radius, noise[i:i + 1], args)
            total = total + F.cross_entropy(model(image), label) / len(x)
        torch.testing.assert_close(terms["loss"], total)
        assert terms["right"] == pytest.approx(right / len(x)) and 0.5 < right / len(x) < 1


def test_line_search_against_a_plain_loop():
    """The last radius of the grid before the first that fails; at most 4 eps."""
    model, x, y, _, args = setting()
    torch.manual_seed(5)
    ours, _ = iaat.line_search(model, x, y, args)
    torch.manual_seed(5)
    noises = [torch.empty_like(x).uniform_(-1, 1) for _ in range(6)]
    model.eval()
    for i in range(len(x)):
        level = 0
        while level < 6 and model(plain_pgd(model, x[i:i + 1], y[i:i + 1], (level + 1) * args.gamma,
                                             noises[level][i:i + 1], args)).argmax() == y[i]:
            level += 1
        assert ours[i] == pytest.approx(level * args.gamma)
    assert len(ours.unique()) > 4 and ours.max() <= 4 * args.eps + 1e-6


def test_baselines():
    """PGD-AT is cross-entropy on PGD of one eps; mixup mixes those images and their losses; clean has no adversary."""
    for method in ("pgd-at", "mixup", "clean"):
        model, x, y, memory, args = setting("--method", method)
        model.eval()
        torch.manual_seed(5)
        terms, eps = iaat.iaat_loss(model, x, y, memory, False, args)
        torch.manual_seed(5)
        torch.empty_like(x).uniform_(-1, 1) if method != "clean" else None
        x_adv = x if method == "clean" else common.pgd(model, x, y, args.eps, args.step_size, args.attack_steps)
        if method == "mixup":
            share, other = torch.rand(()), torch.randperm(len(x))
            log_p = model(share * x_adv + (1 - share) * x_adv[other]).log_softmax(1)
            soft = share * F.one_hot(y, 5) + (1 - share) * F.one_hot(y[other], 5)
            expected = -(soft * log_p).sum(1).mean()
        else:
            expected = F.cross_entropy(model(x_adv), y)
        torch.testing.assert_close(terms["loss"], expected)
        assert torch.equal(eps, memory)


@pytest.mark.parametrize("flags", [[], ["--attack-mode", "train"], ["--method", "pgd-at"], ["--method", "line-search"],
                                   ["--method", "mixup"], ["--method", "clean"]], ids=" ".join)
def test_cost_is_what_is_counted(flags):
    """Forward passes are counted with their backward ones, weighted by images: a forward-backward pass is 1, a forward
    pass alone a third. IAAT costs at most 3 k + 2, less in eval mode; PGD-AT k + 1."""
    model, x, y, memory, args = setting(*flags)
    units, forward = [], model.forward

    def counted(x):
        logits = forward(x)
        share = len(x) / 60
        units.append(share / 3)
        if logits.requires_grad:
            logits.register_hook(lambda g: units.append(share * 2 / 3))
        return logits
    model.forward = counted
    terms, _ = iaat.iaat_loss(model, x, y, memory, False, args)
    terms["loss"].backward()
    assert terms["passes"].item() == pytest.approx(sum(units))
    k = args.attack_steps
    bound = {"iaat": 3 * k + 2, "pgd-at": k + 1, "mixup": k + 1, "clean": 1, "line-search": 100}[args.method]
    assert sum(units) <= bound + 1e-6
    if args.method == "iaat" and args.attack_mode == "eval":
        assert sum(units) < 0.95 * bound


def test_a_large_eps_is_reached_and_a_bound_holds():
    """Each image's perturbation fills its own ball: the step grows with eps."""
    _, x, y, _, args = setting()
    model = plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)))
    x, y = 0.4 + 0.2 * x, y % 2
    eps = torch.linspace(0, 0.35, len(x))
    x_adv = iaat.adaptive_pgd(model, x, y, eps, torch.zeros_like(x), args)
    torch.testing.assert_close((x_adv - x).abs().amax((1, 2, 3)), eps)


def test_paper_settings():
    """Tables 9 and 10: both networks' epochs, decays and warm-ups; shares of other lengths."""
    args = iaat.parse([])
    assert (args.model, args.epochs, args.weight_decay, args.warmup, args.batch_size) == ("resnet18", 200, 2e-4, 5, 128)
    drops = [e for e in range(1, 200) if iaat.learning_rate(e, args) < iaat.learning_rate(e - 1, args)]
    assert drops == [80, 140, 170] and iaat.learning_rate(199, args) == pytest.approx(1e-4)
    args = iaat.parse(["--model", "wrn-32-10"])
    assert (args.epochs, args.weight_decay, args.warmup) == (110, 5e-4, 10)
    drops = [e for e in range(1, 110) if iaat.learning_rate(e, args) < iaat.learning_rate(e - 1, args)]
    assert drops == [70, 90, 100] and iaat.learning_rate(109, args) == pytest.approx(0.1 * 0.2**3)
    assert 255 * args.gamma == pytest.approx(1.9) and (args.beta, args.val, args.normalize) == (0.1, 0, "dataset")
    assert iaat.parse(["--warmup", "0"]).warmup == 0
    for flags in (["--epochs", "5"], ["--method", "line-search", "--gamma", "0.5"]):
        with pytest.raises(common.UsageError):
            iaat.parse(flags)
    assert iaat.learning_rate(0, iaat.parse(["--epochs", "1", "--warmup", "0"])) == 0.1


@pytest.mark.parametrize("method", iaat.METHODS)
def test_launch_resume_evaluate(tmp_path, method):
    """Three epochs in one go equal two, an interruption, and another, the memory included; each image's eps moves by at
    most beta gamma an epoch after the warm-up; evaluate.py reads what is written."""
    words = [*SHORT, "--method", method, "--epochs", "3", "--warmup", "1", "--val", "50"]
    run_main(iaat.main, "iaat.py", *words, "--ckpt", tmp_path / "whole.pt")
    run_interrupted(iaat.main, "iaat.py", (3,), *words, "--ckpt", tmp_path / "cut.pt")
    whole, cut = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "cut.pt"))
    assert all(torch.equal(v, cut["last"]["state_dict"][k]) for k, v in whole["last"]["state_dict"].items())
    memory = whole["method_state"]["memory"]
    assert torch.equal(memory, cut["method_state"]["memory"])
    assert whole["method_state"]["snapshots"].keys() == cut["method_state"]["snapshots"].keys()
    train, _ = common.load_train("digits", "data", 50, 100, "cpu")
    others = torch.ones(len(memory), dtype=torch.bool)
    others[train.index] = False
    assert (memory[others] == memory[others][0]).all()
    moved = (memory[train.index] - 0.1).abs()
    if method == "iaat":
        assert 0 < moved.max() <= 2 * 0.1 * 0.024 + 1e-6 and (moved > 0).float().mean() > 0.5
        assert {"eps/mean", "eps/5%", "cost/passes", "train/right"} <= whole["history"][0].keys()
    elif method != "line-search":
        assert moved.max() < 1e-6
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.pt", "--attacks", "clean,pgd-3", "--limit", 50)
    assert [o["attack"] for o in json.loads((tmp_path / "cut.eval.json").read_text())] == ["clean", "pgd-3"]


def test_the_eps_of_the_images_are_drawn(tmp_path):
    """evaluate.py's figure from the memory in the checkpoint; none where there is no memory."""
    words = [*SHORT, "--epochs", "8", "--warmup", "0", "--ckpt", tmp_path / "run.pt"]
    run_main(iaat.main, "iaat.py", *words)
    model, checkpoint = common.load_model(tmp_path / "run.pt")
    assert list(checkpoint["method_state"]["snapshots"]) == list(range(1, 9))
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    test = evaluate.load_test("digits", "data", 20, "cpu")
    scene = evaluate.Scene(model, checkpoint, test, {}, 0.1, 0, "data")
    figure = evaluate.draw_eps(pyplot, scene)
    assert len(figure.axes) == 2 + 40 and len(figure.axes[1].lines) == 4 and len(figure.axes[0].patches) == 4
    assert evaluate.draw_eps(pyplot, scene._replace(checkpoint=dict(checkpoint, method_state=None))) is None
