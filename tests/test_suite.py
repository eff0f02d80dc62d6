"""The suite: its commands, what it does again and what not, and the tables it writes."""

import argparse
import json
import signal
import statistics
from pathlib import Path

import pytest
import torch
from conftest import write_folder, write_photos
from test_train import command

import catalog
import eval as evaluation
import methods
import model
import parallel
import plans
import pretrain
import results
import settings
import suite
from files import UserError


@pytest.fixture
def place(tmp_path):
    write_folder(tmp_path / "data")
    write_photos(tmp_path / "photos")
    return tmp_path


def words(place, *more):
    where = ["--data", f"folder={place}/data", "--photos", f"{place}/photos"]
    own = ["--out-dir", f"{place}/out", "--results", f"{place}/docs/results.md"]
    return ["--plan", "tiny", *where, *own, "--cache-dir", f"{place}/cache", *more]


def test_tables_of_ones_own_do_not_replace_the_published_ones(place):
    argv = words(place)
    at = argv.index("--results")
    args = suite.get_args(argv[:at] + argv[at + 2 :])
    suite.check(args)
    assert args.results == f"{place}/out/results.md"


def get_args(place, *more):
    args = suite.get_args(words(place, *more))
    suite.check(args)
    return args


# ------------------------------------------------------------------------------------------------
# the plans


@pytest.mark.parametrize("plan", suite.PLANS)
def test_every_command_of_every_plan_is_one(plan, monkeypatch):
    """Their flags are known, go together, and say what their row says."""
    monkeypatch.setattr(argparse.ArgumentParser, "error", lambda self, message: fail(message))
    datasets = suite.PLANS[plan]["data"]
    places = [f"{name}=D" for name in datasets if name != "scenes"]
    argv = ["--plan", plan, "--photos", "P", "--list", "--cache-dir", "C"]
    argv += ["--out-dir", "A folder's"]
    args = suite.get_args([*argv, *(["--data", *places] if places else [])])
    suite.check(args)
    jobs = suite.plan_jobs(args)
    assert suite.wanted(jobs, args) == jobs
    files = [w for j in jobs for w in j.argv if w.endswith(".pt")]
    assert files and all(w.startswith("A folder's/") for w in files)
    assert len({job.made for job in jobs}) == len(jobs)
    for job in jobs:
        argv = [*job.argv[1:], *job.own]
        if job.row and job.row[3] > 0:
            continue  # the same with another seed
        if job.script == "train":
            teacher = job.row[0] == next(iter(datasets)) and suite.PLANS[plan]["teacher"]
            said = suite_train(argv, teacher)
            if job.row[1] == "methods":
                assert said.method == job.row[2]
            assert said.resume and Path(said.out_dir) == job.folder
            same = [j for j in jobs if j.script == "train" and j.row[0] == job.row[0]]
            assert sum(j.argv == job.argv for j in same) == 1, "two rows of one command"
        elif job.script == "pretrain":
            pretrain.resolve(pretrain.get_args(argv))
        else:
            assert evaluation.get_args(argv).protocol == "paper"


def fail(message):
    raise AssertionError(message)


def suite_train(argv, teacher):
    """A command of train.py, read and checked as it would be; teacher: who is to teach, or not."""
    args = settings.get_args(argv)
    settings.resolve(args)
    if args.teacher_ckpt and teacher:
        with torch.device("meta"):
            settings.check_method(args, model.build(teacher, 2))
    return args


