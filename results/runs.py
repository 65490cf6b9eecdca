"""What results/*.json say: networks, their seeds, numbers with intervals, and comparisons of them.

Networks are seeds of one method where script, network, data and all flags agree but the seed and
paths. An accuracy of several seeds is their mean; its interval is the 95 % one of Wilson for the
number of test images, which all seeds share. report.py makes tables and figures of this.
"""

import fnmatch
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import evaluate

PATHS = ("ckpt", "init", "teacher", "source", "data_dir")  # flags that differ between seeds ...
MACHINE = ("seed", "resume", "overwrite", "device", "workers", "wandb")  # ... as do these
STAGE = r"\.(teacher|vanilla|align|k\d+)$"  # what a script saves beside its --ckpt
BUDGET_ROWS = 4  # of CIFAR-10 replace MNIST's on the first page
SEED_IN_NAME = r"-s(eed)?\d+(?=\.|$)"
SETTINGS = ("limit", "classes", "val", "augment", "normalize", "epochs", "batch_size", "lr",
            "guide", "weight_decay", "momentum", "precision")  # rows of a set share them
OWN = ("r1", "r2", "r3", "atlas", "iaat", "line-search", "finetune", "dual", "align", "k50",
       "curriculum")  # the papers' methods; others are baselines
VERDICTS = ("holds", "fails", "undecided", "not run")


# ------------------------------------------------------------------------------------ the networks

class Network(NamedTuple):
    """One set of weights. names: its JSON files. facts: the first of them. outcomes: of all."""
    names: list
    facts: dict
    outcomes: list


def outcomes_of(facts):
    """A JSON's outcomes; older ones know aliases as kinds."""
    return [dict(outcome, kind=evaluate.ALIASES.get(outcome["kind"], outcome["kind"]))
            for outcome in facts["outcomes"]]


def alone(folder, name):
    """The network of one JSON, with the outcomes of that file alone."""
    facts = json.loads((folder / f"{name}.json").read_text())
    return Network([name], facts, outcomes_of(facts))


def load(folder):
    """The networks of a folder's *.json, sorted by name; files of the same weights are one.

    Without verdict-*.json: those tell of the verdict, not of a method.
    """
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    files = {name: facts for name, facts in files.items()
             if "outcomes" in facts and not name.startswith("verdict-")}
    found = {}
    for name in sorted(files, key=lambda name: (not name.startswith(files[name]["script"]), name)):
        facts = files[name]
        weights = (facts["script"], facts["outcomes"][0]["weights_sha256"])
        network = found.setdefault(weights, Network([], facts, []))
        network.names.append(name)
        network.outcomes.extend(outcomes_of(facts))
    return sorted(found.values(), key=lambda network: network.names)


def stage(network):
    """teacher, align, k50 ... where the network is not the script's last one; else ""."""
    words = network.facts["evaluation"]["command"].split()
    place = words[words.index("--ckpt") + 1] if "--ckpt" in words else ""
    found = re.search(STAGE, re.sub(r"\.pt$", "", place))
    return found[1] if found else ""


def method(network):
    """The method's name as its flag has it; older runs call the flag otherwise."""
    args = network.facts["args"]
    name = args.get("method") or args.get("strategy") or args.get("loss")
    if args.get("constraint") == "dual":
        name = "dual"
    if name is None or stage(network):
        name = stage(network) or "curriculum"
    return name


def shown_method(network):
    """The method, and the weight that an ablation sets to 0."""
    name = method(network)
    weights = {"atlas": ("alpha", "beta"), "r1": ("lam",), "r2": ("lam",), "r3": ("lam",)}
    off = [flag for flag in weights.get(name, ()) if network.facts["args"].get(flag) == 0]
    words = {"lam": "lambda"}
    return ", ".join([name, *(f"{words.get(flag, flag)} 0" for flag in off)])


def seed(network):
    return network.facts["args"].get("seed", 0)


