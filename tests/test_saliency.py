"""teacher_saliency.py: every term against a formula of its own and finite differences, who moves whose weights, masks,
schedule, teachers, launches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import evaluate
import teacher_saliency as saliency
from conftest import check_slopes, plain, random_mnist, run_interrupted, run_main

SHORT = ["--dataset", "digits", "--limit", "64", "--batch-size", "32", "--val", "40", "--align-epochs", "2", "--ks",
         "80,50", "--k-epochs", "1", "--teacher-epochs", "2", "--lr", "0.01", "--attack-steps", "2"]


def small(*flags):
    """(student, teacher, discriminators, images, labels, flags) in float64, smooth, on 32 x 32 images."""
    torch.manual_seed(0)

    def net():
        return plain(nn.Sequential(nn.Conv2d(1, 3, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(147, 4)).double())
    discriminators = nn.ModuleList(saliency.Discriminator(1, 32) for _ in range(2)).double()
    args = saliency.parse(["--dataset", "mnist", *flags])
    return net(), net().eval(), discriminators, torch.rand(6, 1, 32, 32).double(), torch.randint(0, 4, (6,)), args


def maps_by_sample(model, x, y, kind):
    """Input gradients image by image: of the true class's logit or probability, or of the cross-entropy."""
    rows = []
    for image, label in zip(x, y):
        image = image[None].clone().requires_grad_(True)
        z = model(image)[0]
        value = {"logit": z[label], "prob": z.softmax(0)[label], "ce": -z.log_softmax(0)[label]}[kind]
        rows.append(torch.autograd.grad(value, image)[0])
    return torch.cat(rows)


CASES = [(k, score, sign, scale) for k in (None, 50) for score in ("logit", "prob") for sign in ("literal", "negated")
         for scale in ("image", "family") if k or sign == "literal"]


@pytest.mark.parametrize("k, kind, sign, scale", CASES)
def test_loss_equals_the_formula(k, kind, sign, scale):
    """Eqs. 10 to 18 from maps made one image at a time."""
    flags = ["--score", kind, "--curriculum-sign", sign, "--ldiff-scale", scale, "--gamma2", "7", "--beta2", "3"]
    model, teacher, discriminators, x, y, args = small(*flags)
    discriminators.eval()
    terms, pairs = saliency.saliency_loss(model, teacher, discriminators, x, y, k, args)
    j_s, j_t, j_ce = (maps_by_sample(m, x, y, what) for m, what in ((model, kind), (teacher, kind), (model, "ce")))
    unit = 1 / 6 if scale == "image" else 1 / 255**2
    ce = F.cross_entropy(model(x), y)
    expected = dict(ce=ce, robust=(1 - discriminators[0](j_s).sigmoid()).log().mean(),
                    teacher_norm=unit * j_t.square().sum(), diff=unit * (j_s - j_t).square().sum())
    total = ce + (3 if k else 2) * expected["robust"] + (7 if k else 10) * expected["diff"]
    if k:
        signed, masked = j_ce if sign == "literal" else -j_ce, saliency.top_k(j_t, k)
        expected |= dict(curr_robust=(1 - discriminators[1](signed).sigmoid()).log().mean(),
                         curr_diff=unit * (signed - masked).square().sum())
        total = total + 3 * expected["curr_robust"] + 7 * expected["curr_diff"]
        torch.testing.assert_close(pairs[1][0], signed)
    torch.testing.assert_close(pairs[0][0], j_s)
    assert terms.keys() == {"loss"} | expected.keys()
    for name, value in dict(expected, loss=total).items():
        torch.testing.assert_close(terms[name], value, msg=name)


