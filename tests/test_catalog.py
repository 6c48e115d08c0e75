import hashlib
import io
import json
import socket
import stat
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnviz.data import catalog
from attnviz.data.catalog import Archive, check_data, download, extract, fetch_data, list_data

BYTES = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(BYTES).hexdigest()


class _Server(ThreadingHTTPServer):
    """Serves `content` with Range; `faults` are taken one a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.faults, self.asked = {"/file": BYTES}, [], []

    def url(self, path="/file"):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        pass


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        content, wanted = server.content.get(self.path), self.headers.get("Range")
        server.asked.append(wanted)
        fault = server.faults.pop(0) if server.faults else None
        if content is None or isinstance(fault, int):
            self.send_error(fault or 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if fault == "no range":
            start = 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if fault in ("cut", "drop", "no length"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if fault == "drop":  # the connection is reset
            time.sleep(0.05)
            linger = b"\1\0\0\0\0\0\0\0"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(catalog, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _get(server, path, **changes):
    values = {"size": len(BYTES), "sha256": SHA256, "progress": False} | changes
    return download(server.url(), path, **values)


# ------------------------------------------------------------------------------------ download


def test_a_download_is_whole_or_not_there(server, tmp_path):
    path = tmp_path / "new" / "file.bin"
    assert _get(server, path).read_bytes() == BYTES
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    _get(server, path)
    assert server.asked == [None]


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    part = tmp_path / "file.part"
    part.write_bytes(BYTES[:100_000])
    assert _get(server, tmp_path / "file").read_bytes() == BYTES
    assert server.asked == ["bytes=100000-"]
    part.write_bytes(BYTES)
    (tmp_path / "file").unlink()
    _get(server, tmp_path / "file")
    assert len(server.asked) == 1


@pytest.mark.parametrize("fault", ["cut", "drop", "no length", 503])
def test_a_lost_connection_is_taken_up_again(server, tmp_path, fault):
    server.faults = [fault, fault]
    assert _get(server, tmp_path / "file").read_bytes() == BYTES
    assert len(server.asked) == 3
    assert fault == 503 or server.asked[1] is not None


@pytest.mark.parametrize("fault", ["cut", "drop"])
def test_a_connection_that_stays_lost_is_one_line_and_goes_on(server, tmp_path, fault):
    server.faults = [fault] * 3
    with pytest.raises(OSError, match=r"expected 300,000 bytes of .* again, it goes on") as error:
        _get(server, tmp_path / "file")
    assert "\n" not in str(error.value)
    have = (tmp_path / "file.part").stat().st_size
    assert 0 < have < len(BYTES)
    assert not (tmp_path / "file").exists()
    assert _get(server, tmp_path / "file").read_bytes() == BYTES
    assert server.asked[-1] == f"bytes={have}-"


def test_a_server_that_does_not_continue_starts_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BYTES[:50_000])
    server.faults = ["no range"]
    assert _get(server, tmp_path / "file").read_bytes() == BYTES


def test_wrong_bytes_never_get_the_name(server, tmp_path):
    server.content["/file"] = b"x" + BYTES[1:]
    with pytest.raises(ValueError, match=rf"expected the sha256 {SHA256[:12]}... of http"):
        _get(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    server.content["/file"] = BYTES
    assert _get(server, tmp_path / "file").read_bytes() == BYTES


def test_another_file_is_refused_before_it_is_fetched(server, tmp_path):
    with pytest.raises(ValueError, match=r"expected 299,999 bytes .* offer of 300,000"):
        _get(server, tmp_path / "file", size=len(BYTES) - 1)
    assert list(tmp_path.iterdir()) == []
    server.faults = ["no length"]
    with pytest.raises(ValueError, match="got more"):
        _get(server, tmp_path / "file", size=100)
    assert list(tmp_path.iterdir()) == []


def test_a_part_beyond_the_end_is_dropped(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BYTES + b"x")
    assert _get(server, tmp_path / "file").read_bytes() == BYTES
    server.content["/file"] = BYTES[:10]
    (tmp_path / "file").unlink()
    (tmp_path / "file.part").write_bytes(BYTES[:20])
    with pytest.raises(ValueError, match="offer of 10"):
        _get(server, tmp_path / "file")


def test_answers_that_stay_wrong_are_said_at_once(server, tmp_path):
    with pytest.raises(OSError, match="got the answer 404"):
        download(server.url("/gone"), tmp_path / "f", size=9, sha256=SHA256, progress=False)
    assert len(server.asked) == 1
    with pytest.raises(ValueError, match="address http:// or https://, got 'file:///etc"):
        download("file:///etc/passwd", tmp_path / "f", size=9, sha256=SHA256, progress=False)


def test_no_server_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "PAUSE", 0.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        with pytest.raises(OSError, match="Connection refused"):
            download(url, tmp_path / "f", size=9, sha256=SHA256, progress=False)


def test_a_file_of_the_name_with_other_bytes_is_kept(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match="delete the file"):
        _get(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_disk_too_small_is_said_before(server, tmp_path):
    with pytest.raises(OSError, match=r"free bytes in .* make room"):
        _get(server, tmp_path / "file", size=1 << 60)
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(server, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"got a full disk; make room and run .* again"):
        _get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_the_bar_counts_what_was_there(server, tmp_path, capsys):
    (tmp_path / "file.part").write_bytes(BYTES[:150_000])
    _get(server, tmp_path / "file", progress=True)
    assert "100%" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- extract


def _tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, value in members.items():
            entry = value if isinstance(value, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = value if isinstance(value, bytes) else b""
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            archive.writestr(value if isinstance(value, zipfile.ZipInfo) else name, b"data")
    return path


def _special(kind, target=""):
    entry = tarfile.TarInfo("top/special")
    entry.type, entry.linkname = kind, target
    return entry


GOOD = {"top/a.txt": b"data", "top/deep/b.txt": b"data", "other.txt": b"data"}


@pytest.mark.parametrize("write", [_tar, _zip])
def test_archives_unpack_whole(tmp_path, write):
    archive = write(tmp_path / "archive", GOOD)
    folder = extract(archive, tmp_path / "set", "top", progress=False)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == ["a.txt", "deep/b.txt"]
    assert (folder / "a.txt").read_bytes() == b"data"
    assert stat.S_IMODE(folder.stat().st_mode) & 0o700 == 0o700
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "set"]
    with pytest.raises(FileExistsError, match="move it away"):
        extract(archive, folder, progress=False)


@pytest.mark.parametrize("write", [_tar, _zip])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside", "leads outside"),
        ("top/../../outside", "leads outside"),
        ("/tmp/attnviz-absolute", "absolute path"),
        ("C:/windows", "absolute path"),
        ("top\\..\\outside", "a backslash or a zero"),
    ],
)
def test_names_that_lead_outside_are_refused(tmp_path, write, name, reason):
    archive = write(tmp_path / "archive", GOOD | {name: b"bad"})
    with pytest.raises(ValueError, match=rf"expected plain files .*{reason}; nothing was unpack"):
        extract(archive, tmp_path / "in" / "set", progress=False)
    assert list((tmp_path / "in").iterdir()) == []
    assert not Path("/tmp/attnviz-absolute").exists()


@pytest.mark.parametrize(
    "special",
    [
        _special(tarfile.SYMTYPE, "/etc"),
        _special(tarfile.SYMTYPE, "a.txt"),
        _special(tarfile.LNKTYPE, "../../secret"),
        _special(tarfile.CHRTYPE),
        _special(tarfile.FIFOTYPE),
    ],
    ids=["link outside", "link inside", "hard link", "device", "pipe"],
)
def test_links_and_devices_are_refused(tmp_path, special):
    archive = _tar(tmp_path / "archive", GOOD | {"top/special": special})
    with pytest.raises(ValueError, match="a link or a device"):
        extract(archive, tmp_path / "in" / "set", progress=False)
    assert list((tmp_path / "in").iterdir()) == []


def test_links_in_a_zip_are_refused(tmp_path):
    entry = zipfile.ZipInfo("top/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = _zip(tmp_path / "archive", GOOD | {"top/link": entry})
    with pytest.raises(ValueError, match="a link or a device"):
        extract(archive, tmp_path / "set", progress=False)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path):
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a", b"1")
        opened.writestr("./a", b"2")
    with pytest.raises(ValueError, match="comes twice"):
        extract(archive, tmp_path / "set", progress=False)


@pytest.mark.parametrize("write", [_tar, _zip])
def test_a_damaged_archive_leaves_nothing(tmp_path, write):
    archive = write(tmp_path / "archive", {"top/a": BYTES, "top/b": BYTES})
    whole = archive.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:60] + bytes(20) + whole[80:], b"no archive"):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|expected plain|got no file"):
            extract(archive, tmp_path / "in" / "set", progress=False)
        assert list((tmp_path / "in").iterdir()) == []


def test_what_is_not_in_an_archive_is_said(tmp_path):
    archive = _zip(tmp_path / "archive", GOOD)
    with pytest.raises(ValueError, match="expected 'topp' in .* got no file of it"):
        extract(archive, tmp_path / "set", "topp", progress=False)


# ------------------------------------------------------------------------------ list and check


def _image(path, size=(32, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def _birds(folder, count=2):
    names = [f"001.Bird/{i}.jpg" for i in range(1, count + 1)]
    for name in names:
        _image(folder / "images" / name)
    for file, values in {
        "images.txt": names,
        "train_test_split.txt": ["1"] + ["0"] * (count - 1),
        "image_class_labels.txt": ["1"] * count,
        "bounding_boxes.txt": ["1 1 20 20"] * count,
        "classes.txt": ["001.Bird"],
    }.items():
        lines = [f"{i} {value}\n" for i, value in enumerate(values, 1)]
        (folder / file).write_text("".join(lines))


def _voc(folder):
    for name in ("2007_1", "2007_2"):
        _image(folder / "JPEGImages" / f"{name}.jpg")
        mask = Image.fromarray(np.full((24, 32), 15, np.uint8)).convert("P")
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(folder / "SegmentationClass" / f"{name}.png")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    (lists / "val.txt").write_text("2007_2\n")


def _coco(folder):
    _image(folder / "val2017" / "000000000001.jpg")
    table = {
        "images": [{"id": 1, "file_name": "000000000001.jpg", "height": 24, "width": 32}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 9, 1, 9, 9]]}
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(table))
    return table


def test_every_data_set_is_listed(tmp_path):
    rows = {row["name"]: row for row in list_data(tmp_path)}
    assert {
        "scenes",
        "defects",
        "magnetic_tile",
        "ilsvrc",
        "voc2012",
        "cub",
        "dagm2007",
        "context",
        "coco",
    } <= set(rows)
    assert rows["scenes"]["found"]
    assert not rows["cub"]["found"]
    assert rows["cub"]["bytes"] == 1_150_585_339
    assert rows["ilsvrc"]["bytes"] is None
    assert all(row["terms"] and row["where"] for row in rows.values())
    json.dumps(list(rows.values()))
    _birds(tmp_path / "cub")
    row = next(row for row in list_data(tmp_path) if row["name"] == "cub")
    assert row["found"]
    assert row["counts"] == {"images": 2}


def test_a_whole_set_has_no_problems(tmp_path):
    _birds(tmp_path / "cub")
    result = check_data("cub", tmp_path, progress=False)
    counts = {"images": 2, "classes": 1, "boxes": 2, "train": 1, "test": 1}
    assert result["counts"] == counts
    assert (result["ok"], result["problems"]) == (True, [])
    assert result["missing"][0] == "images: 2 of 11,788"
    json.dumps(result)


def test_a_picture_cut_off_is_found(tmp_path):
    _birds(tmp_path / "cub")
    path = tmp_path / "cub" / "images" / "001.Bird" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    result = check_data("cub", tmp_path, progress=False)
    assert result["problems"] == ["pictures that cannot be read: 2.jpg"]
    assert not result["ok"]


def test_voc_is_checked(tmp_path):
    folder = tmp_path / "voc2012"
    _voc(folder)
    result = check_data("voc2012", tmp_path, progress=False)
    assert result["ok"]
    assert result["counts"] == {"images": 2, "masks": 2, "train": 1, "val": 1}
    mask = Image.fromarray(np.full((24, 32), 77, np.uint8)).convert("P")
    mask.save(folder / "SegmentationClass" / "2007_1.png")
    Image.new("P", (3, 3)).save(folder / "SegmentationClass" / "2007_2.png")
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_1\n2007_9\n")
    Image.new("P", (3, 3)).save(folder / "SegmentationClass" / "2007_3.png")
    (folder / "ImageSets" / "Segmentation" / "trainval.txt").write_text("2007_8\n")
    problems = check_data("voc2012", tmp_path, progress=False)["problems"]
    starts = [
        "pictures of train.txt that are not there: 2007_9",
        "pictures of trainval.txt that are not there: 2007_8",
        "lists that cannot be used: trainval.txt (expected pictures of trainval.txt in",
        "masks that cannot be used: SegmentationClass/2007_1.png (expected labels 0 to 20 or 255",
        "masks of pictures that are not there: 2007_3.png",
    ]
    for line, start in zip(problems, starts, strict=True):
        assert line.startswith(start)
    assert "SegmentationClass/2007_2.png (expected a mask of 24 x 32" in problems[3]


BAD_CLASSES = {
    "broken boxes": (
        "Annotations/2007_1.xml", b"<annotation><object>",
        ["annotations that cannot be read: 2007_1.xml",
         "found none; choose other `labels`, such as 'masks')"],
    ),
    "numbers beyond": (
        "train_cls.txt", b"2007_1 25",
        ["classes outside 0 to 19 in train_cls.txt, left out: line 1", "found none; choose other"],
    ),
    "another encoding": (
        "train_cls.txt", "2007_1 \xe4".encode("latin-1"), ["(expected text in UTF-8, got "],
    ),
    "a list in another encoding": (
        "ImageSets/Segmentation/train.txt", b"\xff", ["(expected text in UTF-8, got "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CLASSES)
def test_voc_lists_without_classes_say_why_and_what_else_is_wrong(tmp_path, kind):
    folder = tmp_path / "voc2012"
    _voc(folder)
    file, content, wanted = BAD_CLASSES[kind]
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    (folder / "val_cls.txt").write_text("2007_2 0\n")
    listed = folder / "ImageSets" / "Segmentation" / "train.txt"
    if listed != folder / file:
        _image(folder / "JPEGImages" / "2007_3.jpg")  # its mask was deleted
        listed.write_text("2007_1\n2007_3\n")
        wanted = ["masks of train.txt that are not there: 2007_3", *wanted]
    problems = check_data("voc2012", tmp_path, progress=False)["problems"]
    for text in [*wanted, "lists that cannot be used: train.txt (expected "]:
        assert sum(text in line for line in problems) == 1
    assert not any("val.txt" in line for line in problems)


def test_coco_is_checked(tmp_path):
    folder = tmp_path / "coco"
    table = _coco(folder)
    assert check_data("coco", tmp_path, progress=False)["ok"]
    first = table["annotations"][0]
    table["images"].append(table["images"][0] | {"id": 2, "file_name": "2.jpg"})
    table["annotations"] += [
        first | {"id": 2, "image_id": 9},
        first | {"id": 3, "category_id": 4},
        first | {"id": 4, "segmentation": {"size": [24, 32], "counts": "!"}},
    ]
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(table))
    problems = check_data("coco", tmp_path, progress=False)["problems"]
    assert problems[:3] == [
        "objects of unknown pictures in instances_val2017.json: object 2",
        "objects of unknown classes in instances_val2017.json: object 3",
        "pictures of instances_val2017.json that are not there: 2.jpg",
    ]
    assert problems[3].startswith("masks that cannot be used, left out: 000000000001 (expected")
    path.write_text("{")
    problems = check_data("coco", tmp_path, progress=False)["problems"]
    assert problems[0].startswith("annotations that cannot be read: instances_val2017.json")


def test_dagm_is_checked(tmp_path):
    folder = tmp_path / "dagm2007" / "Class1" / "Train"
    _image(folder / "1.PNG")
    _image(folder / "Label" / "1_label.PNG")
    _image(folder / "Label" / "2_label.PNG")
    result = check_data("dagm2007", tmp_path, progress=False)
    assert result["counts"] == {"images": 1, "classes": 1, "defects": 1}
    lost = "masks of pictures that are not there: Class1/Train/Label/2_label.PNG"
    assert result["problems"] == [lost]


def test_context_is_checked(tmp_path):
    folder = tmp_path / "context"
    (folder / "trainval").mkdir(parents=True)
    (folder / "trainval" / "2008_1.mat").touch()
    (folder / "labels.txt").write_text("1: accordion\n")
    result = check_data("context", tmp_path, progress=False)
    assert result["problems"][0].startswith(
        "sets of labels that cannot be read: 459 (expected VOC"
    )
    _image(folder / "JPEGImages" / "2008_1.jpg")
    result = check_data("context", tmp_path, progress=False)
    assert result["problems"][0].startswith("masks that cannot be used, left out: 2008_1 (")
    assert result["counts"] == {"masks": 1}


def test_tiles_are_checked(tmp_path):
    for kind in ("Blowhole", "Break", "Crack", "Fray", "Uneven", "Free"):
        for suffix in ("jpg", "png"):
            _image(tmp_path / "magnetic_tile" / f"MT_{kind}" / f"exp1_num_1.{suffix}")
    result = check_data("magnetic_tile", tmp_path, progress=False)
    assert result["counts"] == {"images": 6, "defects": 5}
    assert result["ok"]
    assert result["missing"] == ["images: 6 of 1,344"]
    (tmp_path / "magnetic_tile" / "MT_Fray" / "exp1_num_1.png").write_bytes(b"no")
    problems = check_data("magnetic_tile", tmp_path, progress=False)["problems"]
    assert problems[0].startswith("masks that cannot be used, left out: MT_Fray/exp1_num_1 (")


def test_unknown_and_missing_sets_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"data set of ilsvrc, .*, got 'cup'; did you mean 'cub'"):
        check_data("cup", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"expected COCO 2017 in .*attnviz data fetch coco"
    ):
        check_data("coco", tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "images"), [("ilsvrc", 650), ("voc2012", 623), ("coco", None), ("magnetic_tile", 363)]
)
def test_genuine_sets_are_sound(real_data, name, images):
    result = check_data(name, real_data, progress=False)
    assert result["problems"] == []
    assert images is None or result["counts"]["images"] == images


# --------------------------------------------------------------------------------------- fetch


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """Two small archives that stand for COCO's."""
    _coco(tmp_path / "made")
    archives = []
    for part in ("val2017", "annotations"):
        path = tmp_path / f"{part}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((tmp_path / "made" / part).iterdir()):
                archive.write(file, f"{part}/{file.name}")
        data = path.read_bytes()
        server.content[f"/{part}.zip"] = data
        digest = hashlib.sha256(data).hexdigest()
        archives.append(Archive(server.url(f"/{part}.zip"), len(data), digest, part, part))
    entry = catalog._SETS["coco"]
    values = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    changed = catalog.DataSet(**values | {"archives": tuple(archives)})
    monkeypatch.setitem(catalog._SETS, "coco", changed)
    return server


