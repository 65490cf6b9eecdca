"""evaluate.py's own attacks against brute force, closed forms and the packages they call.

Its record, its checks and its plots are tested, too.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import common
import evaluate
from conftest import Linear, flags_of, plain, run_main


def evaluate_main(*words):
    run_main(evaluate.main, "evaluate.py", "--wandb", "disabled", *words)


def batch(n, shape=(1, 3, 3), low=0.0, high=1.0, seed=1):
    torch.manual_seed(seed)
    return low + (high - low) * torch.rand(n, *shape)


def attack(name, eps=0.1, **options):
    return evaluate.parse_attacks(name, common.dataset_facts("digits"), eps, **options)[0]


def run(name, model, x, y, eps=0.1, **options):
    """Which samples an attack by name leaves correct, bool (N,)."""
    a = attack(name, eps, **options)
    torch.manual_seed(0)
    x_adv = evaluate.ATTACKS[a.kind].run(model, x, y, a, y)
    return evaluate.judge(model, x, y, x_adv, a)[:, 0] == 1


class Rugged(nn.Module):
    """Nine pixels, three classes, many small hills."""

    def __init__(self, classes=3, scale=4.0):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, classes))
        for p in self.net.parameters():
            p.data *= scale

    def forward(self, x):
        return self.net(x)


def test_multi_targeted_against_brute_force():
    """On a linear model the exact answer is known.

    Some wrong class i wins within the ball iff max_i f_i - f_y + eps |w_i - w_y|_1 > 0, for images
    away from the border of [0, 1]. The loss that follows the largest wrong logit misses some of
    these.
    """
    model = Linear((1, 3, 3), classes=6, scale=1.0)
    x = batch(600, low=0.25, high=0.75)
    y = model(x).argmax(1)
    weight = model.layer.weight.detach()
    z = model(x).detach()
    lead = z - z.gather(1, y[:, None])
    distance = (weight[None] - weight[y][:, None]).abs().sum(2)
    reach = lead + 0.2 * distance
    reach[torch.arange(len(x)), y] = -np.inf
    exact = reach.amax(1) <= 0
    assert 0.2 < exact.float().mean() < 0.8
    one_step = dict(eps=0.2, step=0.2)
    assert torch.equal(run("multi-3", model, x, y, **one_step), exact)
    assert run("un-3", model, x, y, **one_step).sum() > exact.sum()


def breakable(model, image, label, signs):
    """Whether any radius up to 0.1, along any of the sign vectors, gives a wrong prediction."""
    for radius in torch.linspace(0, 0.1, 101):
        points = (image + radius * signs).clamp(0, 1)
        if (model(points).argmax(1) != label).any():
            return True
    return False


def test_rays_against_brute_force():
    """All 512 sign vectors of nine pixels, each at all radii of a fine grid.

    RayS breaks nothing that they do not, and at least nine in ten of what they do. Its queries
    stay within the budget.
    """
    model = Rugged()
    x = batch(150)
    with torch.no_grad():
        y = model(x).argmax(1)
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9))).view(-1, 1, 3, 3)
        reachable = [breakable(model, image, label, signs) for image, label in zip(x, y)]
    reachable = torch.tensor(reachable)
    assert 0.2 < reachable.float().mean() < 0.8
    forward = model.forward

    def count(images):
        assert torch.is_tensor(images)
        assert not torch.is_grad_enabled()
        count.queries += len(images)
        return forward(images)
    count.queries = 0
    model.forward = count
    broken = ~run("rays-400", model, x, y)
    assert not (broken & ~reachable).any()
    assert (broken & reachable).sum() >= 0.9 * reachable.sum()
    assert count.queries <= (400 + 11) * len(x) + 2 * len(x)
    weak = ~run("rays-3", model, x, y)
    assert weak.sum() < broken.sum()


def test_random_targeted_aims_at_wrong_classes():
    """Some samples fall, and fewer than if every wrong class is tried.

    The true class is nobody's target.
    """
    model = Linear((1, 3, 3), classes=5, scale=2.0)
    x = batch(300)
    y = model(x).argmax(1)
    left = run("targeted-10", model, x, y)
    assert 0.05 < left.float().mean() < 0.95
    assert left.sum() > run("multi-10", model, x, y).sum()  # one wrong class is fewer than all


@pytest.mark.parametrize("name", ["deepfool", "cw-l2-300"])
def test_minimal_l2_against_the_closed_form(name):
    """Two linear classes: the nearest wrong point is |f_1 - f_0| / ||w_1 - w_0|| away."""
    model = Linear((1, 4, 4), classes=2, scale=1.0)
    x = batch(40, (1, 4, 4), low=0.45, high=0.55)
    z = model(x).detach()
    weight = model.layer.weight.detach()
    y = z.argmax(1)
    distance = (z[:, 1] - z[:, 0]).abs() / (weight[1] - weight[0]).norm()
    near = distance < 0.3
    x = x[near]
    y = y[near]
    distance = distance[near]
    a = attack(name)
    x_adv = evaluate.ATTACKS[a.kind].run(plain(model), x, y, a, y)
    correct, _, l2, _ = evaluate.judge(model, x, y, x_adv, a).T
    assert len(x) > 10
    assert (correct == 0).all()
    assert (l2 >= 0.999 * distance).all()
    assert (l2 <= 1.25 * distance + 1e-3).all()
    assert all(p.grad is None for p in model.parameters())


def test_noise_is_a_weak_attack():
    model = Rugged()
    x = batch(300)
    y = model(x).argmax(1)
    one = run("noise", model, x, y).float().mean()
    hundred = run("noisex100", model, x, y).float().mean()
    pgd = run("pgd-20", model, x, y).float().mean()
    assert pgd < hundred < one <= 1


NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))

def no_network():
    return 3

class WithFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x), x

def with_features():
    return WithFeatures()
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """(folder, plain torch model) of a network that this project's code did not make.

    The folder has net.py, weights.pt and wrapped.pt.
    """
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))
    images, labels = common.digits("train")
    x = torch.from_numpy(images).float() / 255
    y = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 0.01, weight_decay=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.save(net.state_dict(), folder / "weights.pt")
    wrapped = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": wrapped}, folder / "wrapped.pt")
    return folder, net.eval()


def test_an_outcome_has_the_mean_cross_entropy(foreign, tmp_path):
    """On clean images that of the plain network (saliency paper, table 7)."""
    folder, net = foreign
    images, labels = common.digits("test")
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(
            net(torch.from_numpy(images).float() / 255), torch.from_numpy(labels)).item()
    evaluate_main("--ckpt", folder / "weights.pt", "--model", f"{folder / 'net.py'}:make",
                  "--dataset", "digits", "--limit", 0, "--attacks", "clean",
                  "--record", tmp_path / "r.json")
    outcome, = json.loads((tmp_path / "r.json").read_text())
    assert outcome["ce"] == pytest.approx(wanted, rel=1e-4)


def test_autoattack_of_a_foreign_network_is_the_packages(foreign):
    """A bare state_dict and its own file of code.

    AutoAttack through us and AutoAttack called directly agree sample by sample.
    """
    from pyautoattack import AutoAttack
    folder, net = foreign
    words = ["--dataset", "digits", "--model", f"{folder}/net.py:make", "--eps", "0.07",
             "--limit", 24, "--seed", 5]
    evaluate_main("--ckpt", folder / "weights.pt", *words, "--attacks", "clean,aa")
    test = evaluate.load_test(common.dataset_facts("digits"), "data", 24, "cpu")
    x = common.to_float(test.images).contiguous()
    y = test.labels
    adversary = AutoAttack(net, eps=0.07, seed=5)
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=24)
    theirs = (net(x_adv).argmax(1) == y).numpy()
    outcome = json.loads((folder / "weights.eval.json").read_text())[1]
    ours = np.load(folder / "weights.eval.npz")[outcome["key"]][:, 0] == 1
    assert 0.2 < theirs.mean() < 0.8
    assert np.array_equal(ours, theirs)
    assert outcome["attack"] == "aa"
    assert outcome["seed"] == 5
    assert outcome["accuracy"] == theirs.mean()


def test_foreign_checkpoints(foreign, tmp_path, capsys):
    """Prefixes and the usual wrapper are stripped, and what is missing or wrong is named.

    A checkpoint's own file of code is not followed unless the command line gives it.
    """
    folder, _ = foreign
    words = ["--attacks", "clean,fgsm", "--limit", 50, "--dataset", "digits"]
    tables = []
    for name in ("weights.pt", "wrapped.pt"):
        capsys.readouterr()
        evaluate_main("--ckpt", folder / name, *words, "--model", f"{folder}/net.py:make")
        tables.append(capsys.readouterr().out.split("largest")[1].split("worst")[0])
    accuracies = []
    for table in tables:
        accuracies.append([line.split()[:2] for line in table.splitlines()[1:]])
    assert accuracies[0] == accuracies[1]
    assert "clean" in tables[0]
    wrong = [("lenet+", "do not fit .*yours is --model path/to/file.py:function"),
             (f"{folder}/none.py:make", "none.py"),
             (f"{folder}/net.py:no_network", "must return a torch.nn.Module"),
             (f"{folder}/net.py:with_features", "gives tuple, it must return the logits alone"),
             (f"{folder}/net.py:absent", "absent")]
    for model, named in wrong:
        with pytest.raises(common.UsageError, match=named):
            evaluate_main("--ckpt", folder / "weights.pt", *words, "--model", model)
    with pytest.raises(common.UsageError, match="bare state_dict: --model and --dataset"):
        evaluate_main("--ckpt", folder / "weights.pt", "--attacks", "clean")
    import sat_rx
    own = ["--dataset", "digits", "--epochs", 1, "--method", "nt",
           "--model", f"{folder}/net.py:make"]
    run_main(sat_rx.main, "sat_rx.py", *own, "--ckpt", tmp_path / "run.pt")
    with pytest.raises(common.UsageError, match="not run unasked: give --model"):
        evaluate_main("--ckpt", tmp_path / "run.pt", *words)
    evaluate_main("--ckpt", tmp_path / "run.pt", *words, "--model", f"{folder}/net.py:make")


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    """AutoAttack's nine targets and APGD-T's four logits do not fit few classes.

    AutoAttack adapts, and so do the multi-targeted attacks.
    """
    model = Linear((1, 3, 3), classes=classes, scale=1.0)
    x = batch(12)
    y = model(x).argmax(1)
    aa = run("aa", model, x, y)
    multi = run("multi-5", model, x, y)
    fgsm = run("fgsm", model, x, y)
    assert not (aa & ~multi).any()
    assert not (aa & ~fgsm).any()


def test_too_many_classes_are_refused():
    with pytest.raises(common.UsageError, match="99 wrong classes is out of reach"):
        evaluate.parse_attacks("multi-20", common.dataset_facts("cifar100"), 0.03)
    with pytest.raises(common.UsageError, match="no corrupted copy"):
        evaluate.parse_attacks("corruptions", common.dataset_facts("mnist"), 0.3)


def test_names_compose():
    """Radius and step by name: pgd-20:0.2 has its own eps, and a step is the paper's.

    A step never exceeds its radius.
    """
    mnist = common.dataset_facts("mnist")
    a, b = evaluate.parse_attacks("pgd-20x3:1/10, un-4", mnist, 0.3)
    assert (a.eps, a.restarts, a.steps, a.start) == (0.1, 3, 20, "ball")
    assert b.eps == 0.3
    assert a.step == pytest.approx(1.25 * 0.1 / 20)
    assert b.step == pytest.approx(1.25 * 0.3 / 4)
    divided, = evaluate.parse_attacks("pgd-20", mnist, 0.1, step="eps/steps")
    assert divided.step == pytest.approx(0.005)
    clipped, = evaluate.parse_attacks("pgd-20", mnist, 0.005, step=0.01)
    assert clipped.step == 0.005
    for protocol, plans in evaluate.PROTOCOLS.items():
        for dataset, plan in plans.items():
            names = plan["attacks"]
            if common.DATASETS[dataset]["classes"] > 20:
                names = names.replace(",multi-20x5", "")
            facts = common.dataset_facts(dataset)
            attacks = evaluate.parse_attacks(names, facts, 0.1, plan["step"], plan["start"])
            costly = {a.name for a in attacks} & {"aa", "multi-50x20"}
            assert protocol == "common" or costly <= set(plan["few"])


@pytest.fixture
def digits_run(train, tmp_path):
    """A robust network on digits, in a folder of its own."""
    path = tmp_path / "run.pt"
    shutil.copy(train("r2", "--epochs", "6"), path)
    return path


def test_saved_images_reproduce_the_accuracy(digits_run, tmp_path):
    """--save-adv writes float32 images inside ball and box.

    The checkpoint has exactly the reported accuracy on them.
    """
    file = tmp_path / "adv.npz"
    evaluate_main("--ckpt", digits_run, "--attacks", "fgsm,un-5x2", "--limit", 80,
                  "--save-adv", file)
    model, _ = common.load_model(digits_run)
    test = evaluate.load_test(common.dataset_facts("digits"), "data", 80, "cpu")
    clean = common.to_float(test.images).numpy()
    with np.load(file) as saved:
        for outcome in json.loads((tmp_path / "run.eval.json").read_text()):
            images = saved[f"{outcome['attack']}/images"]
            labels = saved[f"{outcome['attack']}/labels"]
            assert images.dtype == np.float32
            assert images.min() >= 0
            assert images.max() <= 1
            assert 0.09 < np.abs(images - clean).max() <= 0.1 + 1e-6
            predicted = evaluate.logits_of(model, torch.from_numpy(images)).argmax(1).numpy()
            assert (predicted == labels).mean() == outcome["accuracy"] < 1


def interrupt_pgd(monkeypatch, number):
    """Make the `number`-th call of PGD a KeyboardInterrupt.

    The list that is returned grows with every call.
    """
    real = evaluate.run_pgd
    calls = []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **options)
    monkeypatch.setitem(evaluate.ATTACKS, "pgd", evaluate.ATTACKS["pgd"]._replace(run=counted))
    return calls


def outcomes_of(path):
    """The outcomes in a .eval.json file, without what depends on the clock."""
    outcomes = json.loads(path.read_text())
    for outcome in outcomes:
        outcome.pop("seconds", None)
    return outcomes


def test_interrupted_attacks_go_on(digits_run, tmp_path, monkeypatch, capsys):
    """An evaluation is stopped in the third batch of the second attack and started again.

    Batches that were done are not attacked again. What was finished is not measured again. The
    outcome is that of an uninterrupted evaluation.
    """
    words = ["--attacks", "fgsm,pgd-5x2", "--limit", 100, "--batch-size", 20]
    whole = tmp_path / "whole.pt"
    shutil.copy(digits_run, whole)
    evaluate_main("--ckpt", whole, *words)
    clock = itertools.count(0, 60)  # every batch seems to take a minute, so each is saved
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    calls = interrupt_pgd(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate_main("--ckpt", digits_run, *words)
    assert "run.eval.json keeps what is measured: the same command" in capsys.readouterr().out
    monkeypatch.setattr(common, "fgsm", None)  # would fail
    evaluate_main("--ckpt", digits_run, *words)
    assert len(calls) == 3 + 3
    assert outcomes_of(tmp_path / "run.eval.json") == outcomes_of(tmp_path / "whole.eval.json")
    ours = np.load(tmp_path / "run.eval.npz")
    theirs = np.load(tmp_path / "whole.eval.npz")
    for key in theirs.files:
        if not key.endswith("seconds"):
            assert np.array_equal(ours[key], theirs[key]), key
    evaluate_main("--ckpt", digits_run, *words)
    assert len(calls) == 6
    monkeypatch.undo()
    evaluate_main("--ckpt", digits_run, *words, "--overwrite")
    assert outcomes_of(tmp_path / "run.eval.json") == outcomes_of(tmp_path / "whole.eval.json")


def test_interrupted_transfer_images_go_on(digits_run, tmp_path, monkeypatch):
    """Images that were made before an interruption are not made again.

    All are those of an uninterrupted run.
    """
    source = tmp_path / "source.pt"
    whole = tmp_path / "whole.pt"
    shutil.copy(digits_run, source)
    shutil.copy(digits_run, whole)
    words = ["--ckpt", digits_run, "--attacks", "clean", "--transfer", "pgd-3x3", "--limit", 60,
             "--eps", "0.14", "--batch-size", 20, "--surrogate"]
    calls = interrupt_pgd(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        evaluate_main(*words, source)
    assert len(list(tmp_path.glob("source.*.part.npy"))) == 1
    evaluate_main(*words, source)
    assert len(calls) == 9 + 1
    assert not list(tmp_path.glob("source.*.part.npy"))
    evaluate_main(*words, whole, "--overwrite")
    assert len(calls) == 10 + 9
    ours = np.load(next(tmp_path.glob("source.pgd-3x3-*.npy")))
    theirs = np.load(next(tmp_path.glob("whole.pgd-3x3-*.npy")))
    assert np.isfinite(ours).all()
    assert np.array_equal(ours, theirs)


def test_restarts_of_a_transfer_attack_are_combined(digits_run, tmp_path):
    """What one of the restarts' images breaks is broken.

    The worst case over attacks is taken sample by sample.
    """
    source = tmp_path / "source.pt"
    shutil.copy(digits_run, source)
    words = ["--attacks", "clean", "--surrogate", source, "--limit", 60, "--eps", "0.14"]
    evaluate_main("--ckpt", digits_run, *words, "--transfer", "pgd-3x3")
    images = torch.from_numpy(np.load(next(tmp_path.glob("source.pgd-3x3-*.npy"))))
    model, _ = common.load_model(digits_run)
    y = evaluate.load_test(common.dataset_facts("digits"), "data", 60, "cpu").labels
    right = torch.stack([evaluate.logits_of(model, x).argmax(1) == y for x in images])
    outcome = json.loads((tmp_path / "run.eval.json").read_text())[-1]
    assert images.shape == (3, 60, 1, 28, 28)
    assert outcome["attack"] == "pgd-3x3@lenet+"
    combined = right.all(0).double().mean()
    assert outcome["accuracy"] == combined
    assert combined < right.double().mean(1).min() + 1e-9


def test_corruptions(tmp_path, capsys):
    """Each type is measured on the chosen test images at five severities.

    The accuracy is the mean over the types. The error gives the address where files are missing.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 30)
    images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", test_images=images, test_labels=labels)
    model = common.build_model("wrn-10-1", common.dataset_facts("cifar10"))
    torch.save(model.net.state_dict(), tmp_path / "w.pt")
    words = ["--ckpt", tmp_path / "w.pt", "--dataset", "cifar10", "--model", "wrn-10-1",
             "--data-dir", tmp_path]
    with pytest.raises(common.UsageError, match="CIFAR-10-C.*zenodo.org/records/2535967"):
        evaluate_main(*words, "--attacks", "corruptions")
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels, 5))
    arrays = {}
    for name in ("fog", "snow"):
        arrays[name] = rng.integers(0, 256, (150, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", arrays[name])
    evaluate_main(*words, "--attacks", "corruptions", "--limit", 20)
    outcome, = json.loads((tmp_path / "w.eval.json").read_text())
    rows = common.subset(30, 20).numpy()
    for name, array in arrays.items():
        chosen = array.reshape(5, 30, 32, 32, 3)[:, rows].reshape(-1, 32, 32, 3)
        x = torch.from_numpy(chosen.transpose(0, 3, 1, 2) / 255).float()
        predicted = model.eval()(x).argmax(1).numpy()
        right = predicted == np.tile(labels[rows], 5)
        assert outcome["types"][name] == pytest.approx(right.mean())
    assert outcome["accuracy"] == pytest.approx(np.mean(list(outcome["types"].values())))


def imagenet_c(folder):
    """Write nine test images of three classes, and ImageNet-C's fifteen types of them, 32 x 32.

    Returns {(type, severity): (pixels (9, 32, 32, 3), labels)}, in the order of the files.
    """
    from PIL import Image
    rng = np.random.default_rng(0)
    stored = {}
    places = [("clean", 0)] + list(itertools.product(evaluate.ALEXNET_ERRORS, range(1, 6)))
    for kind, severity in places:
        root = folder / "ImageNet-C" / kind / str(severity)
        if not severity:
            root = folder / "imagenet" / "val"
        pixels = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
        for i, array in enumerate(pixels):
            place = root / f"n{i // 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"v{i}.JPEG", format="png")  # loses nothing
        stored[kind, severity] = pixels
    return stored


def test_imagenet_c(tmp_path, capsys, monkeypatch):
    """Images are read as they are, at the chosen test images; mCE by its definition.

    The error gives the address and the shape of the folder where files are missing.
    """
    for name, value in dict(classes=3, shape=(3, 32, 32)).items():
        monkeypatch.setitem(common.DATASETS["imagenet"], name, value)
    stored = imagenet_c(tmp_path)
    torch.manual_seed(0)
    model = common.build_model("cnn-small", common.dataset_facts("imagenet"))
    for parameter in model.parameters():  # else it has one class for all images
        parameter.data *= 10
    torch.save(model.net.state_dict(), tmp_path / "w.pt")
    words = ["--ckpt", tmp_path / "w.pt", "--dataset", "imagenet", "--model", "cnn-small",
             "--data-dir", tmp_path, "--workers", 0]
    evaluate_main(*words, "--attacks", "corruptions", "--limit", 5)
    outcome, = json.loads((tmp_path / "w.eval.json").read_text())
    rows = common.subset(9, 5).numpy()
    labels = np.arange(9)[rows] // 3
    errors = {}
    for (kind, severity), pixels in stored.items():
        x = torch.from_numpy(pixels[rows].transpose(0, 3, 1, 2) / 255).float()
        wrong = model.eval()(x).argmax(1).numpy() != labels
        errors.setdefault(kind, []).append(wrong.mean())
    ratios = []
    for kind, of_alexnet in evaluate.ALEXNET_ERRORS.items():
        assert outcome["types"][kind] == pytest.approx(1 - np.mean(errors[kind]))
        ratios.append(np.sum(errors[kind]) / (5 * of_alexnet))
    assert list(outcome["ce"].values()) == pytest.approx(ratios)
    assert outcome["mce"] == pytest.approx(np.mean(ratios))
    assert len(set(outcome["types"].values())) > 1
    assert f"mCE {100 * outcome['mce']:8.2f}" in capsys.readouterr().out
    assert evaluate.our_columns([outcome])["mCE"] is outcome
    (tmp_path / "ImageNet-C" / "fog" / "3").rename(tmp_path / "elsewhere")
    named = "fog.3 is missing, one of 1.*zenodo.org/records/2235448.*CORRUPTION/SEVERITY/WNID"
    with pytest.raises(common.UsageError, match=named):
        evaluate_main(*words, "--attacks", "corruptions")


def test_corruptions_of_some_classes_are_refused():
    facts = common.dataset_facts("cifar10", chosen=[0, 1])
    with pytest.raises(common.UsageError, match="they are of all classes"):
        evaluate.parse_attacks("corruptions", facts, 0.03)


def test_alignment_of_a_linear_model():
    """Eqs. 4, 6 and 7 from the weights."""
    model = Linear((1, 4, 4), classes=4)
    x = batch(30, (1, 4, 4))
    images = (255 * x).round().byte()
    test = common.Split(images, torch.zeros(30, dtype=torch.int64), torch.arange(30))
    flat = common.to_float(images).flatten(1)
    weight = model.layer.weight.detach()
    z = model(common.to_float(images)).detach()
    for i, (alpha, binarised, robustness) in enumerate(evaluate.alignment(plain(model), test, 7)):
        top = z[i].argmax()
        others = [j for j in range(4) if j != top]
        distances = []
        for j in others:
            distance = (z[i, top] - z[i, j]) / (weight[top] - weight[j]).norm()
            distances.append(distance.item())
        nearest = others[int(np.argmin(distances))]
        assert robustness == pytest.approx(min(distances), rel=1e-4)
        expected = (flat[i] @ weight[top]).abs() / weight[top].norm()
        assert alpha == pytest.approx(expected.item(), rel=1e-4)
        g = weight[top] - weight[nearest]
        expected = (flat[i] @ g).abs() / g.norm()
        assert binarised == pytest.approx(expected.item(), rel=1e-4)


def test_alignment_of_a_network_that_standardises():
    """Its logits ignore an image's scale.

    With the gradient at the image itself the product would be 0.
    """
    inner = Linear((1, 4, 4), classes=4)
    x = batch(30, (1, 4, 4))
    images = (255 * x).round().byte()
    test = common.Split(images, torch.zeros(30, dtype=torch.int64), torch.arange(30))
    model = common.Classifier(inner, "image", (0.0,), (1.0,))
    flat = common.to_float(images).flatten(1)
    deviation = flat.std(1, correction=0, keepdim=True).clamp(min=1 / 4)
    flat = (flat - flat.mean(1, keepdim=True)) / deviation
    weight = inner.layer.weight.detach()[inner(flat).argmax(1)]
    expected = (flat * weight).sum(1).abs() / weight.norm(dim=1)
    alpha = torch.from_numpy(evaluate.alignment(model, test, 7)[:, 0])
    torch.testing.assert_close(alpha, expected)
    assert expected.mean() > 0.1


def test_normalised_radii(digits_run, tmp_path, capsys):
    """--normalized-eps finds the protocol's subsets and the paper's columns.

    What is measured beside the attacks is at the same radius. A network trained in pixels is
    attacked at its own radius.
    """
    words = ["--ckpt", digits_run, "--normalized-eps"]
    own = common.load_checkpoint(digits_run)["args"]["eps"]
    evaluate_main(*words, "--attacks", "clean,pgd-3,pgd-5", "--limit", "30")
    assert f"worst case of these 3 at eps {own:.4g}" in capsys.readouterr().out
    outcome = json.loads((tmp_path / "run.eval.json").read_text())[1]
    assert outcome["attack"] == "pgd-3 normalised"
    assert outcome["eps"] == pytest.approx(own)
    args = evaluate.parse([*map(str, words), "--protocol", "common"])
    args.p = 1 / 3
    todo = evaluate.plan(args, common.dataset_facts("mnist"), 0.3, None, torch.device("cpu"))
    sizes = {attack.name: n for attack, _, n in todo}
    assert sizes["aa normalised"] == 500
    assert sizes["rays-40000 normalised"] == 200
    name = f"pgd-20:0.1{evaluate.NORMALISED}"
    outcomes = [dict(attack="clean", accuracy=0.9, n=10, eps=None),
                dict(attack=name, accuracy=0.625, n=10, eps=0.1)]
    evaluate.print_protocol("dra", "mnist", outcomes)
    assert "62.50" in capsys.readouterr().out


def of_mnist(args):
    """As much of a checkpoint as says what its radii are."""
    return dict(dataset="mnist", num_classes=10, input_shape=(1, 28, 28), args=args)


def test_dra_is_evaluated_as_it_was_trained():
    """Its own eps and p are taken. PGD has the radius of validation."""
    import dra_finetune
    trained = vars(flags_of(dra_finetune, "--dataset", "mnist"))
    own, mean_eps = evaluate.trained_eps(of_mnist(trained), False)
    assert (own, mean_eps) == (pytest.approx(0.3), 0.1)
    mnist = common.dataset_facts("mnist")
    dra, pgd = evaluate.parse_attacks("dra-5,pgd-5", mnist, own, mean_eps=mean_eps)
    assert (dra.eps, pgd.eps) == (0.1, own)
    trained = vars(flags_of(dra_finetune, "--dataset", "mnist", "--strategy", "madry"))
    assert evaluate.trained_eps(of_mnist(trained), False) == (0.3, None)


def test_autoattacks_warnings_are_kept(monkeypatch):
    """The package says that a network answers at random.

    The note ends up with the outcome.
    """
    class Random(Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), 3)
    notes = evaluate.Notes()
    x = batch(8)
    run("aa", Random((1, 3, 3)), x, torch.zeros(8, dtype=torch.int64))
    assert any("randomized" in text for text in notes.texts.values())
    notes.begin(["3 points with zero gradient", "4 points with zero gradient"])
    assert list(notes.texts.values()) == ["4 points with zero gradient"]


def test_plots_sanity_and_per_class(digits_run, tmp_path, capsys, monkeypatch):
    """All figures are written, none is blank, and the numbers are beside them.

    The verdict is one line.
    """
    from matplotlib import image
    monkeypatch.setattr(evaluate, "STEPS", (1, 5))
    monkeypatch.setattr(evaluate, "RADII", (1, 2))
    monkeypatch.setattr(evaluate, "BLACK_BOX_ATTACK", "rays-30")
    evaluate_main("--ckpt", digits_run, "--attacks", "clean,fgsm,pgd-5", "--limit", 40,
                  "--sanity", "--per-class", "--alignment", "--plots", tmp_path / "figures")
    out = capsys.readouterr().out
    assert out.count("verdict:") == 1
    assert "by class" in out
    assert "linearised robustness" in out
    assert "worst case of these 3 at eps 0.1, sample by sample" in out
    paths = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert paths == ["curves.png", "images.png", "surface.png", "training.png"]
    for name in paths:
        picture = image.imread(tmp_path / "figures" / name)
        assert picture[..., :3].std() > 0.05, name


def test_the_share_of_values_is_drawn_for_runs_of_dra_alone(digits_run):
    """Each line has a label, clean images are the reference."""
    from matplotlib import pyplot
    model, checkpoint = common.load_model(digits_run)
    test = evaluate.load_test(common.dataset_facts("digits"), "data", 12, "cpu")
    curve = dict(fgsm=[(0.75, 1.0)])
    scene = evaluate.Scene(model, checkpoint, test, curve, 0.1, 0, "data")
    assert evaluate.draw_dra(pyplot, scene) is None
    run = dict(checkpoint, args=dict(checkpoint["args"], adversary="dra", method="finetune"))
    figure = evaluate.draw_dra(pyplot, scene._replace(checkpoint=run))
    *lines, clean = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["DRA-5, eps 0.0125", "DRA-5, eps 0.025"]
    assert clean.get_label() == "clean images" and set(clean.get_ydata()) == {25.0}
    assert all(len(line.get_xdata()) == 7 for line in lines)


def test_images_of_dra_and_pgd_are_drawn_for_runs_of_dra_alone(digits_run):
    """DRA changes a third of the values, PGD nearly all; both changes have one scale."""
    from matplotlib import pyplot
    model, checkpoint = common.load_model(digits_run)
    test = evaluate.load_test(common.dataset_facts("digits"), "data", 12, "cpu")
    scene = evaluate.Scene(model, checkpoint, test, {}, 0.1, 0, "data")
    assert evaluate.draw_dra_images(pyplot, scene) is None
    run = dict(checkpoint, args=dict(checkpoint["args"], adversary="dra", p=1 / 3))
    figure = evaluate.draw_dra_images(pyplot, scene._replace(checkpoint=run))
    grid = np.array(figure.axes).reshape(5, 8)
    assert [ax.get_ylabel() for ax in grid[:, 0]] == [
        "clean", "pgd-5, 0.03188", "dra-5, 0.0125", "by pgd-5", "by dra-5"]
    changes = [np.array([ax.images[0].get_array() for ax in line]) - 0.5 for line in grid[3:]]
    of_pgd, of_dra = [np.abs(change).reshape(8, -1) for change in changes]
    assert np.allclose(np.maximum(of_pgd, of_dra).max(1), 0.5)
    assert (of_dra > 1e-6).mean() < 0.4 < 0.6 < (of_pgd > 1e-6).mean()


def test_what_is_missing_is_said_before_the_first_attack(digits_run, tmp_path, monkeypatch):
    """A package or a folder that only the last step needs."""
    real = evaluate.importlib.util.find_spec

    def find_spec(name):
        return None if name == absent else real(name)
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", find_spec)
    plots = ["--plots", tmp_path / "figures"]
    cases = [("foolbox", ["--attacks", "clean,deepfool"],
              "deepfool needs foolbox: pip install foolbox"),
             ("pyautoattack", ["--attacks", "clean,aa"], "aa needs pyautoattack"),
             ("matplotlib", plots, "--plots needs matplotlib"),
             (None, ["--plots", digits_run / "figures"], "--plots .*: Not a directory")]
    for absent, words, named in cases:
        with pytest.raises(common.UsageError, match=named):
            evaluate_main("--ckpt", digits_run, *words)
    assert not list(tmp_path.glob("*.eval.*"))


NETWORK_WITH_VIEW = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 26 * 26, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 4 * 26 * 26))
"""


def test_a_record_belongs_to_one_way_of_using_the_weights(foreign, tmp_path):
    """The same weights under another normalisation or another code are measured anew.

    So is what lost its facts. A network that uses view() works.
    """
    folder, _ = foreign
    shutil.copy(folder / "weights.pt", tmp_path / "w.pt")
    (tmp_path / "net.py").write_text(NETWORK.replace("nn.Tanh", "nn.ReLU"))
    words = ["--ckpt", tmp_path / "w.pt", "--dataset", "digits", "--limit", 100,
             "--attacks", "clean,fgsm"]
    own = ["--model", f"{folder}/net.py:make"]
    other = ["--model", f"{tmp_path}/net.py:make"]

    def outcomes():
        return json.loads((tmp_path / "w.eval.json").read_text())
    seen = []
    for more in (own, other, [*own, "--normalize", "image"]):
        evaluate_main(*words, *more)
        seen.append(outcomes()[-1]["accuracy"])
    assert len(set(seen)) == 3
    assert len(outcomes()) == 6
    (tmp_path / "w.eval.npz").unlink()
    evaluate_main(*words, *own)
    assert outcomes()[-1]["accuracy"] == seen[0]
    (tmp_path / "view.py").write_text(NETWORK_WITH_VIEW)
    view = f"{tmp_path}/view.py:Net"
    torch.save(common.imported_net(view, 10).state_dict(), tmp_path / "view.pt")
    evaluate_main("--ckpt", tmp_path / "view.pt", *words[2:], "--model", view)


def test_an_interrupted_overwrite_leaves_no_half_outcome(digits_run, tmp_path):
    """Facts saved half-way take the finished outcome of the same settings away.

    The next evaluation completes them.
    """
    words = ["--ckpt", digits_run, "--attacks", "fgsm", "--limit", 60]
    evaluate_main(*words)
    outcome, = json.loads((tmp_path / "run.eval.json").read_text())
    record = evaluate.Record(digits_run, [outcome["weights_sha256"]], tmp_path / "run.eval")
    measured = ("accuracy", "interval", "largest", "ce", "nonfinite", "seconds", "warnings", "key")
    settings = {k: v for k, v in outcome.items() if k not in measured}
    whole = record.find(settings)[1]
    half = whole.copy()
    half[30:] = np.nan
    record.save(settings, half, 1.0, ["Square has found nothing"])
    assert record.find(settings)[2:] == (1.0, ["Square has found nothing"])
    assert json.loads((tmp_path / "run.eval.json").read_text()) == []
    assert record.find(settings)[0] is None
    evaluate_main(*words)
    again = json.loads((tmp_path / "run.eval.json").read_text())
    assert again[0]["accuracy"] == outcome["accuracy"]


def test_files_of_the_user_are_not_outputs(digits_run, tmp_path):
    """Neither the checkpoint under any suffix, nor a surrogate, nor one file for two outputs."""
    other = tmp_path / "k.pth"
    shutil.copy(digits_run, other)
    one = tmp_path / "x"
    for words in (["--ckpt", other, "--results", other],
                  ["--ckpt", digits_run, "--surrogate", other, "--export", other],
                  ["--ckpt", digits_run, "--results", one, "--save-adv", one]):
        before = other.read_bytes()
        with pytest.raises(common.UsageError, match="choose another name"):
            evaluate_main(*words, "--overwrite", "--attacks", "clean")
        assert other.read_bytes() == before
    evaluate_main("--ckpt", other, "--attacks", "clean", "--limit", 20)
    assert (tmp_path / "k.pth.eval.json").exists()
    with pytest.raises(common.UsageError, match="--transfer needs --surrogate"):
        evaluate_main("--ckpt", other, "--transfer", "fgsm")


def test_labels_and_names_of_own_data(tmp_path):
    """A label far above the number of images; a file's ending, and another case, in a name."""
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = np.zeros((4, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = np.array([0, 1, 0, 1], np.uint64)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert common.dataset_facts("mine", tmp_path)["classes"] == 2
    arrays["train_labels"] = np.array([0, 1, 0, 10 ** 12])
    np.savez(tmp_path / "ids.npz", **arrays)
    with pytest.raises(common.UsageError, match="highest of 4 is 1000000000000"):
        common.dataset_facts("ids", tmp_path)
    for name, meant in (("mine.npz", "mine"), ("Mine", "mine"), ("MNIST", "mnist")):
        with pytest.raises(common.UsageError, match=f"did you mean {meant}[?]"):
            common.dataset_facts(name, tmp_path)
