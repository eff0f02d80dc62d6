"""
A GPU that torch only pretends to have: tensors without numbers, which know where they lie.

So no result is tested here, but what goes wrong on a GPU alone: tensors on two devices, types that
autocast changes, and steps in which the host waits for the device.
"""

import contextlib
import copy
import functools

import pytest
import torch
from gpu import step
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import classifiers
import distill
import methods
import model
import photos
import pretrain
from step import Learner, Teacher, mean_count

GPU = torch.device("cuda", 0)
MINE = (model.IMAGENET_MEAN, model.IMAGENET_STD)


def can_pretend():
    """Whether this build of torch goes without a driver: 2.6 asks for one as soon as it indexes."""
    try:
        with FakeTensorMode():
            torch.zeros(2, device=GPU)[:, None]
        return True
    except (RuntimeError, AssertionError):
        return False


pytestmark = pytest.mark.skipif(not can_pretend(), reason="torch pretends no GPU here")


class Waits(TorchDispatchMode):
    """Notes copies between host and device that block. (To ask for a number is an error anyway.)"""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.found.append(func)
        return out


def to_gpu(mode, *modules):
    """Copies of modules whose tensors lie on the pretended GPU. (Module.to refuses such.)"""
    with FakeCopyMode(mode):
        copies = copy.deepcopy(modules)
    with mode:
        for module in [m for each in copies for m in each.modules()]:
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(p.detach().to(GPU))
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = b.to(GPU)
    return copies


@contextlib.contextmanager
def autocast(dtype):
    """torch.autocast, which refuses a GPU that is not there."""
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def check(terms):
    for name, term in terms.items():
        assert (term.device, term.dtype, term.shape) == (GPU, torch.float32, ()), name


def host_batch(B=4, H=64, W=96):
    """A batch as it travels, see augment.host_batch and photos.host_batch."""
    places = dict(y=torch.zeros(B, H), x=torch.zeros(B, W), colour=torch.zeros(B, 3, 4))
    image = torch.zeros(B, H + 3, W + 5, 3, dtype=torch.uint8)
    return places | dict(image=image)


@pytest.mark.parametrize(
    "spec, dtype",
    [(spec, torch.bfloat16) for spec in [*methods.METHODS, "transkd-base+kd"]]
    + [("transkd-base", torch.float16), ("transkd-base", None)],
)
def test_a_step_lies_on_the_gpu_in_float32_terms_and_waits_for_nothing(spec, dtype):
    teacher, student = model.build("b0", 6), model.build("nano", 5)
    mode = FakeTensorMode()
    with mode:
        weights = torch.rand(5, device=GPU)
    ce = functools.partial(distill.cross_entropy, class_weights=weights)
    learner = Learner(student, methods.build(spec, student, teacher), ce).train()
    facts = dict(mean=[0.0] * 3, std=[1.0] * 3, void=5)  # another normalisation, an output too many
    name = str(dtype or torch.float32).removeprefix("torch.")
    look = Teacher(teacher.eval(), facts, *MINE, learner.method.needs_head, name)
    look, learner = to_gpu(mode, look, learner)
    with mode, Waits() as waits, autocast(dtype):
        batch = host_batch() | dict(label=torch.zeros(4, 64, 96, dtype=torch.uint8))
        images, labels = augment.device_batch(batch, GPU, *MINE)
        count = mean_count([batch["label"]] * 2, weights, GPU)
        seen = look(images) if learner.method.needs_teacher else None
        check(learner(images, labels, seen, count=count))
    assert not waits.found


@pytest.mark.parametrize("name", ["nano", "lvt", "pvt_v2_b0"])
def test_maps_stay_bfloat16(name):
    """With all that LayerNorms' outputs are added to: half the bytes to move."""
    mode = FakeTensorMode()
    (net,) = to_gpu(mode, model.build(name, 5))
    with mode, autocast(torch.bfloat16):
        out = net(torch.zeros(2, 3, 64, 96, device=GPU))
    assert {x.dtype for x in (*out.features, *out.embeddings)} == {torch.bfloat16}


@pytest.mark.parametrize("method", [name for name in pretrain.WEIGHTS if name != "none"])
@pytest.mark.parametrize("nets", [("b0", "nano"), ("vit_small", "vit_tiny")])
def test_likewise_between_classifiers(nets, method):
    teacher, student = (classifiers.build(name, 5, 32) for name in nets)
    args = pretrain.get_args(["--data-dir", "", "--model", nets[1], "--method", method])
    ce = functools.partial(pretrain.cross_entropy, weight=1.0, smoothing=0.1)
    learner = Learner(student, pretrain.method_of(args, student, teacher), ce)
    mode = FakeTensorMode()
    facts = dict(mean=MINE[0], std=MINE[1], void=None)
    look = Teacher(teacher.eval(), facts, *MINE, learner.method.needs_head, "bfloat16")
    look, learner = to_gpu(mode, look, learner.train())
    with mode, Waits() as waits, autocast(torch.bfloat16):
        mix = dict(box=torch.zeros(4, 4).long(), share=torch.ones(4))
        batch = host_batch(4, 32, 32) | mix | dict(label=torch.zeros(4).long())
        images, targets = photos.device_batch(batch, GPU, 5, mixed=True)
        check(learner(images, targets, look(images)))
    assert not waits.found


def test_the_script_for_a_real_one():
    """tests/gpu.py, here on a CPU: what it compares is near, and not the same."""
    want, grads = step("transkd-base", "cpu")
    low, low_grads = step("transkd-base", "cpu", "bfloat16")
    assert 0 < (low - want).norm() < 0.02 * want.norm()
    assert torch.cosine_similarity(grads, low_grads, dim=0) > 0.9


def test_what_would_wait_is_found():
    with FakeTensorMode(), Waits() as waits:
        torch.zeros(3).to(GPU, non_blocking=True)
        assert not waits.found
        torch.zeros(3).to(GPU)
        assert len(waits.found) == 1