def older(network):
    """Whether a network is of the time before all scripts shared the flag --schedule."""
    return "schedule" not in network.facts["args"]


def same_settings(a, b):
    """Whether two networks share script, network, data and SETTINGS, as far as both know them."""
    if any(a.facts[what] != b.facts[what] for what in ("script", "model", "dataset")):
        return False
    one = a.facts["args"]
    other = b.facts["args"]
    return all(one[flag] == other[flag] for flag in SETTINGS if flag in one and flag in other)


def same_method(a, b):
    """Whether two networks may be seeds of one method. Flags that only one knows do not count."""
    if any(a.facts[what] != b.facts[what] for what in ("script", "model", "dataset")):
        return False
    one = a.facts["args"]
    other = b.facts["args"]
    if stage(a) != stage(b) or any(bool(one.get(path)) != bool(other.get(path)) for path in PATHS):
        return False
    flags = set(one) & set(other) - {*PATHS, *MACHINE}
    return all(one[flag] == other[flag] for flag in flags)


def grouped(networks):
    """Lists of networks that differ in the seed alone; a seed's second network is a group apart."""
    groups = []
    for network in networks:
        fit = [group for group in groups if same_method(group[0], network)
               and seed(network) not in map(seed, group)]
        if fit:
            fit[0].append(network)
        else:
            groups.append([network])
    return [sorted(group, key=seed) for group in groups]


def label(group):
    """A group's name: its first file's without the seed."""
    return re.sub(SEED_IN_NAME, "", group[0].names[0].removesuffix("-common"))


def epochs(group):
    """How many epochs each seed was trained for."""
    return " / ".join(dict.fromkeys(str(len(network.facts["history"])) for network in group))


def commits(group):
    """The commits that trained the group's networks, short."""
    return dict.fromkeys((network.facts["training"].get("commit") or "?")[:7] for network in group)


# ------------------------------------------------------------------------------------- the numbers

class Number(NamedTuple):
    """A mean over seeds. Accuracies in %, with n images; n None: minutes, ms, validation.

    values: one for each seed, in the order of the seeds.
    """
    mean: float
    deviation: float | None
    low: float
    high: float
    n: int | None
    seeds: int
    values: tuple = ()


@functools.lru_cache(maxsize=None)
def asked(column, dataset, step=None, start="ball"):
    """(Attack, surrogate's label or "") of a column's name, as evaluate.py would run it."""
    head, at, tail = column.rpartition("@")
    surrogate = tail if at and not re.fullmatch(r"[\d./e:-]+", tail) else ""
    facts = dict(common.DATASETS.get(dataset, common.CIFAR10), name=dataset, chosen=None)
    attacks = evaluate.parse_attacks(head if surrogate else column, facts, facts["eps"],
                                     step=step, start=start)
    return attacks[0], surrogate


def close(a, b):
    return a == b or (None not in (a, b) and abs(a - b) < 1e-6)


def is_asked(outcome, attack, surrogate):
    """Whether an outcome is that of this attack: by its budget, whatever its name."""
    made_on = outcome["attack"].rpartition("@")[2] if "surrogate_sha256" in outcome else ""
    same = [outcome[field] == getattr(attack, field) for field in ("kind", "steps", "restarts")]
    same += [close(outcome[field], getattr(attack, field)) for field in ("eps", "step")]
    plain = outcome.get("bn_mode", "eval") == "eval" and not outcome.get("linf")
    units = evaluate.NORMALISED not in outcome["attack"]
    return (all(same) and plain and units
            and (surrogate == made_on or surrogate == "surrogate" and made_on != ""))


def measured(network, column, **protocol):
    """The outcome of a column, of most images; of several surrogates the strongest; or None."""
    attack, surrogate = asked(column, network.facts["dataset"], **protocol)
    found = [outcome for outcome in network.outcomes if is_asked(outcome, attack, surrogate)]
    order = {}
    for outcome in found:
        order[outcome["n"], outcome.get("start") == attack.start, -outcome["accuracy"],
              outcome.get("key", "")] = outcome
    return order[max(order)] if order else None