def test_budgets_are_equal_but_where_the_row_says_so(place):
    args = get_args(place)
    args.plan, args.data = "reduced", ["nyuv2=D"]
    jobs = suite.wanted(suite.plan_jobs(args), args)
    rows = {name for group in suite.ROWS.values() for name in group}
    students = [j for j in jobs if j.script == "train" and j.row[1] != "teacher"]
    keys = ("max_iters", "batch_size", "crop_size", "lr", "student", "dtype")
    budgets = {}
    for job in students:
        read = settings.get_args(job.argv[1:])
        budgets.setdefault(tuple(str(getattr(read, k)) for k in keys), set()).add(job.row[2])
    common, *others = sorted(budgets.values(), key=len, reverse=True)
    assert sorted(map(sorted, others)) == [
        sorted(f"{row}, eight times the steps" for row in (*plans.LENGTHS, "transkd-base+cwd")),
        sorted(f"{row}, four times the steps" for row in plans.LENGTHS),
        ["alone, pre-trained, lower rate"],
        sorted(f"{row}, twice the steps" for row in (*plans.LENGTHS, "weighted classes")),
    ]
    assert {"alone", "alone, pre-trained", *plans.TRANSKD, "tat", "labels at a quarter"} <= common
    assert set(methods.METHODS) - rows == {"none"}  # which is "alone"
    assert {*plans.PAPER_TOO, *plans.CURVES, results.REFERENCE} <= rows
    steps = {job.row[2]: settings.get_args(job.argv[1:]).max_iters for job in students}
    for rows in plans.LENGTHS.values():
        for row, times in zip(rows, (1, 2, 4, 8)):
            assert steps[row] == times * steps[rows[0]]


@pytest.mark.parametrize("plan", ["reduced", "full"])
def test_what_a_plan_adds_to_a_row(place, plan):
    args = get_args(place)
    args.plan, args.data = plan, ["camvid=D"]
    jobs = [job for job in suite.plan_jobs(args) if job.row[1:2] == ("methods",)]
    fewer = {job.row[2] for job in jobs if "--cirkd-pixel-contrast" in job.argv}
    assert fewer == ({"cirkd"} if plan == "reduced" else set())


def test_later_flags_win():
    assert suite.merged(
        "x.py", "--a 1 2 --b", "--c 'd e' --a 3"
    ) == "x.py --a 3 --b --c".split() + ["d e"]


def test_data_that_no_plan_knows(place):
    with pytest.raises(UserError, match="--data cityscapes=D: NAME=DIR, with NAME one of camvid"):
        suite.check(suite.get_args(["--data", "cityscapes=D", "--photos", "P"]))
    with pytest.raises(UserError, match="--data camvid=D: camvid is named more than once"):
        suite.check(suite.get_args(["--data", "camvid=D", "camvid=E", "--photos", "P"]))
    with pytest.raises(UserError, match="--data is missing: NAME=DIR, with NAME one of camvid"):
        suite.check(suite.get_args(["--photos", "P"]))
    with pytest.raises(UserError, match="--photos is missing"):
        suite.check(suite.get_args(["--data", "camvid=D"]))
    weights = "--data camvid=D --teacher-init a --student-init b".split()
    with pytest.raises(UserError, match="--photos is missing"):
        suite.check(suite.get_args(weights))
    weights += ["--only", "main", "labels"]
    with pytest.raises(UserError, match="D: no such folder"):
        suite.check(suite.get_args(weights))
    suite.check(suite.get_args([*weights, "--list"]))
    with pytest.raises(UserError, match="P: no such folder"):
        get_args(place, "--photos", "P")


def test_tables_replace_nothing_else(place):
    (place / "mine.md").write_text("# Mine\n")
    for name in ("mine.md", "data"):
        with pytest.raises(UserError, match=f"--results .*{name}: no file of the suite's"):
            get_args(place, "--results", f"{place}/{name}")


def test_drawn_scenes_need_nothing(tmp_path, monkeypatch):
    """No folder, no photos, no encoders; scored by one protocol."""
    rows = dict(main=["alone", "transkd-base"])
    data = dict(scenes=dict(teacher="--max-iters 2", student="--max-iters {steps}", steps=2))
    data["scenes"] |= dict(every=0)
    plan = plans.SCENES | dict(teacher="nano", rows=rows, data=data)
    monkeypatch.setattr(suite, "PLANS", dict(mine=plan))
    argv = ["--plan", "mine", "--out-dir", str(tmp_path), "--jobs", "2"]
    suite.main(suite.get_args([*argv, "--cache-dir", str(tmp_path / "cache")]))
    text = (tmp_path / "results.md").read_text()
    assert "## scenes: nano from nano\n" in text and "### Few labels" not in text
    assert "| alone | 3 | " in text and "| transkd-base | 3 | " in text
    assert len(list(tmp_path.rglob("metrics.json"))) == 1 + 2 * 3
    assert not list(tmp_path.rglob("paper.json")) and not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="--data scenes=D: NAME=DIR, with NAME one of scenes"):
        suite.check(suite.get_args([*argv, "--data", "scenes=D"]))


