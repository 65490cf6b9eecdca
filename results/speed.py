"""The page on speed, results/speed.md, and a row's minutes, from results/speed.json.

That file is what `python tests/benchmark.py --json results/speed.json` wrote on an idle machine.
report.py makes the page; tables of CIFAR-10 take their minutes from here, as training times that
were measured beside other work cannot be compared.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from cells import table

NAMES = {"pgd-at": "pgd-at-7", "trades": "trades-7", "finetune": "dra"}  # there -> here
NOTES = """\
* A step is as fast as its bare passes where "of its bare passes" is 1. Where it is below, two
  passes share work. A step also updates the weights. LeNet+ has many for little computation, so
  this is what its short steps cost above their passes. R1 also attacks one image alone in several
  steps, and the saliency script's discriminators are no passes of the network.
* "needs" is what the mathematics of a method asks for, in forward passes; "counted" are the
  operations that were really made, on the same scale.
* ATLAS and the saliency script differentiate a gradient. PyTorch builds the second derivative of
  BatchNorm from many small operations; `common.twice_differentiable` writes it down in one
  function. Forward-mode differentiation would need less memory, but gave wrong gradients with
  BatchNorm in train mode.
* `pgd` and foolbox make the same passes. With frozen weights foolbox is as fast in float32: nothing
  but the passes is left. Our gain is that weights get no gradient, bfloat16, and in an evaluation
  that a broken image is attacked no further.
* IAAT and line search attack only what is classified correctly. Here the network is untrained, so
  their rows are a lower bound."""


def read(folder):
    """The benchmark's JSON, or None."""
    path = folder / "speed.json"
    return json.loads(path.read_text()) if path.exists() else None


def cell(value):
    """Three digits of a number, "-" for nothing."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rows_table(rows):
    """A Markdown table of dictionaries with the same keys."""
    return table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])


def ratio(measured):
    """ATLAS's step in those of one-step ADV, or None."""
    ms = {row["method"]: row["ms"] for row in measured["steps"]}
    return ms["atlas"] / ms["adv"] if {"adv", "atlas"} <= ms.keys() else None


def page(folder):
    """The text of speed.md, or None where nothing was measured."""
    found = read(folder)
    if found is None:
        return None
    command = found["command"].replace("python b", "python tests/b")
    parts = ["# Speed", "Made by `python results/report.py` from [speed.json](speed.json). "
             f"`{command}`, commit {found['commit']}, {found['hardware']}, torch "
             f"{found['versions']['torch']}. Medians of {found['repeats']} repeats; what a table "
             "compares took turns. The machine did nothing else.", NOTES,
             "## PGD beside foolbox", "LeNet+ on digits, 20 steps; equal eps, step and starts; the "
             "weights as a user loads them.", rows_table(found["attacks"]),
             "## The way of a batch to the network", rows_table([found["input"]])]
    for measured in found["networks"]:
        parts += [f"## {measured['network']}, batch {measured['batch']}, {measured['precision']}",
                  rows_table(measured["passes"]), rows_table(measured["steps"])]
        if ratio(measured):
            parts.append(f"A step of ATLAS takes {ratio(measured):.2f} steps of one-step ADV.")
    return "\n\n".join(parts) + "\n"


def step(found, facts, method=None):
    """The benchmark's row of a run's step, or None. facts: of a results file."""
    args = facts["args"]
    method = method or args["method"]
    for measured in found["networks"] if found else []:
        if (measured["network"], measured["batch"], measured["precision"]) == (
                facts["model"], args["batch_size"], args["precision"]):
            rows = {row["method"]: row for row in measured["steps"]}
            return rows.get(NAMES.get(method, method))
    return None


def minutes(found, facts, passes):
    """Training minutes of a run by the benchmark's steps, or None. passes: of a step, or None.

    Without validation and start-up. What the benchmark has no row for, as it depends on the
    images, takes its passes in those of PGD-AT.
    """
    args = facts["args"]
    pgd_at = step(found, facts, "pgd-at")
    if pgd_at is None or args["method"] in ("finetune", "curriculum"):  # steps of several kinds
        return None
    own = step(found, facts)
    if own and args["method"] != "iaat":
        ms = own["ms"]
    elif passes:
        ms = pgd_at["ms"] * passes / (pgd_at["counted"] / 3)
    else:
        return None
    images = args["limit"] or common.DATASETS[args["dataset"]]["images"]
    steps = common.steps_per_epoch(images - args["val"], args["batch_size"])
    return ms * steps * len(facts["history"]) / 60_000
