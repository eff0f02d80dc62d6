"""Batches: image and label move together, as torchvision moves them; the same for everybody."""

import numpy as np
import pytest
import torch
from conftest import COLOURS, picture
from torchvision.transforms.v2 import functional as tv

import augment
import model
from augment import Augment, Batches, device_batch, sample_indices
from catalog import resize_image
from data import Packed, index_of
from distill import cross_entropy

RAW = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def packed(pairs):
    images = np.concatenate([image.reshape(-1) for image, _ in pairs])
    labels = np.concatenate([label.reshape(-1) for _, label in pairs])
    return Packed(images, labels, index_of([label.shape for _, label in pairs]))


def batch(split, how, size=4, seed=0, step=0, **kw):
    return device_batch(Batches(split, size, seed, how, **kw)[step], "cpu", **RAW)


@pytest.mark.parametrize(
    "how",
    [
        Augment((64, 96), colour=0),
        Augment((33, 47), scale=(2.0, 2.0), colour=0),
        Augment((96, 64), scale=(0.4, 0.6), colour=0),
        Augment((64, 96), colour=0, fit=True),
    ],
)
def test_image_and_label_move_together(how):
    """The image's colours are its labels': after any augmentation they still must be."""
    split = packed([picture(i, 61, 85) for i in range(4)])
    table = torch.from_numpy(COLOURS).float() / 255
    right, wrong = [], []
    for step in range(5):
        images, labels = batch(split, how, step=step)
        assert images.shape == (4, 3, *how.crop) and labels.shape == (4, *how.crop)
        known = labels != 255
        assert known.any()
        nearest = (images.permute(0, 2, 3, 1)[..., None, :] - table).norm(dim=-1).argmin(-1)
        right.append((nearest == labels)[known].float().mean())
        wrong.append((nearest.roll(5, 2) == labels)[known].float().mean())
    assert min(right) > 0.93  # all but the mixed colours on edges
    assert np.mean(wrong) < np.mean(right) - 0.02


def test_scale_one_is_a_plain_crop():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    label = np.arange(60 * 80, dtype=np.int64).reshape(60, 80).astype(np.uint8)
    how = Augment((32, 32), scale=(1.0, 1.0), flip=False, colour=0)
    images, labels = batch(packed([(image, label)]), how, size=3)
    for x, y in zip(images, labels):
        places = [
            (r, c)
            for r in range(29)
            for c in range(49)
            if np.array_equal(label[r : r + 32, c : c + 32], y)
        ]
        assert len(places) >= 1
        want = [torch.from_numpy(image[r : r + 32, c : c + 32]) / 255 for r, c in places]
        assert any(torch.allclose(x.permute(1, 2, 0), w, atol=1e-4) for w in want)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.5, 2.0])
def test_scaling_equals_torchvision(scale):
    """A crop as large as the scaled image is torchvision's resize, without antialiasing."""
    image, label = picture(3, 40, 60)
    size = [round(40 * scale), round(60 * scale)]
    how = Augment(tuple(size), scale=(scale, scale), flip=False, colour=0)
    images, labels = batch(packed([(image, label)]), how, size=1)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    want = tv.resize(x, size, antialias=False)
    assert torch.allclose(images, want, atol=1e-4)
    nearest = tv.resize(torch.from_numpy(label)[None], size, tv.InterpolationMode.NEAREST_EXACT)
    assert (labels == nearest).float().mean() > 0.99  # ties may fall to either side


def test_flip_mirrors_both():
    image, label = picture(1, 40, 40)
    split = packed([(image, label)])
    how = Augment((40, 40), scale=(1.0, 1.0), colour=0)
    seen = set()
    for step in range(12):
        images, labels = batch(split, how, size=1, step=step)
        flipped = not np.array_equal(labels[0], label)
        seen.add(flipped)
        want = image[:, ::-1] if flipped else image
        assert np.array_equal(labels[0], label[:, ::-1] if flipped else label)
        assert torch.allclose(images[0].permute(1, 2, 0), torch.from_numpy(want.copy()) / 255)
    assert seen == {True, False}


def test_around_a_small_image_its_edge_is_repeated_and_its_label_is_ignore():
    image, label = picture(0, 20, 24)
    split = packed([(image, label)])
    images, labels = batch(split, Augment((64, 64), scale=(1.0, 1.0), flip=False, colour=0), size=2)
    for x, y in zip(images, labels):
        rows, cols = (y != 255).any(1).nonzero(), (y != 255).any(0).nonzero()
        top, left = rows.min(), cols.min()
        assert (y[top : top + 20, left : left + 24] == torch.from_numpy(label)).all()
        assert (y != 255).sum() == 20 * 24
        around = (top, 64 - 20 - top), (left, 64 - 24 - left), (0, 0)
        want = np.pad(image, around, mode="edge") / 255
        assert np.abs(x.permute(1, 2, 0).numpy() - want).max() < 1e-4


