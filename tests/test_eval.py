"""Metrics against brute force; views of an image that must not change what is in it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

import catalog
import eval as evaluation
import files
import model
import parallel
import scenes
from model import IMAGENET_MEAN, IMAGENET_STD

FACTS = dict(
    void=None,
    dtype="float32",
    mean=list(IMAGENET_MEAN),
    std=list(IMAGENET_STD),
    resize=None,
    short_side=64,
)


def brute_force(pairs, K):
    """mIoU, pixel accuracy and IoU by class, with Python sets of pixels."""
    iou = []
    for k in range(K):
        union = inter = 0
        for p, y in pairs:
            keep = y != 255
            a = {tuple(v) for v in np.argwhere((p == k) & keep)}
            b = {tuple(v) for v in np.argwhere((y == k) & keep)}
            inter, union = inter + len(a & b), union + len(a | b)
        iou.append(inter / union if union else None)
    hits = sum(((p == y) & (y != 255)).sum() for p, y in pairs)
    total = sum((y != 255).sum() for _, y in pairs)
    present = [v for v in iou if v is not None]
    miou = sum(present) / len(present) if present else None
    return miou, hits / total if total else None, iou


def random_pairs():
    """Class 3 is in labels only, class 4 in predictions only, class 5 in neither."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(3):
        y, p = rng.integers(0, 4, (2, 9, 11))
        p[p == 3], y[rng.random(y.shape) < 0.2] = 4, 255
        pairs.append((p, y))
    return pairs


def score(pairs, K):
    matrix, edges = torch.zeros(K, K, dtype=torch.int64), torch.zeros(2, K, dtype=torch.int64)
    for p, y in pairs:
        p, y = torch.from_numpy(p)[None], torch.from_numpy(y)[None]
        matrix += evaluation.confusion(p, y, K)
        edges += evaluation.boundary_counts(p, y, K)
    return evaluation.scores(matrix, edges)


def test_scores_against_brute_force():
    pairs = random_pairs()
    got, (miou, acc, iou) = score(pairs, 6), brute_force(pairs, 6)
    assert got["miou"] == pytest.approx(miou) and got["pixel_acc"] == pytest.approx(acc)
    assert got["iou"] == pytest.approx(iou)
    assert got["iou"][3] == got["iou"][4] == 0 and got["iou"][5] is None


def test_all_ignored():
    blank = np.full((4, 4), 255)
    got = score([(np.zeros_like(blank), blank)], 3)
    assert got["miou"] is None and got["pixel_acc"] is None and got["iou"] == [None] * 3
    json.dumps(got)
    pairs = [*random_pairs(), (np.zeros_like(blank), blank)]
    assert score(pairs, 6)["miou"] == score(random_pairs(), 6)["miou"]


def test_confusion_counts_in_int64():
    matrix = evaluation.confusion(torch.zeros(10), torch.zeros(10, dtype=torch.uint8), 2)
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[10, 0], [0, 0]]


@pytest.mark.parametrize("d", [1, 2, 5])
def test_boundary_against_erosion(d):
    """The mask of each class minus its erosion by a (2d + 1) square, pixel by pixel."""
    y = torch.from_numpy(np.kron(np.random.default_rng(d).integers(0, 3, (3, 4)), np.ones((7, 6))))
    h, w = y.shape
    want = torch.zeros(h, w, dtype=torch.bool)
    for r in range(h):
        for c in range(w):
            inside = d <= r < h - d and d <= c < w - d
            window = y[max(0, r - d) : r + d + 1, max(0, c - d) : c + d + 1]
            want[r, c] = not (inside and (window == y[r, c]).all())
    assert torch.equal(evaluation.boundary(y[None], d)[0], want)


def test_boundary_iou_sees_what_iou_does_not():
    y = np.zeros((100, 100), int)
    y[20:80, 20:80] = 1
    p = np.zeros_like(y)
    p[22:78, 22:78] = 1  # right but for a rim
    got = score([(p, y)], 2)
    assert got["iou"][1] > 0.85 and got["boundary_iou_by_class"][1] < 0.5
    assert score([(y, y)], 2)["boundary_iou"] == 1


