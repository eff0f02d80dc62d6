"""Each method against its formula, written out again in float64; and what leaves it unchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Largest

import baselines
import model
from methods import build_method

STUDENT, TEACHER, WIDTHS, K = (4, 6, 8, 10), (6, 8, 10, 12), (5, 7), 4
SIZE = (32, 48)  # of the images
NAMES = "kd fitnet at cwd review skd ifvd dsd cirkd".split()
RELATIONS = ["kd", "at", "cwd", "skd", "ifvd", "dsd"]  # no adapter if the widths are equal


def ceil(a, b):
    return -(-a // b)


def output(channels, width, kind="mit", batch=2, seed=0, size=SIZE):
    """An Output of random numbers, as a MiT or a dilated CNN (no embeddings) would give it."""
    g = torch.Generator().manual_seed(seed)
    strides, out = ((4, 8, 16, 32), 4) if kind == "mit" else ((4, 8, 8, 8), 8)
    sides = [[ceil(n, stride) for n in size] for stride in (*strides, out)]
    maps = [torch.randn(batch, c, *n, generator=g) for c, n in zip((*channels, width), sides)]
    tokens = tuple(torch.randn(batch, n[0] * n[1], 3, generator=g) for n in sides[:4])
    logits = torch.randn(batch, K, *sides[4], generator=g)
    return model.Output(logits, tuple(maps[:4]), tokens if kind == "mit" else (), maps[4])


def pair(kind="mit", grad=True, **kw):
    """Outputs of a student and of a teacher of another width, and labels with ignored pixels."""
    s, t = output(STUDENT, WIDTHS[0], **kw), output(TEACHER, WIDTHS[1], kind, **{**kw, "seed": 1})
    for tensor in (s.logits, s.decoded, *s.features):
        tensor.requires_grad_(grad)
    g = torch.Generator().manual_seed(2)
    batch, size = len(s.logits), kw.get("size", SIZE)
    blocks = torch.randint(0, K, (batch, *(ceil(n, 8) for n in size)), generator=g)
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : size[0], : size[1]]
    labels[:, :5] = 255
    return s, t, labels.to(torch.uint8)


def build(name, **options):
    torch.manual_seed(0)
    return build_method(name, STUDENT, TEACHER, baselines.METHODS, WIDTHS, K, **options)


def call(name, s, t, labels, **options):
    return build(name, **options)(s, t, None, labels)


# ------------------------------------------------------------------------------------------------
# the formulas, in float64


def axis_weights(n, m, average):
    """(m, n): how the m cells of an output axis are made of the n of the input."""
    w = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        if average:
            cells = range(i * n // m, ceil((i + 1) * n, m))
            w[i, cells] = 1 / len(cells)
        else:
            x = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
            left, right = int(x), min(int(x) + 1, n - 1)
            w[i, left] += 1 - (x - left)
            w[i, right] += x - left
    return w


def on_grid(t, size):
    """The teacher's map (B, C, h, w) on the student's grid."""
    h, w = t.shape[2:]
    average = h > size[0] or w > size[1]
    rows, cols = axis_weights(h, size[0], average), axis_weights(w, size[1], average)
    return rows @ t.double() @ cols.T


def maps_of(s, t, relu=True):
    a, b = (x.decoded.detach().double().clamp(min=0 if relu else -99) for x in (s, t))
    return a, on_grid(b, a.shape[2:])


def logits_of(s, t):
    return s.logits.detach().double(), on_grid(t.logits, s.logits.shape[2:])


def kl(p, q):
    return (p * (p / q).log()).sum()


def softmax(x, dim=-1):
    e = (x - x.max()).exp()
    return e / e.sum(dim, keepdim=True)


def unit(x, dim=-1):
    return x / x.square().sum(dim, keepdim=True).sqrt().clamp(min=1e-12)  # of 0: 0


def at_formula(s, t, power=2, over_channels=False):
    total = 0
    for a, b in zip(*maps_of(s, t)):
        if over_channels:
            a, b = ((x**power).mean((1, 2)) for x in (a, b))
            a, b = F.pad(a, (0, len(b) - len(a))), b
        else:
            a, b = ((x**power).mean(0).flatten() for x in (a, b))
        total += (unit(a) - unit(b)).square().mean() / len(s.logits)
    return dict(at=1e4 * total)


def cwd_formula(s, t, weight=None, channels=WIDTHS[1]):
    a, b = maps_of(s, t)
    a = torch.einsum("bchw,oc->bohw", a, weight[:, :, 0, 0].detach().double())
    terms = {}
    for name, x, y, w, c in (("features", a, b, 5, channels), ("logits", *logits_of(s, t), 0.3, K)):
        total = 0
        for i in range(len(x)):
            for k in range(x.shape[1]):
                total += kl(softmax(y[i, k].flatten() / 4), softmax(x[i, k].flatten() / 4))
        terms[name] = w * 16 * total / (len(x) * c)
    return terms


def skd_formula(s, t, pool=2, cosine=True):
    total = 0
    for a, b in zip(*maps_of(s, t)):
        grams = []
        for x in (a, b):
            rows = []
            for y in range(0, x.shape[1], pool):
                for z in range(0, x.shape[2], pool):
                    rows.append(x[:, y : y + pool, z : z + pool].amax((1, 2)))
            rows = torch.stack(rows)
            rows = unit(rows) if cosine else rows
            grams.append(torch.stack([(r * rows).sum(1) for r in rows]))
        total += (grams[0] - grams[1]).square().mean() / len(s.logits)
    return dict(skd=10 * total)


def nearest(labels, size):
    H, W = labels.shape[1:]
    rows = [y * H // size[0] for y in range(size[0])]
    return labels[:, rows][:, :, [x * W // size[1] for x in range(size[1])]]


def ifvd_formula(s, t, labels, per_image=True, all_pixels=False):
    maps = maps_of(s, t)
    labels = nearest(labels, maps[0].shape[2:])
    total, count = 0, 0
    for i in range(len(labels)):
        for k in range(K):
            v = []
            for x in maps:
                pixels = x[i][:, labels[i] == k]
                source = x.transpose(0, 1)[:, labels == k] if not per_image else pixels
                centre = source.mean(1, keepdim=True)
                v.append((unit(pixels, 0) * unit(centre, 0)).sum(0))
            total, count = total + (v[0] - v[1]).square().sum(), count + len(v[0])
    return dict(ifvd=20 * total / (labels.numel() if all_pixels else count))


def dsd_formula(s, t, twice=True, T=4):
    psd = csd = 0
    for f_s, f_t, z_s, z_t in zip(*maps_of(s, t), *logits_of(s, t)):
        r, grams = [], []
        for f, z in ((f_s, z_s), (f_t, z_t)):
            d = unit((z**2).mean(0).flatten()) - unit((f**2).mean(0).flatten())
            r.append(unit(d) if twice else d)
            cells = []
            for y in range(0, z.shape[1], 2):
                for x in range(0, z.shape[2], 2):
                    cells.append(z[:, y : y + 2, x : x + 2].mean((1, 2)))
            p = softmax(torch.stack(cells, 1) / T)  # (K, n)
            grams.append(p @ p.T)
        psd += (r[0] - r[1]).square().mean() / len(s.logits)
        csd += (grams[0] - grams[1]).square().mean() / len(s.logits)
    return dict(psd=1000 * psd, csd=10 * csd)


def check(got, want, *mutants):
    """The terms agree with the formula, and with none of its mutants."""
    assert set(got) == set(want)
    for name, value in got.items():
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(want[name].item(), rel=2e-5), name
    for mutant in mutants:
        assert any(abs(mutant[n] / want[n] - 1) > 1e-3 for n in want), "a mutant that is none"


TEACHERS = pytest.mark.parametrize(
    "kind, size", [("mit", (32, 48)), ("cnn", (32, 48)), ("cnn", (34, 51))]
)


@TEACHERS
def test_fitnet(kind, size):
    s, t, labels = pair(kind, size=size)
    method = build("fitnet")
    w = method.project.weight[:, :, 0, 0].detach().double()

    def formula(relu):
        a, b = maps_of(s, t, relu)
        return dict(fitnet=10 * (torch.einsum("bchw,oc->bohw", a, w) - b).square().mean())

    check(method(s, t, None, labels), formula(True), formula(False))


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_fitnet_of_a_stage(stage):
    s, t, labels = pair("cnn", size=(34, 51))
    method = build("fitnet", fitnet_layer=str(stage), fitnet_weight=2.0)
    assert not method.needs_head and build("fitnet").needs_head
    s, t = s._replace(decoded=None, logits=None), t._replace(decoded=None, logits=None)
    a, b = s.features[stage - 1].detach().double(), t.features[stage - 1]
    w = method.project.weight[:, :, 0, 0].detach().double()
    d = torch.einsum("bchw,oc->bohw", a, w) - on_grid(b, a.shape[2:])
    check(method(s, t, None, labels), dict(fitnet=2 * d.square().mean()))


@TEACHERS
def test_at(kind, size):
    s, t, labels = pair(kind, size=size)
    mutants = at_formula(s, t, power=1), at_formula(s, t, over_channels=True)
    check(call("at", s, t, labels), at_formula(s, t), *mutants)


@TEACHERS
def test_cwd(kind, size):
    """By the teacher's channels; by the student's, as published, it is another number."""
    s, t, labels = pair(kind, size=size)
    method = build("cwd")
    w = method.project.weight
    published = cwd_formula(s, t, w, channels=WIDTHS[0])
    check(method(s, t, None, labels), cwd_formula(s, t, w), published)
    ratio = WIDTHS[1] / WIDTHS[0]
    check(build("cwd", cwd_feature_weight=5 * ratio)(s, t, None, labels), published)


@TEACHERS
def test_skd(kind, size):
    s, t, labels = pair(kind, size=size)
    mutants = skd_formula(s, t, pool=1), skd_formula(s, t, cosine=False)
    check(call("skd", s, t, labels), skd_formula(s, t), *mutants)


@TEACHERS
def test_ifvd(kind, size):
    """Centres are those of one image; the published mean, over ignored pixels too, is smaller."""
    s, t, labels = pair(kind, size=size)
    mutants = [
        ifvd_formula(s, t, labels, **{k: v})
        for k, v in (("per_image", False), ("all_pixels", True))
    ]
    check(call("ifvd", s, t, labels), ifvd_formula(s, t, labels), *mutants)


@TEACHERS
def test_dsd(kind, size):
    s, t, labels = pair(kind, size=size)
    mutants = dsd_formula(s, t, twice=False), dsd_formula(s, t, T=1)
    check(call("dsd", s, t, labels), dsd_formula(s, t), *mutants)


def norm2d(x):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("kind", ["mit", "cnn"])
def test_review(kind):
    s, t, labels = pair(kind)
    method = build("review")
    net = copy.deepcopy(method).double()

    def formula(squash):
        total, m = 0, None
        for i in (3, 2, 1, 0):
            f = s.features[i].detach().double()
            x = norm2d(torch.einsum("bchw,oc->bohw", f, net.reduce[i][0].weight[:, :, 0, 0]))
            if m is not None:
                rows = [y * m.shape[2] // x.shape[2] for y in range(x.shape[2])]
                r = m[:, :, rows][..., [z * m.shape[3] // x.shape[3] for z in range(x.shape[3])]]
                w = net.attend[i].weight[:, :, 0, 0]
                both = torch.einsum("bchw,oc->bohw", torch.cat([x, r], 1), w)
                a = squash(both + net.attend[i].bias[:, None, None])
                x = a[:, :1] * x + a[:, 1:] * r
            m = x
            d = norm2d(F.conv2d(m, net.expand[i][0].weight, padding=1))
            d = d - on_grid(t.features[i], d.shape[2:])
            loss, total_weight = d.square().mean(), 1.0
            for level, w in zip([n for n in (4, 2, 1) if n < d.shape[2]], (0.5, 0.25, 0.125)):
                rows, cols = (axis_weights(n, level, True) for n in d.shape[2:])
                loss = loss + w * (rows @ d @ cols.T).square().mean()
                total_weight += w
            total = total + loss / total_weight
        return dict(review=total)

    got = method(s, t, None, labels)
    check(got, formula(torch.sigmoid), formula(lambda a: a.softmax(1)))


def test_parameters_of_the_review_wrapper():
    """What the TransKD release's own wrapper of this method has, B2 -> B0."""
    with torch.device("meta"):
        s, t = model.build("b0", 20), model.build("b2", 20)
        extra = {}
        for name in NAMES:
            args = (s.channels, t.channels, baselines.METHODS, (s.width, t.width), 20)
            extra[name] = model.count_parameters(build_method(name, *args))
    assert model.count_parameters(s) + extra["review"] == 4345210
    assert extra["fitnet"] == extra["cwd"] == 256 * 768
    assert extra["cirkd"] == 256 * 768 + 768**2 + 2 * 768