def test_when_fitted_an_image_is_moved_over_black():
    image = np.full((30, 50, 3), 200, np.uint8)
    split = packed([(image, np.zeros((30, 50), np.uint8))])
    black = 0
    for step in range(8):
        images, labels = batch(split, Augment((60, 60), colour=0, fit=True), size=1, step=step)
        outside = labels[0] == 255
        want = torch.where(outside, 0.0, 200 / 255).expand(3, 60, 60)
        assert torch.allclose(images[0], want, atol=1e-4)
        black += outside.sum().item()
    assert black > 0


def test_when_fitted_an_image_is_shrunk_as_for_scoring():
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8)
    how = Augment((60, 80), flip=False, colour=0, fit=True)
    images, _ = batch(packed([(image, np.zeros((120, 160), np.uint8))]), how, size=1)
    want = np.pad(resize_image(image, 60), ((2, 2), (2, 2), (0, 0))) / 255
    moved = [want[r : r + 60, c : c + 80] for r in range(5) for c in range(5)]
    got = images[0].permute(1, 2, 0).numpy()
    assert min(np.abs(got - x).max() for x in moved) < 1e-3


@pytest.mark.parametrize("name", ["nano", "lvt", "pvt_v2_b0"])
def test_first_gradients_from_scratch_are_no_larger_beside_a_small_image(name):
    """Zeros there would be zeros for the first LayerNorm, which divides by them."""
    torch.manual_seed(0)
    net, sizes = model.build(name, 3), []
    for height in (64, 24):
        split = packed([picture(k, height, 64) for k in range(2)])
        images, labels = batch(split, Augment((64, 64), scale=(1.0, 1.0)), size=2)
        net.zero_grad()
        cross_entropy(net(images).logits, labels).backward()
        sizes.append(sum(p.grad.square().sum() for p in net.parameters()).sqrt().item())
    assert sizes[1] < 20 * sizes[0]


