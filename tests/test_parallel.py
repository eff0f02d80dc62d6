"""Two processes against one that sees the whole batch."""

import os
import socket
import time

import numpy as np
import pytest
import torch

import methods
import parallel
import timing
from files import UserError
from nets import Output

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EVERY = [name for name in methods.METHODS if name != "none"]
STUDENT, TEACHER, WIDTHS, K = (4, 6, 8, 16), (6, 8, 10, 12), (5, 7), 4
# as large as the other terms, so that they show in the gradients
OPTIONS = {
    "manifold": dict(manifold_patch_weight=0.1, manifold_sample_weight=10.0),
    "c2vkd": dict(c2vkd_graph=1e2),
    "cirkd": dict(cirkd_pixel_queue=40, cirkd_region_queue=3, cirkd_pixel_weight=1.0),
    "tat": dict(tat_patch=4, tat_anchors=8),
}


def filled(norm):
    torch.manual_seed(1)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    return norm


def maps(dtype):
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 5, 7) * torch.rand(6, 1, 1) + 3).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.randn_like(x)


def half(rank, dtype):
    """What one of two processes makes of its half: output, gradients, running statistics."""
    net = torch.nn.Sequential(filled(torch.nn.BatchNorm2d(6)))
    norm = parallel.share_statistics(net, torch.device("cpu"))[0]
    assert type(norm) is parallel.GlooBatchNorm
    x, grad = (t[2 * rank : 2 * rank + 2] for t in maps(dtype))
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    grads = [p.grad for p in norm.parameters()]
    tensors = [y.detach(), x.grad, *grads, norm.running_mean, norm.running_var]
    return [t.float().numpy() for t in tensors]


def output(channels, width, seed):
    """An Output of random numbers for four images of 64x96."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, c, 16 >> i, 24 >> i, generator=g) for i, c in enumerate(channels)]
    tokens = [torch.randn(4, m[0, 0].numel(), m.shape[1], generator=g) for m in maps]
    logits, decoded = (torch.randn(4, c, 16, 24, generator=g) for c in (K, width))
    return Output(logits, tuple(maps), tuple(tokens), decoded)


def taught(name, rank, world=2):
    """What one of `world` processes makes of its images: terms, gradients, the method's state."""
    g = torch.Generator().manual_seed(2)
    images = torch.randn(4, 3, 64, 96, generator=g)
    labels = torch.randint(K, (4, 16, 24), generator=g)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[1, 9:] = 255  # the processes have unlike numbers of labelled pixels

    def share(x):
        if isinstance(x, torch.Tensor):
            return x.chunk(world)[rank]
        return type(x)(*map(share, x)) if isinstance(x, Output) else tuple(map(share, x))

    student, teacher = share(output(STUDENT, WIDTHS[0], 0)), share(output(TEACHER, WIDTHS[1], 1))
    leaves = [student.logits, student.decoded, *student.features, *student.embeddings]
    leaves = [x.requires_grad_() for x in leaves]
    torch.manual_seed(0)
    nets = dict(widths=WIDTHS, classes=K)
    method = methods.build_method(name, STUDENT, TEACHER, **nets, **OPTIONS.get(name, {}))
    if world > 1:
        method = parallel.share_statistics(method, torch.device("cpu"))
    torch.manual_seed(1)
    terms = method(student, teacher, share(images), share(labels))
    parameters = [*method.parameters()]
    sum(terms.values()).backward()
    grads = [
        [torch.zeros(()) if x.grad is None else x.grad for x in xs] for xs in (leaves, parameters)
    ]
    parts = [[t.detach() for t in terms.values()], *grads, [*method.buffers()]]
    return [[x.numpy() for x in part] for part in parts]


def moments():
    began = time.monotonic()
    time.sleep(0.2)
    return began, time.monotonic()


