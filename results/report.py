"""Every table and figure that is shown, made from results/*.json: no number is typed by hand.

    python results/report.py            # writes what has changed, names each file
    python results/report.py --check    # writes nothing; status 1 and a line for each stale file

It writes README.md's advice, main table and claims between their markers, results/README.md (an
index of all JSON files), a page per paper, and results/figures. Written by hand are papers.json,
the rows that the papers print, and claims.json: what the papers say, which networks tell, and the
sentences of advice, which are shown while the networks that they name support them.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import budget
import common
import draw
import evaluate
import speed
import tables
from cells import (SEEDS, links, name_with_mark, named_once, numbers_table, table, title,
                   trained_on, verdict_of, written)
from runs import (VERDICTS, alone, asked, claim_text, commands, commits, common_n, compare, counted,
                  epochs, grouped, label, load, main_groups, method, name_of, named, needs, number,
                  older, ordered, seed, seeds_of, sets, threshold, trained)

COUNTS = ("A comparison holds where the whole 95 % interval of its difference agrees with the "
          "claim, and fails where none of it does. One seed tells nothing of other seeds.")
PAGE = ("PGD-CW is PGD on the margin between two logits: the papers' C&W, `un` and `cw` in older "
        "commands. Behind @ stands PGD's step where it is not evaluate.py's own. \\*: an older "
        "run. [Names](README.md#names). Minutes come from unlike machines and loads. Intervals of "
        "differences are Newcombe's for two independent samples, though the images are the same. "
        "Differences in time, and those within a log, have none: their sign decides.")
COLUMNS_SHOWN = 8  # of a page's table of all rows
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
WORDS = {  # of results/README.md
    "`teacher`": "the network that teacher_saliency.py trains first, by PGD-AT. `align`: its "
                 "student after phase 1. `k50`: the student after phase 2, whose last k is 50 %.",
    "`r1` `r2` `r3`": "the three regularisers of SAT-Rx. In a file's name `r1-1` is `r1` with "
                      "lambda 0 (the paper's ablation), `r1-10` has 10 steps of IFGSM.",
    "`lenet+`": "SAT-Rx's CNN for MNIST, two convolutional and two linear layers. `cnn-small`: "
                "the same with fewer and strided convolutions. `wrn-28-10`: WideResNet, depth 28, "
                "width 10.",
    "IFGSM-3": "FGSM in 3 steps. PGD-100x5: PGD, 100 steps, 5 random starts. PGD-CW: PGD on the "
               "margin between two logits. MULTI: PGD towards each wrong class. `@` a step size.",
    "older run": "a run from before all scripts shared one set of flags. Its JSON names the "
                 "commit. Tables mark it with \\*.",
    "`half.pt`": "the run's weights rounded to float16, as in [weights](weights). A row whose "
                 "evaluation names it was measured on it.",
}


# ----------------------------------------------------------------------------------------- tables

def set_letters(members):
    """{a group's label: the letter of its set, "-" where it is alone}. members: lists of groups."""
    letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    found = {}
    for alike in members:
        one = next(letters) if len(alike) > 1 else "-"
        found.update({label(group): one for group in alike})
    return found


def main_table(groups, claims, folder, prefix="results/"):
    """README's table: script by script, rows that share all settings together, under a letter.

    Where CIFAR-10 has enough rows under one budget, their table.
    """
    dataset, chosen = main_groups(groups)
    if dataset == "cifar10":
        return budget.budget_table(groups, claims, folder, prefix)
    members = []
    for script in dict.fromkeys([*claims, *(group[0].facts["script"] for group in chosen)]):
        members += sets([group for group in chosen if group[0].facts["script"] == script])
    letter = set_letters(members)

    def first(group):
        script = group[0].facts["script"]
        name = f"[{script}]({prefix}{claims[script]['page']})" if script in claims else script
        lr = group[0].facts["args"].get("lr")
        return [name, name_with_mark(group), trained_on(group), epochs(group), f"{lr}",
                letter[label(group)]]

    def last(group):
        return [links(group, prefix)]
    heads, rows = numbers_table(sum(members, []), ["clean", "pgd-20", "aa", "minutes"], first, last,
                                lambda column: column == "aa")
    scripts = {group[0].facts["script"] for group in chosen}
    without = [f"{script}.py" for script in claims if script not in scripts]
    eps = common.DATASETS[dataset]["eps"]
    above = (f"{NAMES[dataset]}, L-infinity, eps {common.shown(eps)}, accuracy in %. Compare rows "
             "of one set: same network, images, limit of epochs, lr, batch size, precision (-: "
             "alone).")
    below = (f"{SEEDS} PGD-20's step: {common.shown(asked('pgd-20', dataset)[0].step)}. Minutes "
             "are of unlike machines.")
    if any(older(group[0]) for group in chosen):
        below += " \\*: older run."
    if without:
        below += f" Of {', '.join(without)} no row has AutoAttack yet."
    heads = ["script", "method", "network", "epochs", "lr", "set", *heads, "JSON"]
    return "\n\n".join([above, table(heads, named_once(rows)), below])


def claims_table(groups, claims, prefix="results/"):
    """README's list: the claims of claims.json that are marked as "front", and their verdicts.

    Those of which nothing was run are counted alone: the pages name them.
    """
    rows = []
    waiting = 0
    others = 0
    for about in claims.values():
        for claim in about["claims"]:
            compared = [compare(groups, test) for test in claim["tests"]]
            if not seeds_of(compared):
                waiting += 1
            elif not claim.get("front"):
                others += 1
            else:
                counts = [f"{count or ''}" for count in counted(compared).values()]
                rows.append([f"[{about['name']}]({prefix}{about['page']})", claim_text(claim),
                             *counts, "-".join(map(str, seeds_of(compared)))])
    parts = [COUNTS, table(["paper", "claim", *VERDICTS, "seeds"], named_once(rows))]
    if waiting:
        parts.append(f"The pages have {others} more claims that were tested, and {waiting} that "
                     "were not.")
    return "\n\n".join(parts)


def verdict_words(compared):
    """The counts of a claim's verdicts in one line."""
    counts = counted(compared)
    text = ", ".join(f"{verdict}: {count}" for verdict, count in counts.items() if count)
    return text + (" (one seed)" if seeds_of(compared) == [1] else "")


def advice(groups, claims, prefix=""):
    """The sentences of claims.json's "advice" that the networks support, numbers filled in.

    A sentence is shown while each of its tests has one of the verdicts that it allows. {method}
    and {control} are the two sides of its first test.
    """
    shown = []
    for about in claims.values():
        for sentence in about.get("advice", []):
            compared = [compare(groups, test) for test in sentence["tests"]]
            if all(comparison.verdict in sentence["while"] for comparison in compared):
                sides = dict(method=written(compared[0].method, 500),
                             control=written(compared[0].control, 500))
                shown.append(sentence["text"].format(**sides))
    return " ".join(shown)


def verdicts(folder):
    """What `evaluate.py --sanity` says of networks whose state is known (verdict.sh)."""
    rows = []
    for path in sorted(folder.glob("verdict-*.json")):
        facts = json.loads(path.read_text())
        failed = [f"{finding['sign']}: {finding['text']}" for finding in facts["findings"]
                  if finding["passed"] is False]
        verdict = verdict_of(facts)
        if facts["verdict"].startswith("verdict: sound, "):
            verdict += " (says nothing about robustness)"
        rows.append([f"[{path.stem.removeprefix('verdict-')}]({path.name})", verdict,
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
        for other, its in tables.measured_others(printed, about, dataset, groups):
            parts += [f"{other['table']}, {other['caption']}, {dataset}, eps {other['eps']}:",
                      paper_table(other, its, groups, protocol)]
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
    heads = [title(column) + (f", our n={n:,}" if n else "") for column, n in zip(columns, ns)]
    rows = []
    remaining = iter(numbers)
    for name, values in printed["rows"].items():
        rows.append([f"**{name}**, paper", *["" if v is None else f"{v:g}" for v in values]])
        for group in found[name]:
            head = (f"ours: {name_with_mark(group)}, {trained_on(group)}, {epochs(group)} epochs, "
                    f"{label(group)} {links(group)}")
            rows.append([head, *map(written, next(remaining), ns)])
        if name in ours and not found[name]:
            rows.append(["ours", *["not run"] * len(values)])
    return table(["row", *heads], rows)


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
        lr = group[0].facts["args"].get("lr")
        return [name_with_mark(group), trained_on(group), epochs(group), f"{lr}"]

    def last(group):
        return [" ".join(commits(group)), f"{label(group)} {links(group)}"]
    parts = []
    for dataset in sorted({group[0].facts["dataset"] for group in groups}):
        chosen = [group for group in groups if group[0].facts["dataset"] == dataset]
        chosen.sort(key=lambda group: (method(group[0]), trained_on(group), label(group)))
        heads, rows = numbers_table(chosen, [*own_columns(chosen), "minutes"], first, last)
        several = len({commit for group in chosen for commit in commits(group)})
        note = f", rows of {several} commits of the script" if several > 1 else ""
        parts += [f"On {dataset}{note}:", table(["method", "network", "epochs", "lr", *heads,
                                                 "commit", "run and its seeds"], rows)]
    return "\n\n".join(parts)


def claims_part(about, groups):
    """The paper's claims, the numbers on both sides, the verdict."""
    parts = []
    for claim in about["claims"]:
        compared = [compare(groups, test) for test in claim["tests"]]
        rows = []
        for test, c in zip(claim["tests"], compared):
            by = "" if c.low is None else f"{c.difference:.1f} ({c.low:.1f} to {c.high:.1f})"
            if c.low is not None and c.low == c.high:
                by = f"{c.difference:.1f}, no interval"
            rows.append([c.say, title(c.column), written(c.method), written(c.control), by,
                         threshold(test), verdict_words([c]).replace(": 1", "")])
        parts += [f"**{claim_text(claim)}** ({claim['place']}). Here: "
                  f"**{verdict_words(compared)}**.",
                  table(["what is compared", "column", "method", "control",
                         "difference (95 % interval)", "holds if", "verdict"], rows)]
        if claim.get("why"):
            parts.append(claim["why"])
    return "\n\n".join(parts)


def recipe(network, made):
    """How a network's numbers come out again, as a list item. made: the result of `trained`."""
    facts = network.facts
    lines = [f"* `{network.names[0]}` (seed {seed(network)}, best epoch {facts['best_epoch']} of "
             f"{len(facts['history'])}, {facts.get('training_minutes')} minutes on "
             f"{facts['training'].get('hardware')}), at commit "
             f"{facts['training'].get('commit')}:"]
    for path, needed in needs(network, made).items():
        how = "not on record"
        if needed:
            how = f"that of `{needed.names[0]}`"
            if needed.facts["script"] != facts["script"]:  # it is on another page
                how += f", by `{needed.facts['training'].get('command')}`"
        lines.append(f"  needs `{path}`, {how}<br>")
    lines.append(f"  `{facts['training'].get('command')}`")
    return "\n".join(lines + [f"  <br>`{command}`" for command in commands(network)])


def page(about, groups, papers, figures):
    """A paper's page."""
    own = [group for group in groups if group[0].facts["script"] == about["script"]]
    made = trained(groups)
    recipes = [recipe(network, made) for group in sorted(own, key=label) for network in group]
    shown = [f"![{figure['alt']}](figures/{name}.png)" for name, figure in figures.items()
             if figure["paper"] == about["script"]]
    shown += [f"![{picture['file']}](figures/{picture['file']})\n\n{picture['text']} By `python "
              "evaluate.py --ckpt RUN --plots DIR`." for picture in about.get("pictures", [])]
    parts = [f"# {about['name']}", f"{about['paper']} [The paper]({about['link']}), "
             f"[the script](../{about['script']}.py), [all results](README.md).",
             f"Made by `python results/report.py` from the JSON files. Accuracy in %. {SEEDS} "
             f"{PAGE}",
             "## Claims", COUNTS,
             claims_part(about, groups), *shown,
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


def files_table(files):
    """results/README.md's first table: a row for each JSON. files: {name: network of that file}."""
    rows = []
    for name, network in files.items():
        facts = network.facts
        cells = [written(number([network], column)) for column in ("clean", "aa")]
        rows.append([f"[{name}]({name}.json)", facts["script"], name_with_mark([network]),
                     trained_on([network]), facts["dataset"], f"{seed(network)}", *cells])
    return table(["file", "script", "method", "network", "data", "seed", "clean", "AutoAttack"],
                 rows)


def file_part(name, network, folder):
    """What a JSON shows, its training command, and all evaluation commands that it keeps."""
    facts = network.facts
    columns = dict.fromkeys(name_of(outcome) for outcome in network.outcomes)
    training = facts["training"]
    evaluation = facts["evaluation"]
    weights = f"weights/{name}.pt"
    kept = f" [Weights]({weights})." if (folder / weights).exists() else ""
    given = [outcome["command"] for outcome in network.outcomes if outcome.get("command")]
    lines = [f"**[{name}]({name}.json)** shows {', '.join(columns)}. Trained in "
             f"{facts.get('training_minutes')} minutes.{kept}",
             f"* trained at {training.get('commit')}, {training.get('hardware')}: "
             f"`{training.get('command')}`"]
    lines += [f"* evaluated at {evaluation.get('commit')}, {evaluation.get('hardware')}: "
              f"`{command}`" for command in dict.fromkeys([*given, evaluation.get("command")])]
    return "\n".join(lines)


def index(groups, claims, folder, extra):
    """results/README.md: a table of every JSON, then their commands, the verdicts, the names.

    extra: names of the pages that are no paper's.
    """
    words = {"cifar10.md": "five methods on CIFAR-10", "speed.md": "speed"}
    others = "".join(f", [{text}]({name})" for name, text in words.items() if name in extra)
    files = {}
    for group in sorted(groups, key=lambda group: (group[0].facts["script"], label(group))):
        for network in group:
            files |= {name: alone(folder, name) for name in network.names}
    parts = ["# Results", "Made by `python results/report.py`; `--check` fails where a table and "
             "the JSON files disagree. Pages: " + ", ".join(
                 f"[{about['name']}]({about['page']})" for about in claims.values()) + ", "
             f"[the commands of every table of the papers](tables.md){others}.",
             "Accuracy in % at the data set's usual eps, in brackets the 95 % interval. \\*: an "
             "older run. A method's two files of one seed are one network, evaluated twice.",
             files_table(files),
             "![All methods, clean accuracy against AutoAttack](figures/methods.png)",
             "## Names", "\n".join(f"* {name}: {words}" for name, words in WORDS.items()),
             "## Every table of the five papers", tables.RUN,
             table(*tables.every_table(groups, claims, folder)),
             "## Commands", "The pages have commands for every number. A file keeps the "
             "evaluations that are listed here, an older one only its last."]
    parts += [file_part(name, network, folder) for name, network in files.items()]
    parts += ["## The verdict of `evaluate.py --sanity`", "On networks whose state is known: "
              "[verdict.sh](verdict.sh) has the commands, [verdict_nets.py](verdict_nets.py) "
              "the layers that hide a gradient.", verdicts(folder)]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------ files

def between(text, mark, content):
    """text with what stands between two markers replaced; None where it has no such markers."""
    begin = f"<!-- {mark}: begin -->"
    end = f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        return None
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def readme(path, groups, claims, folder):
    """README's text with its tables renewed; a line for each pair of markers that it lacks."""
    text = path.read_text()
    parts = {"advice": advice(groups, claims), "table": main_table(groups, claims, folder),
             "claims": claims_table(groups, claims)}
    for mark, content in parts.items():
        renewed = between(text, mark, content)
        if renewed is None:
            print(f"{path.name}: no <!-- {mark}: begin --> and end, left as it is")
        text = renewed or text
    return text


def pages(folder, readme_path):
    """({path: text}, {name: figure}) of everything that is shown."""
    claims = json.loads((folder / "claims.json").read_text())
    papers = json.loads((folder / "papers.json").read_text())
    groups = ordered(grouped(load(folder)), claims)
    drawn = draw.collect(groups)
    more = {"speed.md": speed.page(folder), "cifar10.md": budget.page(groups, claims, folder),
            "tables.md": tables.page(claims, folder)}
    more = {name: text for name, text in more.items() if text}
    texts = {readme_path: readme(readme_path, groups, claims, folder),
             folder / "README.md": index(groups, claims, folder, more)}
    texts |= {folder / name: text for name, text in more.items()}
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