def from_training(network, column):
    """minutes, ms (of a batch, last epoch), "best ..." and "last ..." of the history; or None."""
    history = network.facts["history"]
    if column == "minutes":
        return network.facts.get("training_minutes")
    if column == "ms":
        return history[-1].get("cost/ms_per_batch")
    which, _, key = column.partition(" ")
    values = [100 * row[key] for row in history if key in row]
    if not values:
        return None
    return max(values) if which == "best" else values[-1]


def number(group, column, **protocol):
    """The Number of a group of seeds, or None where none has been measured."""
    if column in ("minutes", "ms") or column.startswith(("best ", "last ")):
        values = [from_training(network, column) for network in group]
        values = [value for value in values if value is not None]
        n = None
    else:
        outcomes = [measured(network, column, **protocol) for network in group]
        outcomes = [outcome for outcome in outcomes if outcome]
        values = [100 * outcome["accuracy"] for outcome in outcomes]
        n = min((outcome["n"] for outcome in outcomes), default=None)
    if not values:
        return None
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    low = high = mean
    if n:
        low, high = (100 * share for share in evaluate.wilson(mean / 100, n))
    return Number(mean, deviation, low, high, n, len(values), tuple(values))


def common_n(numbers):
    """The number of images that most Numbers of a column have."""
    counts = [value.n for value in numbers if value and value.n]
    return max(sorted(set(counts)), key=counts.count) if counts else None


# ---------------------------------------------------------------------------------------- commands

def name_of(outcome):
    """A column's name for an outcome: aliases resolved, radius and step shown where unusual."""
    name = evaluate.canonical(outcome["attack"])
    facts = common.DATASETS.get(outcome["dataset"], common.CIFAR10)
    if close(outcome["eps"], facts["eps"]) and evaluate.NORMALISED not in name:
        name = re.sub(":[^@]*", "", name)
    kind = evaluate.ALIASES.get(outcome["kind"], outcome["kind"])
    if not evaluate.ATTACKS[kind].step or "surrogate_sha256" in outcome:
        return name
    usual = evaluate.default_step(outcome["eps"], outcome["steps"], None, facts)
    if "@" in name or close(outcome["step"], usual):
        return name
    return f"{name}@{common.shown(outcome['step'])}"


def place_of(network):
    """Where its training command writes it; run.pt where that names no place."""
    words = (network.facts["training"].get("command") or "").split()
    place = words[words.index("--ckpt") + 1] if "--ckpt" in words else "run.pt"
    return f"{place.removesuffix('.pt')}.{stage(network)}.pt" if stage(network) else place


def commands(network):
    """evaluate.py's commands that measure the numbers again, one for each number of images.

    What needs another network is left out: the JSON has the command that was given.
    """
    facts = network.facts
    usual = common.DATASETS.get(facts["dataset"], facts["args"])["eps"]
    wanted = {}
    for outcome in network.outcomes:
        if "surrogate_sha256" in outcome or evaluate.NORMALISED in outcome["attack"]:
            continue
        flags = f"--limit {0 if outcome['n'] == 10_000 else outcome['n']}"
        if outcome["kind"] in ("pgd", "pgd-cw") and outcome.get("start") == "step":
            flags += " --start step"
        names = wanted.setdefault(flags, [])
        if name_of(outcome) not in names:
            names.append(name_of(outcome))
    place = place_of(network)
    return [f"python evaluate.py --ckpt {place} {flags} --eps {common.shown(usual)} "
            f"--attacks {','.join(names)}" for flags, names in wanted.items()]


def trained(groups):
    """{path: network} of all networks, by the path that their training command writes."""
    return {place_of(network): network for group in groups for network in group}


