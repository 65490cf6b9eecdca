"""teacher_saliency.py: every term against a formula of its own and against finite differences.

Further tests: who moves whose weights, masks, schedule, teachers, launches.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import benchmark
import common
import evaluate
import sat_rx
import teacher_saliency as saliency
from conftest import check_slopes, flags_of, plain, random_mnist, run_interrupted, run_main

ALIGN = ["--dataset", "digits", "--model", "cnn-small", "--limit", "64", "--batch-size", "32",
         "--val", "40", "--align-epochs", "2", "--lr", "0.01"]
SHORT = [*ALIGN, "--ks", "80,50", "--k-epochs", "1"]  # of a teacher that is given
TEACHER = ["--teacher-epochs", "2", "--attack-steps", "2"]
SCRIPT = [saliency.main, "teacher_saliency.py"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Path of a finished run on digits, with everything that it leaves. Tests only read it."""
    path = tmp_path_factory.mktemp("saliency") / "whole.pt"
    run_main(*SCRIPT, *SHORT, *TEACHER, "--wandb", "disabled", "--ckpt", path)
    return path


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_weights(one, other, which="last"):
    """Bit for bit, of two checkpoints."""
    one = one[which]["state_dict"]
    other = other[which]["state_dict"]
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def smooth_net():
    return plain(nn.Sequential(nn.Conv2d(1, 3, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(108, 4)))


def small(monkeypatch, *words):
    """What main() would train with on grey images, in float64, smooth: a name space.

    It has model, teacher, judges (the discriminators), x, y and losses: stage -> function (x, y).
    The losses are main's own with the flags of the command line. Stage "align" is phase 1, "k50"
    is phase 2 with k = 50.
    """
    torch.manual_seed(0)
    model = smooth_net().double()
    teacher = smooth_net().double().eval()
    found = SimpleNamespace(model=model, teacher=teacher)

    def keep(run, args, plan, rate, model, judges, *_, **named):
        found.judges = judges.double()
        found.losses = {stage.name: stage.loss for stage in plan}
    run = SimpleNamespace(method_state=None, start=lambda *_: 0, tell=lambda *_, **__: None,
                          path=Path("run.pt"))
    with monkeypatch.context() as patch:
        patch.setattr(common, "Run", lambda *_, **__: run)
        patch.setattr(common, "build_model", lambda *_: model)
        patch.setattr(common, "load_train", lambda *_: (None, None))
        patch.setattr(saliency, "get_teacher", lambda *_: teacher)
        patch.setattr(saliency, "train_epochs", keep)
        run_main(*SCRIPT, "--dataset", "mnist", "--ks", 50, "--device", "cpu", *words)
    torch.manual_seed(0)
    found.x = torch.rand(6, 1, 28, 28).double()
    found.y = torch.randint(0, 4, (6,))
    return found


def maps_by_sample(model, x, y, kind):
    """Input gradients, image by image.

    kind: of the true class's logit ("logit") or probability ("prob"), or of cross-entropy ("ce").
    """
    rows = []
    for image, label in zip(x, y):
        image = image[None].clone().requires_grad_(True)
        z = model(image)[0]
        values = {"logit": z[label], "prob": z.softmax(0)[label], "ce": -z.log_softmax(0)[label]}
        rows.append(torch.autograd.grad(values[kind], image)[0])
    return torch.cat(rows)


SCORES = ["logit", "prob"]
SCALES = ["image", "family"]
CASES = [*itertools.product([None], SCORES, ["literal"], SCALES),
         *itertools.product([50], SCORES, ["literal", "negated"], SCALES)]


@pytest.mark.parametrize("k, kind, sign, scale", CASES)
def test_loss_equals_the_formula(k, kind, sign, scale, monkeypatch):
    """Eqs. 10 to 18 from maps made one image at a time. k is None for phase 1."""
    flags = ["--score", kind, "--curriculum-sign", sign, "--ldiff-scale", scale, "--gamma2", "7",
             "--beta2", "3"]
    run = small(monkeypatch, *flags)
    run.judges.eval()
    model = run.model
    x = run.x
    y = run.y
    terms, judged = run.losses["k50" if k else "align"](x, y)
    j_s = maps_by_sample(model, x, y, kind)
    j_t = maps_by_sample(run.teacher, x, y, kind)
    j_ce = maps_by_sample(model, x, y, "ce")
    unit = 1 / 6 if scale == "image" else 1 / 255**2
    ce = F.cross_entropy(model(x), y)
    expected = dict(ce=ce, robust=(1 - run.judges[0](j_s).sigmoid()).log().mean(),
                    diff=unit * (j_s - j_t).square().sum(),
                    relative_diff=(j_s - j_t).square().sum() / j_t.square().sum(),
                    cosine=F.cosine_similarity(j_s.flatten(1), j_t.flatten(1)).mean())
    beta = 3 if k else 2
    gamma = 7 if k else 10
    total = ce + beta * expected["robust"] + gamma * expected["diff"]
    pairs = [(run.judges[0], j_s, j_t)]
    if k:
        signed = j_ce if sign == "literal" else -j_ce
        masked = saliency.top_k(j_t, k)
        expected["curr_robust"] = (1 - run.judges[1](signed).sigmoid()).log().mean()
        expected["curr_diff"] = unit * (signed - masked).square().sum()
        total = total + 3 * expected["curr_robust"] + 7 * expected["curr_diff"]
        pairs.append((run.judges[1], signed, masked))
    assert terms.keys() == {"loss"} | expected.keys()
    for name, value in dict(expected, loss=total).items():
        torch.testing.assert_close(terms[name], value, msg=name)
    assert len(judged) == len(pairs)
    for (judge, *maps), (wanted, *wanted_maps) in zip(judged, pairs):
        assert judge is wanted
        assert not any(m.requires_grad for m in maps)
        torch.testing.assert_close(maps, wanted_maps)


@pytest.mark.parametrize("kind", ["logit", "prob"])
def test_gradient_by_finite_differences(kind, monkeypatch):
    """Every term in float64, along a random direction of the student's weights.

    This goes through the maps' own gradients.
    """
    run = small(monkeypatch, "--score", kind)
    run.judges.requires_grad_(False)

    def terms_of(stage):
        terms, _ = run.losses[stage](run.x, run.y)
        assert not terms.pop("relative_diff").requires_grad
        assert not terms.pop("cosine").requires_grad
        return terms
    check_slopes(run.model, lambda: terms_of("k50"), rel=1e-3)
    check_slopes(run.model, lambda: terms_of("align"), rel=1e-3)


def test_discriminators_loss(monkeypatch):
    """Eqs. 14 and 19: maximise log D(J_T) + log(1 - D(J_S)).

    A map's shift and scale do not matter.
    """
    run = small(monkeypatch)
    _, judged = run.losses["k50"](run.x, run.y)
    run.judges.eval()
    terms = saliency.discriminator_loss(judged)
    expected = 0
    hits = []
    for discriminator, student, true in judged:
        p = discriminator(true).sigmoid()
        q = discriminator(student).sigmoid()
        expected = expected - (p.log().mean() + (1 - q).log().mean()) / 2
        hits += [*(p > 0.5), *(q <= 0.5)]
        torch.testing.assert_close(discriminator(3 * true + 0.2), discriminator(true))
    assert len(judged) == 2
    torch.testing.assert_close(terms["loss"], expected)
    hits = torch.stack(hits).double().mean().item()
    assert terms["right"].item() == pytest.approx(hits)


def copy_of(module):
    return [p.detach().clone() for p in module.parameters()]


def moved(before, module):
    """Whether each parameter of a module has changed since copy_of."""
    return [not torch.equal(old, new) for old, new in zip(before, module.parameters())]


def watch_steps(monkeypatch, parts):
    """A list that grows at every step of an optimizer: which parameters of each part it moved."""
    steps = []
    real = common.update

    def watched(*args):
        before = [copy_of(part) for part in parts]
        real(*args)
        steps.append([moved(old, part) for old, part in zip(before, parts)])
    monkeypatch.setattr(common, "update", watched)
    return steps


def after_first_step(loss, part):
    """The parameters of a part after one step of SGD with lr 0.1 and weight decay 0.01."""
    grads = torch.autograd.grad(loss, part.parameters(), retain_graph=True)
    return [p - 0.1 * (g + 0.01 * p) for p, g in zip(part.parameters(), grads)]


def check_step_of_judges(moves, used):
    """The step moved all weights of the first `used` discriminators, and no others."""
    student, *judges = moves
    assert not any(student)
    assert all(all(weights) for weights in judges[:used])
    assert not any(any(weights) for weights in judges[used:])


@pytest.mark.parametrize("stage", ["align", "k50"])
def test_alternate(stage, monkeypatch):
    """The student takes a step of SGD on its loss, then the discriminators one on theirs.

    Theirs is on the maps before the student's step. Each leaves the others' weights alone, with
    momentum and weight decay at work. Without `judge` there is the student's step alone.
    """
    run = small(monkeypatch)
    parts = [run.model, *run.judges]
    used = run.judges if stage == "k50" else run.judges[:1]
    optimizer = torch.optim.SGD([dict(params=part.parameters()) for part in parts], 0.1,
                                momentum=0.9, weight_decay=0.01)
    steps = watch_steps(monkeypatch, parts)

    def step(judge):
        steps.clear()
        return saliency.alternate(optimizer, run.judges, "float32", run.losses[stage], run.x, run.y,
                                  judge)

    terms, judged = run.losses[stage](run.x, run.y)
    judge_loss = saliency.discriminator_loss(judged)["loss"]
    expected = [*after_first_step(terms["loss"], run.model), *after_first_step(judge_loss, used)]
    ours, judge_terms = step(judge=True)
    torch.testing.assert_close(ours["loss"], terms["loss"])
    torch.testing.assert_close(judge_terms["loss"], judge_loss)
    for value, wanted in zip([*run.model.parameters(), *used.parameters()], expected, strict=True):
        torch.testing.assert_close(value, wanted)

    for judge in (True, False, True):
        ours, judge_terms = step(judge)
        student, *judges = steps.pop(0)
        assert all(student)
        assert not any(any(weights) for weights in judges)
        if not judge:
            assert judge_terms is None
        else:
            assert judge_terms is not None
            check_step_of_judges(steps.pop(0), len(used))
        assert not steps
    assert all(p.grad is None for p in run.teacher.parameters())


def test_nobody_moves_anothers_weights(tmp_path, whole, monkeypatch):
    """The student's steps change neither teacher nor discriminators.

    The discriminators' steps change only themselves.
    """
    seen = []
    real = torch.optim.SGD.step

    def watched(optimizer, *args):
        before = []
        for group in optimizer.param_groups:
            before.append([p.detach().clone() for p in group["params"]])
        result = real(optimizer, *args)
        changed = []
        for old, group in zip(before, optimizer.param_groups):
            changed.append(not all(torch.equal(a, b) for a, b in zip(old, group["params"])))
        seen.append(changed)
        return result
    teachers = []
    get = saliency.get_teacher

    def kept(*args):
        teachers.append(get(*args))
        return teachers[-1]
    monkeypatch.setattr(saliency, "get_teacher", kept)
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    path = whole.with_suffix(".teacher.pt")
    run_main(*SCRIPT, *SHORT, "--ckpt", tmp_path / "run.pt", "--teacher", path)
    student = [True, False, False]
    phase_1 = [student, [False, True, False], student]  # an epoch of two steps: one is judged
    phase_2 = [student, [False, True, True], student]
    assert seen == 2 * phase_1 + 2 * phase_2
    before = load(path)["best"]["state_dict"]
    teacher, = teachers
    for name, value in teacher.net.state_dict().items():
        assert torch.equal(value.cpu(), before[name]), name
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("k", [90, 50, 7, 100])
def test_top_k(k):
    """round(k h w / 100) pixels remain, those of largest channel sum of |J|, in all channels."""
    torch.manual_seed(0)
    maps = torch.randn(5, 3, 9, 9)
    kept = saliency.top_k(maps, k)
    on = (kept != 0).any(1)
    assert (on.flatten(1).sum(1) == round(k * 81 / 100)).all()
    assert torch.equal(kept, torch.where(on[:, None], maps, torch.zeros_like(maps)))
    sums = maps.abs().sum(1)
    assert k == 100 or all(s[o].min() > s[~o].max() for s, o in zip(sums, on))


def test_top_k_zeroes_all_channels_of_a_pixel():
    maps = torch.tensor([[[[5.0, 0.1]], [[0.0, 4.0]]]])  # channel sums of |J|: 5 and 4.1
    assert torch.equal(saliency.top_k(maps, 50), torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]]))


