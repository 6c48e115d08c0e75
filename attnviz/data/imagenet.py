"""ILSVRC 2012 (ImageNet): pictures, classes 0 to 999 and boxes, in every layout people have.

Looked for below the root, for the split ``val`` (``train`` alike); the first that is there counts:

* pictures: ``val/``, ``ILSVRC2012_img_val/``, ``Data/CLS-LOC/val/``,
  ``ILSVRC/Data/CLS-LOC/val/``, the root itself; all in one folder or one sub-folder a class,
  named by WordNet id (``n01440764``) or by number;
* classes: ``val_labels.txt``, ``val.txt``, ``class_labels.txt``, ``LOC_val_solution.csv``, the
  development kit's ``ILSVRC2012_validation_ground_truth.txt`` with ``meta.mat``, or the
  sub-folders;
* names: ``synset_words.txt``, ``LOC_synset_mapping.txt``, ``meta.bin`` or ``meta.mat``;
* boxes: the XML files of ``Annotations/``, ``LOC_val_solution.csv``, ``localization.txt`` or
  ``boxes_*.csv``.

Class numbers are the places of the WordNet ids in alphabetical order, as in torchvision's and
every other network's output; the development kit's own ids, 1 to 1000, have another order.
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from ..files import first_line, read_saved
from .folder import (
    Box,
    LabeledImages,
    PictureNames,
    Problems,
    check_limit,
    collect,
    find_box_list,
    fit_all,
    list_pictures,
    read_box_list,
    read_lines,
)
from .matlab import read_table

__all__ = ["CLASS_COUNT", "find_pictures", "load_imagenet"]

CLASS_COUNT = 1000
_WNID = re.compile(r"n\d{8}")
_DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"


@dataclass
class _Synsets:
    # WordNet ids in the order of the class numbers, their names, and where they come from.
    wnids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    source: Path | None = None

    def __post_init__(self) -> None:
        self.numbers = {wnid: i for i, wnid in enumerate(self.wnids)}


@dataclass
class _Boxes:
    # Boxes, classes and sizes by the number of the picture.
    boxes: dict[int, list[Box]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    source: Path | None = None


def load_imagenet(
    root: str | Path,
    split: str = "val",
    *,
    boxes: str | Path | None = "auto",
    limit: int | None = None,
    progress: bool = False,
) -> LabeledImages:
    """Reads the pictures, classes and boxes of ILSVRC 2012.

    Pictures come in the order of their names. Pictures without a class are left out, boxes are
    scaled to the files and cut at their borders; the data set's ``problems`` say so.

    Args:
        root: The folder; see the module's text for what is looked for in it.
        split: ``val``, ``train`` or the name of another folder of pictures.
        boxes: ``auto`` looks for boxes, None leaves them out (no file's header is read then),
            a path names the folder of XML files or the list.
        limit: Keep only so many pictures.
        progress: Show progress bars.

    Returns:
        The data set; its class names are the first ones of each synset.

    Raises:
        FileNotFoundError: Pictures or their classes are not there; names every place searched.
        ValueError: A list has another format or counts classes from 1.
    """
    root = Path(root)
    check_limit(limit)
    if not root.is_dir():
        raise FileNotFoundError(f"expected the folder of ILSVRC 2012, got {str(root)!r}")
    folder, files = find_pictures(root, split)
    places = _places(root, folder, split)
    problems = Problems()
    synsets = _synsets(places, files)
    found = _Boxes()
    names = PictureNames(files)
    class_ids, source = _classes(places, split, files, names, synsets, problems)
    with_class = [i for i in range(len(files)) if class_ids[i] is not None]
    lost = [files[i] for i in range(len(files)) if class_ids[i] is None]
    problems.add_all("pictures without a class, left out", lost)
    kept = with_class[:limit]
    files, class_ids = [files[i] for i in kept], [class_ids[i] for i in kept]

    sources = {"images": str(folder), "labels": str(source)}
    if synsets.source:
        sources["names"] = str(synsets.source)
    if boxes is not None:
        partial = limit is not None and limit < len(with_class)
        found = _find_boxes(
            boxes, root, places, split, files, class_ids, synsets, problems, partial, progress
        )
        if found.source:
            sources["boxes"] = str(found.source)
    if found.source and split != "train":  # official boxes cover only part of train
        bare = [file for i, file in enumerate(files) if i not in found.boxes]
        problems.add_all("pictures without a box", bare)
    wrong = [files[i] for i, label in found.classes.items() if label != class_ids[i]]
    problems.add_all("pictures of another class in the boxes than in the labels", wrong)

    drawn = [found.boxes.get(i, []) for i in range(len(files))]
    sizes = [found.sizes.get(i, found.size) for i in range(len(files))]
    fitted = fit_all(folder, files, drawn, sizes, problems, upright=False, progress=progress)
    return collect(
        folder, files, class_ids, fitted, problems,
        class_names=synsets.names, sources=sources, upright=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------- where things are


def find_pictures(root: Path, split: str) -> tuple[Path, list[str]]:
    """The folder of a split's pictures and their names in it; FileNotFoundError if none."""
    names = (
        split, f"ILSVRC2012_img_{split}", f"ILSVRC2012_{split}", f"images/{split}",
        f"Data/CLS-LOC/{split}", f"ILSVRC/Data/CLS-LOC/{split}", f"CLS-LOC/{split}",
    )  # fmt: skip
    for name in names:
        if (root / name).is_dir() and (files := list_pictures(root / name)):
            return root / name, _by_name(files)
    other = "train" if split == "val" else "val"
    if not any((root / name.replace(split, other)).is_dir() for name in names):
        files = [name for name in list_pictures(root) if _fits(name, split)]
        if files:
            return root, _by_name(files)
    raise FileNotFoundError(
        f"expected the pictures of ILSVRC 2012 {split}, found none in {str(root)!r} "
        f"(searched {', '.join(names)} and the folder itself); put or link them into one of these"
    )


def _fits(name: str, split: str) -> bool:
    # Whether a file below the root itself is a picture of the split.
    top, _, rest = name.partition("/")
    if rest:
        return bool(_WNID.fullmatch(top) or (top.isdecimal() and int(top) < CLASS_COUNT))
    return top.startswith(f"ILSVRC2012_{split}_") or (split == "train" and top.startswith("n"))


def _by_name(files: list[str]) -> list[str]:
    # The same order for one folder and for class folders.
    return sorted(files, key=lambda file: (file.rpartition("/")[2], file))


def _places(root: Path, folder: Path, split: str) -> list[Path]:
    # Folders that lists are looked for in. The last is wsolevaluation's, which calls val test.
    lists = {"val": "test", "val2": "val"}.get(split, split)
    places = [
        root, root / "ILSVRC", folder.parent, root / "caffe_ilsvrc12", root / "data",
        root / "ILSVRC2012_devkit_t12" / "data", root / "devkit" / "data",
        root / "metadata", root / "metadata" / lists, root / "metadata" / "ILSVRC" / lists,
    ]  # fmt: skip
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def _first(places: Sequence[Path], *names: str) -> Path | None:
    for name in names:
        for place in places:
            if (place / name).is_file():
                return place / name
    return None


# ------------------------------------------------------------------------------ names, classes


def _synsets(places: Sequence[Path], files: Sequence[str]) -> _Synsets:
    path = _first(places, "synset_words.txt", "LOC_synset_mapping.txt")
    if path:
        return _read_synset_words(path)
    path = _first(places, "meta.bin")
    if path:
        return _read_meta_bin(path)
    path = _first(places, "meta.mat")
    if path:
        return _read_meta_mat(path)[0]
    folders = sorted({file.partition("/")[0] for file in files if "/" in file})
    if len(folders) == CLASS_COUNT and all(map(_WNID.fullmatch, folders)):
        return _Synsets(folders, _known_names())
    return _Synsets([], _known_names())


def _known_names() -> list[str]:
    from torchvision.models import AlexNet_Weights

    return list(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])


