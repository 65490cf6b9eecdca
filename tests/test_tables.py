"""The commands of the papers' tables (results/papers.json) are commands, and tell what was run."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RESULTS = Path(__file__).parent.parent / "results"
sys.path.insert(0, str(RESULTS))
import common
import evaluate
import report
import tables
from conftest import flags_of, run_main
from test_data_models import three_classes, tiny_imagenet
from test_evaluate import imagenet_c
from test_report import write
from runs import grouped, load

PAPERS = json.loads((RESULTS / "papers.json").read_text())
LISTS = PAPERS["commands"]
TABLES = {"sat_rx": 9, "atlas": 5, "iaat": 12, "dra": 7, "saliency": 14}  # of each paper
FIGURES = {"sat_rx": 10, "atlas": 17, "iaat": 9, "dra": 5, "saliency": 9}
ROMAN = "I II III IV V VI VII".split()
SMALL = ["--precision", "float32", "--wandb", "disabled"]
# What bash calls instead: each prints its words, a line for each call.
SHELL = r"""set -eu
python() { printf '%s\t' "$@"; echo; }
torchrun() { shift 2; python "$@"; }
"""


def calls(lines):
    """Every call of python or torchrun in lines of bash, loops unrolled, as lists of words."""
    done = subprocess.run(["bash", "-c", SHELL + "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.split("\t")[:-1] for line in done.stdout.splitlines()]


def calls_of(protocol, name=None):
    """Those of a paper, or of one of its tables."""
    return calls([command for entry in LISTS[protocol] if name in (None, entry["table"])
                  for command in entry.get("commands", [])])


def written(script, args):
    """The checkpoints that a training run leaves."""
    names = [""] + [f".e{epoch}" for epoch in args.keep_epochs or ()]
    if script == "dra_finetune.py" and args.has_first_phase and not args.init:
        names.append(".vanilla")
    if script == "teacher_saliency.py":
        if not args.teacher or f"sal-{args.dataset}." not in args.teacher:  # of other data
            names.append(".teacher")
        if args.align_epochs:
            names.append(".align")
        if args.method == "curriculum":
            names += [f".k{k}" for k in args.ks]
    stem = args.ckpt.removesuffix(".pt")
    return [f"{stem}{name}.pt" for name in names]


def trained(words):
    """(flags, what they write) of a training call; UsageError where they do not fit."""
    script, *flags = words
    args = flags_of(importlib.import_module(script.removesuffix(".py")), *flags)
    return args, written(script, args)


def evaluated(flags, datasets):
    """The flags of an evaluation, whose attacks fit the data set of the network.

    datasets: checkpoint -> its data set.
    """
    args = evaluate.parse(flags)
    facts = dict(common.dataset_facts(datasets[args.ckpt]), chosen=None)
    args.p = 1 / 3
    assert evaluate.plan(args, facts, facts["eps"], None, torch.device("cuda"))
    return args


@pytest.mark.parametrize("protocol", LISTS)
def test_every_command_is_understood(protocol, tmp_path, monkeypatch):
    """Flags fit together; a network that is read is one that a command of the paper trains.

    No two commands train to the same file. What they train or attack is not run here.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    datasets = {}
    reads = set()
    found = calls_of(protocol)
    for words in found:
        if words[0] != "evaluate.py":
            args, files = trained(words)
            reads |= {args.init, vars(args).get("teacher"), *vars(args).get("source", [])}
            assert not datasets.keys() & set(files), words
            datasets.update(dict.fromkeys(files, args.dataset))
    assert reads - {None} <= datasets.keys()
    for words in found:
        if words[0] == "evaluate.py":
            args = evaluated(words[1:], datasets)
            assert {datasets[path] for path in args.surrogate} <= {datasets[args.ckpt]}
    assert len(datasets) > 20


@pytest.mark.parametrize("line", [
    "python iaat.py --gama 0.0075", "python iaat.py --method pgd-at --gamma 0.0075",
    "python dra_finetune.py --p 1/0", "for net in nothing; do python atlas.py --modle $net; done",
    "python teacher_saliency.py --align-epochs 0 --ckpt a.pt"])
def test_a_wrong_command_is_found(line):
    with pytest.raises(common.UsageError):
        trained(*calls([line]))


def numbers_in(name):
    """The numbers that "Table 3", "Figs. 1 to 5" or "Figs. 6, 8 and 10" name."""
    if name.startswith("Table "):
        number = name.removeprefix("Table ")
        return [ROMAN.index(number) + 1 if number in ROMAN else int(number)]
    found = [int(number) for number in re.findall(r"\d+", name)]
    return list(range(found[0], found[1] + 1)) if " to " in name else found