def ce():
    pass


def phase_1():
    pass


def phase_2():
    pass


def plan_of(args):
    """(k, loss) of every epoch."""
    losses = dict(nt=[ce], align=[ce, phase_1], curriculum=[ce, phase_1, phase_2])
    plan = saliency.student_plan(args, losses[args.method])
    return [(stage.k, getattr(stage.loss, "func", stage.loss)) for stage in plan]


def test_schedule_and_settings():
    """Section 5: lr 0.1 to 0.001 in 100 epochs, then to 0.0001.

    The second part takes 15 epochs for each of five k.
    """
    args = flags_of(saliency)
    ks = np.repeat([90, 80, 70, 60, 50], 15)
    assert args.epochs == 175
    assert plan_of(args) == [(100, phase_1)] * 100 + [(k, phase_2) for k in ks]
    lrs = [saliency.student_rate(args, epoch) for epoch in range(175)]
    wanted = [pytest.approx(v) for v in (0.1, 0.001, 0.001, 0.0001)]
    assert [lrs[i] for i in (0, 99, 100, 174)] == wanted
    assert all(a >= b - 1e-9 for a, b in zip(lrs, lrs[1:]))
    assert (args.beta, args.gamma, args.gamma2, args.batch_size) == (2, 10, 20, 32)
    assert args.normalize == "image"
    assert flags_of(saliency, "--dataset", "cifar100").gamma2 == 15
    tiny = flags_of(saliency, "--dataset", "tinyimagenet")
    assert (tiny.gamma, tiny.gamma2, tiny.batch_size, tiny.epochs) == (10, 50, 16, 175)
    one = flags_of(saliency, "--align-epochs", "0", "--init", "at.pt", "--ks", "50",
                   "--k-epochs", "4")
    assert plan_of(one) == [(50, phase_2)] * 4
    late = flags_of(saliency, "--align-epochs", "3", "--align-delay", "2", "--ks", "60,20",
                    "--k-epochs", "1")
    assert plan_of(late) == [(100, ce)] * 2 + [(100, phase_1), (60, phase_2), (20, phase_2)]
    align = flags_of(saliency, "--method", "align")
    assert plan_of(align) == [(100, phase_1)] * 100 and align.epochs == 100
    assert [saliency.student_rate(align, epoch) for epoch in range(100)] == lrs[:100]
    assert plan_of(flags_of(saliency, "--method", "nt")) == [(100, ce)] * 100


