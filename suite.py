"""
Every run behind docs/results.md, by one command that can be stopped and run again.

    python suite.py --plan scenes --jobs 2                       # drawn scenes, hours on two cores
    python suite.py --data camvid=D1 nyuv2=D2 --photos D3 --plan reduced --jobs 2
    python suite.py --data camvid=D1 --photos D3 --list          # the commands; +: done

A plan sets sizes, lengths and seeds, and may leave rows out; what a row means is the same in all
plans. All students of a data set have the same steps, batches, crops and rates, except for what
their row changes. Each run is a command that could be typed by hand. Finished runs are skipped;
interrupted ones resume.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import classifiers
import files
import loop
import parallel
import results
from files import UserError
from plans import CLASSIFIERS, CURVES, GROUPS, PAPER_TOO, PLAIN, PLANS, ROWS, numbers

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------------------------
# the runs


@dataclasses.dataclass(eq=False)
class Job:
    """A command of the suite, and the folder for its results, its log and the command."""

    argv: list  # script and flags
    own: list  # flags that say where things are here, not what is computed
    folder: Path
    row: tuple = ()  # of a table: data set (or pair of classifiers), group, row, seed
    needs: list = dataclasses.field(default_factory=list)  # files that other jobs make
    makes: str = "metrics.json"  # exists when it is done

    @property
    def made(self):
        return self.folder / self.makes

    @property
    def script(self):
        return self.argv[0].removesuffix(".py")

    @property
    def command(self):
        return shlex.join(["python", *self.argv])


def merged(script, *flags):
    """[script, *flags] from strings "--a 1 2 --b", of which later ones override earlier ones."""
    chosen = {}
    for word in shlex.split(" ".join(flags)):
        if word.startswith("--"):
            name = word
            chosen[name] = []
        else:
            chosen[name].append(word)
    return [script, *(word for name, values in chosen.items() for word in (name, *values))]


def quoted(path):
    """A path as a word of such a string."""
    return shlex.quote(str(path))


def plan_jobs(args):
    """Every job of a plan, also those not to be run now: results they have go into the tables."""
    plan, folders = PLANS[args.plan], dict(pair.split("=", 1) for pair in args.data)
    inits, jobs = {}, []
    for who in ("teacher", "student"):
        inits[f"{who}_init"] = getattr(args, f"{who}_init")
        if not inits[f"{who}_init"]:
            jobs.append(encoder_job(plan, args, plan[who]))
            inits[f"{who}_init"] = str(jobs[-1].folder / "encoder.pt")
    for dataset in plan["data"]:
        jobs += dataset_jobs(plan, args, dataset, folders.get(dataset) or None, inits)
    for (teacher, student), flags in plan["pairs"].items():
        jobs += classifier_jobs(plan, args, teacher, student, flags)
    return [*{job.made: job for job in jobs}.values()]  # an encoder only once


def wanted(jobs, args):
    """The jobs of --data and --only, those they wait for, and those that score them once more."""
    datasets = [pair.split("=", 1)[0] for pair in args.data]
    rows = {job for job in jobs if job.row and job.row[1] in args.only}
    chosen = {job for job in rows if job.row[0] in datasets or job.row[1] == "photos"}
    while True:
        needed = {need for job in chosen for need in job.needs}
        more = {j for j in jobs if j.made in needed} - chosen
        if not more:
            break
        chosen |= more
    made = {job.made for job in chosen}
    return [j for j in jobs if j in chosen or (j.script == "eval" and {*j.needs} <= made)]


def encoder_job(plan, args, name):
    """A classifier from whose encoder nets start, and which teaches other classifiers."""
    folder = Path(args.out_dir) / "pretrained" / name
    argv = merged("pretrain.py", classifier_flags(plan, name))
    return Job(argv, where(args, args.photos, folder), folder)


def classifier_flags(plan, name):
    kind = plan.get("vit" if name in classifiers.VITS else "mit", "")
    return f"--model {name} {plan['pretrain']} {kind}"


def classifier_jobs(plan, args, teacher, student, shared):
    """A classifier of photos and its students, alone and by every method; shared: their length."""
    first = encoder_job(plan, args, teacher)
    jobs, pair = [first], f"{student} from {teacher}"
    unit, n = shared.split()
    shared = f"{classifier_flags(plan, student)} {shared}"
    for seed in range(plan["seeds"]["photos"]):
        for row, row_flags in CLASSIFIERS.items():
            flags, needs = f"--seed {seed} {row_flags}".format(twice=f"{unit} {2 * int(n)}"), []
            if "--method" in row_flags:
                needs = [first.made]
                flags += f" --teacher {quoted(first.folder / 'encoder.pt')}"
            folder = Path(args.out_dir) / "photos" / slug(f"{pair} {row}") / str(seed)
            argv, own = merged("pretrain.py", shared, flags), where(args, args.photos, folder)
            jobs.append(Job(argv, own, folder, (pair, "photos", row, seed), needs))
    return jobs


def dataset_jobs(plan, args, dataset, data_dir, inits):
    """The teacher of a data set, its students, and their scoring by the paper's protocol."""
    sizes, out = numbers(plan, dataset), Path(args.out_dir) / dataset
    ours = {
        name: [] if getattr(args, name) else [Path(init).with_name("metrics.json")]
        for name, init in inits.items()
    }
    shared = f"--dataset {dataset} {plan['train']} {PLAIN}"
    inits = {name: quoted(init) for name, init in inits.items()}
    flags = f"--student {plan['teacher']} --method none --student-init {inits['teacher_init']}"
    argv = merged("train.py", shared, flags, sizes["teacher"])
    own, row = where(args, data_dir, out / "teacher"), (dataset, "teacher", "teacher", 0)
    teacher = Job(argv, own, out / "teacher", row, ours["teacher_init"])
    jobs = [teacher]
    for group in ROWS:
        for seed in range(plan["seeds"][group]):
            for row in plan.get("rows", ROWS).get(group, ()):
                flags = ROWS[group][row]
                needs = ours["student_init"] if "{student_init}" in flags else []
                flags = f"{sizes['student']} {flags}".format(**sizes, **inits)
                if "--method none" not in flags:
                    flags += f" --teacher-ckpt {quoted(teacher.folder / 'student.pt')}"
                    needs = [*needs, teacher.made]
                if row in CURVES and sizes["every"]:
                    flags += f" --eval-every {sizes['every']}"
                flags += f" {plan.get('also', {}).get(row, '')}"
                folder, row = out / slug(f"{group} {row}") / str(seed), (dataset, group, row, seed)
                flags = f"--student {plan['student']} {flags} --seed {seed}"
                argv, own = merged("train.py", shared, flags), where(args, data_dir, folder)
                jobs.append(Job(argv, own, folder, row, needs))
    twice, scored = plan.get("paper_too", ["teacher", *PAPER_TOO]), []
    for job in jobs:
        scored += [job, paper_job(args, data_dir, job)] if job.row[2] in twice else [job]
    return scored


