"""Networks of strangers: what cannot be attacked is refused, what misleads is named."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import common
import evaluate
from conftest import run_main

DIGITS = common.dataset_facts("digits")
# A two-layer network (784-64-10), and what public bug reports did to it.
NETS = """
import torch
from torch import nn
import torch.nn.functional as F

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(784, 64), nn.Linear(64, 10)
    def hidden(self, x):
        return F.relu(self.a(x.flatten(1)))
    def forward(self, x):
        return self.b(self.hidden(x))

class Dropout(Plain):  # without training=
    def forward(self, x):
        return self.b(F.dropout(self.hidden(x), 0.4))

class Batch(Plain):  # the batch's statistics, in eval mode too
    def forward(self, x):
        h = self.hidden(x)
        return self.b((h - h.mean(0)) / (h.std(0) + 1e-3))

class Alone(Batch):  # cannot take one image
    def forward(self, x):
        return self.b(F.batch_norm(self.hidden(x), None, None, training=True))

class NanGradient(Plain):  # the square root of a zero, finite in value
    def forward(self, x):
        corner = x[:, :, :2, :2].flatten(1)
        return super().forward(x) + (0 * corner).sqrt().sum(1, keepdim=True)

class NanLogits(Plain):
    def forward(self, x):
        return super().forward(x) / 0 - super().forward(x) / 0

class NanUnderAttack(Plain):
    def forward(self, x):
        levels = 255 * x.flatten(1)  # whole numbers of a clean image
        touched = ((levels - levels.round()).abs() > 0.2).any(1, keepdim=True)
        return super().forward(x) + torch.where(touched, float("nan"), 0.0)

class Quantised(Plain):
    def forward(self, x):
        return super().forward((8 * x).round() / 8 + 0 * x)

class Saturated(Plain):
    def forward(self, x):
        return 1e5 * super().forward(x)

class Tuple(Plain):
    def forward(self, x):
        return super().forward(x), x

class NoGrad(Plain):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)

class Detached(Plain):
    def forward(self, x):
        return super().forward(x.detach())

class Whole(Plain):
    def forward(self, x):
        return super().forward(x).round().long()

class Fragile(Plain):  # fails on the last, smaller batch
    def forward(self, x):
        return super().forward(x) if len(x) in (1, 20, 40, 360) or len(x) > 100 else x[:3] @ x

class Strict(Plain):  # refuses other images than those of the attacks
    def forward(self, x):
        assert 0 <= x.min() and x.max() <= 1
        return super().forward(x)

class Updated(Plain):  # its statistics follow the images, in eval mode too
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)
    def forward(self, x):
        self.mean += 0.5 * (x.detach().mean() - self.mean)
        return super().forward(x - 1e-4 * self.mean)

class Seeded(Plain):
    def forward(self, x):
        torch.manual_seed(0)
        return super().forward(x)

class Last(Plain):  # keeps its last images in a buffer, of another size each time
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(0), persistent=False)
    def forward(self, x):
        self.last = x.detach()
        return super().forward(x)

class Expanded(Plain):  # a buffer that cannot be written to
    def __init__(self):
        super().__init__()
        mean = torch.zeros(1).expand(1, 1, 28, 28)
        self.register_buffer("mean", mean, persistent=False)
    def forward(self, x):
        return super().forward(x - self.mean)

class Late(Plain):  # fails on batches that are larger than the first
    def forward(self, x):
        return super().forward(x) if len(x) <= 100 else x[:3] @ x

class Masked(Plain):
    def forward(self, x):
        last = torch.arange(10) == 9
        return super().forward(x).masked_fill(last, -float("inf"))

class Softmax(Plain):
    def forward(self, x):
        return super().forward(x).softmax(1)

class Bytes(Plain):  # trained on images in [0, 255]
    def forward(self, x):
        return super().forward(x / 255)

class Symmetric(Plain):  # trained on images in [-1, 1]
    def forward(self, x):
        return super().forward((x + 1) / 2)

class Shifted(Plain):  # class 0 is at the end
    def forward(self, x):
        return super().forward(x).roll(-1, 1)

class Half(Plain):
    def __init__(self):
        super().__init__()
        self.half()
    def forward(self, x):
        assert x.dtype == torch.float16
        return super().forward(x)