def _read_synset_words(path: Path) -> _Synsets:
    # "n01440764 tench, Tinca tinca", one class a line, in the order of the WordNet ids
    wnids, names = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        wnid, _, words = line.strip().partition(" ")
        if not _WNID.fullmatch(wnid) or not words:
            raise ValueError(
                f"expected lines like 'n01440764 tench, Tinca tinca' in {str(path)!r}, "
                f"got {line[:60]!r} in line {number}"
            )
        wnids.append(wnid)
        names.append(words.split(",")[0].strip())
    _check_synsets(wnids, path)
    return _Synsets(wnids, names, path)


def _read_meta_bin(path: Path) -> _Synsets:
    # torchvision's: ({wnid: (name, ...)}, the wnids of the val pictures)
    try:
        words, _ = read_saved(path)
        wnids = sorted(words)
        names = [str(words[wnid][0]) for wnid in wnids]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"expected torchvision's meta.bin, got {str(path)!r}, which is damaged "
            f"({first_line(error)}); delete it"
        ) from error
    _check_synsets(wnids, path)
    return _Synsets(wnids, names, path)


def _read_meta_mat(path: Path) -> tuple[_Synsets, dict[int, int]]:
    # The development kit's table, and the class number of each of its ids 1 to 1000. A row is
    # (id, wnid, words, gloss, number of children, ...); rows with children are not classes.
    rows = read_table(path, "synsets")
    try:
        leaves = [(int(row[0]), str(row[1]), str(row[2])) for row in rows if int(row[4]) == 0]
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise ValueError(
            f"expected the development kit's meta.mat, got {str(path)!r}, which is damaged "
            f"({first_line(error)}); unpack it again"
        ) from error
    leaves.sort(key=lambda leaf: leaf[1])
    wnids = [leaf[1] for leaf in leaves]
    _check_synsets(wnids, path)
    names = [leaf[2].split(",")[0].strip() for leaf in leaves]
    return _Synsets(wnids, names, path), {leaf[0]: i for i, leaf in enumerate(leaves)}


