"""results/report.py: seeds, means, intervals, verdicts, advice, new and missing rows, --check."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

RESULTS = Path(__file__).parent.parent / "results"
sys.path.insert(0, str(RESULTS))
import budget as budget_page
import common
import draw
import evaluate
import report
import runs
import speed

ABOUT = {"sat_rx": {
    "name": "SAT-Rx", "page": "sat_rx.md", "protocol": "sat_rx", "link": "https://example.org",
    "paper": "A paper.", "misses": ["A reason."], "rows": {"mnist": {"SAT-R2": ["new-r2-s*"],
                                                                      "SAT-R1": ["new-r1-s*"]}},
    "claims": [{"text": "R2 is better than FGSM-AT.", "place": "table 1", "tests": [
        {"say": "R2 against FGSM-AT", "method": ["new-r2-s*"], "control": ["new-fgsm-at-s*"],
         "column": ["aa", "pgd-20"], "above": 0}]}]}}
PAPERS = {"sat_rx": {"mnist": {
    "table": "Table 3", "eps": "0.3", "columns": ["clean", "pgd-100"],
    "rows": {"SAT-R2": [98.23, 90.03], "SAT-R1": [98.15, 88.76], "EAT": [99.37, 0.34]}}}}


def outcome(attack, accuracy, n, sha, **more):
    """An outcome as evaluate.py writes it, of one of these four attacks at MNIST's usual eps."""
    kinds = {"clean": (None, None, None, None), "fgsm": (0.3, None, None, None),
             "pgd-20": (0.3, 0.01875, 20, "ball"), "aa": (0.3, None, None, None)}
    eps, step, steps, start = kinds[attack]
    kind = attack.partition("-")[0]
    return dict(dict(attack=attack, kind=kind, eps=eps, step=step, steps=steps, restarts=1,
                     start=start, n=n, dataset="mnist", weights_sha256=sha, key=f"{sha}-{attack}",
                     accuracy=accuracy), **more)


def write(folder, name, method, seed, accuracies, n=1000, script="sat_rx", **args):
    """A JSON like those of evaluate.py --results. accuracies: attack -> share of 1."""
    outcomes = [outcome(attack, accuracy, n, f"sha-{name}") for attack, accuracy
                in accuracies.items()]
    flags = dict(method=method, seed=seed, ckpt=f"runs/{name}.pt", lam=5.0, init=None, **args)
    history = [{"epoch": epoch, "seconds": 60, "val/fgsm": 0.9, "val/pgd-40": 0.9 / epoch}
               for epoch in (1, 2)]
    made = dict(commit="abc", hardware="CPU", command=f"python {script}.py --ckpt runs/{name}.pt")
    facts = dict(script=script, model="lenet+", dataset="mnist", args=flags, best_epoch=1,
                 training=made, training_minutes=2.0 + seed, outcomes=outcomes, history=history,
                 evaluation=dict(made, command=f"python evaluate.py --ckpt runs/{name}.pt"))
    (folder / f"{name}.json").write_text(json.dumps(facts))


@pytest.fixture
def folder(tmp_path):
    """A results folder with three seeds of R2, one FGSM-AT, and a README with markers."""
    for seed, robust in enumerate((0.80, 0.84, 0.88)):
        write(tmp_path, f"new-r2-s{seed}", "r2", seed, {"clean": 0.98, "pgd-20": 0.9,
                                                        "aa": robust})
    write(tmp_path, "new-fgsm-at-s0", "fgsm-at", 0, {"clean": 0.99, "aa": 0.01})
    (tmp_path / "claims.json").write_text(json.dumps(ABOUT))
    (tmp_path / "papers.json").write_text(json.dumps(PAPERS))
    (tmp_path / "front.md").write_text("Hand-written.\n<!-- table: begin -->\n"
                                       "<!-- table: end -->\nMore.\n")
    return tmp_path