def needs(network, made):
    """{path: network or None}: what the network's training starts from. made: of `trained`."""
    args = network.facts["args"]
    paths = [args[flag] for flag in ("init", "teacher", "source") if args.get(flag)]
    return {path: made.get(path) for path in paths}


# ----------------------------------------------------------------------------------------- claims

class Comparison(NamedTuple):
    """Two sides of a claim. difference: method - times * control, in points, with its interval.

    low equals high where there is no interval. The verdict is one of VERDICTS.
    """
    say: str
    column: str
    method: Number | None
    control: Number | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: str


def named(groups, patterns):
    """The groups that have a JSON whose name fits a pattern, in the patterns' order."""
    found = []
    for pattern in patterns:
        for group in groups:
            names = [name for network in group for name in network.names]
            if fnmatch.filter(names, pattern) and group not in found:
                found.append(group)
    return found


def side(groups, patterns, column):
    """The Number of the first group of these names that has this column, or None."""
    numbers = (number(group, column) for group in named(groups, patterns))
    return next((value for value in numbers if value), None)


def on_curve(groups, test, column, method):
    """The control's Number at the method's place on the curve of several groups, or None.

    test["curve"] names the column that is the curve's abscissa; its own interval is taken along.
    """
    place = side(groups, test["method"], test["curve"])
    points = [(number(group, test["curve"]), number(group, column))
              for group in named(groups, test["control"])]
    points = sorted((x.mean, y.mean) for x, y in points if x and y)
    if not method or not place or not points:
        return None
    if not points[0][0] <= place.mean <= points[-1][0]:
        return None
    xs, ys = zip(*points)
    mean, one, other = (float(np.interp(x, xs, ys)) for x in (place.mean, place.low, place.high))
    return Number(mean, None, min(one, other, mean), max(one, other, mean), None, 1)


def seeds_part(method, control, times):
    """Half the 95 % interval of the difference that the spread over seeds gives; 0: one seed each.

    Welch's where both sides have several seeds. A side with one is given the other's deviation.
    """
    sides = ((method, 1), (control, times))
    several = [side for side, _ in sides if side.seeds > 1]
    if not several:
        return 0.0
    parts = []
    for side, factor in sides:
        spread = side.deviation if side.seeds > 1 else several[0].deviation
        parts.append((factor * spread) ** 2 / side.seeds)
    variance = sum(parts)
    if not variance:
        return 0.0
    freedom = several[0].seeds - 1
    if len(several) == 2:
        freedom = variance ** 2 / sum(part ** 2 / (side.seeds - 1)
                                      for part, (side, _) in zip(parts, sides))
    return float(student.ppf(0.975, freedom)) * math.sqrt(variance)


def interval(method, control, times):
    """(low, high) of method - times * control, in points: 95 %, from the images and the seeds."""
    difference = method.mean - times * control.mean
    seeds = seeds_part(method, control, times)
    below = math.hypot(method.mean - method.low, times * (control.high - control.mean), seeds)
    above = math.hypot(method.high - method.mean, times * (control.mean - control.low), seeds)
    low = difference - below
    high = difference + above
    if method.n:  # accuracies
        low = max(low, -100.0)
        high = min(high, 100.0)
    return low, high


def sides(groups, test, column):
    """(method, control): the Numbers of a test in a column, None what was not run."""
    method = side(groups, test["method"], column)
    if "curve" in test:
        return method, on_curve(groups, test, column, method)
    return method, side(groups, test["control"], test.get("control_column", column))