def _check_synsets(wnids: Sequence[str], path: Path) -> None:
    if len(wnids) != CLASS_COUNT or any(a >= b for a, b in pairwise(wnids)):
        raise ValueError(
            f"expected {CLASS_COUNT} WordNet ids in alphabetical order in {str(path)!r}, "
            f"got {len(wnids)}{'' if len(wnids) != CLASS_COUNT else ' in another order'}; "
            "class numbers depend on it"
        )


def _classes(
    places: Sequence[Path],
    split: str,
    files: Sequence[str],
    names: PictureNames,
    synsets: _Synsets,
    problems: Problems,
) -> tuple[list[int | None], Path | str]:
    """The class of each picture, and where it comes from."""
    by_folder = _folder_classes(files, synsets)
    lists = (f"{split}_labels.txt", f"{split}.txt", "class_labels.txt")
    path = _first(places, *lists)
    if path:
        listed = _read_label_list(path, synsets, problems)
    else:
        path = _first(places, f"LOC_{split}_solution.csv")
        if path:
            listed = _read_solution_classes(path, synsets, problems)
        elif split == "val" and (path := _first(places, _DEVKIT_LABELS)):
            listed = _read_devkit_classes(path, places, problems)
        elif any(label is not None for label in by_folder):
            return by_folder, "the class folders"
        else:
            _no_classes(files, split, lists, synsets, places)
    class_ids: list[int | None] = [None] * len(files)
    for name, label in listed.items():
        i = names.find(name)
        if i is None:
            problems.add(f"pictures of {path.name} that are not there", name)
        else:
            class_ids[i] = label
    if not any(label is not None for label in class_ids):
        raise ValueError(
            f"expected classes of the pictures in {str(path)!r}, got {len(listed)} lines, "
            f"none for a picture like {files[0]!r}"
        )
    for i, (label, folder) in enumerate(zip(class_ids, by_folder, strict=True)):
        if label is None:
            class_ids[i] = folder
        elif folder not in (None, label):
            problems.add(f"pictures of another class in {path.name} than their folder's", files[i])
    return class_ids, path


def _no_classes(
    files: Sequence[str],
    split: str,
    lists: Sequence[str],
    synsets: _Synsets,
    places: Sequence[Path],
) -> None:
    if "/" in files[0] and not synsets.wnids:
        raise FileNotFoundError(
            f"expected the numbers of classes like {files[0].partition('/')[0]!r}, found no "
            f"synset_words.txt, LOC_synset_mapping.txt, meta.bin or meta.mat in "
            f"{_listed(places)}; put one there"
        )
    raise FileNotFoundError(
        f"expected the classes of {split}, found none of {', '.join(lists)}, "
        f"LOC_{split}_solution.csv, {_DEVKIT_LABELS} and no class folders in {_listed(places)}; "
        f"put {lists[0]} there, one line a picture: 'ILSVRC2012_val_00000001.JPEG 65'"
    )


def _listed(places: Sequence[Path]) -> str:
    return ", ".join(repr(str(place)) for place in places)


def _folder_classes(files: Sequence[str], synsets: _Synsets) -> list[int | None]:
    found: list[int | None] = []
    for file in files:
        top = file.partition("/")[0] if "/" in file else ""
        number = synsets.numbers.get(top)
        if top.isdecimal() and int(top) < CLASS_COUNT:
            number = int(top)
        found.append(number)
    return found