# ------------------------------------------------------------------------------------------------
# CIRKD


def row_kl(s, t, s_keys, t_keys):
    """Per row, the KL of the similarities at temperature 0.1; the teacher's first."""
    p, q = softmax(t @ t_keys.T / 0.1), softmax(s @ s_keys.T / 0.1)
    return (p * (p / q).log()).sum(1)


@TEACHERS
def test_cirkd_batch_term(kind, size):
    s, t, labels = pair(kind, size=size, batch=3)

    def formula(pool=2, reverse=False, others=True):
        a, b = ([], [])
        for rows, maps in zip((a, b), maps_of(s, t)):
            for x in maps:
                cells = []
                for y in range(0, x.shape[1], pool):
                    for z in range(0, x.shape[2], pool):
                        cells.append(x[:, y : y + pool, z : z + pool].mean((1, 2)))
                rows.append(unit(torch.stack(cells)))
        a, b = (b, a) if reverse else (a, b)
        pairs = [(i, j) for i in range(3) for j in range(3) if others or i == j]
        values = [row_kl(a[i], b[i], a[j], b[j]).mean() for i, j in pairs]
        return dict(batch=sum(values) / len(values))

    only = dict(cirkd_pixel_weight=0, cirkd_region_weight=0)
    mutants = formula(reverse=True), formula(others=False), formula(pool=4)
    check(call("cirkd", s, t, labels, **only), formula(), *mutants)
    check(call("cirkd", s, t, labels, cirkd_pool=4, **only), formula(pool=4))


