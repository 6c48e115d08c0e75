"""The data sets that the package reads: what is there, whether it is whole, what can be fetched.

Every function returns plain data, for the ``attnviz data`` command to print. Downloads go on
where they were cut off, count only after their checksum, and are unpacked beside their place
and then moved there, so that nothing half-finished ever has a final name.
"""

import errno
import gzip
import hashlib
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from http.client import HTTPException, HTTPResponse
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal

from tqdm import tqdm

from ..images import read_image
from .coco import load_coco
from .context import load_context
from .cub import load_cub
from .dagm import load_dagm
from .folder import LabeledImages, Problems, list_pictures, read_lines
from .imagenet import find_pictures, load_imagenet
from .masks import MaskedImage, read_label_picture
from .surface import load_magnetic_tile
from .voc import VOC_CLASS_NAMES, read_voc

__all__ = [
    "Archive", "DataSet", "check_data", "data_names", "download", "extract", "fetch_data",
    "list_data",
]  # fmt: skip

TRIES, PAUSE, TIMEOUT = 3, 2.0, 30.0  # of one download: attempts, seconds between, of silence
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A published archive that anyone may download."""

    url: str
    size: int
    """Bytes."""
    sha256: str
    inside: str
    """The folder or file in the archive that is wanted."""
    target: str = "."
    """Where it goes below the data set's folder; ``.`` is that folder itself."""

    @property
    def name(self) -> str:
        """The file's name."""
        return posixpath.basename(self.url)


@dataclass(frozen=True)
class DataSet:
    """One entry of the catalog."""

    name: str
    title: str
    terms: str
    where: str
    """How to get it."""
    expected: dict[str, int]
    """What the whole data set holds."""
    count: Callable[[Path], dict[str, int]]
    """Counts what is there, without opening pictures; empty if it is not there."""
    check: Callable[[Path, Problems, bool], dict[str, int]]
    """Verifies what is there and counts it."""
    archives: tuple[Archive, ...] = ()


# ------------------------------------------------------------------------------- list and check


def data_names() -> list[str]:
    """Names of the data sets that are looked for on disk."""
    return list(_SETS)


def list_data(root: str | Path) -> list[dict[str, object]]:
    """Says of every data set whether it is there.

    Args:
        root: The data root.

    Returns:
        One row a data set: ``name``, ``title``, ``folder`` (None: generated), ``found``,
        ``counts`` and ``expected`` (what there is and what the whole holds, by kind),
        ``terms``, ``where`` (how to get it) and ``bytes`` to fetch (None: not by this command).
    """
    generated = {"scenes": "drawn objects, parts and contexts", "defects": "drawn surfaces"}
    rows: list[dict[str, object]] = [
        {
            "name": name, "title": f"generated: {title}", "folder": None, "found": True,
            "counts": {}, "expected": {}, "terms": "the package's license",
            "where": "nothing to get", "bytes": None,
        }
        for name, title in generated.items()
        if find_spec(f"{__package__}.{name}")
    ]  # fmt: skip
    for entry in _SETS.values():
        folder = Path(root) / entry.name
        counts = entry.count(folder) if folder.is_dir() else {}
        rows.append(
            {
                "name": entry.name, "title": entry.title, "folder": str(folder),
                "found": any(counts.values()), "counts": counts, "expected": entry.expected,
                "terms": entry.terms, "where": entry.where,
                "bytes": sum(archive.size for archive in entry.archives) or None,
            }
        )  # fmt: skip
    return rows


def check_data(name: str, root: str | Path, progress: bool = True) -> dict[str, object]:
    """Verifies a data set: counts, labels, boxes and masks, and that every picture can be read.

    Args:
        name: Name of the data set.
        root: The data root.
        progress: Show progress bars.

    Returns:
        ``name``, ``folder``, ``counts``, ``expected``, ``missing`` (one line for each kind of
        which there is less than in the whole data set; a chosen part is no fault), ``problems``
        (one line each) and ``ok`` (no problems).

    Raises:
        ValueError: There is no data set of this name.
        FileNotFoundError: It is not there.
    """
    entry = _entry(name)
    folder = Path(root) / name
    if not folder.is_dir() or not any(entry.count(folder).values()):
        raise FileNotFoundError(
            f"expected {entry.title} in {str(folder)!r}, found nothing; {entry.where}"
        )
    problems = Problems()
    counts = entry.check(folder, problems, progress)
    missing = [
        f"{kind}: {counts.get(kind, 0):,} of {whole:,}"
        for kind, whole in entry.expected.items()
        if counts.get(kind, 0) < whole
    ]
    lines = problems.lines()
    return {
        "name": name, "folder": str(folder), "counts": counts, "expected": entry.expected,
        "missing": missing, "problems": lines, "ok": not lines,
    }  # fmt: skip