def _read_label_list(path: Path, synsets: _Synsets, problems: Problems) -> dict[str, int]:
    # "ILSVRC2012_val_00000001.JPEG 65", or with a comma, or a WordNet id in place of the number
    listed, least, most = {}, CLASS_COUNT, 0
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        name, label = ([*line.rsplit("," if "," in line else None, 1), ""])[:2]
        name, label = name.strip(), label.strip()
        if not name or (number == 1 and label.lower() in ("label", "class", "class_id")):
            continue
        if label.removeprefix("-").isdecimal():
            class_id = int(label)
            least, most = min(least, class_id), max(most, class_id)
            if 0 <= class_id < CLASS_COUNT:
                listed[name] = class_id
            else:
                kind = f"classes outside 0 to {CLASS_COUNT - 1} in {path.name}"
                problems.add(kind, f"line {number} ({label})")
        elif label in synsets.numbers:
            listed[name] = synsets.numbers[label]
        else:
            problems.add(f"lines of {path.name} without a class", f"line {number} ({label!r})")
    if least == 1 and most == CLASS_COUNT:
        raise ValueError(
            f"expected classes 0 to {CLASS_COUNT - 1} in {str(path)!r}, got 1 to {CLASS_COUNT}; "
            "subtract 1, or, for the development kit's ids, use its own two files"
        )
    return listed