def run(folder, *words):
    """report.py's exit status on this folder."""
    return report.main(["--folder", str(folder), "--readme", str(folder / "front.md"), *words])


def group_of(folder, name):
    groups = runs.grouped(runs.load(folder))
    return next(group for group in groups if runs.label(group) == name)


# ------------------------------------------------------------------------------------------ numbers

def test_seeds_are_one_group_and_their_mean_and_deviation_are_right(folder):
    """Of 80, 84 and 88 %: mean 84, deviation 4 with n - 1; minutes 2, 3 and 4: 3 and 1."""
    group = group_of(folder, "new-r2")
    assert [runs.seed(network) for network in group] == [0, 1, 2]
    value = runs.number(group, "aa")
    assert (value.mean, value.deviation, value.seeds, value.n) == pytest.approx((84, 4, 3, 1000))
    assert (value.low, value.high) == pytest.approx([100 * x for x in evaluate.wilson(0.84, 1000)])
    minutes = runs.number(group, "minutes")
    assert (minutes.mean, minutes.deviation, minutes.n) == (3, 1, None)
    assert report.written(value) == "84.0±4.0 (81.6-86.1), n=1,000"


def test_two_seeds_are_shown_as_two_values(folder):
    """Of 80 and 84 % a mean and a deviation would say less than both, of 72.8 and 1 % nothing."""
    (folder / "new-r2-s2.json").unlink()
    value = runs.number(group_of(folder, "new-r2"), "aa")
    assert report.written(value, 1000) == "80.0 / 84.0"
    assert report.written(value) == "80.0 / 84.0, n=1,000"
    figure = draw.methods(runs.grouped(runs.load(folder)))
    line = next(line for line in figure["panels"][0]["lines"] if line["label"].startswith("r2"))
    assert list(line["y"]) == pytest.approx([80, 84]) and "interval" not in line


@pytest.mark.parametrize("change", [dict(lam=1.0), dict(method="r1"), dict(init="runs/a.pt"),
                                    dict(model="cnn-small"), dict(seed=2)])
def test_another_flag_method_network_or_the_same_seed_is_another_group(folder, change):
    write(folder, "new-r2-s9", "r2", 9, {"clean": 0.98, "aa": 0.5})
    assert len(group_of(folder, "new-r2")) == 4
    path = folder / "new-r2-s9.json"
    facts = json.loads(path.read_text())
    place = facts if "model" in change else facts["args"]
    place.update(change)
    path.write_text(json.dumps(facts))
    groups = runs.grouped(runs.load(folder))
    assert sorted(len(group) for group in groups) == [1, 1, 3]


def test_two_files_of_the_same_weights_are_one_network(folder):
    write(folder, "new-r2-s0-common", "r2", 0, {"fgsm": 0.95}, n=500)
    path = folder / "new-r2-s0-common.json"
    path.write_text(path.read_text().replace("sha-new-r2-s0-common", "sha-new-r2-s0"))
    group = group_of(folder, "new-r2")
    assert len(group) == 3 and group[0].names == ["new-r2-s0", "new-r2-s0-common"]
    assert runs.number(group, "fgsm").seeds == 1


@pytest.mark.parametrize("change, found", [
    (dict(attack="cw-20", kind="cw"), "pgd-cw-20"), (dict(attack="un-20", kind="un"), "pgd-cw-20"),
    (dict(step=0.01), "pgd-20@0.01"), (dict(eps=0.1, step=0.00625), "pgd-20:0.1"),
    (dict(surrogate_sha256="x", attack="pgd-20@other"), "pgd-20@surrogate")])
def test_an_attack_is_known_by_its_budget_not_by_its_name(folder, change, found):
    """Older files call the margin attack un or cw, and do not name an unusual step."""
    path = folder / "new-fgsm-at-s0.json"
    facts = json.loads(path.read_text())
    facts["outcomes"].append(outcome("pgd-20", 0.25, 1000, "sha-new-fgsm-at-s0") | change)
    path.write_text(json.dumps(facts))
    group = group_of(folder, "new-fgsm-at")
    assert runs.number(group, found).mean == 25
    assert runs.number(group, "pgd-20") is None