def memories(queue=30, **options):
    """CIRKD's memory terms alone, in eval mode: nothing is added to the queues."""
    sizes = dict(cirkd_pixel_queue=queue, cirkd_region_queue=queue - 1)
    return build("cirkd", cirkd_batch_weight=0, **sizes, **options).eval()


@TEACHERS
def test_cirkd_memory_terms(kind, size):
    s, t, labels = pair(kind, size=size)
    method = memories()
    a, b = maps_of(s, t)
    net = copy.deepcopy(method.project).double()
    a = torch.einsum("bchw,oc->bohw", a, net[0].weight[:, :, 0, 0]) / (1 + 1e-5) ** 0.5
    a = torch.einsum("bchw,oc->bohw", a.clamp(min=0), net[3].weight[:, :, 0, 0]).detach()
    valid = nearest(labels, a.shape[2:]) != 255

    def formula(masked=True, reverse=False):
        terms = {}
        for name in ("pixels", "regions"):
            keys = getattr(method, name).double().flatten(0, 1)
            assert torch.allclose(keys.norm(dim=1), torch.ones(len(keys)).double())
            values = []
            for x, y, v in zip(a, b, valid):
                x, y = (unit(f.flatten(1).T[v.flatten() | (not masked)]) for f in (x, y))
                x, y = (y, x) if reverse else (x, y)
                values.append(row_kl(x, y, keys, keys))
            terms[name] = 0.1 * torch.cat(values).mean()
        return terms

    mutants = formula(masked=False), formula(reverse=True)
    check(method(s, t, None, labels), formula(), *mutants)