def paper_job(args, data_dir, job):
    """The job that scores a net by the paper's protocol too."""
    ckpt = quoted(job.folder / "student.pt")
    flags = f"--ckpt {ckpt} --dataset {job.row[0]} --protocol paper --json"
    own = where(args, data_dir)
    return Job(merged("eval.py", flags), own, job.folder, job.row, [job.made], "paper.json")


def where(args, data_dir, folder=None):
    """The flags that say where things are, not what is computed."""
    flags = dict(data_dir=data_dir, cache_dir=data_dir and args.cache_dir, device=args.device)
    flags |= dict(out_dir=str(folder), workers=args.workers) if folder else {}
    words = [w for k, v in flags.items() if v is not None for w in (files.as_flag(k), str(v))]
    return [*words, *["--graphs"] * args.graphs, "--resume"] if folder else words


def slug(title):
    """A title as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def check_old(jobs):
    """UserError for a folder made by another command: its result is not the plan's."""
    for job in jobs:
        path = job.folder / f"{job.script}.command"
        if path.exists() and resolved(path.read_text()) != resolved(job.command):
            raise UserError(
                f"{path}: made by another command than the plan's now. Remove {job.folder}, or "
                "pass another --out-dir"
            )


def resolved(command):
    """The words of a command, to compare: its paths may be relative or absolute."""
    return [Path(word).resolve() for word in shlex.split(command)]