# ----------------------------------------------------------------------------------------- verdicts

def value(mean, deviation=None, low=None, high=None, seeds=1, n=1000):
    return runs.Number(mean, deviation, mean if low is None else low,
                       mean if high is None else high, n, seeds)


def test_the_interval_of_a_difference_is_newcombes_and_welchs():
    """Newcombe 1998, example (a) of his table: 56/70 - 48/80 = 0.2, 0.0524 to 0.3339."""
    sides = []
    for right, n in ((56, 70), (48, 80)):
        low, high = evaluate.wilson(right / n, n)
        sides.append(value(100 * right / n, None, 100 * low, 100 * high))
    assert runs.interval(*sides, 1) == pytest.approx((5.24, 33.39), abs=0.01)
    several = [value(84, 4, seeds=3), value(70, 4, seeds=3)]  # t of 4 degrees: 2.776
    half = 2.776 * math.sqrt(16 / 3 + 16 / 3)
    assert runs.interval(*several, 1) == pytest.approx((14 - half, 14 + half), abs=0.01)
    one = [value(84, 4, seeds=3), value(70)]  # the other's deviation, 2 degrees: 4.303
    half = 4.303 * math.sqrt(16 / 3 + 16)
    assert runs.interval(*one, 1) == pytest.approx((14 - half, 14 + half), abs=0.01)


@pytest.mark.parametrize("above, verdict", [(10, "holds"), (28, "undecided"), (60, "fails")])
def test_the_verdict_asks_for_the_whole_interval(folder, above, verdict):
    """Seeds of 36, 38, 40 % and 10, 6, 8 %: the difference is 30."""
    for seed, (a, b) in enumerate(((0.36, 0.10), (0.38, 0.06), (0.40, 0.08))):
        write(folder, f"a-s{seed}", "r1", seed, {"aa": a}, n=10_000)
        write(folder, f"b-s{seed}", "nt", seed, {"aa": b}, n=10_000)
    groups = runs.grouped(runs.load(folder))
    test = dict(say="", method=["a-s*"], control=["b-s*"], column="aa", above=above)
    assert runs.compare(groups, test).verdict == verdict


def test_verdicts_are_counted_and_one_seed_and_a_missing_side_are_said(folder):
    write(folder, "old", "nt", 0, {"aa": 0.5})
    groups = runs.grouped(runs.load(folder))
    test = dict(say="", method=["old"], control=["new-fgsm-at-s0"], column=["pgd-20", "aa"],
                above=0)
    compared = runs.compare(groups, test)
    assert (compared.verdict, compared.column) == ("holds", "aa")
    assert compared.difference == pytest.approx(49)
    missing = runs.compare(groups, dict(test, control=["nobody-s*"]))
    several = runs.compare(groups, dict(test, control=["new-r2-s*"]))
    assert (missing.verdict, several.verdict) == ("not run", "fails")
    assert report.verdict_words([compared, missing]) == "holds: 1, not run: 1 (one seed)"
    assert report.verdict_words([compared, several]) == "holds: 1, fails: 1"
    assert report.verdict_words([missing]) == "not run: 1"
    assert runs.seeds_of([compared, several, missing]) == [1, 3]


def test_times_of_one_seed_have_no_interval(folder):
    """Minutes: 2 against a fifth of 2 differ by 1.6, from neither images nor seeds."""
    claims = json.loads((folder / "claims.json").read_text())
    claims["sat_rx"]["claims"][0]["tests"] = [dict(
        say="", method=["new-r2-s0"], control=["new-fgsm-at-s0"], column="minutes", times=0.2,
        below=0)]
    for seed in (1, 2):
        (folder / f"new-r2-s{seed}.json").unlink()
    (folder / "claims.json").write_text(json.dumps(claims))
    run(folder)
    assert "| 1.6, no interval | below 0 | fails (one seed) |" in (folder / "sat_rx.md").read_text()