# ------------------------------------------------------------------------------------------------
# inference


class Brightness(torch.nn.Module):
    """Class 1 where the image's first channel is positive: a net whose answer is known."""

    num_classes = 2

    def forward(self, x, head=True):
        x = torch.nn.functional.avg_pool2d(x[:, :1], 4, ceil_mode=True)
        return model.Output(torch.cat([-x, x], 1), (), ())


def halves(height=64, width=96):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 255
    label = (image[:, :, 0] > 0).astype(np.uint8)
    return image, label


@pytest.mark.parametrize(
    "views",
    [
        {},
        dict(flip=True),
        dict(scales=(0.5, 1.0, 1.5), flip=True),
        dict(window=48, stride=32),
        dict(window=32, stride=20, flip=True),
        dict(window=512, stride=100),
    ],
)
def test_views_agree_on_an_easy_image(views):
    image, label = halves()
    x = evaluation.prepare(image, FACTS)
    got = evaluation.predict(Brightness(), x, label.shape, **views)
    assert got.shape == (1, 2, 64, 96)
    assert (got.argmax(1)[0].numpy() == label).mean() > 0.97


@pytest.mark.parametrize(
    "views", [{}, dict(scales=(0.75,)), dict(window=48, stride=32), dict(flip=True, scales=(1, 2))]
)
@pytest.mark.parametrize("at_once", [1, 2 * 2 * 61 * 90, 10**9])
def test_ids_are_those_of_the_largest_scores(monkeypatch, views, at_once):
    monkeypatch.setattr(evaluation, "AT_ONCE", at_once)  # one class, two, all
    net = model.build("nano", 5).eval()
    net.head.classifier.weight.data[3] = net.head.classifier.weight.data[1]  # a tie: the first
    x = torch.randn(2, 3, 61, 90)
    with torch.no_grad():
        scores = evaluation.predict(net, x, (61, 90), **views)
        ids = evaluation.predict_ids(net, x, (61, 90), **views)
    assert torch.equal(ids, scores.argmax(dim=1)) and len(ids.unique()) > 1


def test_views_are_means():
    net = model.build("nano", 3).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        one = net(x).logits
        two = net(x.flip(3)).logits.flip(3)
        got = evaluation.predict(net, x, (64, 96), flip=True)
        up = [model.resize(v, (64, 96)).softmax(1) for v in (one, two)]
        assert torch.allclose(got, (up[0] + up[1]) / 2, atol=1e-6)
        whole = evaluation.predict(net, x, (64, 96), window=96, stride=96)
        assert torch.allclose(whole, model.resize(one, (64, 96)), atol=1e-5)
        a, b = (model.resize(net(x[..., s]).logits, (64, 64)) for s in (slice(64), slice(32, 96)))
        slid = evaluation.predict(net, x, (64, 96), window=64, stride=32)
        assert torch.allclose(slid[..., :32], a[..., :32], atol=1e-5)
        assert torch.allclose(slid[..., 32:64], (a[..., 32:] + b[..., :32]) / 2, atol=1e-5)


class Pairs(list):
    def image(self, i):
        return self[i][0]

    def label(self, i):
        return self[i][1]


def test_evaluate_scores_each_image_once_whatever_its_size():
    pairs = Pairs([halves(), halves(40, 60), halves(40, 60), halves(33, 97)])
    facts = FACTS | dict(classes=["dark", "bright"])
    got = evaluation.evaluate(Brightness(), pairs, facts, batch_size=2)
    assert got["images"] == 4 and got["miou"] > 0.9 and got["classes"] == ["dark", "bright"]
    assert got == evaluation.evaluate(Brightness(), pairs, facts, batch_size=1)