def test_cirkd_compares_with_a_share_of_each_queue(monkeypatch):
    """contrast // K + 1 of each class, at the same random places, drawn anew at each step."""
    s, t, labels = pair()
    method = memories(cirkd_pixel_contrast=10, cirkd_region_contrast=7)
    seen, real = [], baselines.similarity_kl
    monkeypatch.setattr(baselines, "similarity_kl", lambda *a: (seen.append(a[2:]), real(*a))[1])
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        method(s, t, None, labels)
    for name, queue, count, keys in (
        ("p", method.pixels, 3, seen[0]),
        ("r", method.regions, 2, seen[2]),
    ):
        assert keys[0] is keys[1], name
        places = [
            (queue[k] == row).all(1).nonzero().item()
            for k in range(K)
            for row in keys[0].view(K, count, -1)[k]
        ]
        assert len(set(places)) == count and places == places[:count] * K
    assert torch.equal(seen[0][0], seen[4][0]) and not torch.equal(seen[0][0], seen[8][0])


def coloured(labels, size, seed):
    """A decoded map (B, C, h, w): a pixel of class k lies along e_k, an ignored one along e_K."""
    classes = nearest(labels, size).long()
    classes[classes == 255] = K
    g = torch.Generator().manual_seed(seed)
    strength = 1 + torch.rand(*classes.shape, generator=g)
    return (F.one_hot(classes, WIDTHS[1]) * strength[..., None]).permute(0, 3, 1, 2).float()