class InPlace(Plain):
    def forward(self, x):
        return super().forward(x.mul_(1.0).sub_(0.1).add_(0.1))
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder with nets.py and weights.pt, trained on digits for a few seconds)."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    net = common.imported_net(f"{folder}/nets.py:Plain", 10)
    images, labels = common.digits("train")
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.save(net.state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture
def look(theirs, tmp_path, capsys):
    """look(function, *flags) -> (outcomes by name, what was printed)."""
    def evaluated(function, *flags):
        record = tmp_path / f"{function}.json"
        capsys.readouterr()
        run_main(evaluate.main, "evaluate.py", "--ckpt", theirs / "weights.pt", "--dataset",
                 "digits", "--model", f"{theirs}/nets.py:{function}", "--record", record,
                 "--limit", 40, "--eps", "0.05", *flags)
        outcomes = json.loads(record.read_text())
        return {o["attack"]: o for o in outcomes}, capsys.readouterr().out
    return evaluated


def accuracies(outcomes):
    return {name: outcome["accuracy"] for name, outcome in outcomes.items()}


@pytest.mark.parametrize("function, named", [
    ("NanLogits", "it cannot be judged"), ("Tuple", "tuple"), ("NoGrad", "differentiably"),
    ("Detached", "differentiably"), ("Whole", "floating"), ("Fragile", "fails on a batch of"),
    ("Late", "fails on a batch of 140"), ("Masked", "mask a class by -1e4")])
def test_what_cannot_be_attacked_is_refused_before_the_first_attack(look, tmp_path, function,
                                                                     named):
    flags = dict(Fragile=["--limit", 15], Late=["--limit", 140]).get(function, [])
    with pytest.raises(common.UsageError, match=named) as error:
        look(function, "--attacks", "clean,fgsm", *flags)
    assert "\n" not in str(error.value).strip() and not (tmp_path / f"{function}.json").exists()


def test_weights_that_hold_nan_are_named(theirs, look, tmp_path):
    weights = torch.load(theirs / "weights.pt", weights_only=True)
    weights["b.weight"][2, 3] = float("nan")
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(common.UsageError, match="not finite.*its weights hold NaN in b.weight"):
        look("Plain", "--attacks", "clean", "--ckpt", tmp_path / "w.pt")


def test_logits_that_are_not_finite_under_attack_are_refused(look):
    with pytest.raises(common.UsageError, match="fgsm: the network's logits are not finite on"):
        look("NanUnderAttack", "--attacks", "clean,fgsm")


def test_a_nan_gradient_is_zeroed_and_counted(look):
    """Each attack finds what it finds where the gradient is finite, but for the four pixels."""
    names = "ifgsm-10,mi-fgsm-10,pgd-5,cw-l2-50,deepfool,deepfool-linf,dra-5,fgsm"
    broken, out = look("NanGradient", "--attacks", names)
    usual, _ = look("Plain", "--attacks", names)
    for name, outcome in broken.items():
        assert outcome["nonfinite"] == 1.0 and usual[name]["nonfinite"] == 0.0
        assert abs(outcome["accuracy"] - usual[name]["accuracy"]) <= 0.1, name
    assert "not finite, taken as zero: 100.00 %" in out
    assert 0 < usual["ifgsm-10"]["accuracy"] < usual["fgsm"]["accuracy"] + 0.05 < 1
    assert broken["cw-l2-50"]["accuracy"] == 0


def test_foreign_precision_and_in_place_forwards_change_nothing(look):
    """Of a half-precision network nearly; of one that changes its input in place, nothing."""
    names = "clean,fgsm,rays-60,pgd-5"
    usual = accuracies(look("Plain", "--attacks", names)[0])
    assert accuracies(look("InPlace", "--attacks", names)[0]) == usual
    half = accuracies(look("Half", "--attacks", names)[0])
    assert half == pytest.approx(usual, abs=0.06)


def test_randomised_networks_are_named_and_get_rand(look):
    """The last step is judged; AutoAttack is the version for them; restarts help, not harm."""
    outcomes, out = look("Dropout", "--attacks", "pgd-5,aa", "--sanity", "--limit", 12)
    assert "aa-rand" in outcomes and outcomes["pgd-5"]["randomised"]
    assert outcomes["pgd-5"]["judge"] == "last"
    assert "the network is randomised" in out
    assert "verdict: " in out and "randomised" in out.split("verdict: ")[1]


@pytest.mark.parametrize("function", ["Batch", "Alone"])
def test_batch_dependent_networks_keep_their_batches(look, theirs, function):
    """No image is dropped, no batch is of one image, the whole final batch is judged."""
    outcomes, out = look(function, "--attacks", "clean,pgd-3x2,multi-2", "--limit", 41,
                         "--batch-size", 20, "--sanity")
    assert "the network is batch-dependent" in out
    assert "batch-dependent" in out.split("verdict: ")[1]
    assert outcomes["clean"]["batch_size"] == 19 and outcomes["clean"]["batch_dependent"]
    test = evaluate.load_test(DIGITS, "data", 41, "cpu")
    net = common.imported_net(f"{theirs}/nets.py:{function}", 10)
    net.load_state_dict(torch.load(theirs / "weights.pt", weights_only=True))
    x = common.to_float(test.images)
    right = [net(part).argmax(1) == y for part, y in zip(x.split(19), test.labels.split(19))]
    assert outcomes["clean"]["accuracy"] == torch.cat(right).double().mean().item()
    assert outcomes["pgd-3x2"]["accuracy"] < outcomes["clean"]["accuracy"]


def test_images_of_a_whole_batch_are_those_that_are_judged():
    """perturbed(stop=False): with batch statistics every call of the network is a whole batch."""
    sizes = []

    class Spy(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            flat = x.flatten(1)
            return (flat - flat.mean(0))[:, :3]
    x = torch.rand(7, 1, 4, 4)
    y = torch.randint(0, 3, (7,))
    for name in ("pgd-3x2", "multi-2x2", "ifgsm-2", "noisex3"):
        attack, = evaluate.parse_attacks(name, dict(DIGITS, classes=3), 0.1)
        x_adv = evaluate.perturbed(Spy(), x, y, attack, stop=False)
        assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert set(sizes) <= {7, 2}, "two images tell the number of classes"


@pytest.mark.parametrize("function, sign", [("Quantised", "dead gradients"),
                                            ("Saturated", "dead gradients")])
def test_masked_gradients_are_named(look, function, sign):
    _, out = look(function, "--attacks", "pgd-5,rays-60", "--sanity")
    verdict = out.split("verdict: ")[1]
    assert verdict.startswith("masked gradients") and sign in verdict


def test_an_undefended_network_is_sound(look, theirs):
    """Its large gap between FGSM and PGD is no sign of masking."""
    _, out = look("Plain", "--attacks", "fgsm,pgd-10,rays-60,square", "--sanity", "--baseline",
                  f"{theirs}/weights.pt={theirs}/nets.py:Plain")
    assert "verdict: sound" in out and "not tested" not in out


def test_a_baseline_that_cannot_be_attacked_is_refused_before_the_first_attack(look, theirs,
                                                                               tmp_path):
    for function, named in (("NoGrad", "differentiably"), ("NanLogits", "not finite"),
                            ("Shifted", "at chance")):
        with pytest.raises(common.UsageError, match=f"{function}.*{named}"):
            look("Plain", "--attacks", "clean", "--baseline",
                 f"{theirs}/weights.pt={theirs}/nets.py:{function}")
    assert not (tmp_path / "Plain.json").exists()


def test_probabilities_are_named(look):
    """Attacks run; the network is asked for logits, and the verdict is not sound."""
    usual = look("Plain", "--attacks", "clean")
    probabilities = look("Softmax", "--attacks", "clean")
    assert accuracies(usual[0]) == accuracies(probabilities[0])
    assert "let it return logits" in probabilities[1] and "probabilities" not in usual[1]
    one = torch.tensor([[0.1, 0.25]])  # logits of one image, by chance
    assert not evaluate.seem_probabilities(one) and evaluate.seem_probabilities(one.softmax(1))
    nature = evaluate.Nature(n=400, classes=10, probabilities=True)
    signs = findings([0.98, 0.5, 0.4, 0.3], nature=nature)
    found = [evaluate.Finding(sign, passed, "") for sign, passed in signs.items()]
    assert evaluate.verdict(found, nature).startswith("verdict: not sound, the network gives prob")


@pytest.mark.parametrize("function, line", [
    ("Bytes", "255 * x before the network gives {} %"),
    ("Symmetric", "2 * x - 1 before the network gives {} %"),
    ("Shifted", "its class is the label + 9, with that {} %"), ("Plain", None)])
def test_images_or_labels_that_a_network_is_not_used_to(look, function, line):
    """The line names the change, and the accuracy that the same weights have with it."""
    right = accuracies(look("Plain", "--attacks", "clean", "--limit", 100)[0])["clean"]
    outcomes, out = look(function, "--attacks", "clean", "--limit", 100)
    if line is None:
        assert "clean accuracy is" not in out
    else:
        assert line.format(f"{100 * right:.1f}") in out
        assert accuracies(outcomes)["clean"] < right - 0.1


def test_advice_leaves_the_network_as_it_was(look, theirs):
    """One that refuses other images is evaluated; one that keeps statistics keeps the old."""
    usual, _ = look("Plain", "--attacks", "clean,fgsm")
    assert accuracies(look("Strict", "--attacks", "clean,fgsm")[0]) == accuracies(usual)
    usual, _ = look("Plain", "--attacks", "clean,fgsm", "--limit", 120)
    for name in ("Last", "Expanded"):
        found, _ = look(name, "--attacks", "clean,fgsm", "--limit", 120)
        assert accuracies(found)["fgsm"] == accuracies(usual)["fgsm"]
    assert "changes its own buffers" in look("Updated", "--attacks", "clean")[1]
    model = common.build_model(f"{theirs}/nets.py:Updated", DIGITS).eval()
    model.net.mean.fill_(0.25)
    found = evaluate.accuracies_as(model, evaluate.load_test(DIGITS, "data", 20, "cpu"))
    assert len(found) == 5 and model.net.mean == 0.25 and model.normalize == "none"


def test_a_forward_that_sets_the_seed_changes_no_outcome(look):
    """Random starts and noise are those of the same network without the seed."""
    names = "noisex5,pgd-2x5,multi-2x2"
    outcomes, out = look("Seeded", "--attacks", names)
    assert accuracies(outcomes) == accuracies(look("Plain", "--attacks", names)[0])
    assert "sets torch's seed" in out and outcomes["noisex5"]["sets_seed"]


def test_clean_accuracy_at_chance_names_the_normalisation(theirs, tmp_path, capsys):
    """An untrained network; one whose images were normalised in training is told how."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model = common.Classifier(net, "image", DIGITS["mean"], DIGITS["std"])
    images, labels = common.digits("train")
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.from_numpy(labels)).backward()
        optimizer.step()
    net[1].weight.data[3] += 1  # the same for images whose mean is 0; all others are a three
    model = model.eval()
    test = evaluate.load_test(DIGITS, "data", 100, "cpu")
    expected = common.accuracy(model, test)
    model.normalize = "none"
    nature = evaluate.Nature(accuracy=common.accuracy(model, test), n=100, classes=10)
    assert nature.at_chance and not nature._replace(accuracy=0.3).at_chance
    line = evaluate.advice(model, test, nature)
    assert f"no better than chance: --normalize image gives {100 * expected:.1f} %" in line
    assert expected > 0.8


def outcome(attack, accuracy, **more):
    kind = attack.partition("-")[0]
    return dict(dict(attack=attack, kind=kind, eps=0.1, n=400, accuracy=accuracy), **more)


def both_held(by_blind, by_white):
    """Who holds under PGD and under a black-box attack: so many of 200 fall to one of them."""
    white = np.ones(200, bool)
    blind = np.ones(200, bool)
    blind[:by_blind] = False
    white[len(white) - by_white:] = False
    return white, blind


def findings(fgsm, pgd=0.0, losses=None, outcomes=(), listed=False, **options):
    """sign -> passed, for a made-up curve: FGSM accuracy at 0, eps / 4 ... eps.

    listed: sign -> all its findings; else the first of each.
    """
    losses = losses or [1 - accuracy for accuracy in fgsm]
    curve = dict(fgsm=list(zip(fgsm, losses)), at_eps=len(fgsm) - 1, n=400, pgd=(pgd, 2.0),
                 pgd_at_1=(options.pop("at_1", 0.0), 9.0), noise=options.pop("noise", 0.95),
                 black_box=both_held(*options.pop("black_box", (0, 30))))
    nature = options.pop("nature", evaluate.Nature(n=400, classes=10))
    found = evaluate.sanity(curve, options.pop("unattacked", 0.0), nature, 0.1, list(outcomes),
                            options.pop("baseline", None))
    result = {}
    for finding in found:
        result.setdefault(finding.sign, []).append(finding.passed)
    if listed:
        return result
    return {sign: passed[0] for sign, passed in result.items()}


def test_signs_of_masking():
    """Each on numbers that show it, and on numbers that nearly do."""
    falling = [0.98, 0.8, 0.5, 0.3, 0.28]
    sound = findings(falling)
    assert [sign for sign, passed in sound.items() if passed is not True] == [
        "FGSM far above the baseline's"]
    assert sound["FGSM far above the baseline's"] is None
    rises = "FGSM accuracy rises with eps"
    assert findings([0.98, 0.5, 0.3, 0.6, 0.9])[rises] is False
    assert findings([0.98, 0.2, 0.12, 0.15, 0.2])[rises] is True
    falls = "loss falls along the gradient's sign"
    assert findings(falling, losses=[0.1, 2, 3, 1, 0.5])[falls] is False
    assert findings(falling, losses=[0.1, 2, 3, 2.9, 2.5])[falls] is True
    assert findings(falling, unattacked=0.2)["dead gradients"] is False
    assert findings(falling, pgd=0.9, noise=0.5)["noise beats PGD"] is False
    assert findings(falling, at_1=0.5)["PGD fails at eps 1"] is False
    above = "FGSM far above the baseline's"
    assert findings(falling, baseline=0.02)[above] is False
    assert findings(falling, baseline=0.15)[above] is True
    assert findings(falling, pgd=0.25, baseline=0.02)[above] is True, "PGD leaves something"
    blind = "black-box beats white-box"
    assert findings(falling, black_box=(12, 2))[blind] is False
    assert findings(falling, black_box=(9, 0))[blind] is True, "fewer than 5 %"
    assert findings(falling, black_box=(30, 19))[blind] is True, "that is chance"
    assert findings(falling, black_box=(0, 0))[blind] is True
    assert evaluate.sign_test(5, 0) == 1 / 32 and evaluate.sign_test(0, 4) == 1
    assert evaluate.sign_test(8, 2) == pytest.approx(56 / 1024)


def test_black_box_beats_white_box():
    """By more than chance; a surrogate at chance is no evidence; other radii are not compared."""
    sign = "black-box beats white-box"
    fgsm = [0.98, 0.8, 0.5, 0.3, 0.28]
    white = outcome("pgd-20", 0.5)

    def found(*outcomes):
        own, *others = findings(fgsm, outcomes=outcomes, listed=True)[sign]
        assert own is True, "the verdict's own attack"
        return others[0] if others else None
    assert found(white, outcome("rays-900", 0.3)) is False
    assert found(white, outcome("square", 0.3)) is False
    assert found(white, outcome("rays-900", 0.48)) is True
    assert found(white, outcome("fgsm@c", 0.3, surrogate_sha256="")) is False
    assert found(white, outcome("fgsm@c", 0.3, surrogate_sha256="", surrogate_at_chance=True)) \
        is None
    assert found(white, outcome("rays-900", 0.3, eps=0.2)) is None
    assert found(outcome("rays-900", 0.3)) is None, "nothing to compare with"


def test_wilson():
    """The textbook's values, and the ends."""
    low, high = evaluate.wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    low, high = evaluate.wilson(0.0, 1000)
    assert low == 0 and high == pytest.approx(0.00383, abs=1e-5)
    assert evaluate.wilson(1.0, 10)[1] == 1.0


# ---------------------------------------------------------------------------- names and places

def test_aliases_are_one_attack_and_the_step_is_in_the_name(look):
    """cw, un and pgd-cw: one column; what is on record under one name is found under another."""
    outcomes, out = look("Plain", "--attacks", "un-4,cw-4,pgd-cw-4,un-4@0.003,pgd-4@0.003:0.02")
    assert list(outcomes) == ["un-4", "un-4@0.003", "pgd-4@0.003:0.02"]
    assert outcomes["un-4@0.003"]["step"] == 0.003
    assert outcomes["un-4@0.003"]["largest"] <= 0.05 + 1e-6
    again, out = look("Plain", "--attacks", "cw-4", "--step-size", "0.003")
    assert list(again) == list(outcomes) and "cw-4@0.003" in out
    named, = evaluate.parse_attacks("pgd-20@0.01", common.dataset_facts("mnist"), 0.3,
                                    step=0.01)
    assert named.name == "pgd-20", "the default step is not named"


def test_judge_last(look):
    """The last step alone is never stronger than any step."""
    loose, _ = look("Plain", "--attacks", "pgd-8@0.02", "--judge", "any")
    strict, out = look("Plain", "--attacks", "pgd-8@0.02", "--judge", "last")
    assert strict["pgd-8@0.02"]["accuracy"] >= loose["pgd-8@0.02"]["accuracy"]
    assert strict["pgd-8@0.02"]["judge"] == "last" and "judged alone" in out


def test_intervals_are_in_the_outcome_and_the_table(look):
    outcomes, out = look("Plain", "--attacks", "clean,pgd-3")
    for found in outcomes.values():
        low, high = evaluate.wilson(found["accuracy"], 40)
        assert found["interval"] == [low, high] and f"{100 * low:.2f}-{100 * high:.2f}" in out
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 100


def test_autoattacks_parts_are_the_packages(theirs, look, tmp_path):
    """apgd-ce, apgd-t, fab-t and square by name: sample by sample as the package alone."""
    from pyautoattack import AutoAttack
    parts = ["apgd-ce", "apgd-t", "fab-t", "square"]
    outcomes, _ = look("Plain", "--attacks", ",".join(parts), "--limit", 8, "--seed", 3)
    facts = np.load(tmp_path / "Plain.npz")
    test = evaluate.load_test(DIGITS, "data", 8, "cpu")
    x = common.to_float(test.images).contiguous()
    net = common.imported_net(f"{theirs}/nets.py:Plain", 10)
    net.load_state_dict(torch.load(theirs / "weights.pt", weights_only=True))
    seen = set()
    for part in parts:
        adversary = AutoAttack(net.eval(), eps=0.05, seed=3)
        adversary.attacks_to_run = [part]
        x_adv, _ = adversary.run_standard_evaluation(x, test.labels, batch_size=8)
        expected = (net(x_adv).argmax(1) == test.labels).tolist()
        ours = facts[outcomes[part]["key"]]
        assert (ours[:, 0] == 1).tolist() == expected
        largest = (x_adv - x).abs().flatten(1).amax(1)
        assert torch.equal(torch.from_numpy(ours[:, 1]), largest), "the very same images"
        seen.update(expected)
    assert seen == {True, False}


def test_deepfool_in_linf_fails_above_its_radius(look):
    """What needs a larger change counts as correct; the radius is kept."""
    outcomes, _ = look("Plain", "--attacks", "clean,deepfool-linf:0.01,deepfool-linf,"
                       "deepfool-linf:0.9")
    found = accuracies(outcomes)
    assert found["clean"] >= found["deepfool-linf:0.01"] > found["deepfool-linf"]
    assert found["deepfool-linf:0.9"] == 0
    assert 0 < outcomes["deepfool-linf"]["largest"] <= 0.05


def test_dra_with_the_bound_of_training():
    """No value changes by more than linf; without the key, or with 0, there is no bound."""
    from types import SimpleNamespace
    torch.manual_seed(0)
    net = common.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "none", (0.0,), (1.,))
    x = 0.3 + 0.4 * torch.rand(5, 1, 28, 28)
    y = torch.arange(5)
    budget = SimpleNamespace(eps=0.05, steps=4, p=0.5)
    free = (evaluate.dra(net, x, y, budget, y) - x).abs().max()
    bound = (evaluate.dra(net, x, y, budget, y, 0.02) - x).abs().max()
    assert free > 0.05 and bound == pytest.approx(0.02, abs=1e-6)
    run = dict(dataset="mnist", num_classes=10, input_shape=(1, 28, 28), args=dict(linf=0.1))
    assert evaluate.trained_linf(run) == 0.1
    assert evaluate.trained_linf(dict(run, args={})) is None
    assert evaluate.trained_linf(dict(run, args=dict(linf=0.0))) is None
    attack, = evaluate.parse_attacks("dra-4", DIGITS, 0.1, linf=0.02)
    assert attack.linf == 0.02


def test_bn_mode_train(tmp_path, capsys):
    """Batches of 100; AutoAttack's images are made in eval mode; no buffer changes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))
    model = common.Classifier(net, "none", (0.0,), (1.0,))
    x = torch.rand(6, 1, 28, 28)
    wrapped = evaluate.BatchStatistics(model.eval())
    z = net[1](x.flatten(1))
    expected = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.allclose(model(x), expected)
    for name, network in (("aa", model), ("pgd-3", wrapped)):
        attack, = evaluate.parse_attacks(name, DIGITS, 0.1)
        assert evaluate.attacked_network(wrapped, attack) is network
    torch.save(net.state_dict(), tmp_path / "w.pt")
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential("
                                     "nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))\n")
    words = ["--ckpt", tmp_path / "w.pt", "--dataset", "digits", "--model",
             f"{tmp_path}/net.py:make", "--attacks", "clean,pgd-2"]
    run_main(evaluate.main, "evaluate.py", *words, "--bn-mode", "train", "--limit", 0)
    stored = json.loads((tmp_path / "w.eval.json").read_text())
    assert stored[0]["bn_mode"] == "train" and stored[0]["batch_size"] == 100
    assert "BatchNorm in train mode, batches of 100" in capsys.readouterr().out
    with pytest.raises(common.UsageError, match="has no BatchNorm"):
        evaluate.BatchStatistics(nn.Linear(2, 2))
    with pytest.raises(common.UsageError, match="one image alone .* larger --batch-size"):
        evaluate.Guarded(wrapped)(x[:1])


@pytest.mark.parametrize("protocol", ["table", "atlas", "iaat", "saliency", "dra", "sat_rx"])
def test_protocols_on_digits(protocol):
    """Every protocol has a plan for digits, at its own radii, within its usual steps."""
    args = evaluate.parse(["--ckpt", "x.pt", "--protocol", protocol])
    args.p = 1 / 3
    todo = evaluate.plan(args, DIGITS, DIGITS["eps"], None, torch.device("cpu"))
    assert len(todo) >= 3 and todo[0][0].name == "clean"
    assert all(attack.eps is None or attack.eps <= 0.1 for attack, _, _ in todo)
    assert "corruptions" not in [attack.name for attack, _, _ in todo]
    if protocol == "table":
        assert [(attack.name, n) for attack, _, n in todo] == [
            ("clean", 0), ("fgsm", 0), ("pgd-20", 0), ("pgd-100", 1000), ("aa", 1000)]
    if protocol == "atlas":
        pgd, = [attack for attack, _, _ in todo if attack.name == "pgd-1000"]
        assert pgd.step == pytest.approx(0.01 / 3)


def test_missing_corruptions_cost_a_column_and_a_line(capsys, tmp_path):
    args = evaluate.parse(["--ckpt", "x.pt", "--protocol", "iaat", "--data-dir", str(tmp_path)])
    args.p = 1 / 3
    facts = common.dataset_facts("cifar10")
    names = [a.name for a, _, _ in evaluate.plan(args, facts, 8 / 255, None, torch.device("cpu"))]
    assert "deepfool-linf" in names and "corruptions" not in names
    assert "zenodo.org/records/2535967" in capsys.readouterr().out


def test_the_step_that_is_not_the_default_has_a_column_of_its_own(capsys):
    outcomes = [dict(attack=name, accuracy=share, n=10, eps=0.3) for name, share in (
        ("un-50x20", 0.79), ("un-50x20@0.003", 0.9125), ("pgd-20", 0.5))]
    evaluate.print_protocol("atlas", "mnist", outcomes)
    out = capsys.readouterr().out
    assert "un-50x20@0.003" in out and "91.25" in out and "79.00" in out


def test_every_place_is_checked_before_the_first_attack(theirs, look, tmp_path, monkeypatch):
    """A record, images, results or figures that cannot be written; --record puts them elsewhere."""
    def no_attack(*args):
        raise AssertionError("an attack ran")
    file = tmp_path / "file"
    file.write_text("")
    with monkeypatch.context() as patch:
        patch.setitem(evaluate.ATTACKS, "clean", evaluate.ATTACKS["clean"]._replace(run=no_attack))
        for flags in (["--record", file / "r.json"], ["--plots", file / "figures"],
                      ["--results", tmp_path / "nowhere" / "r.json"],
                      ["--save-adv", tmp_path / "nowhere" / "a.npz"]):
            with pytest.raises(common.UsageError, match="cannot be written|Not a dir|no such"):
                look("Plain", "--attacks", "clean", *flags)
    look("Plain", "--attacks", "clean")
    assert (tmp_path / "Plain.npz").exists() and not list(theirs.glob("*.eval.*"))


def test_an_output_never_replaces_the_network_or_a_device(theirs, look, tmp_path):
    source = (theirs / "nets.py").read_text()
    os.mkfifo(tmp_path / "pipe")
    for path, named in ((theirs / "nets.py", "belongs to --ckpt"), (tmp_path / "pipe", "a pipe")):
        with pytest.raises(common.UsageError, match=named):
            look("Plain", "--attacks", "clean", "--overwrite", "--results", path)
    assert (theirs / "nets.py").read_text() == source and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("flags, named", [
    (["--attacks", ""], "names no attack"), (["--attacks", " , "], "names no attack"),
    (["--surrogate", "x.pt", "--transfer", ","], "--transfer names no attack"),
    (["--attacks", "PGD20"], "did you mean pgd-20"),
    (["--attacks", "autoattack"], "did you mean aa"), (["--attacks", "pgd-0"], "no attack: choose"),
    (["--attacks", "clean", "--batch-size", 2 ** 70], "at most 2147483647")])
def test_odd_flags_are_refused(look, flags, named):
    with pytest.raises(common.UsageError, match=named):
        look("Plain", *flags)


def test_lists_of_attacks_are_read_with_spaces_and_a_last_comma():
    """AutoAttack is found in them where the network is randomised, with a radius, too."""
    args = evaluate.parse(["--ckpt", "x.pt", "--attacks", " clean, aa , aa:0.02,"])
    args.p = 1 / 3
    nature = evaluate.Nature(randomised=True)
    todo = evaluate.plan(args, DIGITS, 0.1, None, torch.device("cpu"), nature)
    assert [attack.name for attack, _, _ in todo] == ["clean", "aa-rand", "aa-rand:0.02"]


def test_a_surrogate_is_one_however_it_is_spelled(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(theirs)
    (tmp_path / "link.pt").symlink_to(theirs / "weights.pt")
    spelled = ["weights.pt", "./weights.pt", theirs / "weights.pt", tmp_path / "link.pt",
               "weights.pt=nets.py:Plain", f"weights.pt={theirs}/nets.py:Plain"]
    words = ["--ckpt", "x.pt", "--model", "nets.py:Plain"]
    for path in [*spelled, "weights.pt=nets.py:Half"]:
        words += ["--surrogate", str(path)]
    assert evaluate.parse(words).surrogate == ["weights.pt", "weights.pt=nets.py:Half"]


def test_images_of_a_surrogate_are_those_of_its_code(theirs, look, tmp_path):
    """The same weights under another function, normalisation or neighbour: made anew."""
    for name in ("weights.pt", "nets.py"):
        (tmp_path / name).write_bytes((theirs / name).read_bytes())
    (tmp_path / "middle.py").write_text("turned = False\n")
    (tmp_path / "sur.py").write_text(
        "import nets, middle\nPlain = nets.Plain\nclass Turned(Plain):\n"
        "    def forward(self, x):\n        return super().forward(x.transpose(2, 3))\n"
        "Mixed = Turned if middle.turned else Plain\n")

    def transferred(function):
        surrogate = f"{tmp_path}/weights.pt={tmp_path}/sur.py:{function}"
        flags = ["--surrogate", surrogate] * 2  # named twice: measured once
        outcomes, said = look("Plain", "--attacks", "clean", "--transfer", "fgsm", *flags)
        rows = [line.split() for line in said.splitlines()]
        shares = [row[1] for row in rows if row and row[0].endswith(f"sur.py:{function}")]
        assert len(shares) == 1
        return float(shares[0])
    own = transferred("Plain")
    turned = transferred("Turned")
    assert turned > own + 20 and transferred("Mixed") == own
    (tmp_path / "middle.py").write_text("turned = 1 == 1\n")
    assert transferred("Mixed") == turned and transferred("Plain") == own


def test_a_record_never_replaces_another_file(theirs, look, tmp_path):
    """Data, results, another output or a lock of the user's; nor outcomes of other weights."""
    mine = tmp_path / "mine.npz"
    np.savez(mine, train_images=np.zeros(3))
    (tmp_path / "res.json").write_text('{"history": [1]}')
    (tmp_path / "rows.json").write_text('[{"key": 1}]')
    other = ["--results", tmp_path / "o.json"], ["--save-adv", tmp_path / "o.npz"]
    np.savez(tmp_path / "run.npz", train_images=np.zeros(3))
    (tmp_path / "run.json").write_text("of weights, perhaps")
    cases = [("mine", ["--data-dir", tmp_path], "train_images, not"),
             ("run", ["--ckpt", tmp_path / "run.json"], "would replace"),
             ("res", [], "is no record"), ("rows", [], "is no record"),
             *(("o", flags, "or to the record") for flags in other)]
    for name, flags, named in cases:
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(common.UsageError, match=named):
            look("Plain", "--attacks", "clean", "--record", tmp_path / f"{name}.json", *flags)
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "Plain.lock").write_text("of poetry")
    look("Plain", "--attacks", "clean")
    assert (tmp_path / "Plain.lock").read_text() == "of poetry"
    weights = torch.load(theirs / "weights.pt", weights_only=True)
    torch.save({name: 2 * value for name, value in weights.items()}, tmp_path / "w.pt")
    kept = (tmp_path / "Plain.json").read_text()
    with pytest.raises(common.UsageError, match="holds outcomes of other weights"):
        look("Plain", "--attacks", "fgsm", "--ckpt", tmp_path / "w.pt")
    assert (tmp_path / "Plain.json").read_text() == kept
    look("Plain", "--attacks", "fgsm", "--ckpt", tmp_path / "w.pt", "--overwrite")
    (tmp_path / "Half.lock").mkdir()
    with pytest.raises(common.UsageError, match="Half.lock: cannot be written"):
        look("Half", "--attacks", "clean")


