"""
Downloads that resume after an interruption, and archives that cannot write outside their folder.
"""

import hashlib
import http.client
import json
import os
import platform
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from files import Progress, UserError, write_text

TRIES = 4  # of a download that makes no progress
PAUSE = 2  # seconds before the second try, doubled before each further one
TELL = 5  # seconds between progress lines
BLOCK = 1 << 16  # bytes read at a time: few, so that slow connections show progress too


# ------------------------------------------------------------------------------------------------
# downloads


class Cut(Exception):
    """A transfer that was not completed; again: whether another try may succeed."""

    def __init__(self, message, again=True):
        super().__init__(message)
        self.again = again


def download(url, path, size=None, sha256=None, md5=None):
    """Fetch a URL into a file, which gets its name when it is complete and its hash is right.

    PATH.part keeps what has arrived, through cut connections, Ctrl-C and kills; the next call
    resumes there. An existing file, perhaps put there by hand, is checked and kept.
    size, in bytes, and the hexadecimal hashes (one, or a tuple of alternatives; a prefix is enough)
    are checked if given. Raises UserError.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: not downloaded, only http:// and https:// are")
    path = Path(path)
    part, note = (path.with_name(path.name + end) for end in (".part", ".part.json"))
    by_hand = f"fetch it in a browser and put it at {path}"
    if path.exists():
        wrong = wrong_file(path, size, sha256, md5)
        if wrong:
            raise UserError(f"{path}: {wrong}; remove it and try again, or from {url} {by_hand}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    most, tries = -1, 0
    while True:
        try:
            fetch_once(url, part, note, size, checked=bool(sha256 or md5))
            break
        except Cut as e:
            have = part.stat().st_size if part.exists() else 0
            most, tries = max(most, have), 1 if have > most else tries + 1
            if tries == TRIES or not e.again:
                kept = f" ({have / 1e6:.0f} MB of it are kept)" if have else ""
                raise UserError(f"{url}: {e}{kept}; try again later, or {by_hand}") from e
            pause = PAUSE * 2 ** (tries - 1)
            print(f"{path.name}: {e}; trying again in {pause} s", flush=True)
            time.sleep(pause)
        except OSError as e:
            raise UserError(f"cannot write {part}: {e.strerror or e}") from e
    wrong = wrong_file(part, size, sha256, md5)
    if wrong:
        part.unlink()
        note.unlink(missing_ok=True)
        raise UserError(f"{url}: {wrong}; the download is removed: try again, or {by_hand}")
    os.replace(part, path)
    note.unlink(missing_ok=True)


def fetch_once(url, part, note, size, checked):
    """One try: append to `part` what it lacks, or start over if it may be from another file.

    note records the version and length of the file of which `part` is the beginning. Where the
    server gives no version, the length must do, but only if a hash is checked at the end.
    Raises Cut; UserError if it is not the expected file; OSError if the disk is at fault.
    """
    title, have, was = part.name.removesuffix(".part"), 0, {}
    if part.exists() and note.exists():
        was = json.loads(note.read_text())
        if was["url"] == url and was["total"] and (was["version"] or checked):
            have = part.stat().st_size
            if have == was["total"]:
                return
    headers = {"User-Agent": "segmentation-student"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if was["version"]:
            headers["If-Range"] = was["version"]
    with ask(url, headers, part) as reply:
        if reply.status == 206:
            total = was.get("total")
            if reply.headers.get("Content-Range") != f"bytes {have}-{total - 1}/{total}":
                part.unlink()
                raise Cut("the file on the server has changed")
        else:
            have, total = 0, reply.length  # from Content-Length, None if there is none
            if reply.headers.get_content_type() == "text/html":  # a login, a hotel's network
                raise Cut("a web page in place of the file", again=False)
            if size and total and total != size:
                advice = "another file by now? Not fetched; look at its page"
                raise UserError(f"{url}: {total} bytes, expected {size}: {advice}")
            tag, date = reply.headers.get("ETag", ""), reply.headers.get("Last-Modified")
            part.unlink(missing_ok=True)  # before the note: they must never disagree
            # a weak tag, W/"...", does not promise the same bytes
            version = tag if tag.startswith('"') else date
            write_text(note, json.dumps({"url": url, "version": version, "total": total}))
        need, free = (total or 0) - have, shutil.disk_usage(part.parent).free
        if need > free:
            where = f"{part.parent} has {free / 1e9:.3g} GB free"
            raise UserError(f"{title} needs {need / 1e9:.3g} GB, {where}")
        length = f", {total / 1e6:.1f} MB" if total else ""
        at = f", resuming at {have / 1e6:.1f} MB" if have else ""
        print(f"{title}: from {url}{length}{at}", flush=True)
        progress = Progress(f"{title}, MB", (total or 0) / 1e6, TELL, have / 1e6)
        with open(part, "ab") as file:
            while block := receive(reply):
                file.write(block)
                have += len(block)
                progress.at(have / 1e6)
    if total and have < total:
        raise Cut(f"the connection was cut at {have} of {total} bytes")


def ask(url, headers, part):
    """The server's reply to a GET request. Raises Cut if it does not send the file."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # our part is not shorter than the file
            part.unlink()
            raise Cut("the file on the server has another length than it had") from e
        again = e.code in (408, 429) or e.code >= 500
        raise Cut(f"the server says {e.code} {e.reason}", again) from e
    except (OSError, http.client.HTTPException) as e:
        raise Cut(f"no connection ({getattr(e, 'reason', e) or type(e).__name__})") from e