def test_cirkd_queues_hold_only_their_own_class():
    method = build("cirkd", cirkd_pixel_queue=50, cirkd_region_queue=5)
    before = {name: b.clone() for name, b in method.named_buffers()}
    s, t, labels = pair()
    labels[0][labels[0] == 2] = 0  # class 2 is in the second image alone,
    labels[labels == 3] = 1
    labels[1, 9:13, 9:13] = 3  # class 3 in one position of it
    small = nearest(labels, s.decoded.shape[2:])
    assert int((small == 3).sum()) == 1
    t = t._replace(decoded=coloured(labels, s.decoded.shape[2:], 0))
    method(s, t, None, labels)
    for name, most in (("pixels", 16), ("regions", 1)):
        queue, at = getattr(method, name), getattr(method, f"{name}_at")
        for k in range(K):
            new = sum(min(most, int((image == k).sum())) for image in small)
            assert at[k] == new
            want = F.one_hot(torch.tensor(k), WIDTHS[1]).float().expand(new, -1)
            assert torch.allclose(queue[k, :new], want), (name, k)
            assert torch.equal(queue[k, new:], before[name][k, new:])


def test_cirkd_draws_pixels_at_random_without_repetition():
    method = build("cirkd", cirkd_pixel_queue=400)
    s, t, _ = pair(batch=1)
    labels = torch.zeros(1, *SIZE, dtype=torch.uint8)
    for _ in range(12):
        method(s, t, None, labels)
    rows = F.normalize(F.relu(t.decoded[0]).flatten(1).T, dim=1)  # (96, C)
    drawn = torch.cdist(method.pixels[0, : 12 * 16], rows).argmin(1).view(12, 16)
    assert all(len(set(step.tolist())) == 16 for step in drawn)
    assert drawn.unique().numel() > 75 and drawn.float().mean() == pytest.approx(47.5, abs=8)
    want = F.normalize(rows.mean(0), dim=0)
    assert torch.allclose(method.regions[0, :12], want.expand(12, -1), atol=1e-6)


def test_push_is_a_ring():
    """Against lists, over several turns."""
    g = torch.Generator().manual_seed(0)
    queue, at = torch.zeros(2, 7, 1), torch.zeros(2, dtype=torch.long)
    want, ends = [[0.0] * 7, [0.0] * 7], [0, 0]
    for step in range(1, 30):
        counts = torch.randint(0, 4, (2,), generator=g).tolist()
        rows = step + torch.rand(2, 3, 1, generator=g)
        baselines.push(queue, at, rows, torch.arange(3) < torch.tensor(counts)[:, None])
        for k in range(2):
            for j in range(counts[k]):
                want[k][ends[k] % 7] = rows[k, j, 0].item()
                ends[k] += 1
    assert queue[:, :, 0].tolist() == want and at.tolist() == [n % 7 for n in ends]


