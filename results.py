"""
The results of `suite.py`: tables in Markdown, and plots of mIoU against training time.
"""

import json
import re
import statistics
from pathlib import Path

import files
from files import UserError
from plans import CURVES, LENGTHS

HEAD = ["mIoU", "of the gap", "pixels", "boundary IoU", "mIoU, paper's"]
TITLES = {
    "main": "TransKD and its parts",
    "long": "Long trainings",
    "labels": "Few labels",
    "ablations": "What matters",
    "methods": "Other methods",
}
REFERENCE = "transkd-base"  # in every table, like the teacher and the student alone
PICTURE = """Dots: the ends of trainings of one to eight times the steps, each with a schedule of
its own, means and standard deviations; dashed: from one to the next. Thin lines, where there are
any: along a training."""


def read(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else {}


def headline(path):
    """A run's main result, for a progress line."""
    metrics = read(path)
    if "miou" in metrics:
        return f"mIoU {mean_and_spread([metrics['miou']])}"
    return f"{metrics['top1']:.1%}"


def mean_and_spread(values):
    """Mean and, of several values, standard deviation, in percent."""
    values = [100 * v for v in values]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def collect(jobs):
    """{data set: {group: {row: [a finished run's results, by seed]}}}, the rows in their order.

    The only group of a pair of classifiers is "photos".
    """
    tree = {}
    for job in jobs:
        if job.row and job.makes == "metrics.json" and job.made.exists():
            dataset, group, row, seed = job.row
            metrics = read(job.folder / "metrics.json")
            found = metrics["encoder" if group == "photos" else "student"]
            found |= dict(folder=job.folder, command=job.command, seed=seed)
            found |= dict(where=f"{metrics['hardware']}, torch {metrics['torch']}")
            found |= dict(paper=read(job.folder / "paper.json").get("miou"))
            tree.setdefault(dataset, {}).setdefault(group, {}).setdefault(row, []).append(found)
    return tree


def mean(runs, key="miou"):
    return statistics.mean(run[key] for run in runs)


def table(head, rows, cells):
    """Lines of Markdown, one per row; cells(runs): its texts under `head`."""
    head = ["", "runs", *head, "minutes"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row, runs in rows.items():
        minutes = f"{mean(runs, 'seconds') / 60:.1f}"
        lines.append(f"| {' | '.join([row, str(len(runs)), *cells(runs), minutes])} |")
    return lines


def student_table(rows, starts, teacher):
    """The table of rows of train.py. The gap's ends are starts, {steps: runs of the student alone},
    and teacher, runs or None. Of the student alone the seeds of the row count, if they exist."""

    def cells(runs):
        closed, all_alone = "", starts.get(runs[0]["steps"], [])
        seeds = {run["seed"] for run in runs}
        alone = [run for run in all_alone if run["seed"] in seeds] or all_alone
        whole = mean(teacher) - mean(alone) if alone and teacher else 0
        if whole > 0 and runs not in (all_alone, teacher):
            closed = f"{round(100 * (mean(runs) - mean(alone)) / whole)}%"
        miou, pixels, edges = (
            mean_and_spread([run[key] for run in runs])
            for key in ("miou", "pixel_acc", "boundary_iou")
        )
        paper = mean_and_spread([run["paper"] for run in runs if run["paper"] is not None])
        return [miou, closed, pixels, edges, paper]

    return table(HEAD, rows, cells)


def classifier_table(pair, rows, jobs):
    """The table of rows of pretrain.py for a pair; jobs: among others the teacher's."""
    metrics = [read(job.made) for job in jobs if not job.row]
    teachers = {m["encoder"]["model"]: [m["encoder"]] for m in metrics if m}
    teacher = teachers.get(pair.split()[-1])
    rows = (dict(teacher=teacher) if teacher else {}) | rows

    def cells(runs):
        return [mean_and_spread([run[key] for run in runs]) for key in ("top1", "top5")]

    return table(["top-1", "top-5"], rows, cells)


def commands(groups):
    """The command of every row, for its first seed."""
    lines = ["```"]
    for rows in groups.values():
        lines += [runs[0]["command"] for runs in rows.values()]
    return [*lines, "```"]


def curve(runs):
    """(minutes, mIoU in percent) along a training, means over its seeds."""
    logs = [[json.loads(x) for x in open(run["folder"] / "log.jsonl")] for run in runs]
    points = [
        {r["step"]: r["miou"] for r in log if "miou" in r and r["stage"] == "student"}
        for log in logs
    ]
    steps = sorted(set.intersection(*(set(p) for p in points)))
    pace = mean(runs, "seconds") / 60 / runs[0]["steps"]
    return [s * pace for s in steps], [100 * statistics.mean(p[s] for p in points) for s in steps]


def plot(path, dataset, rows, teacher):
    """Plot mIoU against training time: during and after trainings, and the teacher's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for k, (name, lengths) in enumerate(LENGTHS.items()):
        style, found = dict(color=f"C{k}"), [rows[row] for row in lengths if row in rows]
        for row in lengths:
            if row in rows and row in CURVES:
                axis.plot(*curve(rows[row]), linewidth=0.8, **style)
        if found:
            minutes = [mean(runs, "seconds") / 60 for runs in found]
            miou = [[100 * run["miou"] for run in runs] for runs in found]
            means = [statistics.mean(of) for of in miou]
            spreads = [statistics.stdev(of) if len(of) > 1 else 0 for of in miou]
            axis.errorbar(minutes, means, spreads, fmt="o--", capsize=3, label=name, **style)
    axis.axhline(100 * mean(teacher), color="grey", linestyle=":", label="teacher")
    axis.set(xlabel="minutes of training", ylabel="mIoU, %", title=dataset)
    axis.legend()
    with files.atomic(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


def encoders(jobs, names):
    """Lines on the finished pre-trained encoders of these names."""
    lines = []
    for job in jobs:
        e = {} if job.row else read(job.made).get("encoder", {})
        if e.get("model") in names:
            cost = f"{e['steps']} steps, {e['seconds'] / 60:.1f} minutes"
            lines += [f"- {e['model']}: top-1 {e['top1']:.1%}, {cost}: `{job.command}`"]
    return ["Encoders are pre-trained as classifiers:", "", *lines, ""] if lines else []


INTRODUCTION = """# Results

Written by `suite.py`: every number comes from a run whose command is below, for its first seed.
mIoU, pixel accuracy and boundary IoU are by the full-resolution protocol on the validation images;
beside them mIoU by the paper's (`eval.py --protocol paper` of the same net). *Of the gap*: how much
of the gap is closed between the student alone, of the same seeds, with as many steps and without
class weights, and the teacher. Means and standard deviations over seeds. What a command does not
say is the same for all students; where data and results lie (`--data-dir`, `--out-dir`) is left
out. Minutes are those of training by the clock, including whatever else the machine did.

Each section has its own plan and hardware, those of its last run: compare within one only.
"""


def title_of(dataset, groups, plan):
    if "photos" in groups:
        return f"classifiers: {dataset}"
    return "{}: {student} from {teacher}".format(dataset, **plan)


def section(dataset, groups, plan, jobs, path):
    """Lines on a data set or a pair of classifiers; writes its plot beside the file `path`."""
    done = [run for rows in groups.values() for runs in rows.values() for run in runs]
    places = sorted({run["where"] for run in done})
    lines = [f"## {title_of(dataset, groups, plan)}", "", plan["note"], ""]
    lines += [f"Ran on: {'; '.join(places)}.", ""]
    nets = [dataset.split()[-1]] if "photos" in groups else [plan["teacher"], plan["student"]]
    lines += encoders(jobs, nets)
    if "photos" in groups:
        lines += [*classifier_table(dataset, groups["photos"], jobs), ""]
    else:
        picture = path.with_name(f"{path.stem}-{dataset}-{plan['student']}.png")
        lines += student_tables(dataset, groups, picture)
    return [*lines, "### Commands", "", *commands(groups), ""]


def student_tables(dataset, groups, picture):
    """Lines on the students of a data set; writes the plot `picture` where times differ."""
    lines, main = [], groups.get("main", {})
    teacher, alone = groups.get("teacher", {}).get("teacher"), main.get("alone")
    lengths = main | groups.get("long", {})
    starts = {lengths[row][0]["steps"]: lengths[row] for row in LENGTHS["alone"] if row in lengths}
    for group in [group for group in TITLES if group in groups]:
        others = dict(teacher=teacher, alone=alone) | {REFERENCE: main.get(REFERENCE)}
        rows = {row: runs for row, runs in others.items() if runs}  # to compare with
        if group == "main":
            rows = dict(teacher=teacher) if teacher else {}
        rows |= groups[group]
        lines += [f"### {TITLES[group]}", "", *student_table(rows, starts, teacher), ""]
    longer = any(row in lengths for rows in LENGTHS.values() for row in rows[1:])
    scored = any(len(curve(main[row])[0]) > 1 for row in CURVES if row in main)
    if teacher and (longer or scored) and files.installed("matplotlib"):
        plot(picture, dataset, lengths, teacher)
        lines += [f"![mIoU against training time]({picture.name})", "", PICTURE, ""]
    return lines


def written(path):
    """{title: lines} of the sections in a file of results."""
    text = Path(path).read_text() if Path(path).exists() else ""
    parts = re.split("^(?=## )", text, flags=re.MULTILINE)[1:]
    return {
        part.splitlines()[0].removeprefix("## "): [*part.rstrip().splitlines(), ""]
        for part in parts
    }


def check(path):
    """UserError if `path` is something other than a file of results: writing would replace it."""
    path = Path(path)
    title = INTRODUCTION.partition("\n")[0].encode()
    if path.is_dir() or path.exists() and not path.read_bytes().startswith(title):
        raise UserError(f"--results {path}: no file of the suite's; pass another")


def write(path, plan, jobs):
    """Write the results of finished jobs as Markdown, with plots beside it.

    Sections of other data sets and pairs, written by other runs of the suite, are kept.
    """
    path = Path(path)
    sections = written(path)
    for dataset, groups in collect(jobs).items():
        sections[title_of(dataset, groups, plan)] = section(dataset, groups, plan, jobs, path)
    lines = [INTRODUCTION, *(line for part in sections.values() for line in part)]
    files.write_text(path, "\n".join(lines))