def test_paper_protocol_scores_a_quarter_of_a_shorter_side_of_512(monkeypatch):
    image, label = halves(100, 151)  # resized to 773 columns, one more than 4 times 193
    sizes, shrink = [], catalog.resize_label
    monkeypatch.setattr(catalog, "resize_label", lambda y, n: sizes.append(n) or shrink(y, n))

    class Net(Brightness):
        def forward(self, x, head=True):
            sizes.append(tuple(x.shape[2:]))
            return super().forward(x)

    facts = FACTS | dict(classes=["a", "b"])
    got = evaluation.evaluate(Net(), Pairs([(image, label)]), facts, protocol="paper")
    assert sizes == [(128, 194), (512, 773)] and got["miou"] > 0.98  # logits are as large
    assert shrink(label, (128, 194)).shape == (128, 194)
    assert set(np.unique(shrink(label, (128, 194)))) == {0, 1}


# ------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def ckpt(tmp_path):
    torch.manual_seed(0)
    facts = FACTS | dict(dataset="folder", classes=["thing 0", "thing 1", "thing 2"])
    facts |= dict(palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    model.save(tmp_path / "student.pt", model.build("nano", 3), **facts)
    return str(tmp_path / "student.pt")


def run(*words):
    evaluation.main(evaluation.get_args([*map(str, words)]))


@pytest.mark.parametrize("native", [True, False])
def test_scores_in_the_dtype_of_training_unless_the_device_emulates_it(
    monkeypatch, folder, ckpt, tmp_path, native
):
    net, facts = model.load(ckpt)
    model.save(tmp_path / "low.pt", net, **facts | dict(dtype="bfloat16"))
    asked, seen = [], []
    evaluate = evaluation.evaluate
    monkeypatch.setattr(parallel, "has_native", lambda *about: asked.append(about) or native)
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *a, **k: seen.append(a[4]) or evaluate(*a, **k)
    )
    low, predict = [], evaluation.predict_ids

    def predicted(net, images, *a, **k):
        low.append((len(images), torch.is_autocast_enabled("cpu")))
        return predict(net, images, *a, **k)

    monkeypatch.setattr(evaluation, "predict_ids", predicted)
    words = ["--ckpt", tmp_path / "low.pt", "--dataset", "folder", "--data-dir", folder]
    run(*words)
    run(*words, "--dtype", "float16")
    assert seen == ["bfloat16" if native else "float32", "float16"]
    assert asked == [(torch.device("cpu"), "bfloat16")]
    run(*words, "--batch-size", "2")
    run(*words[:2], "--image", folder / "images/p0.png", "--out-dir", tmp_path / "o")
    assert low == [(3, native), (3, True), (2, native), (1, native), (1, native)]


def test_json_is_one_object_and_nothing_else(capsys, folder, ckpt):
    run("--ckpt", ckpt, "--data-dir", folder, "--json")
    out = json.loads(capsys.readouterr().out)
    assert {"miou", "pixel_acc", "iou", "classes", "images"} <= set(out)
    assert out["images"] == 3 and len(out["iou"]) == 3
    run("--ckpt", ckpt, "--data-dir", folder, "--split", "train", "--cache", "off")
    assert "6 images" in capsys.readouterr().out
    run("--ckpt", ckpt, "--data-dir", folder, "--split", "train", "--cache-dir", folder / "c")
    caches = [path.parent.name for path in folder.rglob("folder-*-*")]
    assert caches == [".cache", "c"]
    (folder / "unlabelled.txt").write_text("p0\n")
    (folder / "labels/p0.png").unlink()
    (folder / "train.txt").write_text("p1\n")
    run("--ckpt", ckpt, "--data-dir", folder, "--split", "unlabelled")
    assert "folder/unlabelled has no labels: nothing to score\n" in capsys.readouterr().out


def test_predictions_of_drawn_scenes_are_named_by_number(monkeypatch, tmp_path):
    monkeypatch.setitem(scenes.SPLITS, "val", (1_000_000, 2))
    model.save(tmp_path / "s.pt", model.build("nano", 11), **FACTS | dict(dataset="scenes"))
    run("--ckpt", tmp_path / "s.pt", "--save-preds", tmp_path / "p")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["1000000.png", "1000001.png"]


