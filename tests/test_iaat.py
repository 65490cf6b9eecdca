"""iaat.py: algorithms 1 and 2 against a plain loop over images, the other methods, the schedule, cost, launches."""

import json
import os
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
    args = iaat.parse(["--dataset", "mnist", "--eps", "0.05", *flags])
    args.gamma, args.attack_steps, args.select_steps = 0.03, 4, 4
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
    x_adv = iaat.adaptive_pgd(model, x, y, eps, torch.zeros_like(x), args.attack_steps, args)
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
    elsewhere = iaat.parse(["--dataset", "imagenet", "--model", "wrn-32-10"])  # table 10 is CIFAR's
    assert (elsewhere.weight_decay, elsewhere.warmup) == (1e-4, 30)
    for flags in (["--epochs", "5"], ["--method", "line-search", "--gamma", "0.5"],
                  ["--method", "pgd-at", "--beta", "0"], ["--method", "clean", "--targeted"]):
        with pytest.raises(common.UsageError):
            iaat.parse(flags)
    assert iaat.learning_rate(0, iaat.parse(["--epochs", "1", "--warmup", "0"])) == 0.1


@pytest.mark.parametrize("method", iaat.METHODS)
def test_launch_resume_evaluate(tmp_path, method):
    """Three epochs in one go equal two, an interruption, and another, the memory included; each image's eps moves by at
    most beta gamma an epoch after the warm-up; evaluate.py reads what is written."""
    words = [*(SHORT[:-2] if method == "clean" else SHORT), "--method", method, "--epochs", "3", "--val", "50"]
    words += ["--warmup", "1"] if method in iaat.OWN else []
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
    first = checkpoint["method_state"]["snapshots"][1]  # without a warm-up eps starts at 0
    assert first.min() == 0 and first.max() == pytest.approx(checkpoint["args"]["beta"] * checkpoint["args"]["gamma"])
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    test = evaluate.load_test("digits", "data", 20, "cpu")
    scene = evaluate.Scene(model, checkpoint, test, {}, 0.1, 0, "data")
    figure = evaluate.draw_eps(pyplot, scene)
    assert len(figure.axes) == 2 + 40 and len(figure.axes[1].lines) == 4 and len(figure.axes[0].patches) == 4
    assert evaluate.draw_eps(pyplot, scene._replace(checkpoint=dict(checkpoint, method_state=None))) is None
    state = checkpoint["method_state"]
    memory = torch.full_like(state["memory"], 0.1)  # within a warm-up
    state = dict(memory=memory, snapshots=dict.fromkeys(state["snapshots"], memory))
    figure = evaluate.draw_eps(pyplot, scene._replace(checkpoint=dict(checkpoint, method_state=state)))
    bars = figure.axes[0].patches[0].get_xy()
    assert bars[:, 1].max() == checkpoint["args"]["limit"]  # every image that was trained on, no other


# ------------------------------------------------------------------------------- ImageNet and several processes

SMALL = """import common
common.DATASETS["imagenet"].update(classes=3, shape=(3, 64, 64))
import iaat
{extra}
if __name__ == "__main__":
    common.cli(iaat.main)
"""
CHECKED = """
import torch
merged = iaat.merged
def checked(memory, seen):
    whole = merged(memory, seen)
    every = [torch.zeros_like(whole) for _ in range(2)]
    visits = torch.zeros(41).index_add_(0, seen, torch.ones(len(seen)))
    torch.distributed.all_gather(every, whole)
    torch.distributed.all_reduce(visits)
    assert torch.equal(*every) and torch.equal(whole[seen], memory[seen]) and (visits == 1).all()
    print("memories agree")
    return whole
iaat.merged = checked
"""
STOPPED = """
batches = common.train_batches
def stopped(*args):
    if args[3] == 1:
        raise KeyboardInterrupt
    return batches(*args)
common.train_batches = stopped
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of JPEG files as ImageNet's, three classes told apart by colour: 41 training and 12 test images."""
    from PIL import Image
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
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
    """ImageNet of three classes and 64 x 64 pixels, in this process."""
    for name, value in dict(classes=3, shape=(3, 64, 64)).items():
        monkeypatch.setitem(common.DATASETS["imagenet"], name, value)