@pytest.mark.parametrize("protocol", LISTS)
def test_every_table_and_figure_is_listed_once(protocol):
    for kind, counts in (("Table", TABLES), ("Fig", FIGURES)):
        listed = [entry["table"] for entry in LISTS[protocol] if entry["table"].startswith(kind)]
        numbers = [number for name in listed for number in numbers_in(name)]
        assert sorted(numbers) == list(range(1, counts[protocol] + 1))
    for entry in LISTS[protocol]:
        assert ("commands" in entry) != ("none" in entry), entry["table"]
        commands = json.dumps(entry.get("commands", ["--plots"]))
        assert "|" not in commands, "it would end a cell"
        if entry["table"].startswith("Fig"):
            assert "--plots" in commands or "draws" in entry["note"]


@pytest.mark.parametrize("protocol", LISTS)
def test_what_tells_of_a_run_is_there(protocol):
    """Data sets and rows of an entry, rows of "ours", pictures that are named."""
    for entry in LISTS[protocol]:
        for dataset in entry.get("data", []):
            printed = tables.printed_table(entry, PAPERS[protocol][dataset])
            assert any(re.match(entry.get("rows", ""), row) for row in printed["rows"])
            assert set(entry.get("columns", [])) <= set(printed["columns"])
            number = entry["table"].split()[-1]
            assert number in re.split("[ ,]+", printed["table"]) or " to " in printed["table"]
        for picture in re.findall(r"\((figures/.*?)\)", entry.get("ran", "")):
            assert (RESULTS / picture).exists()


def test_each_printed_table_is_whole():
    """A number for each column, and rows of "ours" that are rows."""
    for protocol in LISTS:
        for main in PAPERS[protocol].values():
            for table in [main, *main.get("more", [])]:
                assert {len(row) for row in table["rows"].values()} == {len(table["columns"])}
                assert table.get("ours", {}).keys() <= table["rows"].keys()


# --------------------------------------------------------------------------------- what was run

@pytest.mark.parametrize("changes, said", [
    ({}, "run on mnist: SAT-R2"), (dict(limit=100), "smaller on mnist: SAT-R2"),
    (dict(epochs=5), "smaller on mnist: SAT-R2"), (dict(model="cnn-small"), "smaller on mnist"),
    (dict(epochs=5, schedule_epochs=20), "run on mnist: SAT-R2"),
    (dict(dataset="digits"), "not run")])
def test_a_network_makes_its_row_run(tmp_path, changes, said):
    """If it is of the table's data; "smaller" where its flags or network are not the paper's."""
    args = dict(epochs=20, attack_steps=40) | changes
    places = {name: args.pop(name) for name in ("model", "dataset") if name in args}
    write(tmp_path, "r2-s0", "r2", 0, {"clean": 0.98}, **args)
    facts = json.loads((tmp_path / "r2-s0.json").read_text()) | places
    facts["outcomes"][0].update({key: value for key, value in places.items() if key == "dataset"})
    (tmp_path / "r2-s0.json").write_text(json.dumps(facts))
    about = dict(script="sat_rx", protocol="sat_rx", rows={"mnist": {"SAT-R2": ["r2-s*"]}})
    entry, = [entry for entry in LISTS["sat_rx"] if entry["table"] == "Table 3"]
    assert tables.what_was_run(entry, about, grouped(load(tmp_path)), PAPERS).startswith(said)
    far = dict(entry, columns=["rays-40000"])
    assert tables.what_was_run(far, about, grouped(load(tmp_path)), PAPERS) == "not run"


def test_other_tables_are_on_the_page_where_a_network_was_attacked(tmp_path):
    """Table 7 has a row of the network, also under its other name; table 9 was not attacked."""
    about = dict(protocol="sat_rx", rows={"mnist": {"SAT-R2": ["r2-s*"]}})
    main = dict(PAPERS["sat_rx"]["mnist"])
    other, = [table for table in main["more"] if table["table"] == "Table 7"]
    main["more"] = [dict(other, ours={"Ablation-R2-1": ["r2-1-s*"]})
                    if table is other else table for table in main["more"]]
    write(tmp_path, "r2-s0", "r2", 0, {"clean": 0.98}, ce_all=False)
    write(tmp_path, "r2-1-s0", "r2", 0, {"clean": 0.97}, ce_all=True)
    papers = {"sat_rx": {"mnist": main}}
    page = report.paper_tables(about, grouped(load(tmp_path)), papers)
    assert "Table 3, mnist" in page and "Table 7" not in page
    write(tmp_path, "r2-1-s0", "r2", 0, {"clean": 0.97, "fgsm": 0.75}, ce_all=True)
    page = report.paper_tables(about, grouped(load(tmp_path)), papers)
    shown = page[page.index("Table 7"):]
    ablation = shown[shown.index("**Ablation-R2-1**, paper | 95.39 |"):].splitlines()[1]
    assert "| 75.0 (72.2-77.6) |" in ablation and "ours: r2\\*, lenet+" in shown
    assert "Table 9" not in page and "Table 6" not in page