@pytest.mark.parametrize("words", [
    ["--ks", "90,x"], ["--ks", "0"], ["--epochs", "3"], ["--ks", "90,90"], ["--align-delay", "101"],
    ["--teacher", "at.pt", "--attack-steps", "7"], ["--align-epochs", "0"],
    ["--teacher", "at.pt", "--teacher-warmup", "0"],
    ["--teacher-epochs", "3", "--teacher-warmup", "3"],
    ["--method", "align", "--ks", "90,80,70,60,50"], ["--method", "align", "--k-epochs", "1"],
    ["--method", "align", "--gamma2", "1"], ["--method", "align", "--drop-alignment"],
    ["--method", "align", "--align-epochs", "0", "--init", "at.pt"],
    ["--method", "nt", "--teacher", "at.pt"], ["--method", "nt", "--beta", "1"],
    ["--method", "nt", "--score", "prob"], ["--method", "align", "--score2", "prob"],
    ["--method", "nt", "--map-mode", "eval"],
    ["--align-epochs", "0", "--init", "at.pt", "--beta", "1"],
    ["--method", "nt", "--attack-steps", "7"]], ids=" ".join)
def test_flags_that_contradict_each_other_are_refused(words):
    """So is one that does nothing, be it given with its default."""
    with pytest.raises(common.UsageError):
        flags_of(saliency, *words)