def test_a_curve_is_read_at_the_methods_own_place(folder):
    """Points (50, 90) and (60, 80): at 54 the curve is 86, outside of it there is nothing."""
    write(folder, "c-1", "c1", 0, {"clean": 0.9, "aa": 0.5})
    write(folder, "c-2", "c2", 0, {"clean": 0.8, "aa": 0.6})
    write(folder, "d-1", "d1", 0, {"clean": 0.99, "aa": 0.54})
    write(folder, "d-2", "d2", 0, {"clean": 0.99, "aa": 0.7})
    groups = runs.grouped(runs.load(folder))
    test = dict(say="", method=["d-1"], control=["c-*"], column="clean", curve="aa", above=0)
    assert runs.compare(groups, test).control.mean == pytest.approx(86)
    assert runs.compare(groups, dict(test, method=["d-2"])).verdict == "not run"


# -------------------------------------------------------------------------------------------- files

def test_check_fails_where_a_table_was_altered_by_hand_and_writes_nothing(folder, capsys):
    assert run(folder, "--check") == 1
    assert not (folder / "sat_rx.md").exists()
    assert run(folder) == 0 and run(folder, "--check") == 0
    for name in ("front.md", "sat_rx.md", "README.md"):
        path = folder / name
        whole = path.read_text()
        path.write_text(whole.replace("84.0", "85.0").replace("2.0 minutes", "1.0 minutes"))
        assert path.read_text() != whole
        capsys.readouterr()
        assert run(folder, "--check") == 1
        assert f"{name}: would change" in capsys.readouterr().out
        path.write_text(whole)
    assert run(folder, "--check") == 0
    assert "Hand-written." in (folder / "front.md").read_text()


def test_a_new_json_is_a_new_row_in_table_and_figure_and_a_missing_one_is_not_run(folder):
    run(folder)
    page = (folder / "sat_rx.md").read_text()
    ours = page[page.index("**SAT-R1**"):].splitlines()[1]
    assert ours == "| ours | not run | not run |"
    assert "| above 0 | holds |" in page and "| 83.0 (" in page
    assert "EAT**, paper | 99.37 | 0.34 |" in page
    before = draw.collect(runs.grouped(runs.load(folder)))["methods"]
    write(folder, "new-r1-s0", "r1", 0, {"clean": 0.97, "aa": 0.71})
    assert run(folder, "--check") == 1
    run(folder)
    for name in ("front.md", "sat_rx.md"):
        assert "71.0 (68.1-73.7)" in (folder / name).read_text()
        assert "| r1\\* | lenet+ |" in (folder / name).read_text()
    after = draw.collect(runs.grouped(runs.load(folder)))["methods"]
    assert len(after["panels"][0]["lines"]) == len(before["panels"][0]["lines"]) + 1
    assert (folder / "figures" / "methods.png").exists() and run(folder, "--check") == 0


def test_a_picture_of_other_data_is_stale_and_one_without_data_goes(folder):
    run(folder)
    pictures = folder / "figures"
    shutil.copy(pictures / "methods.png", pictures / "overfitting.png")
    assert run(folder, "--check") == 1
    run(folder)
    assert run(folder, "--check") == 0
    shutil.copy(pictures / "methods.png", pictures / "dra-transfer.png")
    assert run(folder, "--check") == 1
    run(folder)
    assert not (pictures / "dra-transfer.png").exists()


def write_budget_row(folder, name, robust, **more):
    """A row of cifar10.sh: of WRN-16-2, with a batch and a precision that the benchmark has."""
    write(folder, f"cifar10-{name}", name, 0, {"clean": 0.8}, batch_size=128, limit=None, val=1000,
          precision="bfloat16")
    path = folder / f"cifar10-{name}.json"
    facts = dict(json.loads(path.read_text()), dataset="cifar10", model="wrn-16-2", **more)
    facts["args"]["dataset"] = "cifar10"
    facts["outcomes"].append(dict(outcome("aa", robust, 1000, f"sha-cifar10-{name}"), eps=8 / 255))
    path.write_text(json.dumps(facts))