@pytest.mark.parametrize(
    "words, views",
    [
        ("--flip", dict(flip=True)),
        ("--scales 0.5 1", dict(scales=[0.5, 1.0])),
        ("--window 40", dict(window=40, stride=30)),
        ("--window 40 --stride 20", dict(window=40, stride=20)),
    ],
)
def test_the_views_are_those_that_were_asked_for(monkeypatch, folder, ckpt, words, views):
    seen = []
    real = evaluation.predict_ids
    monkeypatch.setattr(evaluation, "predict_ids", lambda *a, **k: seen.append(k) or real(*a, **k))
    run("--ckpt", ckpt, "--data-dir", folder, *words.split())
    assert seen == [dict(scales=[1.0], flip=False, window=None, stride=0) | views]


def test_the_table(capsys):
    """A class that is nowhere has no score, and counts in no mean."""
    score = dict(miou=0.5, boundary_iou=0.25, pixel_acc=0.75, mean_acc=0.625, images=2)
    by_class = dict(classes=["road", "tram"], iou=[0.5, None], boundary_iou_by_class=[0.25, None])
    parts = dict(fog=dict(miou=0.125, images=1))
    evaluation.print_table(score | by_class | dict(parts=parts, protocol="full"))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "class IoU boundary IoU".split(),
        "road 50.00 25.00".split(),
        "tram - -".split(),
        "mean 50.00 25.00".split(),
        "pixel accuracy 75.00, mean accuracy 62.50".split(),
        "fog 12.50 mIoU of 1 images".split(),
        "2 images, protocol full".split(),
    ]


def test_the_overlay_blends_photo_and_colours_and_has_a_legend():
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    ids = np.full((200, 300), 1, np.uint8)
    ids[100:], ids[150:], ids[180:] = 0, 2, 255  # 100 rows of class 1, 50 of 0, 30 of 2, 20 void
    palette = [(200, 0, 0), (0, 180, 40), (10, 20, 250)]
    seen = np.asarray(evaluation.overlay(image, ids, ["a", "b", "c"], palette)).astype(int)
    colours = np.array([*palette, (0, 0, 0)])[np.where(ids == 255, 3, ids)]
    assert np.abs(seen - (image + colours) / 2)[:, 60:].max() <= 1  # right of the legend
    legend = [tuple(seen[y, 8]) for y in (8, 19, 30)]  # a square of 8 pixels every 11
    assert legend == [palette[1], palette[0], palette[2]]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--window", "31"], "--window 31: at least 32"),
        (["--window", "32", "--stride", "64"], "or there would be gaps"),
        (["--stride", "64"], "--stride 64: 1 to --window"),
        (["--scales", "0"], "--scales must be above 0"),
        (["--scales", "nan"], "--scales must be above 0"),
        (["--short-side", "31"], "--short-side 31: from 32 to 8192"),
        (
            ["--short-side", "64", "--protocol", "paper"],
            "with --protocol paper it is 512 by itself",
        ),
        (["--split", "tests"], "folder has no split 'tests': choose train, val"),
        (["--dataset", "scenes", "--cache-dir", "c"], "the drawn scenes are in no folder"),
        (["--device", "abacus"], "--device abacus: "),
        (["--out-dir", "somewhere"], "--out-dir goes with --image"),
        (["--image", "x.png"], "--image labels photos: --data-dir is for scoring"),
        (["--batch-size", "0"], "--batch-size at least 1"),
        (
            ["--save-preds", "p", "--protocol", "paper"],
            "--save-preds goes with --protocol full",
        ),
        (["--cache", "off", "--cache-dir", "c"], "--cache-dir has no effect with --cache off"),
    ],
)
def test_mistakes(folder, ckpt, more, message):
    with pytest.raises(files.UserError) as e:
        run("--ckpt", ckpt, "--data-dir", folder, *more)
    assert message in str(e.value)


