"""README.md: its length, and that its commands are commands."""

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import common
import evaluate
from conftest import flags_of, run_main

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)


def commands():
    """Every `python SCRIPT.py ...` or `torchrun ... SCRIPT.py ...` of the README, as words."""
    found = []
    for line in "".join(BLOCKS).splitlines():
        for part in re.split(r"&&|;", line.partition("  #")[0]):
            match = re.search(r"(?:python|torchrun .*?) (\w+\.py) ?(.*)", part)
            if match and "mine.py" not in part:
                found.append([match[1], *shlex.split(match[2].replace("$seed", "0"))])
    return found


def test_the_page_is_short():
    """At most 1,500 words; the bars of the tables are none."""
    assert len(README.replace("|", " ").split()) <= 1500


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(words, tmp_path, monkeypatch):
    """The flags of each command fit together. What it trains or attacks is not run here."""
    script, *flags = words
    monkeypatch.chdir(tmp_path)
    if script == "evaluate.py":
        args = evaluate.parse(flags)
        facts = common.dataset_facts(args.dataset or "mnist")
        args.p = 1 / 3
        assert evaluate.plan(args, facts, facts["eps"], None, torch.device("cpu"))
        return
    if "mine" in flags:
        (tmp_path / "data").mkdir()
        common.write_beside(tmp_path / "data" / "mine.npz", own_images)
    assert flags_of(importlib.import_module(script.removesuffix(".py")), *flags)


def own_images(file):
    import numpy as np
    images = np.zeros((20, 8, 8, 3), np.uint8)
    np.savez(file, train_images=images, train_labels=np.arange(20) % 2)


def test_there_are_commands_for_every_script():
    named = {words[0] for words in commands()}
    assert {"sat_rx.py", "atlas.py", "evaluate.py"} <= named and len(commands()) >= 12


def test_the_attacks_are_functions():
    """The lines of the README, with a network and images of the test."""
    block, = [text for text in BLOCKS if "common.pgd(model" in text]
    model = common.build_model("cnn-small", common.dataset_facts("digits")).eval()
    names = dict(x=torch.rand(3, 1, 28, 28), y=torch.tensor([0, 1, 2]), model=model)
    lines = [line.strip() for line in block.splitlines() if "load_model" not in line]
    exec("\n".join(lines), names)
    moved = (names["x_adv"] - names["x"]).abs().amax()
    assert 0 < moved <= 8 / 255 + 1e-6


def test_what_a_copy_needs_is_what_the_readme_says():
    """Its added lines are those with which test_runs.py trains a copy of sat_rx.py."""
    import test_runs
    block, = [text for text in BLOCKS if "+def mine_loss" in text]
    added = [line.strip()[1:].strip() for line in block.splitlines()
             if line.strip().startswith("+")]
    tested = [line.strip() for line in (test_runs.NEW_LOSS + test_runs.NEW_LINE).splitlines()]
    assert set(added) <= set(tested)


def test_the_sweep_is_one_that_wandb_can_run(tmp_path, monkeypatch):
    """Its program takes every combination of its parameters, and logs the metric."""
    import yaml
    block, = [text for text in BLOCKS if "method: grid" in text]
    sweep = yaml.safe_load(block)
    script = importlib.import_module(sweep["program"].removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    for choice in choices(sweep["parameters"]):
        given = [f"--{name}={value}" for name, value in choice.items()]  # as its agent gives them
        assert flags_of(script, *given)
    assert set(sweep["metric"]) == {"name", "goal"}
    run_main(script.main, sweep["program"], "--dataset", "digits", "--model", "cnn-small",
             "--epochs", 1, "--limit", 60, "--ckpt", "run.pt")
    row = json.loads((tmp_path / "run.jsonl").read_text())
    assert sweep["metric"]["name"].removeprefix("best/") in row


def choices(parameters):
    """Every combination that a sweep's grid has."""
    values = [entry.get("values", [entry.get("value")]) for entry in parameters.values()]
    return [dict(zip(parameters, chosen)) for chosen in itertools.product(*values)]


def test_papers_are_cited_as_on_the_pages():
    """Each paper's title and link are those of results/claims.json."""
    claims = json.loads((Path(__file__).parent.parent / "results" / "claims.json").read_text())
    text = " ".join(README.split())
    assert len(claims) == 5
    for about in claims.values():
        titles = re.findall(r"\*([^*]+)\*", about["paper"])
        assert titles and all(title.partition(":")[0] in text for title in titles), about["paper"]
        assert f"({about['link']})" in README and f"({about['link']})" in page(about)


def page(about):
    return (Path(__file__).parent.parent / "results" / about["page"]).read_text()
