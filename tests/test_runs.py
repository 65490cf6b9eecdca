"""Runs as a user sees them: launches, resuming, refusals, checkpoints, evaluation."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import evaluate
import iaat
import sat_rx
from conftest import flags_of, random_mnist, run_interrupted, run_main

ROOT = Path(__file__).parent.parent
DIGITS = common.dataset_facts("digits")
SHORT = ["--dataset", "digits", "--model", "cnn-small", "--limit", "100", "--batch-size", "25"]
FOUR_EPOCHS = ["--model", "cnn-small", "--epochs", "4", "--lr", "0.1"]  # of all digits


def train(*words):
    run_main(sat_rx.main, "sat_rx.py", *SHORT, *words)


def evaluate_main(*words):
    run_main(evaluate.main, "evaluate.py", *words)


def shell(script, *words, **env):
    """(exit status, standard output, standard error) of a real process without standard input."""
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    command = [sys.executable, ROOT / script, *map(str, words)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=env, capture_output=True,
                          text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def weights(path, which="last"):
    return torch.load(path, weights_only=True)[which]["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


METHODS = ["nt", "fgsm-at", "rfgsm-at", "pgd-at", "trades", "r1", "r2", "r3"]  # all but eat


@pytest.mark.parametrize("method", METHODS)
def test_launch_then_evaluate(tmp_path, method, capsys):
    """Every method trains on real digits. evaluate.py reads what it wrote and counts right."""
    path = tmp_path / "run.pt"
    train("--method", method, "--epochs", 2, "--ckpt", path)
    attacks = ["clean", "fgsm", "ifgsm-3", "mi-fgsm-3", "pgd-3x2", "pgd-cw-3"]
    evaluate_main("--ckpt", path, "--attacks", ",".join(attacks), "--limit", 90)
    outcomes = {o["attack"]: o for o in json.loads((tmp_path / "run.eval.json").read_text())}
    assert list(outcomes) == attacks
    for name, outcome in outcomes.items():
        assert outcome["n"] == 90
        assert outcome["accuracy"] <= outcomes["clean"]["accuracy"]
        assert outcome["largest"] <= 0.1 + 1e-6
        assert (outcome["largest"] > 0) == (name != "clean")
    history = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2]
    for name in ("train/loss", "val/clean", "val/ifgsm-3", "val/fgsm", "val/pgd",
                 "masking/loss_gap"):
        assert name in history[0]
    best = torch.load(path, weights_only=True)["best"]
    metric = "val/clean" if method == "nt" else "val/ifgsm-3"
    assert best["metric"] == max(row[metric] for row in history)
    assert best["metric"] == history[best["epoch"] - 1][metric]
    assert "run.pt" in capsys.readouterr().out


def test_eat_and_transfer(tmp_path, capsys):
    """EAT from a source's checkpoint.

    Transfer images are made once, kept, and judged on the target alone.
    """
    source = tmp_path / "source.pt"
    path = tmp_path / "run.pt"
    train("--method", "nt", "--model", "eat-d", "--epochs", 2, "--ckpt", source)
    train("--method", "eat", "--source", source, "--epochs", 1, "--ckpt", path)
    words = ["--ckpt", path, "--attacks", "clean", "--surrogate", source,
             "--transfer", "fgsm,mi-fgsm-4", "--limit", 50]
    evaluate_main(*words)
    images = {p: p.stat().st_mtime_ns for p in tmp_path.glob("source.*.npy")}
    assert len(images) == 2
    evaluate_main(*words)
    assert images == {p: p.stat().st_mtime_ns for p in tmp_path.glob("source.*.npy")}
    outcomes = {o["attack"]: o for o in json.loads((tmp_path / "run.eval.json").read_text())}
    assert list(outcomes) == ["clean", "fgsm@eat-d", "mi-fgsm-4@eat-d"]
    test = evaluate.load_test(DIGITS, "data", 50, "cpu")
    target, _ = common.load_model(path)
    surrogate, _ = common.load_model(source)
    x_adv = common.fgsm(surrogate, common.to_float(test.images), test.labels, 0.1)
    right = target(x_adv).argmax(1) == test.labels
    assert outcomes["fgsm@eat-d"]["accuracy"] == right.double().mean().item()


def test_accuracies_are_those_of_a_plain_loop(train, tmp_path):
    """Clean and FGSM accuracy on all test digits, recounted image by image.

    They are the same whatever the batch size.
    """
    path = tmp_path / "run.pt"
    shutil.copy(train("nt", *FOUR_EPOCHS), path)
    for batch_size in (360, 77):
        evaluate_main("--ckpt", path, "--attacks", "clean,fgsm", "--limit", 0,
                      "--batch-size", batch_size, "--eps", "0.05")
    clean, attacked, *other = json.loads((tmp_path / "run.eval.json").read_text())
    assert [o["accuracy"] for o in other] == [clean["accuracy"], attacked["accuracy"]]
    flags = np.load(tmp_path / "run.eval.npz")
    model, _ = common.load_model(path)
    test = evaluate.load_test(DIGITS, "data", None, "cpu")
    right = []
    robust = []
    for i, (image, label) in enumerate(zip(test.images, test.labels)):
        x = (image[None] / 255).requires_grad_(True)
        z = model(x)
        right.append((z.argmax() == label).item())
        grad, = torch.autograd.grad(torch.nn.functional.cross_entropy(z, label[None]), x)
        x_adv = (x + 0.05 * grad.sign()).clamp(0, 1)
        robust.append((model(x_adv).argmax() == label).item())
        assert flags[clean["key"]][i, 0] == right[i]
    assert clean["n"] == 360
    assert clean["accuracy"] == sum(right) / 360
    assert attacked["accuracy"] == pytest.approx(sum(robust) / 360, abs=1.1 / 360)
    assert attacked["accuracy"] < 0.9


SHORT_RUNS = {  # script -> a run of some seconds and of so many epochs
    "sat_rx": (7, ["--method", "r2", "--epochs", 7]),
    "atlas": (12, ["--epochs", 12, "--ramp", 3, "--val-steps", 2]),
    "iaat": (10, ["--epochs", 10, "--warmup", 2, "--attack-steps", 2, "--limit", 60]),
    "dra_finetune": (12, ["--epochs", 12, "--pretrain-epochs", 1, "--attack-steps", 2]),
    "teacher_saliency": (10, ["--teacher-epochs", 1, "--align-epochs", 6, "--ks", "90,50",
                              "--k-epochs", 2, "--attack-steps", 1]),
}


def history_of(path):
    """The lines of a run.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