@pytest.mark.parametrize("kind", ["logit", "prob"])
def test_gradient_by_finite_differences(kind):
    """Every term, in float64, along a random direction of the student's weights: through the maps' own gradients."""
    model, teacher, discriminators, x, y, args = small("--score", kind)
    discriminators.requires_grad_(False)

    def terms():
        terms = saliency.saliency_loss(model, teacher, discriminators, x, y, 50, args)[0]
        assert not terms.pop("teacher_norm").requires_grad
        return terms
    check_slopes(model, terms, rel=1e-3)


def test_discriminators_loss():
    """Eqs. 14 and 19: maximise log D(J_T) + log(1 - D(J_S)); a map's shift and scale do not matter."""
    model, teacher, discriminators, x, y, args = small()
    _, pairs = saliency.saliency_loss(model, teacher, discriminators, x, y, 50, args)
    discriminators.eval()
    loss, right = saliency.discriminator_loss(discriminators, pairs)
    expected, hits = 0, []
    for discriminator, (student, true) in zip(discriminators, pairs):
        p, q = discriminator(true).sigmoid(), discriminator(student).sigmoid()
        expected = expected - (p.log().mean() + (1 - q).log().mean()) / 2
        hits += [*(p > 0.5), *(q <= 0.5)]
        torch.testing.assert_close(discriminator(3 * true + 0.2), discriminator(true))
    torch.testing.assert_close(loss, expected)
    assert right == pytest.approx(torch.stack(hits).double().mean().item())


def test_nobody_moves_anothers_weights(tmp_path, monkeypatch):
    """The student's steps change neither teacher nor discriminators, the discriminators' steps only themselves."""
    seen, real = [], torch.optim.SGD.step

    def watched(optimizer, *args):
        groups = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        result = real(optimizer, *args)
        seen.append([any(not torch.equal(a, b) for a, b in zip(old, group["params"]))
                     for old, group in zip(groups, optimizer.param_groups)])
        return result
    teachers, get = [], saliency.get_teacher
    monkeypatch.setattr(saliency, "get_teacher", lambda *a: teachers.append(get(*a)) or teachers[0])
    run_main(saliency.main, "teacher_saliency.py", *SHORT, "--ckpt", tmp_path / "first.pt")
    before = {name: value.clone() for name, value in teachers[0].state_dict().items()}
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    run_main(saliency.main, "teacher_saliency.py", *SHORT[:-2], "--ckpt", tmp_path / "run.pt", "--teacher",
             tmp_path / "first.teacher.pt")
    assert {tuple(row) for row in seen} == {(True, False, False), (False, True, False), (False, True, True)}
    assert all(torch.equal(value, before[name]) for name, value in teachers[1].state_dict().items())
    assert not teachers[1].training and not any(p.requires_grad for p in teachers[1].parameters())


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


def test_schedule_and_settings():
    """Section 5: lr 0.1 to 0.001 in 100 epochs, then to 0.0001 over 15 epochs for each of five k."""
    args = saliency.parse([])
    rows = [saliency.phase(epoch, args) for epoch in range(args.epochs)]
    ks = [k for k in (90, 80, 70, 60, 50) for _ in range(15)]
    assert args.epochs == 175 and [k for k, _ in rows] == [None] * 100 + ks
    lrs = [lr for _, lr in rows]
    assert [lrs[i] for i in (0, 99, 100, 174)] == [pytest.approx(v) for v in (0.1, 0.001, 0.001, 0.0001)]
    assert all(a >= b - 1e-9 for a, b in zip(lrs, lrs[1:]))
    assert (args.beta, args.gamma, args.gamma2, args.batch_size, args.normalize) == (2, 10, 20, 32, "image")
    assert saliency.parse(["--dataset", "cifar100"]).gamma2 == 15
    one = saliency.parse(["--align-epochs", "0", "--init", "at.pt", "--ks", "50", "--k-epochs", "4"])
    assert [saliency.phase(epoch, one)[0] for epoch in range(one.epochs)] == [50] * 4
    for flags in (["--ks", "90,x"], ["--ks", "0"], ["--epochs", "3"], ["--ks", "90,90"], ["--align-delay", "101"],
                  ["--teacher", "at.pt", "--attack-steps", "7"], ["--align-epochs", "0"],
                  ["--teacher", "at.pt", "--teacher-warmup", "0"],
                  ["--teacher-epochs", "3", "--teacher-warmup", "3"]):
        with pytest.raises(common.UsageError):
            saliency.parse(flags)
    prob, logit = small("--score", "prob")[-1], small("--score", "logit")[-1]
    assert [saliency.passes(k, a) for a in (prob, logit) for k in (None, 50)] == [4, 6, 4, 6]


