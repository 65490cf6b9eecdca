"""Every table and figure that is shown, made from results/*.json: no number is typed by hand.

    python results/report.py            # writes what has changed, names each file
    python results/report.py --check    # writes nothing; status 1 and a line for each stale file

It writes README.md's main table and claims between their markers, results/README.md (an index of
all JSON files), a page per paper, and results/figures. Written by hand are papers.json, the rows
that the papers print, and claims.json, what the papers say and which networks tell.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import common
import draw
import evaluate
from runs import (close, compare, concluded, grouped, label, load, main_groups, method, named,
                  number, seed, stage)

COLUMNS_SHOWN = 8  # of a page's table of all rows
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


# ------------------------------------------------------------------------------------------ cells

def written(value, n=None):
    """A Number as a cell: mean +- deviation (interval). n: the column's number of images."""
    if value is None:
        return "not run"
    digits = 2 if (value.n or 0) > 1000 else 1
    text = f"{value.mean:.{digits}f}"
    if value.deviation is not None:
        text += f" ± {value.deviation:.{digits}f}"
    if value.n:
        text += f" ({value.low:.1f}-{value.high:.1f})"
    if value.n and value.n != n:
        text += f", n {value.n:,}"
    return text


def title(column):
    """A column's heading."""
    name, mark, rest = re.fullmatch(r"([^:@]*)(.?)(.*)", column).groups()
    known = {"clean": "clean", "aa": "AutoAttack", "minutes": "minutes", "ms": "ms a batch",
             "corruptions": "corruptions", "rays-40000": "RayS-40000"}
    words = known.get(name) or (name if " " in name else re.sub(r"X(?=\d)", "x", name.upper()))
    return f"{words}, eps {rest}" if mark == ":" else f"{words}{mark}{rest}"


# ----------------------------------------------------------------------------------------- tables