def test_export_keeps_what_float16_cannot_hold(tmp_path):
    """Above 65,504 or far below 1e-7; all else is in float16, and whole numbers stay."""
    state = {"bn.running_var": torch.tensor([1.0, 1e6]), "small": torch.tensor([1e-9, 3e-9]),
             "usual": torch.randn(50), "zero": torch.zeros(2), "empty": torch.zeros(0),
             "bn.num_batches_tracked": torch.tensor(70_000)}
    for name, value in state.items():
        kept = evaluate.in_half(value)
        assert (kept.dtype == torch.float16) == (name in ("usual", "zero")), name
        torch.testing.assert_close(kept.to(value.dtype), value, rtol=1e-3, atol=1e-3)


def test_an_order_of_labels_is_named_on_evidence_alone():
    """11 of 20 images of two classes say nothing, 40 of 40 of ten do."""
    for n, classes, shift in ((20, 2, 0), (40, 10, 1)):
        labels = torch.arange(n) % classes
        images = labels.view(-1, 1, 1, 1).expand(n, 1, 28, 28).to(torch.uint8)
        if shift == 0:
            images[:11] = 1 - images[:11]
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, classes, bias=False))
        model = common.Classifier(network, "none", (0.0,), (1.0,)).eval()
        model.forward = lambda x, normalize=True: nn.functional.one_hot(
            ((255 * x[:, 0, 0, 0]).round().long() + shift) % classes, classes).float()
        test = common.Split(images.contiguous(), labels, torch.arange(n))
        accuracy = common.accuracy(model, test)
        nature = evaluate.Nature(accuracy=accuracy, n=n, classes=classes)
        line = evaluate.advice(model, test, nature)
        assert accuracy < 0.5 and ("its class is the label + 1" in line) == (shift == 1)