def test_what_is_wanted_and_what_that_needs(place):
    """A group of rows, the teacher, its encoder; not the student's where no row starts from it."""
    args = get_args(place, "--only", "methods")
    args.data = ["camvid=D"]
    jobs = suite.wanted(suite.plan_jobs(args), args)
    rows = [job.row[1:3] for job in jobs]
    methods_ = [("methods", row) for row in plans.ROWS["methods"]]
    teacher = ("teacher", "teacher")
    assert rows == [(), teacher, teacher, *methods_]  # it twice: by the paper's protocol too
    assert {job.row[0] for job in jobs[1:]} == {"camvid"}


def test_weights_that_are_there_are_not_trained(place):
    args = get_args(place, "--teacher-init", "hub/b2", "--student-init", "b0.pth", "--only", "main")
    jobs = suite.plan_jobs(args)
    assert not any(job.script == "pretrain" for job in suite.wanted(jobs, args))
    teacher, alone = (next(j for j in jobs if j.row[2] == row) for row in ("teacher", "alone"))
    assert "hub/b2" in teacher.argv and not teacher.needs and not alone.needs
    assert "b0.pth" in next(j for j in jobs if j.row[2] == "alone, pre-trained").argv


# ------------------------------------------------------------------------------------------------
# runs


def test_stopped_and_run_again(place, monkeypatch):
    """Interrupted in its first run, it goes on; a third time there is nothing to do."""
    child = command(*words(place, "--only", "labels"), script="suite.py")
    for line in child.stdout:
        if "begins" in line:
            break
    child.send_signal(signal.SIGTERM)
    said, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM and not errors, errors
    assert "the same command resumes" in said and not list((place / "out").rglob("metrics.json"))
    rows = {k: suite.ROWS["labels"][k] for k in list(suite.ROWS["labels"])[1:3]}
    monkeypatch.setattr(suite, "ROWS", suite.ROWS | {"labels": rows})
    suite.main(get_args(place, "--only", "labels", "--jobs", "2"))
    found = {p: p.stat().st_mtime_ns for p in (place / "out").rglob("*.json")}
    assert len(found) == 1 + 1 + 1 + 2 + 1  # encoder, teacher, its paper.json, two rows, data.json
    assert not list((place / "out").rglob("last.pt"))
    text = (place / "docs/results.md").read_text()
    assert "| transkd-base, 10 % of the labels | 1 |" in text and f"{place}/data" not in text
    suite.main(get_args(place, "--only", "labels"))
    suite.main(get_args(place, "--only", "ablations", "--no-runs"))  # nothing is forgotten
    assert found == {p: p.stat().st_mtime_ns for p in (place / "out").rglob("*.json")}
    assert (place / "docs/results.md").read_text() == text
    (place / "other").mkdir()
    args = get_args(place, "--only", "labels", "--data", f"folder={place}/other")
    with pytest.raises(UserError, match="folder .*/other: .*out has results from .*/data. Pass an"):
        suite.main(args)
    (place / "out/data.json").write_text('{"folder": "/data",}')
    with pytest.raises(UserError, match="out/data.json: not JSON"):
        suite.main(get_args(place, "--only", "labels"))
    (place / "out/data.json").unlink()
    made = next((place / "out").rglob("labels-*/0/metrics.json"))
    tree = json.loads(made.read_text())
    made.write_text(json.dumps(tree | {"checksum of names and sizes": "of others"}))
    with pytest.raises(UserError, match="labels-.*/0 is a run with other data files than .*/teach"):
        suite.main(get_args(place, "--only", "labels"))
    made.write_text(json.dumps(tree))
    monkeypatch.chdir(place)
    suite.main(get_args(place, "--only", "labels", "--out-dir", "out"))  # the same, relative
    changed = dict(plans.TINY, train="--batch-size 2 --crop-size 64")
    monkeypatch.setattr(suite, "PLANS", dict(tiny=changed))
    with pytest.raises(UserError, match="made by another command than the plan's now"):
        suite.main(get_args(place, "--only", "labels"))