def test_cirkd_goes_on_with_the_same_bits():
    """Queues are in the state dict, and what is drawn depends on the step's seed alone."""

    def step(method, k):
        torch.manual_seed(k)
        s, t, labels = pair(grad=False, seed=k)
        return torch.stack(list(method(s, t, None, labels).values()))

    options = dict(cirkd_pixel_queue=20, cirkd_region_queue=3, cirkd_pixel_contrast=8)
    whole = build("cirkd", **options)
    first = [step(whole, k) for k in range(4)]
    saved = copy.deepcopy(whole.state_dict())
    rest = [step(whole, k) for k in range(4, 7)]
    resumed = build("cirkd", **options)
    other = torch.stack([step(resumed, k) for k in range(4, 7)])
    resumed.load_state_dict(saved)
    again = torch.stack([step(resumed, k) for k in range(4, 7)])
    assert torch.equal(again, torch.stack(rest)) and not torch.equal(other, again)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers()))
    assert torch.stack(first).isfinite().all()


def test_cirkd_evaluation_leaves_the_queues():
    s, t, labels = pair()
    method = build("cirkd").eval()
    before = method.pixels.clone(), method.regions.clone()
    method(s, t, None, labels)
    assert torch.equal(before[0], method.pixels) and torch.equal(before[1], method.regions)


def test_cirkd_keeps_no_large_matrix_for_the_backward_pass():
    s, t, labels = pair(size=(64, 96))
    method, saved = build("cirkd", cirkd_pixel_queue=300), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        terms = method(s, t, None, labels)
    n = 16 * 24
    assert max(saved) < n * n / 4 and max(saved) < n * 300 * K / 4
    grads = torch.autograd.grad(sum(terms.values()), s.decoded)[0]
    assert grads.isfinite().all() and grads.any()


# ------------------------------------------------------------------------------------------------
# invariances


@pytest.mark.parametrize("name", [*RELATIONS, "cirkd"])
def test_zero_when_student_and_teacher_agree(name):
    t = output(TEACHER, WIDTHS[1], seed=1)
    _, other, labels = pair()
    options = dict(cirkd_pixel_weight=0, cirkd_region_weight=0) if name == "cirkd" else {}
    args = (TEACHER, TEACHER, baselines.METHODS, (WIDTHS[1], WIDTHS[1]), K)
    method = build_method(name, *args, **options)
    same = method(t, other, None, labels)
    away = method(output(TEACHER, WIDTHS[1], seed=9), t, None, labels)
    for term, value in same.items():
        assert abs(value.item()) < 1e-5 * away[term].item(), term


def scaled(out, factor, what="decoded"):
    return out._replace(**{what: getattr(out, what).detach() * factor})


def value(name, s, t, labels, **options):
    return sum(call(name, s, t, labels, **options).values()).item()


def random_factors(*shape):
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def test_softmax_methods_do_not_see_a_constant():
    s, t, labels = pair(size=(37, 50))
    n = s.logits.shape[2:]
    pixel, channel = random_factors(2, 1, *n), random_factors(2, K, 1, 1)
    only = dict(cwd_feature_weight=0)
    for name, options, along, across in (("kd", {}, pixel, channel), ("cwd", only, channel, pixel)):
        base = value(name, s, t, labels, **options)
        moved = [s._replace(logits=s.logits.detach() + c) for c in (along, across)]
        same, other = (value(name, m, t, labels, **options) for m in moved)
        assert same == pytest.approx(base, rel=1e-4) and abs(other / base - 1) > 1e-2, name


