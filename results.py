"""
What the runs of `suite.py` found: tables in Markdown, and mIoU against training time as a picture.
"""

import json
import statistics
from pathlib import Path

import files
from export import installed
from plans import CURVES

HEAD = ["", "runs", "mIoU", "of the way", "pixels", "boundary IoU", "mIoU, paper's", "minutes"]
TITLES = {
    "main": "TransKD and its parts",
    "labels": "Few labels",
    "ablations": "What matters",
    "methods": "Other methods",
}


def read(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else {}


def headline(path):
    """What a run found, in a word or two."""
    metrics = read(path)
    return f"mIoU {percent([metrics['miou']])}" if "miou" in metrics else f"{metrics['top1']:.1%}"


def percent(values):
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
            dataset, group, row, _ = job.row
            metrics = read(job.folder / "metrics.json")
            found = metrics["encoder" if group == "photos" else "student"]
            found |= dict(folder=job.folder, command=job.command)
            found |= dict(where=f"{metrics['hardware']}, torch {metrics['torch']}")
            found |= dict(paper=read(job.folder / "paper.json").get("miou"))
            tree.setdefault(dataset, {}).setdefault(group, {}).setdefault(row, []).append(found)
    return tree


def all_runs(groups):
    return [run for rows in groups.values() for runs in rows.values() for run in runs]


def mean(runs, key="miou"):
    return statistics.mean(run[key] for run in runs)


def table(rows, alone=None, teacher=None):
    """Lines of Markdown, one a row; `alone` and `teacher`: the ends of the way."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for row, runs in rows.items():
        way = ""
        if alone and teacher and runs not in (alone, teacher):
            way = f"{(mean(runs) - mean(alone)) / (mean(teacher) - mean(alone)):.0%}"
        cells = [row, str(len(runs)), percent([run["miou"] for run in runs]), way]
        cells += [percent([run[key] for run in runs]) for key in ("pixel_acc", "boundary_iou")]
        cells.append(percent([run["paper"] for run in runs if run["paper"] is not None]))
        cells.append(f"{mean(runs, 'seconds') / 60:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def classifier_table(pair, rows, jobs):
    """Lines of Markdown for a pair of classifiers; jobs: among them what trained the teacher."""
    metrics = [read(job.made) for job in jobs if not job.row]
    teachers = {m["encoder"]["model"]: [m["encoder"]] for m in metrics if m}
    teacher = teachers.get(pair.split()[-1])
    lines = ["|  | runs | top-1 | top-5 | minutes |", "|" + "---|" * 5]
    for row, runs in ((dict(teacher=teacher) if teacher else {}) | rows).items():
        cells = [row, str(len(runs))]
        cells += [percent([run[key] for run in runs]) for key in ("top1", "top5")]
        lines.append(f"| {' | '.join(cells)} | {mean(runs, 'seconds') / 60:.1f} |")
    return lines


def commands(groups):
    """The command of every row, of its first seed."""
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
    """mIoU against training time of some rows, and how far the teacher is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for row in CURVES:
        if row in rows:
            axis.plot(*curve(rows[row]), label=row)
    axis.axhline(100 * mean(teacher), color="grey", linestyle=":", label="teacher")
    axis.set(xlabel="minutes of training", ylabel="mIoU, %", title=dataset)
    axis.legend()
    with files.atomic(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


def encoders(jobs):
    """Lines about the pre-trained encoders that are done."""
    lines = []
    for job in jobs:
        metrics = {} if job.row else read(job.made)
        if metrics:
            e = metrics["encoder"]
            how = f"{e['steps']} steps, {e['seconds'] / 60:.0f} minutes"
            lines += [f"- {e['model']}: top-1 {e['top1']:.1%}, {how}: `{job.command}`"]
    return ["Encoders are pre-trained as classifiers:", "", *lines, ""] if lines else []


INTRODUCTION = """# Results

Written by `suite.py`: every number comes from a run whose command is below. mIoU, accuracy of
pixels and boundary IoU by the full-resolution protocol on the validation images, beside them mIoU
by the paper's, at a quarter of that. *Of the way*: from the student alone to the teacher. Means and
standard deviations over seeds. What a command does not say is the same for all students; where
data and results lie (`--data-dir`, `--out-dir`) is left out.
"""


def write(path, plan, jobs):
    """The results of what is done, as Markdown, with a picture a data set beside it."""
    path, found = Path(path), collect(jobs)
    places = {run["where"] for groups in found.values() for run in all_runs(groups)}
    lines = [INTRODUCTION, plan["note"], "", *[f"Ran on: {p}." for p in sorted(places)], ""]
    lines += encoders(jobs)
    for dataset, groups in found.items():
        lines += [f"## {dataset}", ""]
        teacher, main = groups.get("teacher", {}).get("teacher"), groups.get("main", {})
        if "photos" in groups:
            lines += [*classifier_table(dataset, groups["photos"], jobs), ""]
        for group, title in TITLES.items():
            if group in groups:
                rows = (dict(teacher=teacher) if teacher else {}) | groups[group]
                lines += [f"### {title}", "", *table(rows, main.get("alone"), teacher), ""]
        if teacher and main and installed("matplotlib"):
            picture = path.with_name(f"{path.stem}-{dataset}.png")
            plot(picture, dataset, main, teacher)
            lines += [f"![mIoU against training time]({picture.name})", ""]
        lines += ["### Commands", "", *commands(groups), ""]
    with files.atomic(path) as tmp:
        Path(tmp).write_text("\n".join(lines))