def test_mistakes_of_labelling(folder, ckpt):
    with pytest.raises(files.UserError, match="/nowhere: no such file"):
        run("--ckpt", ckpt, "--image", "/nowhere")
    images = folder / "images"
    with pytest.raises(files.UserError, match="--image needs --out-dir"):
        run("--ckpt", ckpt, "--image", images)
    with pytest.raises(files.UserError, match="data: no photos in it .*jpg"):
        run("--ckpt", ckpt, "--image", folder, "--out-dir", images)
    model.save(folder / "any.pt", model.build("nano", 3), **FACTS)
    with pytest.raises(files.UserError, match="does not say what it was trained on: pass --data"):
        run("--ckpt", folder / "any.pt")
    for source in (images, images / "p0.png"):  # beside which its mask may lie
        with pytest.raises(files.UserError, match="the photos are there; pass another folder"):
            run("--ckpt", ckpt, "--image", source, "--out-dir", images)


@pytest.mark.parametrize("split", ["val", "unlabelled"])
@pytest.mark.parametrize("name", ["images", "labels"])
def test_predictions_do_not_replace_the_data_set(folder, ckpt, name, split):
    (folder / "unlabelled.txt").write_text("p0\n")  # which has a label all the same
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    with pytest.raises(files.UserError, match=f"{name}: the data set's own files; pass another"):
        argv = ["--ckpt", ckpt, "--data-dir", folder, "--save-preds", folder / "." / name]
        run(*argv, "--split", split)
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    assert not (folder / ".cache").exists()  # nor is anything decoded before