def test_cost():
    """The unit is one pass forward and backward to the image.

    A step of phase 1 takes 4, one of phase 2 takes 6, one of PGD-7 training takes 8, up to a half.
    """
    facts = common.dataset_facts("digits")
    torch.manual_seed(0)
    model = common.build_model("lenet+", facts)
    teacher = common.build_model("lenet+", facts).eval()
    x = torch.rand(4, 1, 28, 28)
    y = torch.arange(4)

    def cheap(maps):  # a discriminator that counts for nothing
        return maps.sum((1, 2, 3))
    options = [2.0, 10.0, "prob", "image"]
    steps = [lambda: saliency.align_loss(model, teacher, cheap, x, y, *options),
             lambda: saliency.curriculum_loss(model, teacher, cheap, cheap, x, y, 50, *options,
                                              "negated"),
             lambda: saliency.pgd_at_loss(model, x, y, 0.1, 0.03, 7)]
    one, _ = benchmark.operations(lambda: common.input_gradient(model, x, y))
    passes = []
    for step in steps:
        count, _ = benchmark.operations(lambda: step()[0]["loss"].backward())
        passes.append(count / one)
    assert passes == [pytest.approx(wanted, abs=0.51) for wanted in (4, 6, 8)]


@pytest.mark.parametrize("stage", ["align", "k50"])
def test_map_mode_eval(stage, monkeypatch):
    """The maps are those of the network in eval mode, one image at a time.

    Cross-entropy is of train mode. Its pass alone moves the running statistics, once.
    """
    def build(*_):
        return plain(nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Tanh(),
                                   nn.Linear(8, 4)))
    monkeypatch.setitem(globals(), "smooth_net", build)
    run = small(monkeypatch, "--map-mode", "eval", "--score", "logit")
    norm = run.model.net[2]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    updates = norm.num_batches_tracked.item()
    terms, judged = run.losses[stage](run.x, run.y)
    assert norm.num_batches_tracked.item() == updates + 1 and run.model.training
    run.model.eval()
    expected = maps_by_sample(run.model, run.x, run.y, "logit")
    expected_ce = -maps_by_sample(run.model, run.x, run.y, "ce")
    run.model.train()
    torch.testing.assert_close(judged[0][1], expected)
    if stage == "k50":
        torch.testing.assert_close(judged[1][1], expected_ce)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(run.model(run.x), run.y))
    run_train = small(monkeypatch, "--score", "logit")  # BatchNorm's batch matters in train mode
    _, judged = run_train.losses[stage](run_train.x, run_train.y)
    run_train.model.eval()
    alone = maps_by_sample(run_train.model, run_train.x, run_train.y, "logit")
    assert (judged[0][1] - alone).abs().max() > 1e-3