def _solution_rows(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    # "ILSVRC2012_val_00048981,n03995372 85 1 499 272 n03995372 ..." behind a header line
    rows = csv.reader(read_lines(path))
    for row in rows:
        if len(row) >= 2 and row[0] != "ImageId":
            yield f"line {rows.line_num}", row[0], row[1].split()


def _read_solution_classes(path: Path, synsets: _Synsets, problems: Problems) -> dict[str, int]:
    if not synsets.wnids:
        raise FileNotFoundError(
            f"expected LOC_synset_mapping.txt or synset_words.txt beside {str(path)!r}, "
            "found none; put one there"
        )
    listed = {}
    for where, name, words in _solution_rows(path):
        if words and words[0] in synsets.numbers:
            listed[name] = synsets.numbers[words[0]]
        else:
            problems.add(f"lines of {path.name} without a class", where)
    return listed


def _read_devkit_classes(path: Path, places: Sequence[Path], problems: Problems) -> dict[str, int]:
    # One of the kit's ids a line, for picture 1, 2, ...
    meta = _first([path.parent, *places], "meta.mat")
    if meta is None:
        raise FileNotFoundError(
            f"expected the development kit's meta.mat beside {str(path)!r}, found none; its ids "
            "have another order than the classes, put meta.mat or val_labels.txt there"
        )
    numbers = _read_meta_mat(meta)[1]
    listed = {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip().isdecimal() and int(line) in numbers:
            listed[f"ILSVRC2012_val_{number:08d}"] = numbers[int(line)]
        elif line.strip():
            problems.add(f"lines of {path.name} without a class", f"line {number}")
    return listed


# --------------------------------------------------------------------------------------- boxes


def _find_boxes(
    wanted: str | Path,
    root: Path,
    places: Sequence[Path],
    split: str,
    files: Sequence[str],
    class_ids: Sequence[int | None],
    synsets: _Synsets,
    problems: Problems,
    partial: bool,
    progress: bool,
) -> _Boxes:
    names = PictureNames(files)
    if wanted == "auto":
        path = (
            _annotations(root, split)
            or _first(places, f"LOC_{split}_solution.csv", "localization.txt")
            or find_box_list(places)
        )
        if path is None:
            problems.add(
                "no boxes",
                f"searched Annotations/CLS-LOC/{split}, Annotations/{split}, Annotations, "
                f"ILSVRC2012_bbox_{split}_v3, LOC_{split}_solution.csv, localization.txt, "
                f"boxes_*.csv",
            )
            return _Boxes()
    else:
        path = Path(wanted)
    if path.is_dir():
        return _read_annotations(path, files, synsets, problems, progress)
    if not path.is_file():
        raise FileNotFoundError(f"expected a folder of XML files or a list, got {str(path)!r}")

    found = _Boxes(source=path)
    if path.name.startswith("LOC_"):
        _read_solution(path, names, found, synsets, problems, partial)
    elif path.suffix == ".txt":
        _read_localization(path, names, found, problems, partial)
    else:
        listed = read_box_list(path, problems)
        found.size = listed.drawn_on
        for name, boxes in listed.boxes.items():
            i = _known(names, name, path, problems, partial)
            if i is None:
                continue
            found.boxes.setdefault(i, []).extend(boxes)
            label = listed.classes.get(name, "")
            if label.isdecimal():
                found.classes[i] = int(label)
            elif label in synsets.numbers:
                found.classes[i] = synsets.numbers[label]
    return found


def _known(
    names: PictureNames, name: str, path: Path, problems: Problems, partial: bool
) -> int | None:
    # The number of the picture; one that is not there is a problem unless only a part is read.
    i = names.find(name)
    if i is None and not partial:
        problems.add(f"pictures of {path.name} that are not there", name)
    return i


def _inclusive(sides: Sequence[float]) -> Box:
    # ILSVRC's boxes count pixels from 0 and name the last one inside: the whole of a picture of
    # 500 x 375 pixels is written 0 0 499 374. (VOC's, in the same XML, count from 1.)
    x0, y0, x1, y1 = sides
    return x0, y0, x1 + 1, y1 + 1


def _read_solution(
    path: Path,
    names: PictureNames,
    found: _Boxes,
    synsets: _Synsets,
    problems: Problems,
    partial: bool,
) -> None:
    for where, name, words in _solution_rows(path):
        i = _known(names, name, path, problems, partial)
        if i is None:
            continue
        try:
            groups = [words[k : k + 5] for k in range(0, len(words), 5)]
            boxes = [_inclusive([float(side) for side in sides]) for _, *sides in groups]
        except ValueError:
            problems.add(f"lines of {path.name} that are no boxes, left out", where)
            continue
        found.boxes.setdefault(i, []).extend(boxes)
        if words and words[0] in synsets.numbers:
            found.classes[i] = synsets.numbers[words[0]]


def _read_localization(
    path: Path, names: PictureNames, found: _Boxes, problems: Problems, partial: bool
) -> None:
    # wsolevaluation's: "val/ILSVRC2012_val_00000001.JPEG,111,108,441,193", several a picture,
    # and image_sizes.txt: "val/ILSVRC2012_val_00000001.JPEG,500,375" (width, height)
    def rows(path: Path, count: int, read: Callable[[int, list[float]], None]) -> None:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            name, *numbers = line.split(",")
            i = _known(names, name, path, problems, partial)
            if i is None:
                continue
            try:
                values = [float(text) for text in numbers]
                if len(values) != count:
                    raise ValueError
                read(i, values)
            except (ValueError, OverflowError):
                kind = f"lines of {path.name} without {count} numbers, left out"
                problems.add(kind, f"line {number}")

    rows(path, 4, lambda i, sides: found.boxes.setdefault(i, []).append(_inclusive(sides)))
    sizes = path.with_name("image_sizes.txt")
    if sizes.is_file():
        rows(sizes, 2, lambda i, s: found.sizes.update({i: (round(s[1]), round(s[0]))}))


def _annotations(root: Path, split: str) -> Path | None:
    # The folder of XML files: all in it, or in sub-folders by WordNet id.
    for name in (
        f"Annotations/CLS-LOC/{split}", f"ILSVRC/Annotations/CLS-LOC/{split}",
        f"Annotations/{split}", f"ILSVRC2012_bbox_{split}_v3/{split}",
        f"ILSVRC2012_bbox_{split}_v3", f"bbox/{split}", "Annotations",
    ):  # fmt: skip
        folder = root / name
        if folder.is_dir() and any(
            path.suffix == ".xml" or _WNID.fullmatch(path.name) for path in folder.iterdir()
        ):
            return folder
    return None


def _read_annotations(
    folder: Path,
    files: Sequence[str],
    synsets: _Synsets,
    problems: Problems,
    progress: bool,
) -> _Boxes:
    found = _Boxes(source=folder)
    jobs = tqdm(files, "boxes", unit="image", leave=False, disable=not progress)
    for i, file in enumerate(jobs):
        stem = file.rpartition("/")[2].rpartition(".")[0]
        tops = ["", stem.partition("_")[0], file.rpartition("/")[0]]
        for path in (folder / top / f"{stem}.xml" for top in tops):
            if path.is_file():
                break
        else:
            continue  # reported as a picture without a box
        try:
            size, boxes, wnid = _read_annotation(path)
        except (ElementTree.ParseError, ValueError, OverflowError, LookupError):
            problems.add("XML files that cannot be read, left out", path.name)
            continue
        found.boxes[i] = boxes
        if size:
            found.sizes[i] = size
        if wnid in synsets.numbers:
            found.classes[i] = synsets.numbers[wnid]
    return found


def _read_annotation(path: Path) -> tuple[tuple[int, int] | None, list[Box], str | None]:
    # <size><width>, <height>; <object><name>n01751748</name><bndbox><xmin>, <ymin>, <xmax>, <ymax>
    tree = ElementTree.parse(path).getroot()
    height, width = (int(float(tree.findtext(f"size/{s}") or 0)) for s in ("height", "width"))
    boxes, wnid = [], None
    for item in tree.iter("object"):
        wnid = wnid or item.findtext("name")
        for box in item.iter("bndbox"):
            sides = [float(box.findtext(s) or "") for s in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append(_inclusive(sides))
    return (height, width) if height > 0 and width > 0 else None, boxes, wnid