@pytest.mark.parametrize("script", SHORT_RUNS)
def test_launch_killed_and_resumed_equals_uninterrupted(tmp_path, script):
    """SIGKILL some time after the first save, then --resume: the same weights and history."""
    epochs, words = SHORT_RUNS[script]
    words = [*SHORT, *words, "--precision", "float32"]
    main = importlib.import_module(script).main
    run_main(main, f"{script}.py", *words, "--ckpt", tmp_path / "whole.pt")
    command = [sys.executable, ROOT / f"{script}.py", *words, "--ckpt", tmp_path / "cut.pt"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut.resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2 * list(SHORT_RUNS).index(script) / 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(tmp_path / "cut.resume.pt", weights_only=True)["last"]["epoch"]
    assert 1 <= done < epochs, "killed too late to show anything"
    code, out, err = shell(f"{script}.py", *words, "--ckpt", tmp_path / "cut.pt", "--resume")
    assert code == 0, err
    assert f"goes on after epoch {done}" in out
    for which in ("best", "last"):
        assert same(weights(tmp_path / "whole.pt", which), weights(tmp_path / "cut.pt", which))
    assert history_of(tmp_path / "whole.jsonl") == history_of(tmp_path / "cut.jsonl")
    assert len(history_of(tmp_path / "cut.jsonl")) == epochs
    assert not list(tmp_path.glob("*.lock"))


def test_killed_between_two_files(tmp_path, monkeypatch):
    """run.pt of epoch 2 beside run.resume.pt of epoch 1.

    The second epoch is trained again, with the same result.
    """
    path = tmp_path / "run.pt"
    write = common.write_beside
    train("--method", "r2", "--epochs", 3, "--ckpt", tmp_path / "whole.pt")

    def stop(target, content):
        if target == path.with_suffix(".resume.pt") and target.exists():
            raise KeyboardInterrupt
        write(target, content)
    monkeypatch.setattr(common, "write_beside", stop)
    with pytest.raises(KeyboardInterrupt):
        train("--method", "r2", "--epochs", 3, "--ckpt", path)
    monkeypatch.setattr(common, "write_beside", write)
    assert torch.load(path, weights_only=True)["last"]["epoch"] == 2
    train("--method", "r2", "--epochs", 3, "--ckpt", path, "--resume")
    assert same(weights(path), weights(tmp_path / "whole.pt"))


def test_paths_in_use_are_kept(tmp_path, capsys):
    """A run is refused, continued or replaced as the flags say.

    A finished one says so. Other flags are named.
    """
    path = tmp_path / "run.pt"
    words = ["--method", "nt", "--epochs", 1, "--ckpt", path]
    train(*words, "--resume")  # nothing there: starts
    before = path.read_bytes()
    choice = "exists.*--resume goes on with it, --overwrite replaces it"
    with pytest.raises(common.UsageError, match=choice):
        train(*words)
    with pytest.raises(common.UsageError, match="lr was 0.02, is 0.5"):
        train(*words, "--resume", "--lr", "0.5")
    with pytest.raises(common.UsageError, match="give one of them"):
        train(*words, "--resume", "--overwrite")
    train(*words, "--resume")
    assert "is finished" in capsys.readouterr().out
    assert path.read_bytes() == before
    path.unlink()
    train(*words, "--resume")  # run.resume.pt alone brings the run back
    assert same(weights(path), weights_of(before))
    with common.fcntl and open(f"{path}.lock", "w") as lock:
        common.fcntl.flock(lock, common.fcntl.LOCK_EX)
        with pytest.raises(common.UsageError, match="another run is writing"):
            train(*words, "--overwrite")
    train(*words, "--overwrite", "--seed", 1)
    assert not same(weights(path), weights_of(before))
    path.with_suffix(".resume.pt").unlink()
    with pytest.raises(common.UsageError, match="exists.*: --overwrite replaces it"):
        train(*words, "--resume")
    for name in ("run.pt", "run.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "run.jsonl").write_text("somebody's notes")
    with pytest.raises(common.UsageError, match="--overwrite replaces it"):
        train(*words)
    assert (tmp_path / "run.jsonl").read_text() == "somebody's notes"


def weights_of(content):
    return torch.load(io.BytesIO(content), weights_only=True)["last"]["state_dict"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    """The error names epoch, step and term, and nothing broken is saved.

    Here the first epoch is good.
    """
    path = tmp_path / "run.pt"
    real = sat_rx.r2_loss

    def broken(*arguments):
        terms = real(*arguments)
        broken.calls += 1
        if broken.calls > 6:
            terms["loss"] = terms["loss"] * float("inf")
        return terms
    broken.calls = 0
    monkeypatch.setattr(sat_rx, "r2_loss", broken)
    with pytest.raises(common.UsageError, match="loss is (inf|nan) at epoch 2, step 3"):
        train("--method", "r2", "--epochs", 3, "--ckpt", path)
    saved = torch.load(path, weights_only=True)
    assert saved["last"]["epoch"] == 1
    assert all(v.isfinite().all() for v in saved["last"]["state_dict"].values())


def test_init_and_no_validation(tmp_path):
    """--init starts from given weights. --val 0 keeps the last epoch.

    A network that does not fit is refused.
    """
    first = tmp_path / "a.pt"
    second = tmp_path / "b.pt"
    train("--method", "nt", "--epochs", 1, "--ckpt", first)
    train("--method", "nt", "--epochs", 2, "--ckpt", second, "--init", first, "--lr", "1e-30",
          "--val", 0)
    assert same(weights(first, "best"), weights(second))
    saved = torch.load(second, weights_only=True)
    assert saved["best"]["epoch"] == 2
    assert saved["best"]["metric"] is None
    assert "val/clean" not in saved["history"][0]
    with pytest.raises(common.UsageError, match="do not fit"):
        train("--method", "nt", "--epochs", 1, "--model", "wrn-10-1", "--init", first,
              "--ckpt", tmp_path / "c.pt")


BAD = [  # command line -> what the message must name
    ("sat_rx.py --dataset imagenot", "imagenot"),
    ("sat_rx.py --dataset digits --model vit", "vit"),
    ("sat_rx.py --method r9", "r9"),
    ("sat_rx.py --frobnicate", "frobnicate"),
    ("sat_rx.py --lr x", "lr"),
    ("sat_rx.py --eps 0", "eps"),
    ("sat_rx.py --eps -1", "eps"),
    ("sat_rx.py --eps 8", "eps"),
    ("sat_rx.py --epochs 0", "epochs"),
    ("sat_rx.py --device abacus", "abacus"),
    ("sat_rx.py --dataset digits --ckpt run.bin", "end in .pt"),
    ("sat_rx.py --dataset digits --val 1437", "--val"),
    ("sat_rx.py --dataset digits --ckpt /dev/null/run.pt", "cannot be written"),
    ("sat_rx.py --dataset digits --init nothing.pt", "nothing.pt"),
    ("sat_rx.py --method eat", "--source"),
    ("sat_rx.py --dataset digits --resume", "needs --ckpt"),
    ("sat_rx.py --dataset digits --limit 9 --ckpt new/run.pt --init nothing.pt", "nothing.pt"),
    ("sat_rx.py --method trade --dataset digits", "did you mean trades"),
    ("sat_rx.py --epsilon 8/255", "did you mean --eps"),
    ("sat_rx.py --dataset mnits", "did you mean mnist"),
    ("sat_rx.py --dataset digits --classes 0,10", "classes 0 to 9"),
    ("sat_rx.py --dataset digits --classes 3", "2 or more"),
    ("evaluate.py", "--ckpt"),
    ("evaluate.py --ckpt nothing.pt", "nothing.pt"),
    ("evaluate.py --ckpt .", "cannot be read"),
    ("evaluate.py --ckpt x.pt --limit -1", "limit"),
    ("evaluate.py --ckpt x.pt --protocol magic", "magic"),
    ("evaluate.py --ckpt x.pt --protocol sat_rx --attacks clean", "give it or --attacks")]


@pytest.mark.parametrize("line, named", BAD)
def test_bad_input_is_named(line, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *words = line.split()
    main = importlib.import_module(Path(script).stem).main
    with pytest.raises(common.UsageError, match=named.replace(".", r"\.")):
        run_main(main, script, *words)
    assert not any(tmp_path.iterdir()), "nothing is left behind: no folder, lock or W&B run"


@pytest.mark.parametrize("name", [
    "magic", "pgd", "fgsm-3", "pgd-0", "clean,,fgsm", "ifgsm-3x2", "pgd-3x0", "PGD-3", "aa-5",
    "clean:0.1", "deepfool:0.1", "rays", "multi-3x0", "cw-l2x2"])
def test_unknown_attacks_are_named(name):
    with pytest.raises(common.UsageError, match="is no attack: choose from clean, noise, fgsm"):
        evaluate.parse_attacks(name, common.dataset_facts("mnist"), 0.3)


def test_bad_input_ends_in_one_line(tmp_path):
    """As a process: exit status 2, one line, no traceback, no usage.

    Ctrl-C leaves without a traceback, too.
    """
    for line in ("sat_rx.py --eps 8", "evaluate.py --ckpt nothing.pt"):
        code, out, err = shell(*line.split())
        assert code == 2
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert "Traceback" not in out + err
    words = [*SHORT, "--epochs", "1000", "--ckpt", tmp_path / "run.pt", "--wandb", "disabled"]

    def heed_ctrl_c():  # a shell's `&` has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, ROOT / "sat_rx.py", *words],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=heed_ctrl_c)
    while not (tmp_path / "run.resume.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert torch.load(tmp_path / "run.pt", weights_only=True)["last"]["epoch"] >= 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a short run."""
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    train("--method", "nt", "--epochs", 1, "--ckpt", path, "--wandb", "disabled")
    return path


class Unsafe:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should-not-exist",))


@pytest.mark.parametrize("content, named", [
    (b"", "is empty"),
    (bytes(range(256)) * 20, "not a checkpoint"),
    ("truncated", "damaged"),
    (Unsafe(), "would run code"),
    (dict(state_dict={}), "not a checkpoint of a run"),
    (3, "not a checkpoint"),
    ("format", "format 99"),
    ("file", "not run unasked")])
def test_bad_checkpoints_are_refused(content, named, tmp_path, finished):
    """Empty, random, truncated, needing code, foreign, another format, a file to import."""
    bad = tmp_path / "bad.pt"
    if content == "truncated":
        bad.write_bytes(finished.read_bytes()[:100_000])
        assert bad.stat().st_size < finished.stat().st_size
    elif content in ("format", "file"):
        change = dict(format=99) if content == "format" else dict(model="evil.py:make")
        torch.save(dict(torch.load(finished, weights_only=True), **change), bad)
    elif isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        torch.save(content, bad)
    with pytest.raises(common.UsageError, match=named):
        evaluate_main("--ckpt", bad)
    assert not Path("/tmp/should-not-exist").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_stripped(prefix, tmp_path, finished):
    path = tmp_path / "run.pt"
    saved = torch.load(finished, weights_only=True)
    plain_weights = saved["best"]["state_dict"]
    saved["best"]["state_dict"] = {prefix + k: v for k, v in plain_weights.items()}
    torch.save(saved, path)
    model, _ = common.load_model(path)
    assert same(model.net.state_dict(), plain_weights)
    assert not model.training
    saved["best"]["state_dict"].pop(prefix + "0.bias")
    torch.save(saved, path)
    with pytest.raises(common.UsageError, match="do not fit"):
        common.load_model(path)


def test_a_protocol_says_what_it_compares(tmp_path, capsys):
    """--protocol takes the paper's eps, prints its rows, dashes what was not run.

    Another data set's surrogate is refused. --results does not replace a file of the checkpoint.
    """
    random_mnist(tmp_path)
    mnist = ["--ckpt", tmp_path / "m.pt", "--data-dir", tmp_path]
    run_main(sat_rx.main, "sat_rx.py", *mnist, "--dataset", "mnist", "--method", "nt",
             "--epochs", 1, "--val", 0, "--eps", "0.1")
    evaluate_main(*mnist, "--protocol", "sat_rx", "--limit", 5)
    out = capsys.readouterr().out
    for text in ("Table 3", "this network", "eps: 0.3", "SAT-R2"):
        assert text in out
    outcomes = json.loads((tmp_path / "m.eval.json").read_text())
    assert all(o["eps"] in (None, 0.3) for o in outcomes)
    train("--method", "nt", "--epochs", 1, "--ckpt", tmp_path / "d.pt")
    with pytest.raises(common.UsageError, match="was trained on digits, not on mnist"):
        evaluate_main(*mnist, "--surrogate", tmp_path / "d.pt")
    with pytest.raises(common.UsageError, match="belongs to --ckpt"):
        evaluate_main("--ckpt", tmp_path / "d.pt", "--results", tmp_path / "d.eval.json",
                      "--overwrite")


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The last update of an epoch may break the weights after a finite loss.

    The files of the epoch before remain.
    """
    path = tmp_path / "run.pt"
    real = common.Meter.read
    build = common.build_model
    built = []

    def read(meter):
        if meter.epoch == 1:
            built[-1].net[0].weight.data[0] = float("nan")
        return real(meter)

    def remember(*args):
        built.append(build(*args))
        return built[-1]
    monkeypatch.setattr(common, "build_model", remember)
    monkeypatch.setattr(common.Meter, "read", read)
    with pytest.raises(common.UsageError, match="no longer finite after epoch 2"):
        train("--method", "nt", "--epochs", 3, "--val", 0, "--ckpt", path)
    assert torch.load(path, weights_only=True)["last"]["epoch"] == 1


def test_nothing_of_an_earlier_network_remains(tmp_path):
    """Retrain on the same path and evaluate: only the new network's outcomes.

    Its own are kept, or replaced.
    """
    path = tmp_path / "run.pt"
    train("--method", "nt", "--epochs", 1, "--ckpt", path)
    evaluate_main("--ckpt", path, "--attacks", "clean,fgsm", "--limit", 50)
    evaluate_main("--ckpt", path, "--attacks", "clean,ifgsm-2", "--limit", 50)

    def read():
        return json.loads((tmp_path / "run.eval.json").read_text())
    assert [o["attack"] for o in read()] == ["clean", "fgsm", "ifgsm-2"]
    old = {o["weights_sha256"] for o in read()}
    train("--method", "nt", "--epochs", 1, "--ckpt", path, "--overwrite", "--seed", 1)
    evaluate_main("--ckpt", path, "--attacks", "clean", "--limit", 50)
    outcome, = read()
    assert outcome["attack"] == "clean"
    assert outcome["weights_sha256"] not in old
    key = outcome["key"]
    files = np.load(tmp_path / "run.eval.npz").files
    assert files == [key, f"{key}-seconds", f"{key}-warnings"]


def test_export_and_results(tmp_path):
    """The float16 copy is half the size and evaluates as itself.

    Its results say where it comes from.
    """
    path = tmp_path / "run.pt"
    half = tmp_path / "half.pt"
    train("--method", "nt", "--model", "lenet+", "--epochs", 2, "--ckpt", path)
    evaluate_main("--ckpt", path, "--export", half)
    parameters = sum(v.numel() for v in weights(path, "best").values())
    assert 2 * parameters < half.stat().st_size < 2.1 * parameters
    written = tmp_path / "results.json"
    evaluate_main("--ckpt", half, "--attacks", "clean,pgd-3", "--limit", 60, "--results", written)
    results = json.loads(written.read_text())
    assert [o["attack"] for o in results["outcomes"]] == ["clean", "pgd-3"]
    assert results["training"]["command"].startswith("python sat_rx.py --dataset digits")
    assert results["training"]["hardware"]
    assert results["training_minutes"] >= 0
    assert len(results["history"]) == 2
    with pytest.raises(common.UsageError, match="no last weights"):
        evaluate_main("--ckpt", half, "--weights", "last")
    before = half.read_bytes()
    for flag, target in (("--export", half), ("--results", written)):
        with pytest.raises(common.UsageError, match="exists: --overwrite replaces it"):
            evaluate_main("--ckpt", path, flag, target)
        with pytest.raises(common.UsageError, match="no such folder"):
            evaluate_main("--ckpt", path, flag, tmp_path / "nowhere" / "file")
    assert half.read_bytes() == before
    evaluate_main("--ckpt", path, "--export", half, "--overwrite", "--weights", "last")
    assert half.read_bytes() != before


def test_wandb_never_asks_and_never_stops_a_run(tmp_path, monkeypatch, capsys):
    """Standard input closed, no network: offline by default. Where wandb is absent, one line."""
    words = ["--method", "nt", "--epochs", 1, *SHORT]
    environment = dict(WANDB_MODE=None, HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"))
    code, _, err = shell("sat_rx.py", *words, "--ckpt", tmp_path / "a.pt", **environment)
    assert code == 0, err
    assert list(tmp_path.glob("wandb/offline-run-*")), err
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises an ImportError
    run_main(sat_rx.main, "sat_rx.py", *words, "--ckpt", tmp_path / "b.pt")
    assert "wandb is not installed" in capsys.readouterr().out
    assert (tmp_path / "b.jsonl").exists()


def test_a_failed_connection_continues_offline(tmp_path, monkeypatch, capsys):
    import wandb
    calls = []

    class Offline:
        id = "abc"

        def define_metric(self, *args, **kwargs):
            pass

    def init(mode, group, **kwargs):
        assert group == "sat_rx-digits-r2"
        calls.append(mode)
        if mode == "online":
            raise ConnectionError("no route")
        return Offline()
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    config = dict(wandb="auto", dataset="digits", method="r2")
    run = common.wandb_run(config, "sat_rx", tmp_path / "run.pt")
    assert calls == ["online", "offline"]
    assert run.id == "abc"
    assert "no route" in capsys.readouterr().out


def test_iaat_sends_every_eps_to_wandb(tmp_path, monkeypatch):
    """As a histogram over all training images. The summary has the best epoch's numbers."""
    import wandb
    rows = []
    run = SimpleNamespace(id="abc", define_metric=lambda *_, **__: None, log=rows.append,
                          summary={}, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_main(iaat.main, "iaat.py", *SHORT, "--epochs", 2, "--warmup", 1, "--attack-steps", 1,
             "--val", 20, "--ckpt", tmp_path / "run.pt")
    assert [sum(row["eps/all"].histogram) for row in rows] == [100, 100]
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    best = saved["history"][saved["best"]["epoch"] - 1]
    assert run.summary["best/val/robust"] == best["val/robust"]


def test_precision_of_evaluation_is_said(tmp_path, capsys):
    path = tmp_path / "run.pt"
    train("--method", "nt", "--epochs", 1, "--ckpt", path, "--precision", "float32")
    capsys.readouterr()
    evaluate_main("--ckpt", path, "--attacks", "clean", "--limit", 30)
    assert "float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.eval.json").read_text())[0]["precision"] == "float32"


def test_vanished_gradients_are_reported(train):
    """The share of zero gradients: none for a trained network, all for one without a gradient."""
    model, _ = common.load_model(train("nt", *FOUR_EPOCHS))
    test = evaluate.load_test(DIGITS, "data", 60, "cpu")
    assert evaluate.dead_gradients(model, test, 30).mean() == 0
    forward = model.net.forward

    def rounded(x):
        return forward(x.round()) + 0 * x.sum()
    model.net.forward = rounded
    assert evaluate.dead_gradients(model, test, 30).mean() == 1

    def saturated(x):  # the cross-entropy of a certain prediction is flat
        return forward(x) * 1e5
    model.net.forward = saturated
    assert evaluate.dead_gradients(model, test, 30).mean() > 0.5


# ------------------------------------------------------------- a copy, and data of the user's own

NEW_LOSS = """def mine_loss(model, x, y, eps, lam):
    x_adv = common.fgsm(model, x, y, eps)
    ce_clean = common.cross_entropy(model(x), y).mean()
    ce_adv = common.cross_entropy(model(x_adv), y).mean()
    return dict(loss=ce_clean + lam * ce_adv, ce_clean=ce_clean, ce_adv=ce_adv)


def main():
"""
NEW_LINE = """    losses = {
        "mine": lambda x, y: mine_loss(model, x, y, args.eps, args.lam),
"""


def main_of(path):
    """main() of a script, imported from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_launch_of_a_copy_with_a_loss_of_its_own(tmp_path, monkeypatch):
    """cp sat_rx.py mine.py, five lines and one line: it trains, and says `mine` everywhere."""
    source = (ROOT / "sat_rx.py").read_text()
    assert source.count("def main():\n") == 1
    assert source.count("    losses = {\n") == 1
    copy = source.replace("def main():\n", NEW_LOSS).replace("    losses = {\n", NEW_LINE)
    (tmp_path / "mine.py").write_text(copy)
    shutil.copy(ROOT / "common.py", tmp_path)

    def run(*words):
        command = [sys.executable, "mine.py", *SHORT, "--epochs", 2, *words]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    code, out, err = run("--method", "mine", "--lam", 2)
    assert code == 0, err
    path, = [p for p in (tmp_path / "runs").glob("mine-digits-*.pt") if ".resume" not in p.name]
    saved = torch.load(path, weights_only=True)
    assert saved["script"] == "mine"
    assert saved["source"] == copy
    assert "mine --method mine on digits" in out
    assert f"runs/{path.name}" in out
    row = saved["history"][0]
    expected = row["train/ce_clean"] + 2 * row["train/ce_adv"]
    assert row["train/loss"] == pytest.approx(expected, rel=1e-4)
    monkeypatch.chdir(tmp_path)
    main = main_of(tmp_path / "mine.py")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("--method", "mien", "--lam", 2)
    assert code == 2
    assert "did you mean mine?" in err
    assert len(err.splitlines()) == 1
    with pytest.raises(common.UsageError, match="reads --lam, which has no default"):
        run_main(main, "mine.py", *SHORT, "--method", "mine")
    with pytest.raises(common.UsageError, match="no use for --tau"):
        run_main(main, "mine.py", *SHORT, "--method", "mine", "--lam", 2, "--tau", 1)
    assert sorted(tmp_path.rglob("*")) == before, "a refused command leaves nothing behind"
    (tmp_path / "mine.py").write_text(copy.replace(NEW_LINE, "    losses = {\n"))
    main = main_of(tmp_path / "mine.py")
    with pytest.raises(common.UsageError, match="invalid choice: 'mine'"):  # it is in no line
        run_main(main, "mine.py", *SHORT, "--method", "mine")


def own_data(folder, name, shape, classes):
    """Write folder/NAME.npz of 400 training and 80 test images that show their class."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, (classes, *shape))
    arrays = {}
    for split, n in (("train", 400), ("test", 80)):
        labels = rng.integers(0, classes, n)
        labels[:classes] = np.arange(classes)
        noise = rng.integers(0, 256, (n, *shape))
        arrays[f"{split}_images"] = (0.8 * pattern[labels] + 0.2 * noise).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(folder / f"{name}.npz", **arrays)


OWN_RUNS = {
    "sat_rx": ["--epochs", 2],
    "atlas": ["--epochs", 2, "--ramp", 1],
    "iaat": ["--epochs", 2, "--warmup", 1, "--attack-steps", 2],
    "dra_finetune": ["--epochs", 2, "--pretrain-epochs", 1, "--attack-steps", 2],
    "teacher_saliency": ["--teacher-epochs", 1, "--teacher-warmup", 0, "--attack-steps", 2,
                         "--align-epochs", 1, "--ks", 50, "--k-epochs", 1]}


@pytest.mark.parametrize("script", OWN_RUNS)
def test_chosen_epochs_are_kept(tmp_path, script, monkeypatch):
    """run.e1.pt and run.e2.pt have the weights after these epochs as best and last ones.

    So they have where the run was interrupted. They are not replaced unasked.
    """
    main = importlib.import_module(script).main
    after = {}
    real = common.Run.finish_epoch

    def finish_epoch(run, model, optimizer, row, *args, **kwargs):
        after[run.path.name, row["epoch"]] = common.copy_of_weights(model.net)
        real(run, model, optimizer, row, *args, **kwargs)
    monkeypatch.setattr(common.Run, "finish_epoch", finish_epoch)
    words = [*SHORT, *OWN_RUNS[script], "--precision", "float32", "--keep-epochs"]
    with pytest.raises(common.UsageError, match="--keep-epochs 3: the run has 2 epochs"):
        run_main(main, f"{script}.py", *words, 3)
    (tmp_path / "whole.e2.pt").write_text("somebody's notes")
    with pytest.raises(common.UsageError, match="whole.e2.pt exists: --overwrite replaces it"):
        run_main(main, f"{script}.py", *words, "1,2", "--ckpt", tmp_path / "whole.pt")
    run_main(main, f"{script}.py", *words, "1,2", "--ckpt", tmp_path / "whole.pt", "--overwrite")
    phases = len(after) - 1  # epochs before the second one
    run_interrupted(main, f"{script}.py", [phases + 1], *words, "1,2", "--ckpt",
                    tmp_path / "cut.pt")
    kept = {path.name for path in tmp_path.glob("*.e*.pt")}
    assert kept == {"whole.e1.pt", "whole.e2.pt", "cut.e1.pt", "cut.e2.pt"}
    for epoch in (1, 2):
        for name in ("whole", "cut"):
            saved = torch.load(tmp_path / f"{name}.e{epoch}.pt", weights_only=True)
            assert (saved["best"]["epoch"], len(saved["history"])) == (epoch, epoch)
            assert same(saved["best"]["state_dict"], after["whole.pt", epoch])
            assert same(saved["last"]["state_dict"], after["whole.pt", epoch])
        common.load_model(tmp_path / f"whole.e{epoch}.pt")
    assert not same(after["whole.pt", 1], after["whole.pt", 2])


@pytest.mark.parametrize("script", OWN_RUNS)
@pytest.mark.parametrize("shape, classes, like", [((20, 20), 3, "mnist"),
                                                  ((32, 32, 3), 20, "cifar10")])
def test_launch_on_data_of_ones_own(tmp_path, script, shape, classes, like, capsys):
    """A grey and a coloured NAME.npz train and evaluate. What is missing or wrong is said."""
    own_data(tmp_path, "mine", shape, classes)
    main = importlib.import_module(script).main
    words = ["--dataset", "mine", "--data-dir", tmp_path, "--model", "cnn-small", "--batch-size",
             50, *OWN_RUNS[script], "--ckpt", tmp_path / "run.pt"]
    with pytest.raises(common.UsageError, match="--dataset mine needs --eps"):
        run_main(main, f"{script}.py", *words)
    run_main(main, f"{script}.py", *words, "--eps", "4/255", "--normalize", "dataset")
    out = capsys.readouterr().out
    assert f"mine: the script takes the settings of {like}" in out
    assert "--data-dir" in out.splitlines()[-1] or "--data-dir" in out.splitlines()[-2]
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["num_classes"] == classes and tuple(saved["input_shape"][1:]) == shape[:2]
    assert saved["args"]["val"] in (0, 40) and saved["args"]["eps"] == 4 / 255
    evaluate_main("--ckpt", tmp_path / "run.pt", "--data-dir", tmp_path, "--attacks",
                  "clean,pgd-3", "--eps", "4/255")
    outcomes = json.loads((tmp_path / "run.eval.json").read_text())
    assert [(o["attack"], o["n"]) for o in outcomes] == [("clean", 80), ("pgd-3", 80)]
    assert 0 < outcomes[1]["largest"] <= 4 / 255 + 1e-6
    for name in EPS_FOLLOWERS[script]:
        assert 0 <= saved["args"][name] <= 4 / 255, f"{name} does not follow --eps"


EPS_FOLLOWERS = {
    "sat_rx": ["eps_low", "rfgsm_alpha", "step_size"],
    "atlas": ["step_size"],
    "iaat": ["gamma", "step_size", "eps_min"],
    "dra_finetune": ["eps_end"],
    "teacher_saliency": ["step_size"]}


@pytest.mark.parametrize("dataset", ["cifar100", "tinyimagenet"])
@pytest.mark.parametrize("script", OWN_RUNS)
def test_every_script_has_settings_for_cifar100_and_tinyimagenet(script, dataset, capsys):
    """Settings of the paper, or CIFAR-10's, which the script then says."""
    module = importlib.import_module(script)
    flags = flags_of(module, "--dataset", dataset)
    said = f"{dataset}: the script takes the settings of cifar10" in capsys.readouterr().out
    assert said == (dataset not in module.PAPER)
    like = flags_of(module, "--dataset", "cifar10")
    assert (flags.eps, flags.model, flags.lr) == (like.eps, like.model, like.lr)
    tenth = common.DATASETS[dataset]["images"] // 10
    assert flags.val == min(module.PAPER["cifar10"]["val"], tenth)


def test_classes_are_kept_in_the_checkpoint(tmp_path):
    """--classes 7,0,1: three logits, evaluated on the test images of these classes alone."""
    path = tmp_path / "run.pt"
    train("--method", "nt", "--epochs", 2, "--classes", "7,0,1", "--ckpt", path)
    saved = torch.load(path, weights_only=True)
    assert saved["num_classes"] == 3 and saved["args"]["classes"] == [7, 0, 1]
    evaluate_main("--ckpt", path, "--attacks", "clean", "--limit", 0)
    outcome, = json.loads((tmp_path / "run.eval.json").read_text())
    whole = evaluate.load_test(DIGITS, "data", None, "cpu")
    assert outcome["n"] == sum((whole.labels == c).sum().item() for c in (7, 0, 1))


def test_what_a_resumed_run_may_change(tmp_path, capsys, monkeypatch):
    """A flag that is newer than the run counts as its default. "auto" keeps the run's precision."""
    path = tmp_path / "run.pt"
    words = ["--method", "nt", "--epochs", 1, "--ckpt", path]
    train(*words, "--precision", "float32")
    resume = torch.load(tmp_path / "run.resume.pt", weights_only=True)
    del resume["args"]["tau"]
    del resume["args"]["schedule"]
    resume["source"] += "# another line"
    torch.save(resume, tmp_path / "run.resume.pt")
    monkeypatch.setattr(common, "computes_in_bfloat16", lambda device: True)
    train(*words, "--resume")
    out = capsys.readouterr().out
    assert "is finished" in out
    assert "has changed since this run began" in out
    assert "trains in float32 on CPU" in " ".join(out.split())
    with pytest.raises(common.UsageError, match="schedule was paper, is onecycle"):
        train(*words, "--resume", "--schedule", "onecycle")
    with pytest.raises(common.UsageError, match="begun with --precision float32"):
        train(*words, "--resume", "--precision", "bfloat16")
    with pytest.raises(common.UsageError, match="the schedule depends on --epochs"):
        train(*words, "--resume", "--epochs", 2)


def test_default_names_are_unique_and_underscores_work():
    assert common.default_path("sat_rx", "digits") != common.default_path("sat_rx", "digits")
    args = flags_of(sat_rx, "--dataset=digits", "--batch_size=64", "--weight_decay", "1e-3")
    assert (args.batch_size, args.weight_decay) == (64, 1e-3)


@pytest.mark.parametrize("script", ["sat_rx", "atlas", "iaat", "dra_finetune", "teacher_saliency"])
def test_help_shows_the_values_that_will_be_used(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        run_main(module.main, f"{script}.py", "--dataset", "mnist", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "defaults for --dataset mnist --method" in text
    assert "(lenet+)" in text
    assert "None" not in text
    if script == "dra_finetune":
        assert "the mean change per value (0.1; madry, trades, mart: 0.3)" in text
    else:
        assert "mean change" not in text and "8/255 or 0.031" in text and "(0.3)" in text


def test_help_tells_every_method_and_its_values(capsys):
    """The other methods' values are those of the settings, each with the methods that read it."""
    with pytest.raises(SystemExit):
        run_main(sat_rx.main, "sat_rx.py", "--method", "r3", "--help", "--dataset", "mnist")
    text = " ".join(capsys.readouterr().out.split())
    assert "defaults for --dataset mnist --method r3." in text
    assert "(1; trades: 6; r1: 0.2; r2: 5)" in text
    assert "(0.05; nt, fgsm-at, rfgsm-at, eat, pgd-at, trades, r1, r2: 0.01)" in text
    assert " r2 SAT-R2, eq. 15: FGSM samples, their logits" in text
    losses = {"a": [lambda: mine_loss(), lambda: other_loss()], "long": lambda: no_loss()}
    assert common.method_lines(losses) == "a     First line, then Other\nlong"


def mine_loss():
    """First line.

    Second line.
    """


def other_loss():
    """Other."""


def test_a_run_explains_its_table(tmp_path, capsys):
    """Before it the method, the images and the numbers; after it whose weights are evaluated."""
    path = tmp_path / "run.pt"
    train("--method", "r2", "--epochs", 2, "--eps", "8/255", "--ckpt", path, "--val", 60)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(path) not in line) <= 100
    lines = out.splitlines()
    assert lines[0] == ("sat_rx --method r2 on digits, cnn-small: 100 training and 60 validation "
                        "images")
    assert lines[1] == ("flags: --eps 8/255 --epochs 2 --batch-size 25 --lr 0.02 --lam 5 "
                        "--limit 100 --val 60")
    text = " ".join(out.split())
    assert f"; writes {path}, run.jsonl (this log) and run.resume.pt (for --resume)" in text
    assert "accuracy on the validation images (chance: 10 %); ifgsm-3 (3 steps), fgsm, " in text
    assert "pgd-10 (step 1.6/255): under attack at eps 8/255" in text
    assert "seconds clean % ifgsm-3 % fgsm % pgd-10 % left" in text
    best = torch.load(path, weights_only=True)["best"]["epoch"]
    assert f"the best epoch is {best}, by ifgsm-3 %; evaluate.py takes its weights" in text
    assert ("(--weights last: epoch 2's)" in text) == (best == 1)
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert all("val/pgd" in row for row in rows), "the log keeps the name"


def test_chance_is_named_after_a_first_epoch_near_it(tmp_path, capsys):
    words = ["--method", "nt", "--epochs", 2, "--lr", "1e-9"]
    train(*words, "--ckpt", tmp_path / "a.pt")
    assert capsys.readouterr().out.count("clean % is near chance, 10:") == 1
    train(*words, "--ckpt", tmp_path / "b.pt", "--lr", "0.1", "--limit", "1000")
    assert "near chance" not in capsys.readouterr().out


def test_numbers_as_they_are_shown():
    """What a person would type: exact where that is short, in the unit of the flag."""
    values = {3 * 0.3: "0.9", 8 / 255: "8/255", 1.9 / 255: "1.9/255", 1 / 3: "1/3", 0.3: "0.3",
              2.55 * 2 / 255: "0.02", 1e-5: "1e-05", 2.0: "2", 0.0: "0", 0.1234567: "0.1235"}
    assert [common.shown(value) for value in values] == list(values.values())
    assert common.shown([0.5, 2 / 3]) == "0.5,2/3" and common.shown(7) == 7
    assert all(common.quotient(common.shown(value)) == pytest.approx(value, rel=1e-3)
               for value in values)
    assert common.in_unit_of(6.4 / 255, 8 / 255) == "6.4/255"
    assert common.in_unit_of(0.08, 0.1) == "0.08"
    assert [common.duration(s) for s in (0, 45, 720, 12600)] == ["0 s", "45 s", "12 min", "3.5 h"]