def test_similarities_do_not_see_scales():
    """SKD and CIRKD: of a pooling window; IFVD: of a class in an image. Of a position they do."""
    s, t, labels = pair()
    h, w = s.decoded.shape[2:]
    window = random_factors(2, 1, h // 2, w // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    by_class = torch.cat([random_factors(2, K), torch.ones(2, 252)], 1)
    place = nearest(labels, (h, w)).long()
    by_class = torch.stack([f[p] for f, p in zip(by_class, place)])[:, None]  # (B, 1, h, w)
    position = random_factors(2, 1, h, w)
    batch = dict(cirkd_pixel_weight=0, cirkd_region_weight=0)
    for name, options, factor in (
        ("skd", {}, window),
        ("cirkd", batch, window),
        ("ifvd", {}, by_class),
    ):
        base, same, other = (
            value(name, scaled(s, f), t, labels, **options) for f in (1, factor, position)
        )
        assert same == pytest.approx(base, rel=1e-4), name
        assert abs(other / base - 1) > 1e-3, name


def test_attention_sees_neither_the_scale_of_a_map_nor_its_order_of_channels():
    s, t, labels = pair()
    base = value("at", s, t, labels)
    assert value("at", scaled(s, 3.0), t, labels) == pytest.approx(base, rel=1e-4)
    turned = s._replace(decoded=s.decoded[:, torch.randperm(WIDTHS[0])])
    assert value("at", turned, t, labels) == pytest.approx(base, rel=1e-4)
    assert (
        abs(value("at", scaled(s, random_factors(1, WIDTHS[0], 1, 1)), t, labels) / base - 1) > 1e-3
    )


@pytest.mark.parametrize("name", ["ifvd", "cirkd"])
def test_ignored_pixels_change_nothing(name):
    """In eval mode: CIRKD's batch norm sees all pixels, as it does in the published code."""
    s, t, labels = pair()
    ignored = (nearest(labels, s.decoded.shape[2:]) == 255)[:, None]
    for changed in (0, 1):
        outs = [s, t]
        noise = torch.randn_like(outs[changed].decoded)
        outs[changed] = outs[changed]._replace(
            decoded=outs[changed].decoded.detach() + ignored * noise
        )
        method = build("ifvd") if name == "ifvd" else memories()
        base, same = (method(*o, None, labels) for o in ((s, t), outs))
        assert all(base[k].item() == pytest.approx(same[k].item(), rel=1e-6) for k in base)
        outs[changed] = outs[changed]._replace(decoded=outs[changed].decoded + ~ignored * noise)
        other = method(*outs, None, labels)
        assert all(abs(base[k].item() / other[k].item() - 1) > 1e-4 for k in base)
    queues = []
    for decoded in (t.decoded, t.decoded + ignored * 5):
        cirkd = build("cirkd")
        cirkd(s, t._replace(decoded=decoded), None, labels)
        queues.append((cirkd.pixels, cirkd.regions))
    assert all(torch.equal(a, b) for a, b in zip(*queues))


@pytest.mark.parametrize("name", ["ifvd", "cirkd"])
def test_a_crop_without_labels_is_worth_nothing(name):
    s, t, labels = pair(batch=1)
    method = build(name, **(dict(cirkd_batch_weight=0) if name == "cirkd" else {}))
    queues = [b.clone() for k, b in method.named_buffers() if "project" not in k]
    terms = method(s, t, None, torch.full_like(labels, 255))
    sum(terms.values()).backward()
    assert all(v.item() == 0 for v in terms.values()) and not s.decoded.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())
    after = [b for k, b in method.named_buffers() if "project" not in k]
    assert all(torch.equal(a, b) for a, b in zip(queues, after))


# ------------------------------------------------------------------------------------------------
# all of them


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_student_and_adapters_only(name):
    torch.manual_seed(0)
    student, teacher = model.build("nano", K), model.build("b0", K)
    widths = (student.width, teacher.width)
    options = dict(cirkd_pixel_queue=40, cirkd_region_queue=10) if name == "cirkd" else {}
    args = (student.channels, teacher.channels, baselines.METHODS, widths, K)
    method = build_method(name, *args, **options)
    images, labels = torch.randn(2, 3, 64, 80), torch.randint(0, K, (2, 64, 80)).to(torch.uint8)
    with torch.no_grad():
        seen = teacher.eval()(images, head=method.needs_head)
    sum(method(student(images), seen, images, labels).values()).backward()
    for key, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
    for key, p in student.named_parameters():
        used = method.needs_head or not key.startswith("head")
        used = used and (name in ("kd", "cwd", "dsd") or "classifier" not in key)
        assert (p.grad is not None and p.grad.isfinite().all()) == used, key
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind, size, batch", [("mit", (33, 47), 1), ("cnn", (70, 33), 2)])
def test_bfloat16_autocast_odd_sizes_and_another_teacher(name, kind, size, batch):
    s, t, labels = pair(kind, size=size, batch=batch)
    method = build(name)
    exact = copy.deepcopy(method)(s, t, None, labels)
    low = rounded(s), rounded(t)
    for x in (low[0].logits, low[0].decoded, *low[0].features):
        x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(*low, None, labels)
    for term, v in terms.items():
        assert v.dtype == torch.float32 and v.isfinite() and v.shape == (), term
        assert v.item() == pytest.approx(exact[term].item(), rel=0.1), term
    sum(terms.values()).backward()