def test_score2_is_phase_2s(monkeypatch):
    run = small(monkeypatch, "--score", "logit", "--score2", "prob")
    for stage, kind in (("align", "logit"), ("k50", "prob")):
        _, judged = run.losses[stage](run.x, run.y)
        torch.testing.assert_close(judged[0][2], maps_by_sample(run.teacher, run.x, run.y, kind))
    assert flags_of(saliency, "--score", "logit").score2 == "logit"
    assert flags_of(saliency).score2 == "prob"


def test_the_teacher_beside_init(tmp_path):
    """It is taken for every file of the run that --init is from. --teacher wins."""
    def teacher_of(*words):
        return flags_of(saliency, "--dataset", "digits", *words).teacher
    names = ["run.pt", "run.align.pt", "run.k50.pt"]
    for name in names:
        assert teacher_of("--init", tmp_path / name) is None
    (tmp_path / "run.teacher.pt").touch()
    for name in names:
        assert teacher_of("--init", tmp_path / name) == str(tmp_path / "run.teacher.pt")
    assert teacher_of("--init", tmp_path / "run.pt", "--teacher", "at.pt") == "at.pt"
    assert teacher_of("--init", tmp_path / "run.pt", "--method", "nt") is None
    with pytest.raises(common.UsageError, match="run.teacher.pt has no use for --attack-steps"):
        teacher_of("--init", tmp_path / "run.pt", "--attack-steps", "3")


def test_alignment_can_be_dropped_in_phase_2(monkeypatch):
    run = small(monkeypatch, "--drop-alignment")
    terms, judged = run.losses["k50"](run.x, run.y)
    assert set(terms) == {"loss", "ce", "curr_robust", "curr_diff"}
    assert [judge for judge, _, _ in judged] == [run.judges[1]]
    assert saliency.discriminator_loss(judged)["loss"].isfinite()
    total = terms["ce"] + 2 * terms["curr_robust"] + 20 * terms["curr_diff"]
    torch.testing.assert_close(terms["loss"], total)
    terms, _ = run.losses["align"](run.x, run.y)
    assert set(terms) == {"loss", "ce", "robust", "diff", "relative_diff", "cosine"}