def test_a_run_that_fails_is_told_and_what_waits_for_it_does_not_begin(place, capsys):
    (place / "data/labels/p0.png").unlink()
    with pytest.raises(UserError, match="10 runs are missing"):
        suite.main(
            get_args(
                place, "--only", "labels", "--teacher-init", "scratch", "--student-init", "scratch"
            )
        )
    said = capsys.readouterr().out
    assert "FAILED (2)" in said and "have no label: p0" in said
    assert said.count("begins") == 3  # the teacher, and the students that need none
    assert "## folder" not in (place / "docs/results.md").read_text()


def test_graphs_are_those_of_every_training(place):
    jobs = suite.plan_jobs(get_args(place, "--graphs"))
    assert all(job.own.count("--graphs") == (job.script != "eval") for job in jobs)
    assert not any("--graphs" in job.argv for job in jobs)
    assert not any("--graphs" in job.own for job in suite.plan_jobs(get_args(place)))


def test_workers_are_those_of_every_training(place, monkeypatch):
    """Not of the scoring, which has none; and not of the published command."""
    jobs = suite.plan_jobs(get_args(place, "--workers", "0"))
    for job in jobs:
        assert job.own.count("--workers") == (job.script != "eval")
        assert "--workers" not in job.argv
    assert not any("--workers" in job.own for job in suite.plan_jobs(get_args(place)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel, "spare_cores", lambda: 14)
    assert [get_args(place, "--jobs", str(n)).workers for n in (1, 4, 20)] == [14, 3, 1]
    assert get_args(place, "--workers", "0").workers == 0


def test_rows_that_a_plan_has_not():
    with pytest.raises(UserError, match="--only long: no rows of plan scenes"):
        suite.main(suite.get_args(["--plan", "scenes", "--only", "long"]))


def test_a_run_that_ends_while_it_is_stopped_is_done(tmp_path, monkeypatch):
    class Ended:
        returncode = 0
        wait = terminate = lambda self: 0

    runs = {("teacher", "teacher"): [dict(miou=0.6)]}
    (job,) = jobs_of(tmp_path / "here", runs)
    (job.folder / "metrics.json").rename(tmp_path / "later")
    signals = []

    def begin(job, env):
        (job.folder / "last.pt").write_text("")
        signals.append(15)
        (tmp_path / "later").rename(job.made)
        return Ended()

    monkeypatch.setattr(suite, "begin", begin)
    Ended.poll = lambda self: None
    assert suite.run_jobs([job], 1, signals) == [] and not (job.folder / "last.pt").exists()


def test_list(place, capsys):
    suite.main(get_args(place, "--list"))
    lines = capsys.readouterr().out.splitlines()
    args = get_args(place)
    assert len(lines) == len(suite.wanted(suite.plan_jobs(args), args))
    assert all(line.startswith("  python ") for line in lines)
    assert not (place / "out").exists() and not (place / "docs").exists()


# ------------------------------------------------------------------------------------------------
# tables


def write_run(folder, miou, seconds=60.0, paper=None, curve=(), steps=10):
    folder.mkdir(parents=True)
    student = dict(miou=miou, pixel_acc=miou / 2, boundary_iou=miou / 4)
    student |= dict(seconds=seconds, steps=steps)
    metrics = dict(student=student, miou=miou, hardware="a device", torch="2.6")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    records = [dict(stage="teacher", step=0, miou=0.9), dict(stage="student", step=1, ce=2.0)]
    records += [dict(stage="student", step=s, miou=m) for s, m in curve]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if paper is not None:
        (folder / "paper.json").write_text(json.dumps(dict(miou=paper)))


NETS = dict(teacher="b0", student="nano")  # of a plan


def jobs_of(tmp_path, runs):
    """{(group, row): [keywords of write_run, a dict a seed]} -> jobs that are done."""
    jobs = []
    for (group, row), seeds in runs.items():
        for seed, facts in enumerate(seeds):
            folder = tmp_path / f"{group}-{row}" / str(seed)
            write_run(folder, **facts)
            key = ("camvid", group, row, seed)
            argv = ["train.py", "--seed", str(seed)]
            jobs.append(suite.Job(argv, [], folder, key))
    return jobs


def test_tables(tmp_path):
    a, b = [0.20, 0.24, 0.22], [0.30, 0.32, 0.37]
    runs = {
        ("teacher", "teacher"): [dict(miou=0.6, paper=0.5, steps=20)],
        ("main", "alone"): [dict(miou=m, seconds=90) for m in a],
        ("main", "alone, twice the steps"): [dict(miou=0.4, steps=20)],
        ("main", "transkd-base"): [dict(miou=m, paper=m + 0.1) for m in b],
        ("main", "transkd-base, twice the steps"): [dict(miou=0.55, steps=20)],
        ("methods", "kd"): [dict(miou=0.1)],
    }
    jobs = jobs_of(tmp_path, runs)
    jobs.append(suite.Job(["train.py"], [], tmp_path / "none", jobs[-1].row))
    results.write(tmp_path / "docs/r.md", dict(note="A note.", **NETS), jobs)
    text = (tmp_path / "docs/r.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, teacher, alone, longer, base, longer_base, *again, kd = rows
    assert again == [head, teacher, alone, base]  # to compare the other methods with
    assert [r[3] for r in (teacher, alone, longer, longer_base)] == ["", "", "", "75%"]
    assert teacher[:3] == ["teacher", "1", "60.0"] and teacher[6] == "50.0"
    assert alone[:4] == ["alone", "3", f"22.0 ± {100 * statistics.stdev(a):.1f}", ""]
    assert alone[6:] == ["", "1.5"]
    way = (statistics.mean(b) - 0.22) / (0.6 - 0.22)
    assert base[2:4] == [f"33.0 ± {100 * statistics.stdev(b):.1f}", f"{way:.0%}"]
    assert base[6] == f"43.0 ± {100 * statistics.stdev(b):.1f}"
    assert kd[1:4] == ["1", "10.0", f"{-0.10 / 0.40:.0%}"]  # from seed 0 alone, 20.0
    assert "A note." in text and text.count("a device, torch 2.6") == 1
    assert text.count("python train.py --seed 0") == len(runs) and "--seed 1" not in text


def test_no_way_where_the_teacher_is_no_better_than_the_student_alone():
    def runs(miou):
        facts = dict(pixel_acc=0.5, boundary_iou=0.5, paper=None, seconds=60, steps=1)
        return [facts | dict(miou=miou, seed=0)]

    for best, way in ((0.4, ""), (0.5, ""), (0.9, "25%")):
        rows = dict(teacher=runs(best), alone=runs(0.5), kd=runs(0.6))
        table = results.student_table(rows, {1: rows["alone"]}, rows["teacher"])
        assert table[-1].startswith(f"| kd | 1 | 60.0 | {way} | ")


def test_the_gap_begins_at_the_student_alone_of_the_same_seeds():
    def runs(**miou):
        facts = dict(pixel_acc=0.5, boundary_iou=0.5, paper=None, seconds=60, steps=1)
        return [facts | dict(miou=v, seed=int(seed[1:])) for seed, v in miou.items()]

    rows = dict(teacher=runs(s0=0.6), alone=runs(s0=0.2, s1=0.3, s2=0.4), kd=runs(s0=0.2))
    rows |= dict(at=runs(s1=0.4, s2=0.5), skd=runs(s7=0.45))  # without a partner: all seeds
    table = results.student_table(rows, {1: rows["alone"]}, rows["teacher"])
    assert [line.split(" | ")[3] for line in table[2:]] == ["", "", "0%", "40%", "50%"]


def test_sections_of_other_data_sets_stay(tmp_path):
    """What was written stays to the letter; a data set that ran again has its new section."""
    path, runs = tmp_path / "r.md", {("teacher", "teacher"): [dict(miou=0.6)]}
    for dataset, note in (("camvid", "First."), ("nyuv2", "Second.")):
        jobs = jobs_of(tmp_path / dataset, runs)
        for job in jobs:
            job.row = (dataset, *job.row[1:])
        results.write(path, dict(note=note, **NETS), jobs)
        results.write(path, dict(note=note, **NETS), jobs)
    text = path.read_text()
    assert list(results.written(path)) == ["camvid: nano from b0", "nyuv2: nano from b0"]
    assert text.startswith(results.INTRODUCTION) and text.count("# Results\n") == 1
    results.write(path, dict(note="Third.", **NETS), jobs)
    assert path.read_text() == text.replace("Second.", "Third.") != text


def test_curve_of_several_seeds(tmp_path):
    """Time is that of training, in proportion to the steps; the teacher's score is not on it."""
    curves = [[(5, 0.2), (10, 0.4)], [(5, 0.3), (8, 0.9), (10, 0.6)]]
    runs = [dict(miou=0.5, seconds=s, curve=c) for s, c in zip((60, 180), curves)]
    teacher = {("teacher", "teacher"): [dict(miou=0.6)]}
    jobs = jobs_of(tmp_path, teacher | {("main", "alone"): runs})
    rows = results.collect(jobs)["camvid"]["main"]["alone"]
    minutes, shares = results.curve(rows)
    assert minutes == pytest.approx([1, 2]) and shares == pytest.approx([25, 50])
    pytest.importorskip("matplotlib")
    results.write(tmp_path / "r.md", dict(note="", **NETS), jobs)
    assert "![mIoU against training time](r-camvid-nano.png)" in (tmp_path / "r.md").read_text()
    assert catalog.read_image(tmp_path / "r-camvid-nano.png").std() > 10


def test_no_plot_of_one_time(tmp_path):
    """Where all trainings have one length and were scored at their end, there is nothing to see."""
    runs = {("teacher", "teacher"): [dict(miou=0.6)], ("main", "alone"): [dict(miou=0.5)]}
    results.write(tmp_path / "r.md", dict(note="", **NETS), jobs_of(tmp_path, runs))
    assert "![" not in (tmp_path / "r.md").read_text()
    assert not (tmp_path / "r-camvid-nano.png").exists()


def test_tables_of_classifiers(place, monkeypatch):
    """By methods, from a teacher that is trained once, between MiTs and between ViTs."""
    monkeypatch.setattr(suite, "CLASSIFIERS", {"alone": "", "kd": "--method kd"})
    args = get_args(place, "--only", "photos", "--jobs", "2")
    args.data = []
    suite.main(args)
    text = (place / "docs/results.md").read_text()
    for pair in ("nano from nano", "vit_tiny from vit_tiny"):
        part = text.split(f"## classifiers: {pair}\n")[1].split("###")[0]
        rows = [line.split(" | ")[0].strip("| ") for line in part.splitlines() if "|" in line]
        assert rows[2:] == ["teacher", "alone", "kd"]
    runs = json.loads((place / "out/photos/nano-from-nano-kd/0/metrics.json").read_text())
    assert f"| kd | 1 | {100 * runs['top1']:.1f} | " in text
    assert text.count("- vit_tiny: top-1 ") == 1  # in its own section
    assert len(list((place / "out/pretrained").iterdir())) == 2


def test_columns_are_those_of_the_head():
    run = dict(miou=0.1, pixel_acc=0.5, boundary_iou=0.25, paper=None, seconds=60, steps=1, seed=0)
    head, _, row = results.student_table(dict(kd=[run]), {}, None)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)]
    found = dict(zip(*cells))
    assert (found["mIoU"], found["pixels"], found["boundary IoU"]) == ("10.0", "50.0", "25.0")