def _entry(name: str) -> DataSet:
    if name not in _SETS:
        near = get_close_matches(name, _SETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; generated ones are always there"
        raise ValueError(f"expected a data set of {', '.join(_SETS)}, got {name!r}{hint}")
    return _SETS[name]


def _check_pictures(paths: Iterable[Path], problems: Problems, progress: bool) -> int:
    # Reads every picture; returns how many are whole.
    paths, whole = list(paths), 0
    for path in tqdm(paths, "pictures", unit="image", disable=not progress):
        try:
            read_image(path)
            whole += 1
        except (ValueError, OSError):
            problems.add("pictures that cannot be read", path.name)
    return whole


def _check_labeled(data: LabeledImages, problems: Problems, progress: bool) -> dict[str, int]:
    problems.keep(data.problems)
    _check_pictures((item.path for item in data), problems, progress)
    return {"images": len(data), "classes": data.class_count, "boxes": data.box_count}


def _count_ilsvrc(folder: Path) -> dict[str, int]:
    try:
        return {"images": len(find_pictures(folder, "val")[1])}
    except FileNotFoundError:
        return {"images": 0}


def _check_ilsvrc(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    return _check_labeled(load_imagenet(folder, progress=progress), problems, progress)


def _count_cub(folder: Path) -> dict[str, int]:
    places = (folder / "images", folder / "CUB_200_2011" / "images")
    return {"images": sum(len(list_pictures(place)) for place in places if place.is_dir())}


def _check_cub(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    counts = _check_labeled(load_cub(folder, "all", progress=progress), problems, progress)
    counts["train"] = len(load_cub(folder, "train"))
    return counts | {"test": counts["images"] - counts["train"]}


def _voc_folder(folder: Path) -> Path:
    places = [folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"]
    return next((place for place in places if (place / "JPEGImages").is_dir()), folder)


def _voc_masks(folder: Path) -> list[Path]:
    places = (folder / "SegmentationClassAug", folder / "SegmentationClass")
    return [place for place in places if place.is_dir()]


def _count_voc(folder: Path) -> dict[str, int]:
    folder = _voc_folder(folder)
    return {
        "images": _files(folder / "JPEGImages", ".jpg"),
        "masks": max((_files(place, ".png") for place in _voc_masks(folder)), default=0),
    }


def _check_voc(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    counts = _count_voc(folder)
    folder = _voc_folder(folder)
    for path in sorted((folder / "ImageSets" / "Segmentation").glob("*.txt")):
        found = Problems()
        try:
            counts[path.stem] = sum(1 for line in read_lines(path) if line.strip())
            read_voc(folder, path.stem, found)
        except (FileNotFoundError, ValueError) as error:
            found.add("lists that cannot be used", f"{path.name} ({error})")
        problems.keep(found.lines())
    if not counts.keys() & {"train", "val"}:
        problems.add("lists that are not there", "ImageSets/Segmentation/train.txt, val.txt")
    images = {path.stem: path for path in sorted((folder / "JPEGImages").glob("*.jpg"))}
    masks = [mask for place in _voc_masks(folder) for mask in sorted(place.glob("*.png"))]
    for mask in tqdm(masks, "masks", unit="mask", disable=not progress):
        if mask.stem not in images:
            problems.add("masks of pictures that are not there", mask.name)
            continue
        source = partial(read_label_picture, mask)
        item = MaskedImage(mask.stem, images[mask.stem], (), len(VOC_CLASS_NAMES), source)
        try:
            item.read_mask()
        except (ValueError, OSError) as error:
            problems.add("masks that cannot be used", f"{mask.parent.name}/{mask.name} ({error})")
    _check_pictures(images.values(), problems, progress)
    return counts


def _count_coco(folder: Path) -> dict[str, int]:
    return {split: _files(folder / f"{split}2017", ".jpg") for split in ("train", "val")} | {
        "annotations": _files(folder / "annotations", ".json")
    }


def _check_coco(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    counts = _count_coco(folder)
    for split in ("train", "val"):
        images = folder / f"{split}2017"
        path = folder / "annotations" / f"instances_{split}2017.json"
        if images.is_dir() != path.is_file():
            lost = path.relative_to(folder) if images.is_dir() else images.name
            if split == "val" or images.is_dir():  # the archive of annotations covers train, too
                problems.add("parts that are not there", str(lost))
        if images.is_dir() and path.is_file():
            try:
                data = load_coco(folder, split)
            except (ValueError, FileNotFoundError) as error:
                problems.add("annotations that cannot be read", f"{path.name} ({error})")
            else:
                counts[f"{split} with objects"] = sum(bool(item.class_ids) for item in data)
                problems.keep(data.checked(progress=progress).problems)
    return counts


def _dagm_images(folder: Path) -> list[Path]:
    names = (Path(name) for name in list_pictures(folder))
    return [folder / name for name in names if "label" not in name.parent.name.lower()]


def _count_dagm(folder: Path) -> dict[str, int]:
    return {
        "images": len(_dagm_images(folder)),
        "classes": len(
            {p.name for p in folder.glob("Class*") if re.fullmatch(r"Class\d+", p.name)}
        ),
    }


def _check_dagm(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    data = load_dagm(folder, "all").checked(progress=progress)
    problems.keep(data.problems)
    defects = sum(bool(item.class_ids) for item in data)
    return _count_dagm(folder) | {"images": len(data), "defects": defects}


def _count_tiles(folder: Path) -> dict[str, int]:
    return {"images": sum(n.lower().endswith(".jpg") for n in list_pictures(folder))}


def _check_tiles(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    data = load_magnetic_tile(folder).checked(progress=progress)
    problems.keep(data.problems)
    return {"images": len(data), "defects": sum(bool(item.class_ids) for item in data)}


def _count_context(folder: Path) -> dict[str, int]:
    return {"masks": sum(1 for p in folder.rglob("*") if p.suffix in (".mat", ".png"))}


def _check_context(folder: Path, problems: Problems, progress: bool) -> dict[str, int]:
    whole = (folder / "trainval").is_dir()
    for labels in (33, 59, 459):
        drawn = (folder / f"{labels}_context_labels").is_dir()
        if drawn or (whole and labels == 459):
            try:
                data = load_context(folder, labels=labels)
            except (ValueError, FileNotFoundError) as error:
                problems.add("sets of labels that cannot be read", f"{labels} ({error})")
            else:
                problems.keep(data.checked(pictures=False, progress=progress).problems)
    return _count_context(folder)


def _files(folder: Path, suffix: str) -> int:
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as found:
        return sum(entry.name.lower().endswith(suffix) for entry in found)


# --------------------------------------------------------------------------------------- fetch


def fetch_data(name: str, root: str | Path, progress: bool = True) -> dict[str, object]:
    """Downloads what may be downloaded openly, verifies it and unpacks it.

    An interrupted call goes on where it stopped when it is made again; parts that are there
    already are left alone.

    Args:
        name: Name of the data set.
        root: The data root; the data set goes to the folder of its name.
        progress: Show progress bars.

    Returns:
        ``name``, ``folder``, ``fetched`` and ``there`` (names of archives unpacked now and
        skipped), ``terms``, and ``where``: how to get what this call does not fetch.

    Raises:
        ValueError: There is no data set of this name, or what came is not what was published.
        OSError: No connection or no space; says how to go on.
    """
    entry = _entry(name)
    folder = Path(root) / name
    fetched, there = [], []
    for archive in entry.archives:
        place = folder / archive.target
        if place.is_dir() and any(place.iterdir()):
            if place == folder and not any(entry.count(folder).values()):
                raise FileExistsError(
                    f"expected {entry.title} or nothing in {str(folder)!r}, got other files; "
                    "move them away"
                )
            there.append(archive.name)
            continue
        store = Path(root) / "downloads"
        file = download(
            archive.url, store / archive.name, size=archive.size, sha256=archive.sha256,
            progress=progress,
        )  # fmt: skip
        extract(file, place, archive.inside, progress=progress)
        file.unlink()
        if not any(store.iterdir()):
            store.rmdir()
        fetched.append(archive.name)
    return {
        "name": name, "folder": str(folder), "fetched": fetched, "there": there,
        "terms": entry.terms, "where": entry.where,
    }  # fmt: skip


def download(url: str, path: str | Path, *, size: int, sha256: str, progress: bool = True) -> Path:
    """Downloads a file; what is cut off goes on at the next call.

    The bytes collect in ``NAME.part`` beside `path`; only a file of the right size and checksum
    gets the name. A lost connection is taken up again a few times before it is an error.

    Args:
        url: The address, http or https.
        path: The file.
        size: Its published size in bytes.
        sha256: Its published checksum.
        progress: Show a progress bar.

    Raises:
        ValueError: The file is not the published one.
        OSError: No connection, no space or no permission; what came so far is kept.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"expected an address http:// or https://, got {url!r}")
    if path.exists():
        if _digest(path) != sha256:
            raise ValueError(
                f"expected the sha256 {sha256[:12]}... of {str(path)!r}, got another; "
                "delete the file and fetch it again"
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if _length(part) > size:
        part.unlink()
    _check_space(path.parent, size - _length(part), path.name)
    with tqdm(
        desc=path.name, total=size, initial=_length(part), unit="B", unit_scale=True,
        unit_divisor=1024, disable=not progress,
    ) as bar:  # fmt: skip
        tries = 0
        while (before := _length(part)) < size:
            try:
                reason = _transfer(url, part, size, bar)
            except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
                reason = _reason(error)
            if reason is None:
                break
            tries = 0 if _length(part) >= before + _BLOCK else tries + 1
            if tries == TRIES:
                raise OSError(
                    f"expected {size:,} bytes of {url}, got {_length(part):,} ({reason}); "
                    "run the same command again, it goes on from there"
                )
            time.sleep(PAUSE)
    got = _digest(part)
    if got != sha256:
        part.unlink()
        raise ValueError(
            f"expected the sha256 {sha256[:12]}... of {url}, got {got[:12]}...; what came was "
            "deleted, run the same command again or get the file elsewhere"
        )
    part.replace(path)
    return path


def _transfer(url: str, part: Path, size: int, bar: tqdm) -> str | None:
    # Gets what is missing; returns why it is not whole, None if it is.
    have = _length(part)
    headers = {"User-Agent": "attnviz", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with closing(error):
            if error.code == 416:  # the file there is shorter than what is here
                part.unlink()
                bar.reset(size)
                return "the file there is shorter"
            if error.code not in (408, 429) and error.code < 500:
                raise OSError(
                    f"expected {url}, got the answer {error.code} {error.reason}; "
                    "has it moved? look at its page"
                ) from None
            return f"{error.code} {error.reason}"
    with response:
        start, whole = _offered(response)
        if whole is not None and whole != size:
            raise ValueError(
                f"expected {size:,} bytes of {url}, got an offer of {whole:,}; "
                "the file there is another one"
            )
        if start not in (0, have):
            return f"an answer from byte {start:,} instead of {have:,}"
        if start != have:  # a server that does not continue
            bar.reset(size)
        with _space(part), part.open("ab" if start else "wb", buffering=0) as file:
            while True:
                try:
                    block = response.read1(_BLOCK)  # what came, even if the next is lost
                except (OSError, HTTPException) as error:
                    return _reason(error)
                if not block:
                    break
                _write(file, block)
                bar.update(len(block))
    have = _length(part)
    if have > size:
        part.unlink()
        raise ValueError(f"expected {size:,} bytes of {url}, got more; the file is another one")
    return None if have == size else "the connection ended early"


def _offered(response: HTTPResponse) -> tuple[int, int | None]:
    # First byte of the answer and length of the whole file, None if not said.
    if response.status == 206:
        match = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")
        )
        if match:
            return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _write(file: IO[bytes], block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason) or type(reason).__name__


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"expected {needed:,} free bytes in {str(folder)!r} for {what}, got {free:,}; "
            "make room, or choose another data root"
        )


@contextmanager
def _space(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"expected space for {str(path)!r}, got a full disk; make room and run the same "
                "command again, it goes on from there"
            ) from error
        raise


# ------------------------------------------------------------------------------------- extract

_Kind = Literal["file", "folder", "other"]
_Open = Callable[[], IO[bytes]]
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError,
    NotImplementedError,
)  # fmt: skip


def extract(
    archive: str | Path, folder: str | Path, inside: str = ".", *, progress: bool = True
) -> Path:
    """Unpacks a zip or tar archive: all of it or nothing.

    Every name is looked at before anything is written. Only plain files and folders are taken,
    with fresh permissions; they are written beside `folder` and then moved there.

    Args:
        archive: The file: ``.zip``, ``.tar``, ``.tar.gz`` or ``.tgz``.
        folder: What it becomes; must not exist, or be an empty folder.
        inside: The folder in the archive that is wanted.
        progress: Show a progress bar.

    Raises:
        ValueError: The archive is damaged, has no `inside`, or holds a path that leads outside,
            an absolute path, a link or a device.
        FileExistsError: `folder` holds something.
        OSError: No space or no permission; nothing is left behind.
    """
    archive, folder = Path(archive), Path(folder).resolve()
    inside = posixpath.normpath(inside)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected no {str(folder)!r}, got one; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        total, count = _check_members(archive, inside)
    except _DAMAGED as error:
        raise _damaged(archive, error) from error
    if not count:
        raise ValueError(f"expected {inside!r} in {str(archive)!r}, got no file of it")
    _check_space(folder.parent, total, archive.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with tqdm(
            desc=f"unpack {archive.name}", total=total, unit="B", unit_scale=True,
            unit_divisor=1024, disable=not progress,
        ) as bar, _space(folder):  # fmt: skip
            for name, kind, _, opened in _members(archive):
                relative = _below(name, inside)
                if kind == "file" and relative is not None:
                    _unpack(opened, temporary / relative, bar)
        temporary.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except _DAMAGED as error:
        raise _damaged(archive, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _damaged(archive: Path, error: Exception) -> ValueError:
    return ValueError(
        f"expected a whole archive, got {str(archive)!r}, which is damaged ({error}); "
        "delete it and fetch it again"
    )


def _check_members(archive: Path, inside: str) -> tuple[int, int]:
    # Bytes and number of the wanted files; raises ValueError for a member that is not harmless.
    total, count, seen = 0, 0, set()
    for name, kind, size, _ in _members(archive):
        parts = name.split("/")
        if "\\" in name or "\0" in name:
            raise _harmful(archive, name, "a name with a backslash or a zero")
        if name.startswith("/") or re.match("[A-Za-z]:", name):
            raise _harmful(archive, name, "an absolute path")
        if ".." in parts:
            raise _harmful(archive, name, "a path that leads outside")
        if kind == "other":
            raise _harmful(archive, name, "a link or a device")
        relative = _below(name, inside)
        if kind == "file" and relative is not None:
            if relative in seen:
                raise _harmful(archive, name, "a name that comes twice")
            seen.add(relative)
            total, count = total + size, count + 1
    return total, count


def _harmful(archive: Path, name: str, what: str) -> ValueError:
    return ValueError(
        f"expected plain files and folders in {str(archive)!r}, got {name[:80]!r}, {what}; "
        "nothing was unpacked"
    )


def _below(name: str, inside: str) -> str | None:
    # The name relative to the wanted folder, None if it is not below it.
    name = posixpath.normpath(name)
    if inside == ".":
        return name
    return name.removeprefix(f"{inside}/") if name.startswith(f"{inside}/") else None


def _members(archive: Path) -> Iterator[tuple[str, _Kind, int, _Open]]:
    # Name, kind, size and a way to open each member of a zip or tar archive, in its order.
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                mode = stat.S_IFMT(entry.external_attr >> 16)
                kind: _Kind = "folder" if entry.is_dir() else "file"
                if mode not in (0, stat.S_IFREG, stat.S_IFDIR) or entry.flag_bits & 1:
                    kind = "other"  # encrypted ones, too
                # orig_filename: the name before Python makes it harmless
                yield entry.orig_filename, kind, entry.file_size, lambda e=entry: opened.open(e)
    else:
        with tarfile.open(archive) as opened:
            for entry in opened:
                kind = "file" if entry.isreg() else "folder" if entry.isdir() else "other"
                yield entry.name, kind, entry.size, lambda e=entry: opened.extractfile(e)


def _unpack(opened: _Open, path: Path, bar: tqdm) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened() as source, path.open("xb") as file:
        while block := source.read(_BLOCK):
            file.write(block)
            bar.update(len(block))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------- entries
# Checksums as torchvision's readers of these data sets state them, sizes as the servers do.

_SETS: dict[str, DataSet] = {
    entry.name: entry
    for entry in (
        DataSet(
            "ilsvrc", "ILSVRC 2012 (ImageNet), validation",
            "non-commercial research; the pictures belong to their owners",
            "register at https://image-net.org/download (ILSVRC2012_img_val.tar, "
            "ILSVRC2012_bbox_val_v3.tgz, ILSVRC2012_devkit_t12.tar.gz), or join the ImageNet "
            "Object Localization Challenge at https://www.kaggle.com/c/"
            "imagenet-object-localization-challenge, and unpack into ilsvrc/",
            {"images": 50_000, "classes": 1000}, _count_ilsvrc, _check_ilsvrc,
        ),
        DataSet(
            "voc2012", "PASCAL VOC 2012",
            "the terms of the pictures' source, Flickr; research",
            "run: attnviz data fetch voc2012; the 10,582 augmented masks (SegmentationClassAug) "
            "are other people's, put them beside SegmentationClass",
            {"images": 17_125, "masks": 2_913, "train": 1_464, "val": 1_449},
            _count_voc, _check_voc,
            (
                Archive(
                    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                    1_999_639_040,
                    "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
                    "VOCdevkit/VOC2012",
                ),
            ),
        ),
        DataSet(
            "cub", "Caltech-UCSD Birds-200-2011",
            "non-commercial research and teaching; the pictures belong to their owners",
            "run: attnviz data fetch cub",
            {"images": 11_788, "classes": 200, "boxes": 11_788, "train": 5_994, "test": 5_794},
            _count_cub, _check_cub,
            (
                Archive(
                    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                    1_150_585_339,
                    "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                    "CUB_200_2011",
                ),
            ),
        ),
        DataSet(
            "dagm2007", "DAGM 2007, defects on textured surfaces",
            "see its page",
            "ask for it at https://hci.iwr.uni-heidelberg.de/content/"
            "weakly-supervised-learning-industrial-optical-inspection and unpack Class1 to "
            "Class10 into dagm2007/",
            {"images": 16_100, "classes": 10}, _count_dagm, _check_dagm,
        ),
        DataSet(
            "magnetic_tile", "Magnetic tiles, photographs of surface defects",
            "see its page",
            "get it from https://github.com/abin24/Magnetic-tile-defect-datasets. and put "
            "MT_Blowhole to MT_Free into magnetic_tile/",
            {"images": 1_344}, _count_tiles, _check_tiles,
        ),
        DataSet(
            "context", "PASCAL Context, 10,103 label maps",
            "see its page",
            "get trainval.tar.gz and labels.txt, or 59_context_labels.tar.gz and 59_labels.txt, "
            "from https://cs.stanford.edu/~roozbeh/pascal-context/ and unpack into context/",
            {"masks": 10_103}, _count_context, _check_context,
        ),
        DataSet(
            "coco", "COCO 2017",
            "annotations CC BY 4.0; pictures under Flickr's terms",
            "run: attnviz data fetch coco, for val2017 and the annotations; train2017.zip (19 GB) "
            "is at https://cocodataset.org/#download",
            {"train": 118_287, "val": 5_000}, _count_coco, _check_coco,
            (
                Archive(
                    "http://images.cocodataset.org/zips/val2017.zip",
                    815_585_330,
                    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
                    "val2017", "val2017",
                ),
                Archive(
                    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
                    252_907_541,
                    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
                    "annotations", "annotations",
                ),
            ),
        ),
    )
}  # fmt: skip
