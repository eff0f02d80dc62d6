"""
The parts of a training step: student and loss terms, frozen teacher, learning rate, update.
`loop.run_steps` puts them together, `bench.py` times them.
"""

import copy
import math

import torch
from torch import nn

import distill
from files import UserError

PAPER_DECAY_EPOCHS = 1500  # TransKD's schedule ends there, its training after 1000


class Learner(nn.Module):
    """The student and its method in one module, so that DDP synchronises the adapters too.

    ce: the loss of logits and labels, or None; not used by a method that `replaces_ce`.
    """

    def __init__(self, student, method, ce=distill.cross_entropy):
        super().__init__()
        self.student, self.method = student, method
        self.ce = None if method.replaces_ce else ce

    def forward(self, images, labels, teacher, **ce_options):
        """{name: loss term}. teacher: its Output, or None; ce_options: further arguments of ce."""
        out = self.student(images)
        terms = {"ce": self.ce(out.logits, labels, **ce_options)} if self.ce else {}
        taught = self.method(out, teacher, images, labels)
        if "ce" in terms and "ce" in taught:
            raise UserError("a method's term is called 'ce', as the cross-entropy of the labels is")
        for name, term in taught.items():
            if not isinstance(term, torch.Tensor) or term.ndim:
                shape = getattr(term, "shape", type(term).__name__)
                raise UserError(f"the loss term '{name}' is no tensor of one number: {shape}")
        return terms | taught


def mean_count(labels, class_weights, device):
    """The sum of the labels' weights in the cross-entropy, averaged over the parts of a batch.

    labels: one tensor (B, H, W) per part. Divided by this and not each by its own sum, the parts of
    --accumulate add up to the batch, however unequally they are labelled. (Cross-entropy only:
    batch norms, and terms of methods that use labels, work on each part separately.)
    """
    labels = [y.to(device, non_blocking=True) for y in labels]
    counts = [distill.label_weights(y, class_weights).sum() for y in labels]
    return distill.valid_count(torch.stack(counts).mean())


class Teacher(nn.Module):
    """A frozen net, run on the student's images: no autograd graph, no head unless needed.

    facts: the net's own; mean, std: those with which the images were normalised, the student's.
    dtype: for bfloat16 a copy of the net is made that holds and computes everything in it, where
    autocast would keep its residual stream in float32 and convert at every layer.
    """

    def __init__(self, net, facts, mean, std, needs_head=False, dtype="float32"):
        super().__init__()
        self.low = dtype == "bfloat16"
        self.net = net
        if self.low:
            self.net = copy.deepcopy(net).bfloat16()
            for name, m in net.named_modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):  # of one process or of many
                    # stays float32: torch's kernels take it with bfloat16 maps, unrounded
                    self.net.get_submodule(name).float().load_state_dict(m.state_dict())
        self.void, self.needs_head = facts["void"], needs_head
        # (x * std + mean - own mean) / own std
        numbers = (torch.tensor(v)[:, None, None] for v in (mean, std, facts["mean"], facts["std"]))
        mean, std, own_mean, own_std = numbers
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.renormalises = bool((self.scale != 1).any() or (self.shift != 0).any())

    @torch.no_grad()
    def forward(self, images):
        if self.renormalises:
            images = images * self.scale + self.shift
        if self.low:
            with torch.autocast(images.device.type, enabled=False):
                out = self.net(images.bfloat16(), head=self.needs_head)
        else:
            out = self.net(images, head=self.needs_head)
        if self.needs_head and self.void is not None:  # an output that is no class
            out = out._replace(logits=out.logits[:, : self.void])
        return out


def learning_rate(step, peak, total, warmup=0.0, decay="linear", paper_epoch=None):
    """lr of `step` (from 0): linear warm-up over a share of the run, then down to 0 at `total`.

    decay: linear, or cosine: peak * (1 + cos(pi x)) / 2 (SGDR, Loshchilov & Hutter 2017, eq. 5),
    where x rises from 0 to 1.
    paper_epoch: steps per epoch, for the paper's schedule, peak * (1 - epoch / 1500), from epoch 1.
    """
    if paper_epoch:
        return peak * max(0.0, 1 - (step // paper_epoch + 1) / PAPER_DECAY_EPOCHS)
    rise = round(warmup * total)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    left = (total - step) / (total - rise)
    return peak * (left if decay == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2)


def parameter_groups(module, weight_decay, everything=False):
    """Weight decay on all but vectors (norms, biases, scalars), or on everything (the paper)."""
    params = list(module.parameters())
    if everything:
        return [dict(params=params, weight_decay=weight_decay)]
    return [
        dict(params=[p for p in params if p.ndim > 1], weight_decay=weight_decay),
        dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0),
    ]


class Graphed:
    """`work`, on tensors of the same shapes at every call, replayed as one CUDA graph.

    A step launches two thousand kernels, which takes the host longer than a GPU takes to compute a
    small batch; a graph is one launch. After WARM_UP calls the next one is recorded, and replayed
    from then on. A replay knows addresses only: inputs are copied to those of the recording,
    results and gradients come out at theirs, so gradients must stay there (`update` with
    keep=True). Its random numbers are those of the seed set before it.

    work: tensors -> {name: tensor}. It must not wait for the GPU, nor go by values that are there.
    """

    WARM_UP = 3  # in which libraries choose their kernels, and gradients get their memory

    def __init__(self, work, device):
        self.work, self.device, self.calls, self.graph = work, device, 0, None
        self.stream = torch.cuda.Stream(device)  # no graph can be recorded on the usual one

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= self.WARM_UP:
            usual = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(usual)
            with torch.cuda.stream(self.stream):
                outputs = self.work(*inputs)
            usual.wait_stream(self.stream)
            return outputs
        if not self.graph:
            self.record(inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        self.graph.replay()
        return self.outputs

    def record(self, inputs):
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may go on to use the GPU, such as that which pins batches
        options = dict(stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.graph(self.graph, **options):
                self.outputs = self.work(*self.inputs)
        except RuntimeError as e:
            cause = e.__context__ or e  # the end of the recording fails too
            if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, Exception):
                raise cause from None
            reason = (str(cause) or repr(cause)).splitlines()[0]
            raise UserError(
                f"this step cannot be recorded as a CUDA graph ({reason}): do without --graphs"
            ) from e


def update(learner, optimizer, scaler, clip, keep=False):
    """An optimiser step on the gradients, their norm clipped to `clip` if not 0; clears them.

    keep: their memory stays, filled with 0.
    """
    scaler.unscale_(optimizer)
    if clip:
        nn.utils.clip_grad_norm_(learner.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not keep)