def compare(groups, test):
    """The Comparison of a claim's test, an entry of results/claims.json.

    method, control: names of JSON files, `*` for seeds; the first group that has the column counts.
    column: what is compared, for the control control_column where it is given. Of a list the first
    that both sides have is taken. The test holds where method - times * control, times 1 unless
    given, is above `above` and below `below` (points) with its whole interval. curve: the column
    by which the control is a curve, read at the method's place.
    """
    columns = test["column"] if isinstance(test["column"], list) else [test["column"]]
    pairs = {column: sides(groups, test, column) for column in columns}
    column = next((column for column in columns if None not in pairs[column]), columns[0])
    method, control = pairs[column]
    if method is None or control is None:
        return Comparison(test["say"], column, method, control, None, None, None, "not run")
    times = test.get("times", 1)
    low, high = interval(method, control, times)
    least = test.get("above", -math.inf)
    most = test.get("below", math.inf)
    verdict = "undecided"
    if low > least and high < most:
        verdict = "holds"
    elif high < least or low > most:
        verdict = "fails"
    difference = method.mean - times * control.mean
    return Comparison(test["say"], column, method, control, difference, low, high, verdict)


def threshold(test):
    """The difference, in points, that a test asks for."""
    words = [f"{word} {test[word]:g}" for word in ("above", "below") if word in test]
    return " and ".join(words)


def claim_text(claim):
    """A claim with the difference that all its comparisons ask for, where it is not just 0."""
    asked = {threshold(test) for test in claim["tests"]}
    if len(asked) > 1 or asked <= {"above 0", "below 0"}:
        return claim["text"]
    return f"{claim['text'].rstrip('.')} ({asked.pop()} points)."


def counted(comparisons):
    """{verdict: how many of the comparisons have it}, of all VERDICTS."""
    found = [comparison.verdict for comparison in comparisons]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def seeds_of(comparisons):
    """The numbers of seeds on either side of the comparisons that were run, sorted."""
    run = [comparison for comparison in comparisons if comparison.verdict != "not run"]
    return sorted({side.seeds for comparison in run
                   for side in (comparison.method, comparison.control)})


def ordered(groups, claims):
    """The groups, those first that the claims name first: a new row stands before an older one.

    Then those of most epochs, then of most seeds, then the one whose training command has the
    fewest words: it is nearest to the defaults.
    """
    patterns = [pattern for about in claims.values() for claim in about["claims"]
                for test in claim["tests"] for pattern in (*test["method"], *test["control"])]
    mentioned = named(groups, dict.fromkeys(patterns))

    def rank(group):
        facts = group[0].facts
        words = len((facts["training"].get("command") or "").split())
        place = mentioned.index(group) if group in mentioned else len(mentioned)
        return place, -len(facts["history"]), -len(group), words
    return sorted(groups, key=rank)


def best_known(groups, named_by=method):
    """{(script, method): the first of its groups}, sorted by name. See `ordered`."""
    best = {}
    for group in groups:
        best.setdefault((group[0].facts["script"], named_by(group[0])), group)
    return {key: best[key] for key in sorted(best)}


def main_groups(groups):
    """(data set, groups) of the main table: networks with AutoAttack's number.

    The groups are `ordered`. The rows of one budget on CIFAR-10 where there are BUDGET_ROWS, else
    MNIST's: the first group of each method, and the baselines of those that are an older run of a
    paper's own method, of equal settings.
    """
    for dataset, pattern in (("cifar10", "cifar10-*"), ("mnist", "*")):
        found = [group for group in named(groups, [pattern])
                 if group[0].facts["dataset"] == dataset and number(group, "aa")]
        if len(found) >= BUDGET_ROWS:
            break
    chosen = list(best_known(found, shown_method).values())
    own = [group[0] for group in chosen if older(group[0]) and method(group[0]) in OWN]
    return dataset, chosen + [group for group in found if group not in chosen
                              and method(group[0]) not in OWN
                              and any(same_settings(group[0], other) for other in own)]


def sets(groups):
    """Lists of groups that share all settings, the most robust list and group first."""
    found = []
    for group in sorted(groups, key=lambda group: -number(group, "aa").mean):
        same = [members for members in found if same_settings(members[0][0], group[0])]
        if same:
            same[0].append(group)
        else:
            found.append([group])
    return found