# ----------------------------------------------------------------------------------- they start

def start(words, *changes):
    """Run a call here, with flags that make it short."""
    script, *flags = words
    module = importlib.import_module(script.removesuffix(".py"))
    run_main(module.main, script, *flags, *SMALL, *changes)


def outcomes(path):
    return {outcome["attack"]: outcome for outcome in json.loads(Path(path).read_text())}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with data/ and runs/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "data").mkdir()
    return tmp_path


def test_tinyimagenet_and_its_teacher_start(folder, three_classes, capsys):
    """Saliency, tables 10, 3 and 8: training on TinyImageNet's folder; its teacher for a student of
    CIFAR-10; phase 2 that begins with the teacher.
    """
    tiny_imagenet(folder / "data")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 20), ("test", 10)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 10
    np.savez(folder / "data" / "cifar10.npz", **arrays)
    short = ["--model", "wrn-10-1", "--batch-size", 10, "--teacher-epochs", 1, "--val", 2]
    both = [*short, "--align-epochs", 1, "--ks", 50, "--k-epochs", 1]
    train, look = calls_of("saliency", "Table 10")
    start(train, *both, "--attack-steps", 1)
    start(look)
    assert outcomes("runs/sal-tinyimagenet.eval.json").keys() == {"clean", "pgd-20"}
    assert "Table 10 of the paper (saliency, tinyimagenet" in capsys.readouterr().out
    train, look = calls_of("saliency", "Table 3")
    start(train, *both)
    start(look, "--limit", 4)
    teacher = torch.load("runs/sal-cifar10-teacher-a.teacher.pt", weights_only=True)
    assert (teacher["dataset"], teacher["num_classes"]) == ("cifar10", 10)
    assert "More of the paper on cifar10: Table 3, Table 5" in capsys.readouterr().out
    (folder / "runs" / "sal-cifar10-teacher-a.teacher.pt").rename("runs/sal-cifar10.teacher.pt")
    train, look = calls_of("saliency", "Table 8")
    start(train, *short[:4], "--val", 2, "--ks", 50, "--k-epochs", 1)
    run = torch.load("runs/sal-cifar10-from-at.pt", weights_only=True)
    assert len(run["history"]) == 1


def image_folders(folder):
    """data/imagenet/train and val of three classes, and ImageNet-C, 32 x 32."""
    imagenet_c(folder / "data")
    root = folder / "data" / "imagenet"
    for place in sorted((root / "val").iterdir()):
        (root / "train").mkdir(exist_ok=True)
        (root / "train" / place.name).symlink_to(place)


def test_the_tables_of_imagenet_start(folder, monkeypatch, capsys):
    """SAT-Rx, table 5, and IAAT, table 4: folders of images, two surrogates, ImageNet-C."""
    for name in ("imagenet", "imagenet100"):
        for key, value in dict(classes=3, shape=(3, 32, 32), images=9).items():
            monkeypatch.setitem(common.DATASETS[name], key, value)
    image_folders(folder)
    short = ["--epochs", 1, "--val", 0, "--workers", 0, "--batch-size", 9]
    found = calls_of("sat_rx", "Table 5")
    for name, model in (("vgg13", "cnn-small"), ("resnet50", "wrn-10-1"), ("r3", "cnn-small")):
        path = f"runs/sat-imagenet100-{name}.pt"
        train, *look = [words for words in found if words[words.index("--ckpt") + 1] == path]
        start(train, *short, "--model", model)
    start(look[0], "--workers", 0)
    measured = outcomes("runs/sat-imagenet100-r3.eval.json")
    assert {"fgsm@cnn-small", "mi-fgsm-20@wrn-10-1", "pgd-cw-20"} <= measured.keys()
    train, look = [words for words in calls_of("iaat", "Table 4")
                   if "runs/iaat-imagenet-resnet50-iaat.pt" in words]
    start(train, *short, "--model", "cnn-small", "--warmup", 0, "--attack-steps", 1)
    start(look, "--workers", 0, "--limit", 3)
    measured = outcomes("runs/iaat-imagenet-resnet50-iaat.eval.json")
    assert {"targeted-1000:4/255", "corruptions"} <= measured.keys()
    assert 0 < measured["corruptions"]["mce"] < 5
    assert "Table 4 of the paper (iaat, imagenet" in capsys.readouterr().out
