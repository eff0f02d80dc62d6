"""What a training run does step by step, against a few lines of plain torch."""

import pytest
import torch
import torch.nn.functional as F
from test_train import run, weights, words

import augment
import loop
import model
import settings
import train
from step import Teacher

MORE = "--method none --class-weights paper --crop-size 64 --max-iters 3 --lr 1e-2 --warmup 0.34"
TINY_CLIP = 1e-5  # gradients as small as AdamW's epsilon: none counts by its sign alone


def open_run(folder, out, *more):
    args = train.get_args(words(folder, out, *more))
    train.resolve(args)
    return train.open_run(args)


def plain_steps(run_, rates, clip):
    """Weighted cross-entropy of all parts of a batch, clip, AdamW, a step a rate: the net's tensors
    and the norms of the gradients."""
    args, norms = run_.args, []
    torch.manual_seed(args.seed)
    net = model.build("nano", 3).to(memory_format=torch.channels_last).train()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices), dict(params=others, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr=1, weight_decay=args.weight_decay)
    labels = [torch.tensor(run_.train.label(i)).flatten() for i in range(len(run_.train))]
    pixels = torch.cat(labels).bincount(minlength=256)[:3]
    class_weights = 1 / torch.log(1.10 + pixels / pixels.sum())
    batches = train.make_batches(run_, run_.train, args.batch_size)
    for step, rate in enumerate(rates):
        parts = [batches[step * args.accumulate + k] for k in range(args.accumulate)]
        labels = [part["label"].long() for part in parts]
        counts = [class_weights[y[y != 255]].sum() for y in labels]
        assert len(parts) == 1 or counts[0] != counts[1]
        for k, part in enumerate(parts):
            images, _ = augment.device_batch(part, "cpu", run_.facts["mean"], run_.facts["std"])
            torch.manual_seed(hash((args.seed, step, k)))
            logits = F.interpolate(net(images).logits, size=labels[k].shape[1:], mode="bilinear")
            weighted = dict(weight=class_weights, ignore_index=255, reduction="sum")
            (F.cross_entropy(logits, labels[k], **weighted) / sum(counts)).backward()
        norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
        norms.append(norm.item())
        for p in net.parameters():
            p.grad *= clip / norm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict(), norms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_plain_torch(accumulate, folder, tmp_path, monkeypatch):
    norms, real = [], loop.update

    def spy(learner, *more):
        grads = [p.grad for p in learner.parameters()]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        real(learner, *more)

    monkeypatch.setattr(loop, "update", spy)
    more = [
        *MORE.split(),
        "--weight-decay",
        "0.1",
        "--clip",
        str(TINY_CLIP),
        "--accumulate",
        str(accumulate),
    ]
    run_ = open_run(folder, tmp_path / "a", *more)
    want, want_norms = plain_steps(run_, [5e-3, 1e-2, 5e-3], TINY_CLIP)
    run(folder, tmp_path / "a", *more)
    assert norms == pytest.approx(want_norms, rel=1e-3)
    torch.manual_seed(0)
    start, got = model.build("nano", 3).state_dict(), weights(tmp_path / "a")
    assert got["head.norm.num_batches_tracked"] == 3 * accumulate
    names = [name for name in want if "num_batches" not in name and "running" not in name]
    for kind in (1, 2):  # vectors, which do not decay, and matrices
        pick = [name for name in names if (want[name].ndim > 1) == (kind > 1)]
        w, g, s = (torch.cat([x[name].flatten() for name in pick]) for x in (want, got, start))
        assert (g - w).norm() < 0.01 * (w - s).norm()


def test_recipe_paper_decays_everything_and_changes_the_rate_once_an_epoch(
    folder, tmp_path, monkeypatch
):
    seen = []
    real = loop.run_steps

    def spy(run, stage, parts, batches, terms, schedule, *more):
        seen.append((schedule, parts["optimizer"].param_groups))
        return real(run, stage, parts, batches, terms, schedule, *more)

    monkeypatch.setattr(loop, "run_steps", spy)
    monkeypatch.setattr(settings, "fast_dtype", lambda device: "bfloat16")
    small = "--student nano --recipe paper --method none --max-iters 1 --dataset folder".split()
    where = ["--data-dir", str(folder), "--out-dir", str(tmp_path / "out")]
    args = train.get_args([*small, *where])
    train.main(args)
    ((schedule, groups),) = seen
    assert schedule["paper_epoch"] == 3  # steps of 2 through 6 images
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.01
    assert args.dtype == "float32"


def test_a_teachers_void_is_cut_off():
    net = model.build("nano", 4).eval()
    facts = dict(mean=[0.0] * 3, std=[1.0] * 3, void=3)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = net(images).logits[:, :3]
    assert torch.equal(Teacher(net, facts, facts["mean"], facts["std"], True)(images).logits, want)