def test_few_images_are_neither_at_chance_nor_sound():
    """Two classes: of three images even all correct ones would be chance."""
    for n, few in ((3, True), (4, False)):
        nature = evaluate.Nature(accuracy=1.0, n=n, classes=2)
        assert nature.too_few == few and not nature.at_chance
        finding = evaluate.chance_finding(nature)
        assert finding.passed is (None if few else True)
        assert ("none, 3 images" in evaluate.verdict([finding], nature)) == few
    assert evaluate.Nature(accuracy=0.5, n=40, classes=2).at_chance


def test_a_committed_checkpoint_is_left_alone(tmp_path, monkeypatch, capsys):
    """Of results/weights nothing is kept unasked, and nothing is written at all."""
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    folder = tmp_path / "results" / "weights"
    folder.mkdir(parents=True)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).state_dict(), folder / "w.pt")
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n"
                                     "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))")
    words = ["--ckpt", folder / "w.pt", "--dataset", "digits", "--model",
             f"{tmp_path}/net.py:make", "--limit", 20, "--attacks", "clean", "--surrogate",
             folder / "w.pt", "--transfer", "fgsm"]
    before = sorted(os.listdir(folder))

    def no_run(*args):
        raise AssertionError("W&B writes a run that stays offline")
    with monkeypatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        patch.delenv("WANDB_DIR", raising=False)
        patch.setattr(common, "wandb_key_is_configured", lambda: False)
        patch.setattr(common, "wandb_run", no_run)
        run_main(evaluate.main, "evaluate.py", *words)
    assert sorted(os.listdir(folder)) == before
    assert "--record" in capsys.readouterr().out
    run_main(evaluate.main, "evaluate.py", *words, "--record", tmp_path / "r.json")
    assert sorted(os.listdir(folder)) == before
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2


def test_one_wandb_run_names_the_training_run(theirs, look, tmp_path, monkeypatch):
    import wandb
    started = []

    class Run:
        id = "x"

        def __init__(self):
            self.summary = {}

        def define_metric(self, *args, **kwargs):
            pass

        def finish(self):
            started.append(self.summary)

    def init(**options):
        started.append(options)
        return Run()
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "offline")
    look("Plain", "--attacks", "clean,fgsm")
    options, summary = started
    assert options["config"]["training_script"] == "state_dict"
    assert "training_run" in options["config"] and str(options["dir"]) == str(tmp_path)
    assert {"eval/clean", "eval/fgsm/low", "eval/fgsm/high"} <= summary.keys()


def test_large_seeds_and_devices(look):
    """A seed above 2^32 runs AutoAttack; a device that is not there is one line."""
    outcomes, _ = look("Plain", "--attacks", "apgd-ce", "--limit", 4, "--seed", 2 ** 40)
    assert outcomes["apgd-ce"]["seed"] == 2 ** 40
    for flags, named in ((["--seed", 2 ** 64], "out of range"), (["--device", "cuda:7"], "cuda")):
        with pytest.raises(common.UsageError, match=named):
            look("Plain", "--attacks", "clean", *flags)