def test_cifar10s_rows_replace_mnists_once_there_are_some(folder):
    """Sorted by AutoAttack, with a page of their own; three are too few for the first page."""
    for name, robust in (("nt", 0.001), ("pgd-at", 0.452), ("r3", 0.443)):
        write_budget_row(folder, name, robust)
    run(folder)
    assert "CIFAR-10" not in (folder / "front.md").read_text()
    assert "CIFAR-10" in (folder / "cifar10.md").read_text()
    write_budget_row(folder, "r2", 0.464, verdict="verdict: sound, no sign of masked gradients: x")
    run(folder)
    text = (folder / "front.md").read_text()
    assert "CIFAR-10, L-infinity, eps 8/255" in text and "84.0" not in text
    robust = re.findall(r"\| ([\d.]+) \(\S+\) \|", text)
    assert robust == ["46.4", "45.2", "44.3", "0.1"]
    assert "| no sign of masked gradients |" in text
    assert "Not run yet: fgsm-at, adv, r1, atlas" in text


def test_a_rows_minutes_are_steps_times_the_benchmarks_step(folder):
    """383 steps an epoch, two epochs: 0.1 s a step make 1.28 minutes, and of PGD-AT's 8 passes
    IAAT's 4 take half."""
    steps = [{"method": "r2", "ms": 100.0, "counted": 12.0},
             {"method": "pgd-at-7", "ms": 400.0, "counted": 24.0}]
    found = {"networks": [{"network": "wrn-16-2", "batch": 128, "precision": "bfloat16",
                           "steps": steps}]}
    write_budget_row(folder, "r2", 0.5)
    facts = json.loads((folder / "cifar10-r2.json").read_text())
    assert speed.minutes(found, facts, None) == pytest.approx(2 * 383 * 0.1 / 60)
    assert speed.minutes(found, dict(facts, model="resnet18"), None) is None
    assert budget_page.passes(facts, found) == 4
    facts["args"]["method"] = "iaat"
    facts["history"] = [{"cost/passes": 3.0}, {"cost/passes": 5.0}]
    assert budget_page.passes(facts, found) == 4
    assert speed.minutes(found, facts, 4) == pytest.approx(2 * 383 * 0.2 / 60)


def change(folder, name, **args):
    """Another value of some flags, in a JSON that is there."""
    path = folder / f"{name}.json"
    facts = json.loads(path.read_text())
    facts["args"].update(args)
    path.write_text(json.dumps(facts))


def table_rows(folder):
    """The main table's rows: method -> its cells."""
    lines = [line for line in (folder / "front.md").read_text().splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[1]: row for row in rows}


def test_a_new_row_replaces_an_older_one_and_an_ablation_does_not(folder):
    """The row is the one that claims.json names first, whatever its epochs, seeds and name."""
    write(folder, "a-r2-ablation", "r2", 0, {"clean": 0.98, "aa": 0.22}, schedule="paper")
    change(folder, "a-r2-ablation", lam=0.0)
    claims = json.loads((folder / "claims.json").read_text())
    claims["sat_rx"]["claims"][0]["tests"] = [
        dict(say="", method=[new], control=["nobody"], column="aa", above=0)
        for new in ("best-r2-s*", "new-r2-s*", "a-r2-*")]
    (folder / "claims.json").write_text(json.dumps(claims))
    run(folder)
    assert "84.0±4.0" in table_rows(folder)["r2\\*"][8]  # of before --schedule: marked
    write(folder, "best-r2-s0", "r2", 0, {"clean": 0.98, "aa": 0.66}, schedule="paper")
    change(folder, "best-r2-s0", lam=7.0)
    run(folder)
    rows = table_rows(folder)
    assert rows["r2"][8].startswith("66.0") and "r2\\*" not in rows
    assert "84.0±4.0" in (folder / "sat_rx.md").read_text()