def work(rank, port):
    """All that the tests want of one of two processes."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    parallel.start("cpu")
    made = {dtype: half(rank, dtype) for dtype in TOLERANCES}
    made |= {name: taught(name, rank) for name in EVERY}
    made["when"] = parallel.first_then_others(moments)
    made["answers"] = parallel.any_process(rank == 0, rank == 1, False, True)
    calls = []
    timing.timed(lambda: calls.append(rank), "cpu", seconds=0, least=3 + 4 * rank)
    made["calls"] = len(calls)
    parallel.stop()
    return made


@pytest.fixture(scope="module")
def both():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return timing.in_processes(work, (0, port), (1, port))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES.items())
def test_batch_norm_over_processes_is_that_of_the_whole_batch(both, dtype, tolerance):
    halves = [made[dtype] for made in both]
    ys, dxs, dws, dbs, means, variances = (torch.from_numpy(np.stack(t)) for t in zip(*halves))
    norm = filled(torch.nn.BatchNorm2d(6))
    x, grad = maps(dtype)
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    for got, want in (
        (ys.flatten(0, 1), y),
        (dxs.flatten(0, 1), x.grad),
        (dws.sum(0), norm.weight.grad),  # DDP, and the mean loss of the processes, scale them
        (dbs.sum(0), norm.bias.grad),
        (means[0], norm.running_mean),
        (variances[1], norm.running_var),
    ):
        assert (got - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("name", EVERY)
def test_a_method_in_two_processes_is_that_of_the_whole_batch(both, name):
    """Its terms, as DDP averages them; gradients of maps and adapters; statistics and queues."""
    whole = taught(name, 0, world=1)
    halves = [zip(*parts) for parts in zip(*(made[name] for made in both))]
    terms, maps, parameters, buffers = ([*pairs] for pairs in halves)
    got = [
        [sum(pair) / 2 for pair in terms],
        [np.concatenate([*map(np.atleast_1d, pair)]) / 2 for pair in maps],
        [sum(pair) / 2 for pair in parameters],
        [pair[0] for pair in buffers],
    ]
    for kind, mine, wants in zip(("terms", "maps", "parameters", "buffers"), got, whole):
        assert len(mine) == len(wants)
        scale = max([np.linalg.norm(want) for want in wants], default=0)
        for a, b in zip(mine, wants):
            assert np.linalg.norm(a - b) <= 2e-4 * np.linalg.norm(b) + 1e-6 * scale, kind
    for pair in buffers:
        assert np.array_equal(*pair)


@pytest.mark.parametrize(
    "cores, processes, workers", [(1, 1, 1), (2, 1, 1), (16, 1, 14), (16, 4, 3), (128, 4, 16)]
)
def test_spare_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parallel.spare_cores() == workers


def test_a_synchronised_norm_is_the_same_norm():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, eps=0.1, momentum=0.3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    got = parallel.share_statistics(torch.nn.Sequential(norm), torch.device("cpu"))[0]
    assert type(got) is parallel.GlooBatchNorm and (got.eps, got.momentum) == (0.1, 0.3)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(got.eval()(x), norm.eval()(x))


def test_all_processes_are_timed_as_often(both):
    """Or one would wait for ever in work that another has finished with."""
    assert [made["calls"] for made in both] == [2 + 7] * 2


def test_the_others_wait_for_the_first(both):
    assert both[0]["when"][1] <= both[1]["when"][0]


@pytest.mark.parametrize(
    "name, message",
    [("cuda:1", "torch finds 1 GPUs here; --device cpu does without"), ("meta", "cpu or cuda")],
)
def test_devices_that_are_not_there(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [str(parallel.get_device(n)) for n in ("cuda", "cuda:0")] == ["cuda", "cuda:0"]
    with pytest.raises(UserError, match=f"--device {name}: {message}"):
        parallel.get_device(name)


def test_any_process_speaks_for_all(both):
    assert [made["answers"] for made in both] == [[True, True, False, True]] * 2