def without_seconds(row):
    """A row of the history without what depends on the clock."""
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("end", [".pt", ".align.pt", ".k80.pt"])
def test_maps_of_teacher_and_student_are_drawn(whole, end):
    """The gradients of the true class's probability, 0 in grey, and their cosine."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    path = whole.with_suffix(end)
    args = evaluate.parse(["--ckpt", str(path)])
    student, checkpoint = evaluate.open_checkpoint(args, "cpu")
    teacher = evaluate.teacher_beside(args, checkpoint, "cpu")
    test = evaluate.load_test(common.dataset_facts("digits"), "nowhere", 3, "cpu")
    scene = evaluate.Scene(student, checkpoint, test, {}, 0.1, 0, "nowhere", teacher)
    figure = evaluate.draw_maps(plt, scene)
    maps = []
    for network in (common.load_model(whole.with_suffix(".teacher.pt"))[0], student):
        x = (test.images.float() / 255).requires_grad_(True)
        chosen = network(x).softmax(1)[range(3), test.labels]
        maps.append(torch.autograd.grad(chosen.sum(), x)[0])
    shown = [ax.images[0].get_array() for ax in figure.axes]
    for row, images in enumerate([test.images / 255, *maps]):
        for image, picture in zip(images, shown[3 * row:3 * row + 3]):
            wanted = image[0] if row == 0 else 0.5 + image[0] / (2 * image.abs().max())
            np.testing.assert_allclose(picture, wanted, atol=1e-5)
    cosines = F.cosine_similarity(maps[0].flatten(1), maps[1].flatten(1)).tolist()
    assert [ax.get_title() for ax in figure.axes[6:]] == [
        f"cosine {value:.2f}" for value in cosines]
    plt.close(figure)


def test_without_a_teacher_there_are_no_maps(whole, tmp_path, capsys):
    """Nor are there of the teacher itself, nor with one of other data, which costs a line."""
    def found(path):
        args = evaluate.parse(["--ckpt", str(path)])
        _, checkpoint = evaluate.open_checkpoint(args, "cpu")
        return evaluate.teacher_beside(args, checkpoint, "cpu")
    assert found(whole.with_suffix(".teacher.pt")) is None
    (tmp_path / "run.pt").write_bytes(whole.read_bytes())
    assert found(tmp_path / "run.pt") is None
    scene = evaluate.Scene(None, None, None, None, 0.1, 0, "nowhere")
    assert evaluate.draw_maps(None, scene) is None
    other = load(whole.with_suffix(".teacher.pt"))
    torch.save(dict(other, dataset="mnist"), tmp_path / "run.teacher.pt")
    assert found(tmp_path / "run.pt") is None
    assert "no maps of the teacher" in capsys.readouterr().out


def test_losses_after_phase_1(whole):
    """Table 7: of student and teacher, once, on the clean images that they were trained on."""
    train, _ = common.load_train(common.dataset_facts("digits"), "nowhere", 40, 64, "cpu")
    x = train.images.float() / 255
    history = load(whole)["history"]
    for name, end in (("phase_1/ce", ".align.pt"), ("phase_1/teacher_ce", ".teacher.pt")):
        model, _ = common.load_model(whole.with_suffix(end), "last")
        expected = F.cross_entropy(model(x), train.labels).item()
        assert history[1][name] == pytest.approx(expected, rel=1e-5)
    assert ["phase_1/ce" in row for row in history] == [False, True, False, False]


def test_align_is_the_first_phase_of_curriculum(tmp_path, whole):
    """Teacher, student, discriminators and log agree bit for bit.

    The first phase is kept as run.align.pt.
    """
    run_main(*SCRIPT, *ALIGN, *TEACHER, "--method", "align", "--ckpt", tmp_path / "run.pt")
    run = load(tmp_path / "run.pt")
    kept = load(tmp_path / "run.align.pt")
    both = load(whole)
    for other in (kept, load(whole.with_suffix(".align.pt"))):
        assert_same_weights(run, other)
        assert other["last"]["epoch"] == other["best"]["epoch"] == 2
        judges = other["method_state"]["discriminators"]
        for name, value in run["method_state"]["discriminators"].items():
            assert torch.equal(value, judges[name]), name
    assert_same_weights(load(tmp_path / "run.teacher.pt"), load(whole.with_suffix(".teacher.pt")))
    for row, other in zip(run["history"], both["history"][:2], strict=True):
        assert without_seconds(row) == without_seconds(other)
    assert not any(tmp_path.glob("run.k*"))
    aligned = run["last"]["state_dict"]
    later = both["last"]["state_dict"]
    assert not all(torch.equal(value, later[name]) for name, value in aligned.items())


def test_phase_2_alone_takes_the_discriminators_of_phase_1(tmp_path, whole):
    """With a vanishing learning rate they are still those of run.align.pt at the end.

    So is the network.
    """
    path = whole.with_suffix(".align.pt")
    run_main(*SCRIPT, *SHORT, "--lr", "1e-12", "--align-epochs", 0, "--init", path,
             "--teacher", whole.with_suffix(".teacher.pt"), "--ckpt", tmp_path / "two.pt")
    align = load(path)
    two = load(tmp_path / "two.pt")
    assert [row["k"] for row in two["history"]] == [80, 50]
    judges = two["method_state"]["discriminators"]
    for name, value in align["method_state"]["discriminators"].items():
        if "weight" in name:
            torch.testing.assert_close(judges[name], value, msg=name)
    for name, value in align["last"]["state_dict"].items():
        torch.testing.assert_close(two["last"]["state_dict"][name], value, msg=name)


def tiny_nets(patch):
    """Launches train linear networks."""
    def build(*_):
        return plain(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    patch.setattr(common, "build_model", build)


def set_robust(patch, accuracies):
    """Validation finds these robust accuracies, one after another."""
    robust = iter(accuracies)

    def validate(*_):
        return {"val/clean": 1.0, "val/robust": next(robust)}
    patch.setattr(saliency, "validate", validate)


def test_the_best_epoch_is_of_either_phase(tmp_path, monkeypatch):
    """Phase 1's is the paper's k = 100. The network after each stage is kept.

    It is not replaced unasked.
    """
    tiny_nets(monkeypatch)
    # two epochs of the teacher, two of phase 1, two of phase 2
    set_robust(monkeypatch, [0.1, 0.95, 0.9, 0.8, 0.3, 0.4])
    words = [*SHORT, *TEACHER, "--ks", "90,50", "--ckpt", tmp_path / "run.pt"]
    run_main(*SCRIPT, *words)
    run = load(tmp_path / "run.pt")
    assert run["best"]["epoch"] == 1 and run["best"]["metric"] == 0.9
    for name, epoch, metric in (("align", 2, 0.8), ("k90", 3, 0.3), ("k50", 4, 0.4)):
        kept = load(tmp_path / f"run.{name}.pt")
        assert kept["best"]["epoch"] == kept["last"]["epoch"] == epoch
        assert kept["best"]["metric"] == metric and len(kept["history"]) == epoch
        assert_same_weights(dict(last=kept["best"]), kept)
    assert_same_weights(kept, run)  # the last weights
    assert not any(value.equal(load(tmp_path / "run.k90.pt")["last"]["state_dict"][name])
                   for name, value in kept["last"]["state_dict"].items())

    names = ["run.align.pt", "run.k90.pt", "run.k50.pt"]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in ("run.pt", "run.resume.pt", "run.jsonl", *names):
        (tmp_path / name).unlink()
    for name in names:  # each alone is in the way
        (tmp_path / name).write_bytes(before[name])
        with pytest.raises(common.UsageError, match=f"{name} exists: --overwrite replaces it"):
            run_main(*SCRIPT, *words)
        assert (tmp_path / name).read_bytes() == before[name]
        assert not (tmp_path / "run.pt").exists()
        (tmp_path / name).unlink()
    set_robust(monkeypatch, [0.5] * 4)
    aligned = [*ALIGN, *TEACHER, "--method", "align", "--ckpt", tmp_path / "run.pt"]
    for name in names:
        (tmp_path / name).write_bytes(before[name])
    run_main(*SCRIPT, *aligned, "--lr", "0.02", "--overwrite")
    assert load(tmp_path / "run.align.pt")["args"]["lr"] == 0.02
    assert (tmp_path / "run.k90.pt").read_bytes() == before["run.k90.pt"]  # not a file of this run


@pytest.mark.parametrize("schedule", ["paper", "onecycle"])
def test_learning_rates(schedule, tmp_path, monkeypatch):
    """onecycle: one cycle over all stages and one for the teacher, a new rate at every step.

    paper: a new rate at every epoch. The teacher's falls to a tenth after half of its epochs, and
    again after three quarters.
    """
    tiny_nets(monkeypatch)
    seen = []
    real = common.set_lr

    def watched(optimizer, lr):
        seen.append(lr)
        real(optimizer, lr)
    monkeypatch.setattr(common, "set_lr", watched)
    run_main(*SCRIPT, *SHORT, *TEACHER, "--val", 0, "--teacher-epochs", 4, "--align-delay", 1,
             "--k-epochs", 2, "--schedule", schedule, "--ckpt", tmp_path / "run.pt")
    steps = [np.arange(0.5, 8), np.arange(0.5, 12)]  # of the teacher, the student: 2 an epoch
    if schedule == "onecycle":
        shares = [np.interp(part / (part[-1] + 0.5), [0, 0.3, 1], [0, 1, 0]) for part in steps]
        expected = 0.01 * np.concatenate(shares)
    else:
        teacher = [1, 1, 0.1, 0.01]
        student = [1, 0.01, 0.01, 0.007, 0.004, 0.001]
        expected = 0.01 * np.repeat([*teacher, *student], 2)
    assert seen == pytest.approx(list(expected))
    teacher = load(tmp_path / "run.teacher.pt")["history"]
    student = load(tmp_path / "run.pt")["history"]
    assert [row["lr"] for row in teacher + student] == seen[1::2]
    assert [row["k"] for row in student] == [100, 100, 80, 80, 50, 50]


def test_normal_training_and_noise(tmp_path, monkeypatch):
    """--method nt trains without teacher and discriminators.

    --input-noise moves every image by at most so much, within [0, 1].
    """
    tiny_nets(monkeypatch)
    seen = []
    real = saliency.alternate

    def watched(optimizer, judges, precision, loss, x, *rest, **more):
        seen.append(x)
        return real(optimizer, judges, precision, loss, x, *rest, **more)
    monkeypatch.setattr(saliency, "alternate", watched)
    words = [*ALIGN, "--val", 0, "--method", "nt"]
    run_main(*SCRIPT, *words, "--ckpt", tmp_path / "nt.pt")
    run_main(*SCRIPT, *words, "--ckpt", tmp_path / "noise.pt", "--input-noise", "0.1")
    clean, noisy = torch.cat(seen).chunk(2)
    change = (noisy - clean).abs()
    assert 0.09 < change.max() <= 0.1 + 1e-6
    assert noisy.min() == 0
    assert noisy.max() <= 1
    assert (change > 0).float().mean() > 0.4
    for name in ("nt.pt", "noise.pt"):
        history = load(tmp_path / name)["history"]
        assert [row["k"] for row in history] == [100, 100]
        assert {"train/loss", "train/ce"} == {key for key in history[0] if "/" in key}
    assert not list(tmp_path.glob("*teacher*"))
    assert not list(tmp_path.glob("*align*"))


def test_the_teachers_radius_grows(tmp_path, monkeypatch):
    """Radius and step are a third, two thirds and all of theirs in its first epochs.

    Validation is always at the full radius.
    """
    seen = []
    real = common.pgd

    def watched(model, x, y, eps, step, steps, **more):
        seen.append((round(eps, 6), round(step, 6), steps))
        return real(model, x, y, eps, step, steps, **more)
    monkeypatch.setattr(common, "pgd", watched)
    run_main(*SCRIPT, *SHORT, *TEACHER, "--teacher-epochs", 4, "--teacher-warmup", 2,
             "--eps", "0.3", "--step-size", "0.06", "--align-epochs", 1, "--ks", 50,
             "--ckpt", tmp_path / "run.pt")
    radii = list(dict.fromkeys(row for row in seen if row[2] == 2))
    assert radii == [(0.1, 0.02, 2), (0.2, 0.04, 2), (0.3, 0.06, 2)]
    assert {row for row in seen if row[2] == 20} == {(0.3, 0.075, 20)}


def test_a_teacher_of_another_data_set(tmp_path):
    """It keeps its body and gets a new last layer, trained while the rest stays frozen."""
    elsewhere = tmp_path / "mnist.pt"
    random_mnist(tmp_path)
    run_main(sat_rx.main, "sat_rx.py", "--dataset", "mnist", "--data-dir", tmp_path, "--method",
             "nt", "--epochs", 1, "--val", 0, "--ckpt", elsewhere)
    words = [*SHORT, "--teacher-epochs", 2]
    run_main(*SCRIPT, *words, "--ckpt", tmp_path / "run.pt", "--teacher", elsewhere)
    given = load(elsewhere)["last"]["state_dict"]
    teacher = load(tmp_path / "run.teacher.pt")["last"]["state_dict"]
    head = [name for name in given if name.startswith("9.")]
    assert all(torch.equal(given[name], teacher[name]) for name in given if name not in head)
    assert head
    assert not any(torch.equal(given[name], teacher[name]) for name in head)
    (tmp_path / "own.teacher.pt").write_bytes(elsewhere.read_bytes())
    with pytest.raises(common.UsageError, match="another --ckpt"):
        run_main(*SCRIPT, *words, "--ckpt", tmp_path / "own.pt", "--teacher",
                 tmp_path / "own.teacher.pt")
    assert (tmp_path / "own.teacher.pt").read_bytes() == elsewhere.read_bytes()


@pytest.mark.parametrize("flags", [
    [],
    ["--align-delay", "1", "--input-noise", "8/255"],
    ["--score", "logit", "--curriculum-sign", "literal", "--gamma", "0.001", "--gamma2", "0.001"],
], ids=" ".join)
def test_launch_resume_evaluate(tmp_path, whole, flags):
    """All stages in one go equal interruptions in the teacher's, in phase 1 and in phase 2.

    Every k has a checkpoint.
    """
    words = [*SHORT, *TEACHER, *flags]
    if flags:
        whole = tmp_path / "whole.pt"
        run_main(*SCRIPT, *words, "--ckpt", whole)
    cut = tmp_path / "cut.pt"
    run_interrupted(*SCRIPT, (2, 4, 7), *words, "--ckpt", cut)
    (tmp_path / "cut.k50.pt").unlink()  # as if killed before it was written
    run_main(*SCRIPT, *words, "--ckpt", cut, "--resume")
    for name in (".pt", ".teacher.pt", ".align.pt", ".k80.pt", ".k50.pt"):
        for which in ("best", "last"):
            assert_same_weights(load(whole.with_suffix(name)), load(cut.with_suffix(name)), which)
    history = load(whole)["history"]
    assert [row["k"] for row in history] == [100, 100, 80, 50]
    expected = {"train/robust", "train/curr_diff", "train/cosine", "discriminator/right"}
    assert expected <= history[-1].keys()
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.k80.pt", "--attacks",
             "clean,pgd-3", "--limit", 30)
    with pytest.raises(common.UsageError, match="--overwrite replaces it"):
        run_main(*SCRIPT, *words, "--ckpt", whole)