def check_data(args):
    """UserError for other data than that of the runs in --out-dir, which data.json there names."""
    places = dict(pair.split("=", 1) for pair in args.data) | dict(photos=args.photos)
    places = {name: str(Path(folder).resolve()) for name, folder in places.items() if folder}
    path = Path(args.out_dir) / "data.json"
    try:
        old = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from e
    for name, folder in places.items():
        if old.get(name, folder) != folder:
            raise UserError(
                f"{name} {folder}: {args.out_dir} has results from {old[name]}. Pass another "
                f"--out-dir, or, if the data has only moved, correct {path}"
            )
    if old != old | places:
        files.write_text(path, json.dumps(old | places, indent=2) + "\n")


def check_same_files(jobs):
    """UserError if the data were edited between the finished runs of a table."""
    checksums = {}  # of a data set, or of as many classes of the photos: (value, folder)
    for job in jobs:
        if job.script == "eval" or not job.made.exists():
            continue
        metrics = results.read(job.made)
        whose = job.row[0] if job.script == "train" else metrics["settings"]["classes"]
        value = metrics.get("checksum of names and sizes")
        first, folder = checksums.setdefault((job.script, whose), (value, job.folder))
        if None not in (first, value) and value != first:
            raise UserError(
                f"{job.folder} is a run with other data files than {folder}: remove the older, and "
                "what came of it, or pass another --out-dir"
            )


