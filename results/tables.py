"""Every table and figure of the five papers: its commands, and what of it has been run here.

Commands are in tables.md, the rest in README.md's table. papers.json has the tables' rows: a main
table for each data set, the others in its "more". Under "commands" is the list. The keys of an
entry:
    table, shows, commands    its name, what it shows, lines of bash
    none                      why there is no command
    data                      the data sets whose table tells what was run, by claims.json's "rows"
                              and the table's own "ours": row -> names of JSON files
    rows, columns             which of them, where a table of papers.json is of several of the
                              paper's; rows is a pattern
    ran                       what was run, in words, where no row tells
    note                      what else must be known
"""

import importlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from runs import asked, method, named, number

COUNTS = ("epochs", "epochs_fixed", "attack_steps", "align_epochs", "k_epochs", "teacher_epochs",
          "pretrain_epochs")  # a network is smaller than the paper's where one of them is

ABOUT = ("The commands are lines of bash, from the project's folder, with the papers' settings. A "
         "table may need networks of other tables of its paper: their names begin alike. On a CPU "
         "`--protocol` gives its slowest attacks fewer images.")
RUN = ("A table's name links its commands. What was run is seen from the JSON files of this "
       "folder; the numbers are on the papers' pages. A row that is not named was not run here, or "
       "is another paper's. smaller: a smaller or other network, some of the images, fewer epochs "
       "or attack steps.")


def printed_table(entry, main):
    """The rows of an entry: the table of its name on a data set, else the data set's main one."""
    return next((table for table in main.get("more", [])
                 if table["table"] == entry["table"] and "rows" in table), main)


def ours_of(printed, about, dataset):
    """{row: names of JSON files}, of a table and of the main one, where the rows share a name."""
    return {**about["rows"].get(dataset, {}), **printed.get("ours", {})}


def can_be_measured(column, dataset):
    """Whether a column is an attack of evaluate.py."""
    try:
        asked(column, dataset)
    except common.UsageError:
        return False
    return True


def measured_others(main, about, dataset, groups):
    """[(table, {row: names of JSON files})] of the tables beside a main one that have our rows.

    Those whose columns are attacks, and where a network has been attacked by one of them.
    """
    found = []
    for printed in main.get("more", []):
        ours = ours_of(printed, about, dataset)
        networks = [group for row in printed["rows"] for group in named(groups, ours.get(row, []))]
        if (all(can_be_measured(column, dataset) for column in printed["columns"])
                and any(number(group, column) for group in networks
                        for column in printed["columns"] if column != "clean")):
            found.append((printed, ours))
    return found


def model_of(row):
    """The backbone that a row begins with: resnet18 of "ResNet-18 IAAT"; else any other word."""
    return row.split()[0].lower().replace("wideresnet", "wrn").replace("resnet-", "resnet")


def is_smaller(network, script, row):
    """Whether a network, or its training, is not of the size that the paper's row has.

    script: the paper's, whose settings count.
    """
    args = network.facts["args"]
    dataset = network.facts["dataset"]
    module = importlib.import_module(script)
    tables = module.PAPER
    if model_of(row).startswith("wrn"):
        tables = getattr(module, "PAPER_WRN", tables)
    settings = tables.get(dataset, {})
    if args.get("limit") or args.get("classes"):
        return True
    if network.facts["model"] not in (settings.get("model"), model_of(row)):
        return True
    for name, value in settings.items():
        if isinstance(value, dict):
            value = value.get(method(network), value.get("else"))
        own = args.get(name)
        if name == "epochs":  # of the whole schedule; guided training may end before
            own = args.get("schedule_epochs") or own
            value = min(value, settings.get("epochs_fixed", value))
        if name in COUNTS and None not in (own, value) and own < value:
            return True
    return False


def rows_run(entry, dataset, printed, ours, groups, script):
    """(rows with a network of the paper's size, rows with a smaller one alone) of a table."""
    columns = [column for column in entry.get("columns", printed["columns"])
               if can_be_measured(column, dataset)]
    full = []
    smaller = []
    for row in printed["rows"]:
        found = [group for group in named(groups, ours.get(row, []))
                 if group[0].facts["dataset"] == dataset
                 and any(number(group, column) for column in columns)]
        if not found or not re.match(entry.get("rows", ""), row):
            continue
        if all(is_smaller(group[0], script, row) for group in found):
            smaller.append(row)
        else:
            full.append(row)
    return full, smaller


def what_was_run(entry, about, groups, papers):
    """The last cell of an entry."""
    if "none" in entry:
        return "-"
    parts = []
    for dataset in entry.get("data", []):
        printed = printed_table(entry, papers[about["protocol"]][dataset])
        ours = ours_of(printed, about, dataset)
        full, smaller = rows_run(entry, dataset, printed, ours, groups, about["script"])
        if full:
            parts.append(f"run on {dataset}: {', '.join(full)}")
        if smaller:
            parts.append(f"smaller on {dataset}: {', '.join(smaller)}")
    if "ran" in entry:
        parts.append(entry["ran"])
    return "<br>".join(parts) or "not run"


def listed(claims, folder):
    """(what claims.json says of a paper, its entries) for each paper."""
    papers = json.loads((folder / "papers.json").read_text())
    for script, about in claims.items():
        entries = papers.get("commands", {}).get(about["protocol"], [])
        if entries:
            yield dict(about, script=script), entries


def every_table(groups, claims, folder):
    """(heads, rows) of README.md's table: what each shows, and whether it has been run."""
    papers = json.loads((folder / "papers.json").read_text())
    rows = []
    for about, entries in listed(claims, folder):
        for entry in entries:
            name = entry["table"]
            ran = f"no command: {entry.get('none')}"
            if "none" not in entry:
                name = f"[{name}](tables.md#{about['name'].lower().replace(' ', '-')})"
                ran = what_was_run(entry, about, groups, papers)
            rows.append([f"[{about['name']}]({about['page']})", name, entry["shows"], ran])
    return ["paper", "table", "what it shows", "run here"], rows


def page(claims, folder):
    """The text of tables.md: the commands of each paper's tables, in blocks to copy."""
    parts = ["# The commands of every table and figure of the five papers", "Made by `python "
             "results/report.py` from papers.json. [README.md](README.md) says what was run.",
             ABOUT]
    for about, entries in listed(claims, folder):
        parts.append(f"## {about['name']}")
        for entry in entries:
            if "none" not in entry:
                lines = "\n".join(entry["commands"])
                note = f" ({entry['note']})" if "note" in entry else ""
                parts.append(f"{entry['table']}, {entry['shows']}{note}:\n\n"
                             f"```bash\n{lines}\n```")
    return "\n\n".join(parts) + "\n"