def table(heads, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def links(group, prefix=""):
    """The group's JSON files as links, named by the seed."""
    texts = []
    for network in group:
        for name in network.names:
            which = f"{seed(network)}" if name == network.names[0] else "more"
            texts.append(f"[{which}]({prefix}{name}.json)")
    return " ".join(texts)


def trained_on(group):
    """The network, and the part of the data that it was trained on where it is not all."""
    args = group[0].facts["args"]
    words = [group[0].facts["model"]]
    if args.get("classes"):
        words.append(f"classes {common.shown(args['classes'])}")
    if args.get("limit"):
        words.append(f"{args['limit']:,} images")
    return ", ".join(words)


def common_n(numbers):
    """The number of images that most Numbers of a column have."""
    counts = [value.n for value in numbers if value and value.n]
    return max(sorted(set(counts)), key=counts.count) if counts else None


def numbers_table(groups, columns, first, last):
    """A table of groups: first(group) cells, a cell per column, last(group) cells."""
    values = [[number(group, column) for column in columns] for group in groups]
    ns = [common_n(column) for column in zip(*values)]
    heads = [title(column) + (f", n {n:,}" if n else "") for column, n in zip(columns, ns)]
    rows = [[*first(group), *map(written, row, ns), *last(group)]
            for group, row in zip(groups, values)]
    return heads, rows


def main_table(groups, claims, prefix="results/"):
    """README's table, the most robust method first."""
    dataset, chosen = main_groups(groups)
    chosen = sorted(chosen.values(), key=lambda group: -number(group, "aa").mean)

    def first(group):
        script = group[0].facts["script"]
        name = f"{script}.py"
        if script in claims:
            name = f"[{name}]({prefix}{claims[script]['page']})"
        return [name, method(group[0]), trained_on(group)]

    def last(group):
        return [links(group, prefix)]
    heads, rows = numbers_table(chosen, ["clean", "pgd-20", "aa", "minutes"], first, last)
    eps = common.shown(common.DATASETS[dataset]["eps"])
    text = (f"{NAMES[dataset]}, L-infinity, eps {eps}. Accuracy in % on n test images, ± the "
            "deviation over seeds, in brackets the 95 % interval from the number of images. The "
            "last column names the seeds and links their JSON. This is no ranking: rows differ in "
            "network, images, epochs and learning rate. The pages compare like with like.")
    return text + "\n\n" + table(["script", "method", "network", *heads, "JSON"], rows)


def threshold(test):
    """The difference, in points, that a test asks for."""
    words = [f"{word} {test[word]:g}" for word in ("above", "below") if word in test]
    return " and ".join(words)


def claim_text(claim):
    """A claim with the difference that all its comparisons ask for, where it is not just 0."""
    asked = {threshold(test) for test in claim["tests"]}
    if len(asked) > 1 or asked <= {"above 0", "below 0"}:
        return claim["text"]
    return f"{claim['text'].rstrip('.')} (difference {asked.pop()} points)."


def claims_table(groups, claims, prefix="results/"):
    """README's list: the claims of claims.json that are marked as "front", and their verdicts."""
    rows = []
    for about in claims.values():
        for claim in about["claims"]:
            if claim.get("front"):
                verdict = concluded([compare(groups, test) for test in claim["tests"]])
                rows.append([f"[{about['name']}]({prefix}{about['page']})", claim_text(claim),
                             verdict.replace(" comparisons run", "")])
    return (table(["paper", "claim", "here"], rows) + "\n\nIn brackets: how many of a claim's "
            "comparisons were run. The pages have the numbers and the other claims.")


def verdicts(folder):
    """What `evaluate.py --sanity` says of networks whose state is known (verdict.sh)."""
    rows = []
    for path in sorted(folder.glob("verdict-*.json")):
        facts = json.loads(path.read_text())
        failed = [f"{finding['sign']}: {finding['text']}" for finding in facts["findings"]
                  if finding["passed"] is False]
        rows.append([f"[{path.stem.removeprefix('verdict-')}]({path.name})",
                     facts["verdict"].removeprefix("verdict: ").partition(":")[0],
                     "<br>".join(failed) or "-"])
    return table(["network", "verdict", "signs that were found"], rows) if rows else "not run"


def paper_tables(about, groups, papers):
    """The paper's rows, ours under each, in the paper's columns."""
    parts = []
    for dataset, printed in papers.get(about["protocol"], {}).items():
        ours = about["rows"].get(dataset, {})
        if not any(named(groups, patterns) for patterns in ours.values()):
            parts.append(f"{printed['table']}, {dataset}: not run.")
            continue
        known = evaluate.PROTOCOLS[about["protocol"]].get(dataset, evaluate.PLAN)
        protocol = dict(step=known["step"], start=known["start"])
        parts += [f"{printed['table']}, {dataset}, eps {printed['eps']}:",
                  paper_table(printed, ours, groups, protocol)]
    return "\n\n".join(parts)


def paper_table(printed, ours, groups, protocol):
    """One table: a row of the paper, then ours, where the method is one of this project's.

    protocol: the step and start of its attacks.
    """
    columns = printed["columns"]
    found = {name: named(groups, ours.get(name, [])) for name in printed["rows"]}
    numbers = [[number(group, column, **protocol) for column in columns]
               for chosen in found.values() for group in chosen]
    ns = [common_n(column) for column in zip(*numbers)]
    heads = [title(column) + (f", our n {n:,}" if n else "") for column, n in zip(columns, ns)]
    rows = []
    remaining = iter(numbers)
    for name, values in printed["rows"].items():
        rows.append([f"**{name}**, paper", *["" if v is None else f"{v:g}" for v in values]])
        for group in found[name]:
            head = f"ours, {label(group)} ({trained_on(group)}): {links(group)}"
            rows.append([head, *map(written, next(remaining), ns)])
        if name in ours and not found[name]:
            rows.append(["ours", *["not run"] * len(values)])
    return table(["row", *heads], rows)


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


def own_columns(groups):
    """The white-box attacks that most of these groups share; clean first, AutoAttack last."""
    counts = {}
    for group in groups:
        for column in {name_of(outcome) for network in group for outcome in network.outcomes
                       if "surrogate_sha256" not in outcome}:
            if evaluate.NORMALISED not in column and number(group, column):
                counts[column] = counts.get(column, 0) + 1
    often = sorted(counts, key=lambda column: (column not in ("clean", "aa"), -counts[column],
                                               column))
    return sorted(often[:COLUMNS_SHOWN], key=lambda column: (column != "clean", column == "aa",
                                                             column))


def own_tables(groups):
    """All rows of a script, a table per data set."""
    def first(group):
        epochs = str(len(group[0].facts["history"]))
        return [label(group), method(group[0]), trained_on(group), epochs]
    parts = []
    for dataset in sorted({group[0].facts["dataset"] for group in groups}):
        chosen = [group for group in groups if group[0].facts["dataset"] == dataset]
        heads, rows = numbers_table(chosen, [*own_columns(chosen), "minutes"], first,
                                    lambda group: [links(group)])
        parts += [f"On {dataset}:",
                  table(["row", "method", "network", "epochs", *heads, "seeds"], rows)]
    return "\n\n".join(parts)


def claims_part(about, groups):
    """The paper's claims, the numbers on both sides, the verdict."""
    parts = []
    for claim in about["claims"]:
        compared = [compare(groups, test) for test in claim["tests"]]
        rows = []
        for test, c in zip(claim["tests"], compared):
            by = "" if c.low is None else f"{c.low:.1f} to {c.high:.1f}"
            rows.append([c.say, title(c.column), written(c.method), written(c.control), by,
                         threshold(test), c.verdict])
        parts += [f"**{claim_text(claim)}** ({claim['place']}). Here: **{concluded(compared)}**.",
                  table(["what is compared", "column", "method", "control",
                         "difference, 95 % interval", "holds if", "verdict"], rows)]
        if claim.get("why"):
            parts.append(claim["why"])
    return "\n\n".join(parts)


def commands(network):
    """evaluate.py's commands that measure the numbers again, one for each number of images.

    What needs another network is left out: the JSON has the command that was given.
    """
    facts = network.facts
    usual = common.DATASETS.get(facts["dataset"], facts["args"])["eps"]
    asked = {}
    for outcome in network.outcomes:
        if "surrogate_sha256" in outcome or evaluate.NORMALISED in outcome["attack"]:
            continue
        flags = f"--limit {0 if outcome['n'] == 10_000 else outcome['n']}"
        if outcome["kind"] in ("pgd", "pgd-cw") and outcome.get("start") == "step":
            flags += " --start step"
        names = asked.setdefault(flags, [])
        if name_of(outcome) not in names:
            names.append(name_of(outcome))
    words = facts["training"].get("command", "").split()
    place = words[words.index("--ckpt") + 1] if "--ckpt" in words else "run.pt"
    if stage(network):
        place = f"{place.removesuffix('.pt')}.{stage(network)}.pt"
    return [f"python evaluate.py --ckpt {place} {flags} --eps {common.shown(usual)} "
            f"--attacks {','.join(names)}" for flags, names in asked.items()]


def recipe(network):
    """How a network's numbers come out again, as a list item."""
    facts = network.facts
    lines = [f"* `{network.names[0]}` (seed {seed(network)}, best epoch {facts['best_epoch']} of "
             f"{len(facts['history'])}, {facts.get('training_minutes')} minutes on "
             f"{facts['training'].get('hardware')}), at commit "
             f"{facts['training'].get('commit')}:",
             f"  `{facts['training'].get('command')}`"]
    return "\n".join(lines + [f"  <br>`{command}`" for command in commands(network)])


def page(about, groups, papers, figures):
    """A paper's page."""
    own = [group for group in groups if group[0].facts["script"] == about["script"]]
    recipes = [recipe(network) for group in own for network in group]
    shown = [f"![{figure['alt']}](figures/{name}.png)" for name, figure in figures.items()
             if figure["paper"] == about["script"]]
    parts = [f"# {about['name']}", f"{about['paper']} [The paper]({about['link']}), "
             f"[the script](../{about['script']}.py), [all results](README.md).",
             "Made by `python results/report.py` from the JSON files. Accuracy in %, ± the "
             "standard deviation over seeds, in brackets the 95 % interval from the number of "
             "test images. A claim holds if the whole interval of the difference agrees with "
             "it. With one seed this interval knows nothing of other seeds.",
             "## Claims", claims_part(about, groups), *shown,
             "## The paper's rows and ours", paper_tables(about, groups, papers),
             "## What explains the differences",
             "\n".join(f"* {text}" for text in about["misses"]),
             f"The list \"Differences from the paper\" in [{about['script']}.py]"
             f"(../{about['script']}.py) is complete.",
             "## All rows", own_tables(own) if own else "not run",
             "## How to reproduce each row",
             "The first command trains, at the commit that is named. The others measure, with "
             "today's evaluate.py. Transfer needs the surrogates, too: the JSON has its command.",
             "\n".join(recipes) or "not run"]
    return "\n\n".join(parts) + "\n"


def index(groups, claims, folder):
    """results/README.md: every JSON, its commands, what it shows."""
    lines = ["# Results", "Made by `python results/report.py`. Pages: " + ", ".join(
        f"[{about['name']}]({about['page']})" for about in claims.values()) + ".",
        "`python results/report.py --check` fails where a table and the JSON files disagree.",
        "![All methods, clean accuracy against AutoAttack](figures/methods.png)"]
    for group in sorted(groups, key=lambda group: (group[0].facts["script"], label(group))):
        for network in group:
            for name in network.names:
                facts = json.loads((folder / f"{name}.json").read_text())
                columns = dict.fromkeys(name_of(outcome) for outcome in facts["outcomes"])
                training = facts["training"]
                evaluation = facts["evaluation"]
                weights = f"weights/{name}.pt"
                kept = f" [Weights]({weights})." if (folder / weights).exists() else ""
                lines += [f"**[{name}]({name}.json)**: {facts['script']}, {method(network)}, "
                          f"{facts['model']} on {facts['dataset']}, seed {seed(network)}, "
                          f"{facts.get('training_minutes')} minutes. It shows "
                          f"{', '.join(columns)}.{kept}\n"
                          f"* trained at {training.get('commit')}, {training.get('hardware')}: "
                          f"`{training.get('command')}`\n"
                          f"* evaluated at {evaluation.get('commit')}, "
                          f"{evaluation.get('hardware')}: `{evaluation.get('command')}`"]
    lines += ["## The verdict of `evaluate.py --sanity`", "On networks whose state is known: "
              "[verdict.sh](verdict.sh) has the commands, [verdict_nets.py](verdict_nets.py) "
              "the layers that hide a gradient.", verdicts(folder)]
    return "\n\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ files

def between(text, mark, content):
    """text with what stands between two markers replaced; None where it has no such markers."""
    begin = f"<!-- {mark}: begin -->"
    end = f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        return None
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def readme(path, groups, claims):
    """README's text with its tables renewed; a line for each pair of markers that it lacks."""
    text = path.read_text()
    for mark, make in (("table", main_table), ("claims", claims_table)):
        renewed = between(text, mark, make(groups, claims))
        if renewed is None:
            print(f"{path.name}: no <!-- {mark}: begin --> and end, left as it is")
        text = renewed or text
    return text


def pages(folder, readme_path):
    """({path: text}, {name: figure}) of everything that is shown."""
    claims = json.loads((folder / "claims.json").read_text())
    papers = json.loads((folder / "papers.json").read_text())
    groups = grouped(load(folder))
    drawn = draw.collect(groups)
    texts = {readme_path: readme(readme_path, groups, claims),
             folder / "README.md": index(groups, claims, folder)}
    for script, about in claims.items():
        texts[folder / about["page"]] = page(dict(about, script=script), groups, papers, drawn)
    return texts, drawn


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).parent
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is stale")
    parser.add_argument("--folder", type=Path, default=here, help="of the JSON files")
    parser.add_argument("--readme", type=Path, default=here.parent / "README.md")
    args = parser.parse_args(argv)
    texts, drawn = pages(args.folder, args.readme)
    stale = [path for path, text in texts.items()
             if not path.exists() or path.read_text() != text]
    old = draw.stale(args.folder / "figures", drawn)
    for path in [*stale, *old]:
        print(f"{path.parent.name}/{path.name}: {'would change' if args.check else 'written'}")
    if not args.check:
        for path in stale:
            path.write_text(texts[path])
        for path in old:
            draw.save(path, drawn.get(path.stem))
    return int(args.check and bool(stale or old))


if __name__ == "__main__":
    sys.exit(main())