def test_an_older_row_keeps_its_baseline(folder):
    """A newer FGSM-AT has other settings: the older one stays beside the older R2."""
    claims = json.loads((folder / "claims.json").read_text())
    claims["sat_rx"]["claims"][0]["tests"] = [
        dict(say="", method=["new-r2-s*"], control=[control], column="aa", above=0)
        for control in ("best-fgsm-at-s*", "new-fgsm-at-s*")]
    (folder / "claims.json").write_text(json.dumps(claims))
    write(folder, "best-fgsm-at-s0", "fgsm-at", 0, {"clean": 0.98, "aa": 0.02}, schedule="paper")
    for name, lr in (("best-fgsm-at-s0", 0.05), ("new-fgsm-at-s0", 0.01), ("new-r2-s0", 0.01),
                     ("new-r2-s1", 0.01), ("new-r2-s2", 0.01)):
        change(folder, name, lr=lr)
    run(folder)
    rows = table_rows(folder)
    assert rows["fgsm-at"][5] == "-" and rows["fgsm-at\\*"][5] == rows["r2\\*"][5] == "A"


def test_rows_of_other_settings_are_in_no_set(folder):
    """Those of equal settings share a letter and stand together, the most robust first."""
    write(folder, "new-r1-s0", "r1", 0, {"clean": 0.97, "aa": 0.71})
    write(folder, "new-r3-s0", "r3", 0, {"clean": 0.97, "aa": 0.81})
    for name in ("new-r2-s0", "new-r2-s1", "new-r2-s2", "new-r1-s0", "new-fgsm-at-s0"):
        change(folder, name, lr=0.01)
    change(folder, "new-r3-s0", lr=0.05)
    run(folder)
    rows = table_rows(folder)
    assert {name: (row[4], row[5]) for name, row in rows.items()} == {
        "r2\\*": ("0.01", "A"), "r1\\*": ("0.01", "A"), "fgsm-at\\*": ("0.01", "A"),
        "r3\\*": ("0.05", "-")}
    assert list(rows) == ["r2\\*", "r1\\*", "fgsm-at\\*", "r3\\*"]


def test_advice_is_shown_while_the_networks_support_it(folder):
    (folder / "front.md").write_text("<!-- advice: begin -->\n<!-- advice: end -->\n")
    claims = json.loads((folder / "claims.json").read_text())
    test = dict(claims["sat_rx"]["claims"][0]["tests"][0], above=50)
    claims["sat_rx"]["advice"] = [{"text": "Take R2: {method} %, not {control} %.",
                                   "while": ["holds"], "tests": [test]}]
    (folder / "claims.json").write_text(json.dumps(claims))
    run(folder)
    assert "Take R2: 84.0±4.0 (81.6-86.1), n=1,000 %, not 1.0" in (folder / "front.md").read_text()
    write(folder, "new-fgsm-at-s0", "fgsm-at", 0, {"clean": 0.99, "aa": 0.7})
    run(folder)
    assert "Take R2" not in (folder / "front.md").read_text()


def test_the_index_begins_with_a_table_and_has_every_command_on_record(folder):
    path = folder / "new-fgsm-at-s0.json"
    facts = json.loads(path.read_text())
    facts["outcomes"][0]["command"] = "python evaluate.py --ckpt a.pt --attacks clean"
    path.write_text(json.dumps(facts))
    run(folder)
    index = (folder / "README.md").read_text()
    row = ("| [new-fgsm-at-s0](new-fgsm-at-s0.json) | sat_rx | fgsm-at\\* | lenet+ | mnist | 0 | "
           "99.0 (98.2-99.5), n=1,000 | 1.0 (0.5-1.8), n=1,000 |")
    assert row in index and index.index(row) < index.index("## Commands")
    part = index[index.index("**[new-fgsm-at-s0]"):].partition("\n\n")[0]
    assert part.count("* evaluated at") == 2 and "--ckpt a.pt --attacks clean`" in part