def rounded(out):
    """An Output whose numbers bfloat16 can hold."""
    features = tuple(f.detach().bfloat16() for f in out.features)
    more = dict(logits=out.logits.detach().bfloat16(), decoded=out.decoded.detach().bfloat16())
    return out._replace(features=features, **more)


@pytest.mark.parametrize("name", ["kd", "at", "skd", "ifvd", "dsd", "cirkd"])
def test_autocast_changes_no_bit_of_what_has_no_adapter(name):
    s, t, labels = pair()
    s, t = rounded(s), rounded(t)
    options = dict(cirkd_pixel_weight=0, cirkd_region_weight=0) if name == "cirkd" else {}
    exact = call(name, s, t, labels, **options)
    with torch.autocast("cpu", torch.bfloat16):
        terms = call(name, s, t, labels, **options)
    assert all(torch.equal(terms[k], exact[k]) for k in exact)


def test_autocast_changes_no_bit_of_the_queues():
    s, t, labels = pair()
    methods = build("cirkd"), build("cirkd")
    for method, enabled in zip(methods, (False, True)):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            method(s, rounded(t), None, labels)
    assert all(torch.equal(*(getattr(m, k) for m in methods)) for k in ("pixels", "regions"))


@pytest.mark.parametrize("name", NAMES)
def test_none_but_cirkd_is_quadratic_in_the_positions(name):
    s, t, labels = pair(size=(256, 256), batch=1)
    options = dict(cirkd_pixel_weight=0, cirkd_region_weight=0) if name == "cirkd" else {}
    method = build(name, **options)
    with Largest() as largest:
        sum(method(s, t, None, labels).values()).backward()
    pooled = 32 * 32
    assert (largest.numel >= pooled**2) == (name == "cirkd")


@pytest.mark.parametrize(
    "name, weights",
    [
        ("fitnet", dict(fitnet=("fitnet_weight", 10))),
        ("at", dict(at=("at_weight", 1e4))),
        ("skd", dict(skd=("skd_weight", 10))),
        ("ifvd", dict(ifvd=("ifvd_weight", 20))),
        ("review", dict(review=("review_weight", 1))),
        ("cwd", dict(features=("cwd_feature_weight", 5), logits=("cwd_logit_weight", 0.3))),
        ("dsd", dict(psd=("dsd_psd_weight", 1000), csd=("dsd_csd_weight", 10))),
        (
            "cirkd",
            dict(
                batch=("cirkd_batch_weight", 1),
                pixels=("cirkd_pixel_weight", 0.1),
                regions=("cirkd_region_weight", 0.1),
            ),
        ),
    ],
)
def test_weights_multiply_and_zero_leaves_a_part_out(name, weights):
    s, t, labels = pair()
    base = call(name, s, t, labels)
    for term, (flag, default) in weights.items():
        more = call(name, s, t, labels, **{flag: 2 * default})
        assert more[term].item() == pytest.approx(2 * base[term].item(), rel=1e-5)
        if len(weights) > 1:
            rest = call(name, s, t, labels, **{flag: 0.0})
            assert set(rest) == set(weights) - {term}


def test_a_part_left_out_costs_nothing():
    def numbers(name, **options):
        method = build(name, **options)
        return sum(x.numel() for x in [*method.parameters(), *method.buffers()])

    assert numbers("cwd", cwd_feature_weight=0) == 0
    pixels, regions = dict(cirkd_pixel_weight=0), dict(cirkd_region_weight=0)
    assert numbers("cirkd", **pixels, **regions) == 0
    assert numbers("cirkd", **pixels) == numbers("cirkd") - (2000 * WIDTHS[1] + 1) * K