def test_a_fetched_set_is_whole(published, tmp_path):
    root = tmp_path / "root"
    result = fetch_data("coco", root, progress=False)
    assert (result["fetched"], result["there"]) == (["val2017.zip", "annotations.zip"], [])
    assert check_data("coco", root, progress=False)["ok"]
    assert [path.name for path in root.iterdir()] == ["coco"]
    result = fetch_data("coco", root, progress=False)
    assert (result["fetched"], result["there"]) == ([], ["val2017.zip", "annotations.zip"])
    json.dumps(result)


def test_a_fetch_cut_off_goes_on(published, tmp_path):
    root = tmp_path / "root"
    published.faults = [None, "cut", "cut", "cut"]
    with pytest.raises(OSError, match="it goes on from there"):
        fetch_data("coco", root, progress=False)
    assert [path.name for path in (root / "coco").iterdir()] == ["val2017"]
    assert [path.name for path in (root / "downloads").iterdir()] == ["annotations.zip.part"]
    assert fetch_data("coco", root, progress=False)["fetched"] == ["annotations.zip"]
    assert check_data("coco", root, progress=False)["ok"]


def test_what_may_not_be_fetched_is_explained(tmp_path):
    result = fetch_data("ilsvrc", tmp_path, progress=False)
    assert result["fetched"] == []
    assert "image-net.org" in result["where"]
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_place_are_left_alone(tmp_path):
    (tmp_path / "cub").mkdir()
    (tmp_path / "cub" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="got other files; move them away"):
        fetch_data("cub", tmp_path, progress=False)


def test_published_sizes_and_checksums_are_complete():
    for entry in catalog._SETS.values():
        for archive in entry.archives:
            assert len(archive.sha256) == 64
            assert archive.size > 1e8
            assert archive.name.endswith((".zip", ".tar", ".tgz"))
