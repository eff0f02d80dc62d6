"""
What training loops share: the run and its files, the steps of a stage, signals, progress lines.

A stage here is the training of one net, of which train.py has up to three. It saves all it needs to
continue (last.pt) every --save-every seconds, and when a signal asks it to stop. As all randomness
of a step comes from the seed and the step's number, a resumed run is the same as one that was never
interrupted.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import files
import model
import parallel
from eval import autocast
from files import UserError
from settings import recorded
from step import Graphed, learning_rate, parameter_groups, update
from timing import hardware

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------
# a run and its files


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the stages of a training run share."""

    args: argparse.Namespace
    out: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    results: dict = dataclasses.field(default_factory=dict)  # stage -> metrics, if finished
    inits: dict = dataclasses.field(default_factory=dict)  # stage -> what it started from
    data: dict = dataclasses.field(default_factory=dict)  # by which --resume recognises the data
    state: dict | None = None  # last.pt, while a stage is to be resumed
    signals: list = dataclasses.field(default_factory=list)  # received

    def print(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def log(self, **record):
        if self.rank == 0:
            path = self.out / "log.jsonl"
            with files.writing(path), open(path, "a") as f:
                f.write(json.dumps(record) + "\n")


def start(args, batch_sizes, results):
    """Join the processes of a run: dict(out, device, rank, world), these fields of a Run.

    UserError if a batch size does not divide by processes x --accumulate, or if --out-dir holds a
    run (`results`: the files that one leaves there) that is not to be resumed.
    """
    device = parallel.start(args.device)
    rank, world = parallel.rank_and_world()
    if rank == 0 and not parallel.has_native(device, args.dtype):
        print(f"!!! This {device.type} emulates {args.dtype}: --dtype float32 is many times faster")
    parallel.keep_memory()
    if args.graphs and (device.type != "cuda" or world > 1):
        raise UserError("--graphs: CUDA graphs are for a GPU, and a single process")
    if args.compile and device.type == "cpu":
        check_compiler()
    for batch in batch_sizes:
        if batch % (world * args.accumulate):
            raise UserError(
                f"batch size {batch} does not divide by {world} processes x {args.accumulate} "
                "parts (--batch-size counts the images of all processes together)"
            )
    out = Path(args.out_dir)
    found = [f for f in ("last.pt", *results, "log.jsonl") if (out / f).exists()]
    files.check_folder("--out-dir", out)
    if found and not args.resume:
        raise UserError(f"{out} holds a run ({found[0]}): pass --resume, or another --out-dir")
    if "last.pt" not in found and results[-1] in found:
        raise UserError(
            f"{out} holds {results[-1]} but no last.pt to go on from: pass another --out-dir"
        )
    return dict(out=out, device=device, rank=rank, world=world)


def check_compiler():
    """UserError where torch.compile would end in a page of traceback."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if sys.platform != "win32" and not shutil.which(shlex.split(name)[0]):
        raise UserError(f"--compile needs a C++ compiler: no {name} here (CXX names another)")


def claim(out, rank):
    """Make --out-dir and lock it against other runs until this process ends, however it ends.

    UserError if another run uses it. Where file locks are unavailable, nothing is locked.
    """
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0 and fcntl:
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # never closed: that would unlock it
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for half in out.glob("last.pt.tmp*"):  # left by a run killed while saving
                half.unlink()
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                reason = "another run is at work there: pass another --out-dir, or wait for it"
                raise UserError(f"{out}: {reason}") from e


def resume(run):
    """Read last.pt: the results of finished stages and the state of the interrupted one."""
    path, log = run.out / "last.pt", run.out / "log.jsonl"
    if not path.exists():
        if run.rank == 0:
            log.unlink(missing_ok=True)
        run.print(f"{path} is not there: nothing to resume, starting from the beginning")
        return
    state = files.load_tensors(path)
    if not isinstance(state, dict) or state.get("format") != "run-state-2":
        raise UserError(f"{path}: not the state of a run; was another file put in its place?")
    check_same(run, state)
    run.results, run.inits = state["results"], state["inits"]
    run.state = state if state["stage"] else None
    if run.rank == 0 and log.exists():  # drop what came after the saved step
        keep = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line cut off by a crash
                record = json.loads(line)
                again = "lr" not in record and record["step"] == state.get("total")  # last score
                before = record["step"] <= state["step"] and not again
                if record["stage"] in run.results or before:
                    keep.append(line + "\n")
        files.write_text(log, "".join(keep))


def check_same(run, state):
    """UserError that names all settings and data that differ from those of the run in last.pt."""
    then, changes = state.get("data", {}), []
    pairs = {files.as_flag(k): (state["settings"].get(k), v) for k, v in recorded(run.args).items()}
    pairs |= {f"the data are others: {k}": (then.get(k, v), v) for k, v in run.data.items()}
    pairs = {what: both for what, both in pairs.items() if both[0] != both[1]}
    for what, both in pairs.items():
        if what.endswith(": classes"):
            both = [f"{len(names)} ({files.some(names)})" for names in both]
        changes.append("{} was {}, now it is {}".format(what, *both))
    if changes:
        raise UserError(f"--resume: {'; '.join(changes)}")


def check_same_net(run, stage, net, source):
    """UserError if a stage is done, and another net lies in its place when the run is resumed."""
    then = run.results.get(stage, {}).get("weights")
    if then and then != model.fingerprint(net):
        raise UserError(f"--resume: {source} holds other weights now than when this run began")


def save_state(run, stage=None, step=0, parts=None, total=None):
    """Write last.pt, all that --resume needs. parts, within a stage: name -> stateful object."""
    if run.rank == 0:
        tree = dict(format="run-state-2", stage=stage, step=step, results=run.results, total=total)
        tree |= dict(settings=recorded(run.args), inits=run.inits, data=run.data)
        tree |= {name: part.state_dict() for name, part in (parts or {}).items()}
        files.save_tensors(run.out / "last.pt", tree)


def save_metrics(run, tree):
    """Write metrics.json: `tree`, the results of all stages, the settings, the hardware."""
    tree = tree | run.results | dict(settings=recorded(run.args))
    tree |= dict(hardware=hardware(run.device), torch=torch.__version__)
    tree |= {what: value for what, value in run.data.items() if what.startswith("checksum")}
    files.write_text(run.out / "metrics.json", json.dumps(tree, indent=1) + "\n")


def catch_signals(run):
    """SIGTERM and the first Ctrl-C: finish the step, save, exit. A second Ctrl-C exits at once."""

    def caught(number, frame):
        if number == signal.SIGINT and number in run.signals:
            raise KeyboardInterrupt
        run.signals.append(number)

    signal.signal(signal.SIGTERM, caught)
    signal.signal(signal.SIGINT, caught)


# ------------------------------------------------------------------------------------------------
# the steps of a stage


def freeze(net, device):
    net.zero_grad()  # free what `update` kept
    net.to(device).to(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


def trained_parts(run, learner, teacher, lr, decay_everything=False):
    """The parts of a stage that training changes: learner (on its device), optimizer, scaler.

    With several processes, the learner's batch norms and drops become those of the whole batch.
    --compile compiles its calls in a step and the teacher's, if there is one: they have one size in
    a stage, and each stage has graphs of its own. Scoring, at any size, is not compiled.
    """
    learner = learner.to(run.device).to(memory_format=torch.channels_last)
    if run.world > 1:
        learner = parallel.share_statistics(learner, run.device)
    if run.args.compile:
        run.print("the first step compiles, which can take minutes")
        for module in filter(None, (learner, teacher)):
            module.compile(dynamic=False)
    groups = parameter_groups(learner, run.args.weight_decay, decay_everything)
    return dict(
        learner=learner,
        optimizer=torch.optim.AdamW(groups, lr=lr, fused=True),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.args.dtype == "float16"),
    )


def run_steps(run, stage, parts, batches, prepare, frozen, schedule, score, count=None):
    """The steps of a stage, from the first or from that in run.state, to schedule["total"].

    parts: what `trained_parts` returns and perhaps ema, a running average of learner.student;
    batches: augment.Batches, `accumulate` of them per step; prepare(batch): images and labels, on
    the device; frozen: the step.Teacher, or None; schedule: arguments of step.learning_rate;
    score(net, step): for --eval-every; count(batches of a step), if given: step.mean_count of them.
    Returns the seconds it took, interrupted runs included, scoring excluded.
    """
    args, total = run.args, schedule["total"]
    log = TrainingLog(run, stage, total, batches.batch_size * args.accumulate)
    parts = parts | dict(watch=log)  # under this name in last.pt
    first = restore(run, stage, parts)
    learner, optimizer, scaler = parts["learner"], parts["optimizer"], parts["scaler"]
    wrapped = parallel.wrap(learner, run.device)

    def forward_backward(images, labels, *counted):
        options = dict(count=counted[0]) if counted else {}
        with autocast(run.device, args.dtype):
            terms = wrapped(images, labels, frozen and frozen(images), **options)
        scaler.scale(sum(terms.values()) / args.accumulate).backward()
        return {name: term.detach() for name, term in terms.items()}

    if args.graphs:
        forward_backward = Graphed(forward_backward, run.device)
    numbers = range(first * args.accumulate, total * args.accumulate)
    batches = load(batches, numbers, args.workers, run.device)
    learner.train()
    log.begin(first)
    saved = time.time()
    for step in range(first, total):
        lr = learning_rate(step, **schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches_of_step = [next(batches) for _ in range(args.accumulate)]
        counted = [count(batches_of_step)] if count else []
        for k, batch in enumerate(batches_of_step):
            torch.manual_seed(hash((args.seed, step, k)))  # the same in all processes: nets.draws
            syncs = run.world == 1 or k == args.accumulate - 1  # DDP: once per step
            with contextlib.nullcontext() if syncs else wrapped.no_sync():
                terms = forward_backward(*prepare(batch), *counted)
            log.add(step, terms)
        update(learner, optimizer, scaler, args.clip, keep=args.graphs)
        if "ema" in parts:
            parts["ema"].update_parameters(learner.student)
        stopping, due = parallel.any_process(run.signals, log.due(step))
        if due:
            log.report(step, lr)
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < total:
            with log.paused():
                score(parts["ema"].module if "ema" in parts else learner.student, step + 1)
        if stopping or time.time() - saved > args.save_every:
            log.check()
            save_state(run, stage, step + 1, parts, total)
            saved = time.time()
        if stopping:
            run.print(f"stopped after step {step + 1} of {stage}; the same with --resume goes on")
            raise SystemExit(128 + (run.signals or [signal.SIGTERM])[0])
    log.check()
    return log.seconds()


def restore(run, stage, parts):
    """Load run.state, if it is of this stage, into its parts; returns the first step to take."""
    if not run.state or run.state["stage"] != stage:
        return 0
    for name, part in parts.items():
        part.load_state_dict(run.state[name])
    first, run.state = run.state["step"], None
    run.print(f"going on from step {first}")
    return first


def load(batches, numbers, workers, device):
    """Yield the host batches of these numbers, in order, prepared by worker processes.

    Raises the UserError that one may be, see augment.Batches.
    """
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_sigterm_to_the_run,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def leave_sigterm_to_the_run(_):
    """In a worker process: torchrun and timeout send it to all, and the run needs its last batches.

    The run ends its workers when it has saved.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------
# progress lines


class TrainingLog:
    """Sums the loss terms on the device, and prints and logs their means every few seconds."""

    def __init__(self, run, stage, total, batch_size):
        self.run, self.stage, self.total, self.batch_size = run, stage, total, batch_size
        self.names, self.sums, self.bad = [], 0, None
        self.before = 0.0  # seconds that the stage took before it was interrupted

    def state_dict(self):
        return dict(seconds=self.seconds())

    def load_state_dict(self, state):
        self.before = state["seconds"]

    def begin(self, first):
        self.first = self.reported_step = first
        self.start = self.reported = time.time()

    def add(self, step, terms):
        if self.names not in ([], list(terms)):
            both = f"{', '.join(self.names)}, in step {step} {', '.join(terms)}"
            raise UserError(f"{self.stage}: the loss terms were {both}: every step needs the same")
        self.names = list(terms)
        values = torch.stack([*terms.values()])
        if self.bad is None:  # first step at which a term was not finite
            self.bad = torch.full_like(values, math.inf)
        self.bad = torch.where(values.isfinite(), self.bad, self.bad.clamp(max=step))
        self.sums = self.sums + values

    def check(self):
        """UserError if a term was not finite. Called now and then only: it waits for the device."""
        for name, step in zip(self.names, [] if self.bad is None else self.bad.tolist()):
            if step < math.inf:
                raise UserError(
                    f"{self.stage}: the loss term '{name}' was not finite at step {int(step)}. Try "
                    "a lower --lr or --dtype bfloat16 in a new --out-dir; --teacher-ckpt takes a "
                    "teacher that is trained"
                )

    def seconds(self):
        return round(self.before + time.time() - self.start, 1)

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside does not count as training."""
        paused = time.time()
        yield
        self.start += time.time() - paused
        self.reported += time.time() - paused

    def due(self, step):
        """Whether it is time for a line: all processes report as soon as it is in one of them.

        Also calls `check`: every 20 steps, or at every step on a CPU, which needs no waiting.
        """
        if self.run.device.type == "cpu" or (step + 1) % 20 == 0:
            self.check()
        return time.time() - self.reported >= self.run.args.log_every or step + 1 == self.total

    def report(self, step, lr):
        now, done = time.time(), step + 1
        steps = done - self.reported_step
        means = parallel.process_mean(self.sums) / (steps * self.run.args.accumulate)
        terms = dict(zip(self.names, means.tolist()))
        speed = steps * self.batch_size / (now - self.reported)
        eta = clock((self.total - done) * (now - self.start) / (done - self.first))
        losses = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        progress = f"{done:6d}/{self.total} {100 * done // self.total:3d}%"
        line = f"{self.stage:7s} {progress}  {losses}  lr {lr:.1e}  {speed:.0f} img/s  eta {eta}"
        self.run.print(line)
        self.run.log(stage=self.stage, step=done, **terms, lr=lr, img_s=round(speed, 1))
        self.reported, self.reported_step, self.sums = now, done, 0


def clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
