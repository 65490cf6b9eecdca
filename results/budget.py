"""Five methods on CIFAR-10 under one budget: README's table and results/cifar10.md.

cifar10.sh has the commands, results/cifar10-NAME.json the outcomes, speed.json the time of a step.
    python results/budget.py OUT    # cifar10-lr.json, of OUT/cifar10-lr-*.jsonl
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import speed
from cells import numbers_table, table, verdict_of
from runs import method, named, number

ROWS = ("nt", "fgsm-at", "adv", "pgd-at", "r1", "r2", "r3", "atlas", "iaat", "dra", "align",
        "saliency")  # of cifar10.sh
LR = ("0.1", "0.2", "0.3")
BUDGET = """\
The budget is the same for all: 49,000 training images, 1,000 for validation, WRN-16-2, images in
[0, 1], eps 8/255, 10 epochs, batch 128, SGD with momentum 0.9 and weight decay 5e-4, a one-cycle
learning rate with the same peak, random crops and flips, bfloat16, seed 0, the last epoch's
weights, attacks of 7 steps of 2/255. What is the method's own is the paper's."""
DEVIATIONS = """\
* The papers train for 30 to 200 epochs, on wider networks, and choose the best epoch. These
  numbers are not to be compared with theirs, and say nothing about long training.
* ATLAS's eps grows for 2 epochs, not 15. IAAT's warm-up is 1 epoch, not 5.
* DRA has 5 clean epochs and 5 of fine-tuning, the last one clean.
* The saliency student's teacher is the PGD-AT row; its training is not in the student's minutes.
  `align` is phase 1 alone, `saliency` has 8 epochs of phase 1 and 2 of phase 2.
* Weights are rounded to float16, as they are kept in [weights](weights), and judged as they are.
* One seed: an interval tells of the test images, not of other seeds."""


def rows(groups):
    """{NAME: group} of the rows that are there, in the order of ROWS."""
    found = {name: named(groups, [f"cifar10-{name}"]) for name in ROWS}
    return {name: chosen[0] for name, chosen in found.items() if chosen}


def passes(facts, found):
    """Forward-backward passes of a step: counted in training, else by the benchmark; or None."""
    logged = [row["cost/passes"] for row in facts["history"] if "cost/passes" in row]
    if logged:
        return sum(logged) / len(logged)
    step = speed.step(found, facts)
    return step["counted"] / 3 if step else None


def budget_table(groups, claims, folder, prefix=""):
    """The table of all rows, the most robust first. prefix: of links to the folder."""
    found = speed.read(folder)
    chosen = sorted(rows(groups).items(),
                    key=lambda item: -(number(item[1], "aa") or number(item[1], "clean")).mean)
    names = {id(group): name for name, group in chosen}

    def first(group):
        script = group[0].facts["script"]
        return [f"{method(group[0])}", f"[{script}]({prefix}{claims[script]['page']})"]

    def last(group):
        facts = group[0].facts
        name = f"cifar10-{names[id(group)]}"
        files = f"[JSON]({prefix}{name}.json)"
        if (folder / "weights" / f"{name}.pt").exists():
            files += f", [weights]({prefix}weights/{name}.pt)"
        cost = passes(facts, found)
        minutes = speed.minutes(found, facts, cost)
        return [verdict_of(facts), f"{cost:.3g}" if cost else "-",
                f"{minutes:.0f}" if minutes else "-", files]
    heads, cells = numbers_table([group for _, group in chosen],
                                 ["clean", "fgsm", "pgd-20", "pgd-100", "aa"], first, last,
                                 lambda column: column == "aa")
    heads = ["method", "script", *heads, "masked gradients?", "passes a step", "minutes", "files"]
    above = ("CIFAR-10, L-infinity, eps 8/255, accuracy in %, in brackets the 95 % interval from n "
             f"images. WRN-16-2 ({parameters():.2g} million weights), 10 epochs, one seed: "
             f"[the budget]({prefix}cifar10.md). passes: forward and backward through the "
             "network. minutes: steps times the benchmark's time of a step.")
    missing = [name for name in ROWS if name not in names.values()]
    text = f"{above}\n\n{table(heads, cells)}"
    return text + (f"\n\nNot run yet: {', '.join(missing)}." if missing else "")


def parameters():
    """WRN-16-2's weights, in millions."""
    model = common.build_model("wrn-16-2", common.dataset_facts("cifar10"))
    return sum(p.numel() for p in model.parameters()) / 1e6


def search(folder):
    """The table of the search for the learning rate, or None. See `write_search`."""
    path = folder / "cifar10-lr.json"
    if not path.exists():
        return None
    logged = json.loads(path.read_text())
    cells = [[lr, *(f"{100 * logged[lr][column]:.1f}" for column in ("val/clean", "val/pgd"))]
             for lr in LR if lr in logged]
    return table(["peak learning rate", "clean", "PGD-7"], cells)


def write_search(out, folder):
    """cifar10-lr.json: the last line of each run's log, {"0.1": {...}, ...}."""
    logs = {lr: out / f"cifar10-lr-{lr}.jsonl" for lr in LR}
    last = {lr: json.loads(path.read_text().splitlines()[-1]) for lr, path in logs.items()
            if path.exists()}
    (folder / "cifar10-lr.json").write_text(json.dumps(last, indent=1) + "\n")


def page(groups, claims, folder):
    """The text of cifar10.md, or None where no row is there."""
    if not rows(groups):
        return None
    parts = ["# Five methods on CIFAR-10, one budget", "Made by `python results/report.py`. "
             "[cifar10.sh](cifar10.sh) has every command. `python evaluate.py --ckpt "
             "results/weights/NAME.pt --protocol table` measures a row again.",
             budget_table(groups, claims, folder), "## The budget", BUDGET,
             "## What differs", DEVIATIONS]
    found = search(folder)
    if found:
        parts += ["## The learning rate", "PGD-AT for 3 epochs, 1,000 validation images. Decided "
                  "before: 0.2, unless another rate wins by more than its 95 % interval, which "
                  "is about 3 points.", found]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_search(Path(sys.argv[1]), Path(__file__).parent)