def run_jobs(jobs, at_once, signals):
    """Run the unfinished jobs, `at_once` at a time; returns those that still are unfinished.

    signals: a list; once it holds one, running jobs are asked to stop, before which they save.
    """
    waiting, running, failed = [job for job in jobs if not job.made.exists()], {}, []
    total, start, threads = len(waiting), time.time(), max(1, (os.cpu_count() or 1) // at_once)
    env = {"OMP_NUM_THREADS": str(threads)} | os.environ
    print(f"{len(jobs) - total} of {len(jobs)} runs are done, {total} to do, {at_once} at a time")
    while (waiting or running) and not signals:
        for job in [job for job in waiting if all(need.exists() for need in job.needs)]:
            if len(running) < at_once:
                waiting.remove(job)
                running[job] = begin(job, env)
        if not running:
            break  # what is left waits for a job that failed
        time.sleep(0.2)
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                if not finish(job, process):
                    failed.append(job)
                done = total - len(waiting) - len(running)
                eta = (time.time() - start) / done * (total - done)
                print(f"{done}/{total}, about {loop.clock(eta)} to go", flush=True)
    for process in running.values():
        process.terminate()
    stopped = [job for job, p in running.items() if p.wait() != 0 or not finish(job, p)]
    return failed + stopped + waiting


def begin(job, env):
    """Start a job; its output goes into a log beside its results."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / f"{job.script}.command").write_text(job.command + "\n")
    log, scores = job.folder / f"{job.script}.log", job.folder / f"{job.makes}.tmp"
    argv = [sys.executable, HERE / job.argv[0], *job.argv[1:], *job.own]
    with open(log, "a") as err, open(scores, "w") if job.script == "eval" else err as out:
        process = subprocess.Popen(argv, stdout=out, stderr=err, env=env, start_new_session=True)
    print(f"{job.script} begins: {job.folder}", flush=True)
    return process


def finish(job, process):
    """Report a job that has ended; returns whether it is done."""
    if process.returncode == 0 and job.script == "eval":
        os.replace(job.folder / f"{job.makes}.tmp", job.made)
    if job.made.exists():
        (job.folder / "last.pt").unlink(missing_ok=True)  # large, and no longer of use
        print(f"{job.script} done: {job.folder}, {results.headline(job.made)}")
        return True
    log = (job.folder / f"{job.script}.log").read_text().splitlines()
    print(f"FAILED ({process.returncode}): {job.command}\n" + "\n".join(log[-5:]))
    return False


# ------------------------------------------------------------------------------------------------
# the command


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Run every method on every data set, and write tables as in docs/results.md",
        allow_abbrev=False,
    )
    p.add_argument("--plan", choices=PLANS, default="full", help="sizes and lengths, see plans.py")
    p.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="camvid=D nyuv2=D; none for --plan scenes or --only photos",
    )
    p.add_argument("--photos", help="photos to pre-train encoders on, see pretrain.py")
    p.add_argument(
        "--teacher-init", help="weights instead of pre-training: a file, a name on the hub"
    )
    p.add_argument("--student-init", help="the same, for the pre-trained students")
    p.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of rows (all)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
    p.add_argument("--out-dir", help="folder of the runs (out/suite-PLAN)")
    p.add_argument("--results", help="where the tables go (results.md in --out-dir)")
    p.add_argument("--list", action="store_true", help="print the commands, finished ones marked +")
    p.add_argument("--no-runs", action="store_true", help="only write the tables of finished runs")
    p.add_argument("--cache-dir", help="where images are decoded to (.cache beside the data)")
    p.add_argument("--device", help="as in train.py")
    p.add_argument("--graphs", action="store_true", help="of all trainings, as in train.py")
    p.add_argument(
        "--workers", type=int, help="of each run, as in train.py (with a GPU they share the cores)"
    )
    return p.parse_args(argv)


def check(args):
    """UserError for what cannot be run, before hours are spent on the rest."""
    plan = PLANS[args.plan]
    if [*plan["data"]] == ["scenes"]:
        args.data = args.data or ["scenes="]
    for pair in args.data or ["is missing"] * (args.only != ["photos"]):
        name, _, folder = pair.partition("=")
        if name not in plan["data"] or bool(folder) == (name == "scenes"):
            names = ", ".join(plan["data"])
            raise UserError(f"--data {pair}: NAME=DIR, with NAME one of {names}")
        if sum(other.startswith(f"{name}=") for other in args.data) > 1:
            raise UserError(f"--data {pair}: {name} is named more than once")
    args.teacher_init = args.teacher_init or plan.get("init")
    args.student_init = args.student_init or plan.get("init")
    weights = args.teacher_init and args.student_init
    if not args.photos and ("photos" in args.only and plan["pairs"] or not weights):
        raise UserError(
            "--photos is missing: the photos of classifiers, for --only photos, and of encoders "
            "from which nets start, unless --teacher-init and --student-init say from what"
        )
    if not args.no_runs and not args.list:
        for folder in [pair.split("=", 1)[1] for pair in args.data] + [args.photos]:
            if folder and not Path(folder).is_dir():
                raise UserError(f"{folder}: no such folder")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1")
    if args.workers is None and torch.cuda.is_available():
        args.workers = max(1, parallel.spare_cores() // args.jobs)
    args.out_dir = args.out_dir or f"out/suite-{args.plan}"
    args.results = args.results or f"{args.out_dir}/results.md"
    results.check(args.results)


def main(args):
    check(args)
    jobs = plan_jobs(args)
    mine, missing, signals = wanted(jobs, args), [], []
    if not mine:
        raise UserError(f"--only {' '.join(args.only)}: no rows of plan {args.plan}")
    if args.list:
        for job in mine:
            print("+" if job.made.exists() else " ", job.command)
        return
    check_old(jobs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    if not args.no_runs:
        check_data(args)
        missing = run_jobs(mine, args.jobs, signals)
    check_same_files(jobs)
    results.write(args.results, PLANS[args.plan], jobs)
    print(f"wrote {args.results}")
    if signals:
        print(f"stopped, {len(missing)} runs are missing; the same command resumes")
        raise SystemExit(128 + signals[0])
    if missing:
        raise UserError(f"{len(missing)} runs are missing; see above, and the logs beside them")


if __name__ == "__main__":
    files.cli(main, get_args())