def test_quarter_labels_lie_on_the_logits():
    """fit, label_stride 4: a shift of the image by t pixels moves its small label by t / 4."""
    row, col = np.mgrid[:15, :15].repeat(4, 1).repeat(4, 2)  # cells of 4 x 4 pixels
    image = np.stack([10 * row, 10 * col, row], 2).astype(np.uint8)
    split = packed([(image, (15 * row + col).astype(np.uint8))])
    how = Augment((60, 60), flip=False, colour=0, fit=True, label_stride=4)
    worst = 0
    for step in range(20):
        images, labels = batch(split, how, size=1, step=step)
        assert labels.shape == (1, 15, 15)
        known = labels[0] != 255
        where = torch.nn.functional.avg_pool2d(images * 255, 4)[0]  # 10 times the place of a cell
        for channel, place in ((0, labels[0] // 15), (1, labels[0] % 15)):
            off = (where[channel] - 10.0 * place)[1:-1, 1:-1][known[1:-1, 1:-1]].abs()
            worst = max(worst, off.max().item())
    assert worst == pytest.approx(5, abs=0.1)  # half a cell, at a shift of half a cell; never more


def test_colour_matrix():
    assert np.allclose(augment.colour_matrix(np.random.default_rng(0), 0), np.eye(3, 4))
    grey = np.array([0.5, 0.5, 0.5, 1.0])
    for seed in range(20):
        out = augment.colour_matrix(np.random.default_rng(seed), 1.0) @ grey
        assert np.ptp(out) < 1e-6 and abs(out[0] - 0.5) <= 0.125 + 1e-6  # hue turns about grey


def test_batches_are_the_same_for_any_number_of_processes_and_parts():
    split = packed([picture(i, 40, 60) for i in range(5)])
    how = Augment((32, 48))
    whole = batch(split, how, size=8, step=3)
    ranks = [batch(split, how, size=8, step=3, rank=r, world=2) for r in range(2)]
    parts = [batch(split, how, size=4, step=s) for s in (6, 7)]
    for pieces in (ranks, parts):
        assert torch.allclose(torch.cat([p[0] for p in pieces]), whole[0], atol=1e-5)
        assert torch.equal(torch.cat([p[1] for p in pieces]), whole[1])
    assert not torch.equal(batch(split, how, size=8, step=4)[1], whole[1])
    assert not torch.equal(batch(split, how, size=8, step=3, seed=1)[1], whole[1])


def test_every_epoch_sees_every_image_once_in_a_new_order():
    stream = [i for step in range(9) for i in sample_indices(step, 4, 12, seed=0)]
    epochs = [stream[k : k + 12] for k in (0, 12, 24)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert len({*map(tuple, epochs)}) == 3
    assert sample_indices(0, 4, 12, seed=1) != epochs[0][:4]
    assert len(sample_indices(0, 30, 12, seed=0)) == 30  # a batch larger than the data


def test_few_labels_are_half_of_every_batch():
    """Even places from the labelled, odd ones from the others, each in whole epochs."""
    stream = [i for step in range(10) for i in sample_indices(step, 6, 13, seed=0, labelled=3)]
    labelled, others = stream[::2], stream[1::2]
    for k in range(0, 30, 3):
        assert sorted(labelled[k : k + 3]) == [0, 1, 2]
    for k in range(0, 30, 10):
        assert sorted(others[k : k + 10]) == list(range(3, 13))
    assert len({tuple(labelled[k : k + 3]) for k in range(0, 30, 3)}) > 1
    assert others[:10] != others[10:20]
    assert [*range(1, 13)] == sorted(sample_indices(0, 24, 13, 0, labelled=1)[1::2])
    assert sample_indices(0, 24, 13, 0, labelled=1)[::2] == 12 * [0]
    for labelled in (0, 13):  # of all or none: as if nothing was said
        assert sample_indices(2, 6, 13, 0, labelled) == sample_indices(2, 6, 13, 0)


class Draws:
    """A generator that draws what it is told."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high, size=None):
        value = self.values.pop(0)
        return np.array(value) if size else value


def test_saturation_is_torchvisions():
    rgb = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    m = torch.from_numpy(augment.colour_matrix(Draws(0.0, (0.4, 0.0), 0.0), 1.0))
    got = torch.einsum("ij,jhw->ihw", m[:, :3], rgb) + m[:, 3, None, None]
    assert torch.allclose(got, tv.adjust_saturation(rgb, 1.4), atol=2e-3)


def test_hue_is_a_turn_about_grey():
    m = torch.from_numpy(augment.colour_matrix(Draws(1.0, (0.0, 0.0), 0.0), 1.0))[:, :3]
    k = 3**-0.5
    cross = torch.tensor([[0, -k, k], [k, 0, -k], [-k, k, 0]])
    assert torch.allclose(m, torch.matrix_exp(0.3 * cross), atol=1e-6)


def test_ranges_of_colour():
    m = np.stack([augment.colour_matrix(np.random.default_rng(k), 1.0) for k in range(2000)])
    contrast = m[:, 0, :3].sum(1)  # saturation and hue leave grey as it is
    brightness = m[:, 0, 3] - 0.5 * (1 - contrast)
    for x, low, high in ((contrast, 0.5, 1.5), (brightness, -0.125, 0.125)):
        share = (x - low) / (high - low)
        assert -1e-5 < share.min() < 0.01 and 0.99 < share.max() < 1 + 1e-5
        assert share.mean() == pytest.approx(0.5, abs=0.03)
    saturation = (np.linalg.det(m[:, :, :3].astype(float)) / contrast.astype(float) ** 3) ** 0.5
    assert 0.5 - 1e-3 < saturation.min() < 0.51 and 1.49 < saturation.max() < 1.5 + 1e-3


def test_scales_and_flips_are_drawn_evenly():
    rng = np.random.default_rng(0)
    draws = [augment.random_geometry(rng, (40, 60), Augment((32, 32))) for _ in range(3000)]
    octaves = np.log2([y[1] for y, _ in draws])  # of 0.5 to 2: -1 to 1, evenly
    counts, _ = np.histogram(octaves, 4, (-1, 1))
    assert counts.sum() == 3000 and abs(counts - 750).max() < 120
    assert abs(np.mean([x[3] for _, x in draws]) - 0.5) < 0.04 and not any(y[3] for y, _ in draws)


@pytest.mark.parametrize(
    "crop, fit, want",
    [
        ((37, 57), False, range(4)),
        ((43, 63), False, range(-3, 1)),
        ((40, 60), True, range(-2, 3)),
    ],
)
def test_every_place_of_a_crop_is_drawn(crop, fit, want):
    rng, how = np.random.default_rng(0), Augment(crop, scale=(1.0, 1.0), fit=fit)
    starts = [[axis[2] for axis in augment.random_geometry(rng, (40, 60), how)] for _ in range(300)]
    assert all(set(along) == set(want) for along in zip(*starts))


def test_colours_stay_colours():
    place = torch.arange(4.0)[None]
    image = torch.full((1, 4, 4, 3), 128, dtype=torch.uint8)
    for bias in (-3.0, 3.0):
        colour = torch.cat([torch.eye(3), torch.full((3, 1), bias)], dim=1)[None]
        got = augment.resample(dict(image=image, y=place, x=place, colour=colour))
        assert (got == float(bias > 0)).all()