def test_a_page_names_the_network_that_a_run_starts_from(folder):
    """With its command where that is on another page."""
    write(folder, "other", "pgd-at", 0, {"clean": 0.9}, script="iaat")
    write(folder, "from-two", "nt", 0, {"clean": 0.9})
    change(folder, "from-two", init="runs/new-r2-s1.pt", teacher="runs/other.pt",
           source="runs/lost.pt")
    run(folder)
    page = (folder / "sat_rx.md").read_text()
    part = page[page.index("* `from-two`"):].partition("\n* ")[0]
    assert "needs `runs/new-r2-s1.pt`, that of `new-r2-s1`<br>" in part
    assert ("needs `runs/other.pt`, that of `other`, by `python iaat.py --ckpt runs/other.pt`"
            in part)
    assert "needs `runs/lost.pt`, not on record" in part


@pytest.mark.parametrize("column", ["un-50x20", "cw-50x20", "pgd-cw-50x20"])
def test_an_attack_has_one_name_in_all_tables(column):
    assert report.title(column) == "PGD-CW-50x20"


def test_a_verdict_without_signs_does_not_read_as_robust(folder):
    facts = dict(verdict="verdict: sound, no sign of masked gradients in 10 tests", findings=[])
    (folder / "verdict-nt.json").write_text(json.dumps(facts))
    assert ("| no sign of masked gradients in 10 tests (says nothing about robustness) |"
            in report.verdicts(folder))


def test_labels_beside_a_panel_do_not_overlap():
    places = draw.apart([0.5, 0.5, 0.52, 0.01, 0.99], 0.1)
    assert np.diff(np.sort(places)).min() > 0.099
    assert places.min() >= 0 and places.max() <= 1
    assert np.allclose(draw.apart([0.2, 0.8], 0.1), [0.2, 0.8])


# ---------------------------------------------------------------------------------- this repository

def test_the_pages_of_this_repository_are_those_of_its_json(capsys):
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr().out + "run: python results/report.py"


def test_each_number_of_a_page_is_measured_again_by_the_command_beside_it():
    """The commands' attacks, images and start are those of the outcomes, none is missing."""
    for network in runs.load(RESULTS):
        dataset = network.facts["dataset"]
        facts = dict(common.DATASETS[dataset], name=dataset, chosen=None)
        budgets = set()
        for command in report.commands(network):
            args = evaluate.parse(shlex.split(command)[2:])
            start = args.start or "ball"
            for attack in evaluate.parse_attacks(args.attacks, facts, args.eps, start=start):
                budgets.add(budget(attack._asdict(), args.limit or 10_000))
        wanted = {budget(o, o["n"]) for o in network.outcomes
                  if "surrogate_sha256" not in o and "normalised" not in o["attack"]}
        assert budgets == wanted, network.names


def budget(settings, n):
    """What an accuracy depends on, but for the network."""
    numbers = [settings[name] and round(settings[name], 7) for name in ("eps", "step")]
    start = settings["start"] if settings["kind"] in ("pgd", "pgd-cw") else None
    return (settings["kind"], *numbers, settings["steps"], settings["restarts"], start, n)


def test_each_claim_compares_with_known_columns_and_every_page_says_so():
    claims = json.loads((RESULTS / "claims.json").read_text())
    for about in claims.values():
        for claim in about["claims"] + about.get("advice", []):
            assert set(claim.get("while", [])) <= set(runs.VERDICTS)
            for test in claim["tests"]:
                assert {"above", "below"} & set(test), test["say"]
                assert set(test) <= {"say", "method", "control", "column", "control_column",
                                     "above", "below", "times", "curve"}
        assert (RESULTS / about["page"]).read_text().count("Here: **") == len(about["claims"])