def test_photos_of_one_name_do_not_overwrite_each_other(folder, ckpt, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("x.jpg", "x.png", "x.jpg.png", "y.png"):
        Image.open(folder / "images/p0.png").save(photos / name)
    run("--ckpt", ckpt, "--image", photos, "--out-dir", out)
    names = {path.name.removesuffix("_ids.png") for path in out.glob("*_ids.png")}
    assert names == {"x.jpg", "x.png", "x.jpg.png", "y"}


def test_a_photo_that_is_void_all_over(folder, tmp_path):
    net = model.build("nano", 4)
    net.head.classifier.bias.data[3] = 1e4
    model.save(tmp_path / "void.pt", net, **FACTS | dict(classes=["a", "b", "c"], void=3))
    photo, out = folder / "images/p0.png", tmp_path / "out"
    run("--ckpt", tmp_path / "void.pt", "--image", photo, "--out-dir", out)
    assert {p.stem for p in out.iterdir()} == {"p0_mask", "p0_overlay", "p0_ids"}
    assert (np.asarray(Image.open(out / "p0_ids.png")) == 255).all()


def test_scoring_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(files.time, "time", lambda: next(clock))
    progress = files.Progress("scoring", 8, every=5)
    for done in range(1, 9):
        progress.at(done)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "scoring: 2/8, 24 s left" and len(said) == 3


@pytest.mark.parametrize("total, words", [(9, "x.zip, MB: 6/9, 12 s left"), (0, "x.zip, MB: 6")])
def test_what_was_there_already_took_no_time(monkeypatch, capsys, total, words):
    clock = iter([0, 4])
    monkeypatch.setattr(files.time, "time", lambda: next(clock))
    files.Progress("x.zip, MB", total, first=5).at(6)
    assert capsys.readouterr().out == words + "\n"


@pytest.mark.parametrize("content", [b"", b"x", b"sky\nroad", b"PK\x03\x04 not a zip"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(files.UserError, match="a.pt: not a checkpoint of tensors"):
        run("--ckpt", tmp_path / "a.pt")


def test_photos(tmp_path, ckpt, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    image = Image.new("RGB", (90, 50), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 30, 50), fill="red")
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: to be turned by 90 degrees
    image.save(photos / "a.jpg", exif=exif)
    image.save(photos / "b.png")
    image.convert("L").save(photos / "b.jpg")
    image.save(photos / "c.webp")
    (photos / "b2.jpg").write_text("no photo")
    (photos / "._a.jpg").write_text("a Mac's")
    (photos / "notes.txt").write_text("mine")
    (photos / "folder.png").mkdir()
    with pytest.raises(files.UserError, match="1 of 5 not labelled; the first: .*b2.jpg: cannot"):
        run("--ckpt", ckpt, "--image", photos, "--out-dir", out)
    assert "5 photos; left out: ._a.jpg, notes.txt\n" in capsys.readouterr().out
    names = {"a", "b.png", "b.jpg", "c"}
    assert {p.name for p in out.iterdir()} == {
        f"{n}_{kind}.png" for n in names for kind in ("mask", "overlay", "ids")
    }
    assert Image.open(out / "a_ids.png").size == (50, 90)
    ids, mask = np.asarray(Image.open(out / "b.png_ids.png")), Image.open(out / "b.png_mask.png")
    assert ids.shape == (50, 90) and ids.max() < 3
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    assert np.array_equal(np.asarray(mask), palette[ids])
    assert Image.open(out / "b.png_overlay.png").size == (90, 50)


def test_a_photo_smaller_than_any_net_takes_is_labelled_too(tmp_path):
    """A checkpoint that names no size of photos: others go in at their own."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name, size in (("a", (60, 20)), ("b", (60, 40))):
        Image.new("RGB", size, "white").save(photos / f"{name}.png")
    model.save(tmp_path / "net.pt", model.build("nano", 3), **FACTS | dict(short_side=None))
    run("--ckpt", tmp_path / "net.pt", "--image", photos, "--out-dir", out)
    assert Image.open(out / "a_ids.png").size == (60, 20)
    assert Image.open(out / "b_ids.png").size == (60, 40)


def test_scenes_can_be_scored_and_labelled_by_a_perfect_net():
    """The whole path on real pictures: a 'net' that is told the answer scores 1."""
    pairs = Pairs(catalog.read_pair(i, None) for i in (1_000_000, 1_000_001))
    answers = iter(label for _, label in pairs)

    class Oracle(torch.nn.Module):
        num_classes = 11

        def forward(self, x, head=True):
            y = torch.from_numpy(next(answers).astype(np.int64)).clamp(max=10)[None]
            logits = torch.nn.functional.one_hot(y, 11).permute(0, 3, 1, 2).float()
            return model.Output(logits, (), ())

    facts = FACTS | dict(classes=["x"] * 11)
    got = evaluation.evaluate(Oracle(), pairs, facts, batch_size=1)
    assert got["miou"] == got["pixel_acc"] == got["boundary_iou"] == 1


def test_boundaries_are_2_percent_of_the_diagonal_wide():
    y = torch.zeros(1, 300, 400, dtype=torch.long)
    y[..., 200:] = 1
    both, union = evaluation.boundary_counts(y, y, 2)
    assert both.tolist() == union.tolist() == [300 * 200 - 280 * 180] * 2  # 10 of 500


def test_what_is_predicted_on_void_makes_no_edges():
    rng = np.random.default_rng(0)
    y = torch.from_numpy(np.kron(rng.integers(0, 3, (5, 5)), np.ones((20, 20), int)))[None]
    y[:, 30:70, 25:60] = 255
    p = torch.where(y == 255, torch.from_numpy(rng.integers(0, 3, (1, 100, 100))), y)
    both, union = evaluation.boundary_counts(p, y, 3)
    assert torch.equal(both, union) and both.all()


def test_scores_by_hand():
    """The third output is none of the classes."""
    matrix = torch.tensor([[6, 1, 1], [2, 3, 0], [0, 0, 0]])
    got = evaluation.scores(matrix, torch.ones(2, 3), 2)
    assert got["mean_acc"] == pytest.approx((6 / 8 + 3 / 5) / 2)
    assert got["iou"] == pytest.approx([6 / 10, 3 / 6]) and got["miou"] == pytest.approx(0.55)
    assert len(got["boundary_iou_by_class"]) == 2


def test_views_of_other_sizes_are_those_of_resized_images():
    net, x = model.build("nano", 3).eval(), torch.randn(1, 3, 64, 96)
    smaller = F.interpolate(x, size=(48, 72), mode="bilinear", antialias=True)
    larger = F.interpolate(x, size=(96, 144), mode="bilinear")
    with torch.no_grad():
        got = evaluation.predict(net, x, (64, 96), scales=(0.75, 1.5))
        views = [model.resize(net(v).logits, (64, 96)).softmax(dim=1) for v in (smaller, larger)]
    assert torch.allclose(got, sum(views) / 2, atol=1e-6)


@pytest.mark.parametrize("size", [(100, 163), (163, 100), (64, 64), (302, 505), (720, 961)])
def test_the_longer_side_is_torchvisions(size):
    image = np.zeros((*size, 3), np.uint8)
    width, height = torchvision.transforms.functional.resize(Image.fromarray(image), 512).size
    assert evaluation.prepare(image, FACTS, 512).shape == (1, 3, height, width)


def test_parts_and_all_together():
    """The second of four images is wrong, and alone in the part that comes first by name."""
    white = np.full((40, 40, 3), 255, np.uint8)
    good, bad = (white, np.ones((40, 40), np.uint8)), (white, np.zeros((40, 40), np.uint8))
    net = Brightness().train()
    how = FACTS | dict(classes=["dark", "bright"])
    parts = ["z", "a", "z", "z"]
    got = evaluation.evaluate(net, Pairs([good, bad, good, bad]), how, parts=parts)
    assert net.training and got["pixel_acc"] == 0.5
    assert {k: (v["images"], v["pixel_acc"]) for k, v in got["parts"].items()} == {
        "a": (1, 0),
        "z": (3, pytest.approx(2 / 3)),
    }


@pytest.mark.parametrize("facts, side", [(dict(), 64), (dict(resize=96), 96), (None, 80)])
def test_photos_are_resized_as_the_net_knows_them(monkeypatch, tmp_path, facts, side):
    """To what it says, or else to the training images' size, unless another is asked for."""
    sides, seen, prepare, predict = [], [], evaluation.prepare, evaluation.predict_ids

    def prepared(image, facts, short_side=None):
        sides.append(short_side)
        return prepare(image, facts, short_side)

    def predicted(*a, **kw):
        seen.append((kw["window"], kw["stride"]))
        return predict(*a, **kw)

    monkeypatch.setattr(evaluation, "prepare", prepared)
    monkeypatch.setattr(evaluation, "predict_ids", predicted)
    ckpt, photo = tmp_path / "net.pt", tmp_path / "a.png"
    Image.new("RGB", (90, 50), "white").save(photo)
    model.save(ckpt, model.build("nano", 3), **FACTS | (facts or {}))
    more = ["--window", "40"] + ["--short-side", "80"] * (facts is None)
    run("--ckpt", ckpt, "--image", photo, "--out-dir", tmp_path / "o", *more)
    assert sides == [side] and seen == [(40, 30)]  # windows overlap by a quarter


def test_scores_are_of_resized_images_where_the_net_wants_them():
    sizes, image = [], np.full((40, 40, 3), 255, np.uint8)
    net = Brightness()
    net.register_forward_pre_hook(lambda net, x: sizes.append(tuple(x[0].shape[2:])))
    how = FACTS | dict(classes=["dark", "bright"], resize=64)
    evaluation.evaluate(net, Pairs([(image, np.ones((40, 40), np.uint8))]), how)
    assert sizes == [(64, 64)]


def test_scores_are_of_resized_images_if_asked_for(monkeypatch, folder, ckpt):
    sides, prepare = [], evaluation.prepare
    monkeypatch.setattr(
        evaluation, "prepare", lambda x, facts, side: sides.append(side) or prepare(x, facts, side)
    )
    run("--ckpt", ckpt, "--data-dir", folder)
    run("--ckpt", ckpt, "--data-dir", folder, "--short-side", "96")
    assert sides == 3 * [None] + 3 * [96]