def receive(reply):
    """The next bytes, empty at the end. Raises Cut."""
    try:
        return reply.read(BLOCK)
    except (OSError, http.client.HTTPException) as e:
        raise Cut(f"the connection was cut ({e or type(e).__name__})") from e


def wrong_file(path, size, sha256, md5):
    """How a file differs in size (bytes) or hash (hexadecimal), as text, or None."""
    if size and path.stat().st_size != size:
        return f"{path.stat().st_size} bytes, expected {size}"
    for name, want in (("sha256", sha256), ("md5", md5)):
        if want:
            found = digest(path, name)
            wants = (want,) if isinstance(want, str) else want
            if not found.startswith(wants):
                return f"its {name} is {found}, expected {' or '.join(wants)}"
    return None


def digest(path, name="sha256"):
    """The hexadecimal hash of a file, read a block at a time."""
    found = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------
# archives


def unpack(archive, folder, only=None):
    """Unpack a zip, tar or tar.gz into a folder: all of it, or nothing.

    only: "*/CamVid" takes the contents of that folder of the archive, without the path to it.
    Raises UserError if a name is taken, or if the archive is damaged or unsafe.
    """
    archive, folder = Path(archive), Path(folder)
    tmp = folder / f"{archive.name}.unpacking"
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of a run that was killed
        extract(archive, tmp)
        paths = sorted(tmp.glob(f"{only}/*" if only else "*"))
        tops = {path.parent for path in paths}
        if len(tops) != 1:
            raise UserError(f"{archive}: {len(tops)} folders {only or ''} in it, expected 1")
        for path in paths:
            if os.path.lexists(folder / path.name):
                raise UserError(f"{folder / path.name} is in the way: remove it first")
        for path in paths:
            path.rename(folder / path.name)
        print(f"{archive.name}: unpacked into {folder}", flush=True)
    except UserError:
        raise
    except Exception as e:  # reading a damaged archive can raise anything
        if getattr(e, "errno", None):
            raise UserError(f"cannot unpack {archive} into {folder}: {e.strerror or e}") from e
        why = str(e) or type(e).__name__
        raise UserError(f"{archive}: damaged or refused ({why}); remove it, fetch it again") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def extract(archive, folder):
    """Extract all of it, into the folder only: zipfile repairs unsafe names and makes no links."""
    tar = tarfile.is_tarfile(archive)
    if tar and not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{archive}: to unpack a tar safely takes Python 3.10.12, 3.11.4 or later, and this is "
            f"{platform.python_version()}: use a later one, or unpack it by hand"
        )
    with tarfile.open(archive) if tar else zipfile.ZipFile(archive) as box:
        members = box.getmembers() if tar else box.infolist()
        progress = Progress(f"unpack {archive.name}", len(members), TELL)
        for done, member in enumerate(members):
            progress.at(done)
            box.extract(member, folder, **(dict(filter=plain) if tar else {}))
        while tar and box.fileobj.read(BLOCK):
            pass  # to the end, where a tar.gz has its checksum


def plain(member, folder):
    """tarfile's "data" filter and no links: chains of them have fooled it; data sets need none."""
    if not (member.isreg() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)