def test_alignment_can_be_dropped_in_phase_2():
    model, teacher, discriminators, x, y, args = small("--drop-alignment")
    terms, pairs = saliency.saliency_loss(model, teacher, discriminators, x, y, 50, args)
    assert set(terms) == {"loss", "ce", "teacher_norm", "curr_robust", "curr_diff"} and pairs[0] is None
    assert saliency.discriminator_loss(discriminators, pairs)[0].isfinite()
    terms, _ = saliency.saliency_loss(model, teacher, discriminators, x, y, None, args)
    assert set(terms) == {"loss", "ce", "teacher_norm", "robust", "diff"}


def test_phase_2_alone_takes_the_discriminators_of_phase_1(tmp_path):
    """With a vanishing learning rate they are still those of run.align.pt at the end, and so is the network."""
    run_main(saliency.main, "teacher_saliency.py", *SHORT, "--ckpt", tmp_path / "run.pt")
    run_main(saliency.main, "teacher_saliency.py", *SHORT[:-2], "--lr", "1e-12", "--align-epochs", 0, "--init",
             tmp_path / "run.align.pt", "--teacher", tmp_path / "run.teacher.pt", "--ckpt", tmp_path / "two.pt")
    align, two = (torch.load(tmp_path / name, weights_only=True) for name in ("run.align.pt", "two.pt"))
    assert [row["k"] for row in two["history"]] == [80, 50]
    judges = [{name: value for name, value in state["method_state"]["discriminators"].items() if "weight" in name}
              for state in (align, two)]
    for name, value in judges[0].items():
        torch.testing.assert_close(judges[1][name], value, msg=name)
    for name, value in align["last"]["state_dict"].items():
        torch.testing.assert_close(two["last"]["state_dict"][name], value, msg=name)