def launch(folder, path, processes, *words, extra="", status=0):
    """Run iaat.py on the folder, after `extra` lines of Python, by so many processes of torchrun: what it prints."""
    script = path.with_suffix(".py")
    script.write_text(SMALL.format(extra=extra))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    words = [*start, script, "--dataset", "imagenet", "--data-dir", folder, "--ckpt", path, *words]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, env=dict(
        os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1"))
    assert (done.returncode == 0) == (status == 0), done.stderr
    return done.stdout


def test_two_processes_train_what_one_does(folder, tmp_path):
    """Without chance in the loss, two processes' weights and means are one's, also after an interruption."""
    words = ["--method", "clean", "--model", "cnn-small", "--batch-size", "7", "--epochs", "3", "--workers", "1",
             "--precision", "float32", "--lr", "0.05", "--resume"]
    launch(folder, tmp_path / "one.pt", 1, *words)
    launch(folder, tmp_path / "two.pt", 2, *words, extra=STOPPED, status=1)
    missing = "import os\nif os.environ['RANK'] == '1': common.Run.restore = lambda self, model, optimizer: 0"
    launch(folder, tmp_path / "two.pt", 2, *words, extra=missing, status=1)
    assert "goes on after epoch 1" in launch(folder, tmp_path / "two.pt", 2, *words)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["history"][-1]["train/loss"] < one["history"][0]["train/loss"] and len(two["history"]) == 3
    for name, value in one["last"]["state_dict"].items():
        torch.testing.assert_close(two["last"]["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(two["history"], one["history"]):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert two["provenance"]["hardware"].startswith("2 x CPU")


def test_two_processes_share_one_memory(folder, tmp_path, small):
    """With BatchNorm, and past the warm-up: both end an epoch with the same memory, every image is visited once, and
    one of them prints. evaluate.py reads the files."""
    words = ["--model", "resnet18", "--batch-size", "14", "--warmup", "1", "--epochs", "2", "--attack-steps", "2",
             "--select-steps", "1", "--workers", "0"]
    out = launch(folder, tmp_path / "run.pt", 2, *words, extra=CHECKED)
    assert out.count("memories agree") == 2 and out.count("the best epoch is") == 1 and "nan" not in out
    memory = torch.load(tmp_path / "run.pt", weights_only=True)["method_state"]["memory"]
    assert len(memory) == 41 and (memory != memory[0]).any()
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "run.pt", "--data-dir", folder, "--attacks",
             "clean,targeted-2:4/255", "--workers", 1)
    outcomes = json.loads((tmp_path / "run.eval.json").read_text())
    assert [(o["attack"], o["n"]) for o in outcomes] == [("clean", 12), ("targeted-2:4/255", 12)]


def test_each_process_gets_its_share(folder, small, monkeypatch):
    """Every image once an epoch over three processes, none of them without work; files are cropped the same whoever
    reads them."""
    train, _ = common.load_train("imagenet", folder, 0, None, "cpu")

    def epoch(rank, size, n=7):
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size).items():
            monkeypatch.setenv(name, str(value))
        return list(common.train_batches(train, n, 0, 1, ""))
    alone = epoch(0, 1)
    images = {i.item(): image for x, _, index in alone for image, i in zip(x, index)}
    shares = [epoch(rank, 3) for rank in range(3)]
    assert sorted(i for share in shares for _, _, index in share for i in index.tolist()) == list(range(41))
    assert {len(share) for share in shares} == {6} and min(len(x) for share in shares for x, _, _ in share) >= 2
    assert {len(epoch(rank, 3, n=8)) for rank in range(3)} == {5}  # 41 = 5 x 8 + 1
    with pytest.raises(common.UsageError, match="41 training images are too few for 42 processes"):
        epoch(0, 42, n=100)
    for share in shares:
        for x, y, index in share:
            assert all(torch.equal(image, images[i]) for image, i in zip(x, index.tolist()))
            assert torch.equal(y, train.labels[index])


def test_image_files(folder, small, tmp_path, monkeypatch):
    """The middle of each test image, in order; training crops change with the epoch; what is wrong is said."""
    test = evaluate.load_test("imagenet", folder, None, "cpu")
    (x, y, _), = common.eval_batches(test, 12)
    assert x.shape == (12, 3, 64, 64) and 0 <= x.min() and x.max() <= 1 and x.is_contiguous(
        memory_format=torch.channels_last)
    coloured = [i for i, path in enumerate(test.images.paths) if not path.endswith(b"/4.JPEG")]
    assert (x.mean((2, 3)).argmax(1) == y)[coloured].all() and y.bincount().tolist() == [4, 4, 4]
    assert torch.equal(evaluate.load_test("imagenet", folder, 5, "cpu").labels, y[common.subset(12, 5)])
    train, held = common.load_train("imagenet", folder, 10, None, "cpu", 2)
    assert (len(train.images), len(held.images), held.images.workers) == (31, 10, 2)
    rows = torch.arange(4)
    first, again, later = (next(common.read(train, [rows], (0, epoch))) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    for workers in (0, 1):
        broken = common.ImageFiles(np.array([b"/nowhere/x.JPEG"]), (3, 64, 64), workers)
        split = common.Split(broken, torch.zeros(1).long(), torch.zeros(1).long())
        with pytest.raises(common.UsageError, match="^/nowhere/x.JPEG cannot be read .FileNotFoundError"):
            list(common.eval_batches(split, 1))
    with pytest.raises(common.UsageError, match="image-net.org"):
        common.load_split("imagenet", tmp_path, "train", "cpu")
    monkeypatch.setitem(common.DATASETS, "imagenet100", dict(common.DATASETS["imagenet"], classes=2))
    some = common.load_split("imagenet100", folder, "val", "cpu")
    chosen = [f"n{i}".encode() for i in common.subset(3, 2).tolist()]
    assert [chosen[y] for y in some.labels] == [path.split(b"/")[-2] for path in some.images.paths]
    assert some.labels.bincount().tolist() == [4, 4]
    monkeypatch.setitem(common.DATASETS["imagenet"], "classes", 4)
    with pytest.raises(common.UsageError, match="holds 3 classes, ImageNet has 4"):
        common.load_split("imagenet", folder, "train", "cpu")


def test_imagenet_settings(monkeypatch):
    """Table 11, lr in proportion to the batch, its warm-up from 0.1, its decay."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=64).items():
        monkeypatch.setenv(name, str(value))
    args = iaat.parse(["--dataset", "imagenet"])
    assert (args.batch_size, args.lr, args.epochs, args.warmup, args.weight_decay) == (2048, 0.8, 110, 30, 1e-4)
    assert [round(255 * v) for v in (args.eps, args.gamma, args.step_size, args.eps_min)] == [16, 4, 1, 4]
    assert (args.attack_steps, args.select_steps, args.targeted, args.model) == (30, 10, True, "resnet50")
    assert iaat.learning_rate(0, args) == pytest.approx(0.1) and iaat.learning_rate(2.5, args) == pytest.approx(0.45)
    drops = [e for e in range(6, 110) if iaat.learning_rate(e, args) < iaat.learning_rate(e - 1, args)]
    assert drops == [35, 70, 95] and iaat.learning_rate(5, args) == 0.8
    for epochs in range(1, 21):
        args = iaat.parse(["--dataset", "imagenet", "--epochs", str(epochs), "--warmup", "0"])
        assert all(0 < iaat.learning_rate(epoch, args) <= 0.8 for epoch in range(epochs))
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = iaat.parse(["--dataset", "imagenet"])
    assert (args.batch_size, args.lr) == (32, 0.0125) and iaat.learning_rate(0, args) == 0.0125


def test_targeted_attacks_aim_at_wrong_classes():
    """Every wrong class and no right one; targeted PGD makes the target likelier."""
    args = iaat.parse(["--dataset", "mnist", "--targeted", "--attack-steps", "3"])
    y = torch.arange(10).repeat(200)
    target = iaat.aims(y, args)
    assert (target != y).all() and len(torch.unique(10 * y + target)) == 90
    model, x, y, _, _ = setting()
    target = (y + 1) % 5
    noise, eps = torch.zeros_like(x), torch.full((len(x),), 0.05)
    x_adv = iaat.adaptive_pgd(model, x, target, eps, noise, 3, args)
    before, after = (F.cross_entropy(model.eval()(z), target, reduction="none") for z in (x, x_adv))
    assert (after < before).float().mean() > 0.9


def test_other_scripts_are_not_for_torchrun(monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(common.UsageError, match="torchrun"):
        common.set_up("cpu")