def test_the_best_epoch_is_of_phase_2(tmp_path, monkeypatch):
    """Though phase 1 was better; and a network kept for a phase is not replaced unasked."""
    robust = iter([0.1, 0.2, 0.9, 0.8, 0.3, 0.4])  # two epochs of the teacher, two of phase 1, two of phase 2
    monkeypatch.setattr(saliency, "validate", lambda *_: {"val/clean": 1.0, "val/robust": next(robust)})
    run_main(saliency.main, "teacher_saliency.py", *SHORT, "--ckpt", tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["best"]["epoch"] == 4
    assert torch.load(tmp_path / "run.align.pt", weights_only=True)["best"]["epoch"] == 2
    for name in ("run.pt", "run.resume.pt", "run.jsonl", "run.k80.pt", "run.k50.pt"):
        (tmp_path / name).unlink()
    before = (tmp_path / "run.align.pt").read_bytes()
    with pytest.raises(common.UsageError, match="align.pt exists"):
        run_main(saliency.main, "teacher_saliency.py", *SHORT, "--ckpt", tmp_path / "run.pt")
    assert (tmp_path / "run.align.pt").read_bytes() == before


def test_the_teachers_radius_grows(tmp_path, monkeypatch):
    """A third, two thirds, all of radius and step in its first epochs; validation is at the full radius always."""
    seen, real = [], common.pgd

    def watched(model, x, y, eps, step, steps, **more):
        seen.append((round(eps, 6), round(step, 6), steps))
        return real(model, x, y, eps, step, steps, **more)
    monkeypatch.setattr(common, "pgd", watched)
    run_main(saliency.main, "teacher_saliency.py", *SHORT, "--teacher-epochs", 4, "--teacher-warmup", 2, "--eps", "0.3",
             "--step-size", "0.06", "--align-epochs", 1, "--ks", 50, "--ckpt", tmp_path / "run.pt")
    radii = list(dict.fromkeys(row for row in seen if row[2] == 2))
    assert radii == [(0.1, 0.02, 2), (0.2, 0.04, 2), (0.3, 0.06, 2)]
    assert {row for row in seen if row[2] == 20} == {(0.3, 0.075, 20)}


def test_a_teacher_of_another_data_set(tmp_path):
    """It keeps its body and gets a new last layer, trained while the rest stays frozen."""
    import sat_rx
    elsewhere = tmp_path / "mnist.pt"
    random_mnist(tmp_path)
    run_main(sat_rx.main, "sat_rx.py", "--dataset", "mnist", "--data-dir", tmp_path, "--method", "nt", "--epochs", 1,
             "--val", 0, "--ckpt", elsewhere)
    run_main(saliency.main, "teacher_saliency.py", *SHORT[:-2], "--ckpt", tmp_path / "run.pt", "--teacher",
             elsewhere)
    given, teacher = (torch.load(path, weights_only=True)["last"]["state_dict"]
                      for path in (elsewhere, tmp_path / "run.teacher.pt"))
    head = [name for name in given if name.startswith("9.")]
    assert all(torch.equal(given[name], teacher[name]) for name in given if name not in head)
    assert head and not any(torch.equal(given[name], teacher[name]) for name in head)
    (tmp_path / "own.teacher.pt").write_bytes(elsewhere.read_bytes())
    with pytest.raises(common.UsageError, match="another --ckpt"):
        run_main(saliency.main, "teacher_saliency.py", *SHORT[:-2], "--ckpt", tmp_path / "own.pt", "--teacher",
                 tmp_path / "own.teacher.pt")
    assert (tmp_path / "own.teacher.pt").read_bytes() == elsewhere.read_bytes()


@pytest.mark.parametrize("flags", [[], ["--align-delay", "1", "--input-noise", "8/255"], [
    "--score", "logit", "--curriculum-sign", "literal", "--gamma", "0.001", "--gamma2", "0.001"]], ids=" ".join)
def test_launch_resume_evaluate(tmp_path, flags):
    """All stages in one go equal interruptions in the teacher's, in phase 1 and phase 2; every k has a checkpoint."""
    words = [*SHORT, *flags]
    run_main(saliency.main, "teacher_saliency.py", *words, "--ckpt", tmp_path / "whole.pt")
    run_interrupted(saliency.main, "teacher_saliency.py", (2, 4, 7), *words, "--ckpt", tmp_path / "cut.pt")
    (tmp_path / "cut.k50.pt").unlink()  # as if killed before it was written
    run_main(saliency.main, "teacher_saliency.py", *words, "--ckpt", tmp_path / "cut.pt", "--resume")
    for name in ("pt", "teacher.pt", "align.pt", "k80.pt", "k50.pt"):
        whole, cut = (torch.load(tmp_path / f"{run}.{name}", weights_only=True) for run in ("whole", "cut"))
        for which in ("best", "last"):
            assert all(torch.equal(v, cut[which]["state_dict"][k]) for k, v in whole[which]["state_dict"].items()), name
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert [row["k"] for row in whole["history"]] == [100, 100, 80, 50]
    assert {"train/robust", "train/curr_diff", "discriminator/right", "cost/passes"} <= whole["history"][-1].keys()
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.k80.pt", "--attacks", "clean,pgd-3", "--limit", 30)
    with pytest.raises(common.UsageError, match="--overwrite replaces it"):
        run_main(saliency.main, "teacher_saliency.py", *words, "--ckpt", tmp_path / "whole.pt")
