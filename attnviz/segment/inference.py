"""Masks from a segmentation network: windows of several scales, and what they are worth.

Everything here gives one probability per class and pixel of the picture, background first;
:func:`evaluate` compares their largest with true masks, with and without a dense CRF.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

from ..checks import check_choice, check_whole
from ..data.masks import IGNORE, voc_colors
from ..deeplab import SegmentationNetwork
from ..files import write_whole
from ..images import to_pixels
from ..labels import CRF_PRESETS, dense_crf
from ..metrics import class_ious, confusion_matrix, mean_iou
from .pseudo import _begin, check_record, is_kept, label_file, make_folder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SCALES", "Scores", "Test", "evaluate", "segment", "write_submission"]

Test = Literal["single", "multi"]
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Sizes of the picture that the multi-scale test averages over."""

Pixels = UInt8[np.ndarray, "h w 3"]
Labels = UInt8[np.ndarray, "h w"]


class Item(Protocol):
    """One picture of a data set."""

    image_id: str

    def read(self) -> Image.Image:
        """Reads it."""

    def read_mask(self) -> np.ndarray | None:
        """Reads its mask: 0 background, ``1 + class_id``, 255 not counted; None without one."""


# ------------------------------------------------------------------------------ probabilities


def segment(
    network: SegmentationNetwork,
    images: Iterable[Pixels],
    test: Test = "multi",
    *,
    batch_size: int | None = None,
    window: int | None = None,
) -> Iterator[Float[Tensor, "k h w"]]:
    """Gives the probabilities of each picture's pixels, in order, as soon as they are there.

    ``single`` enlarges or reduces the long side of the picture to the window and fills the rest
    with the mean color. ``multi`` lays windows over the picture at five sizes, :data:`SCALES`,
    each two thirds of a window after the one before it and the last at the border; where windows
    overlap, and over the sizes, it averages the softmax. Windows of several pictures go through
    the network together; the result does not depend on it but for rounding.

    Args:
        network: The network; its mode and gradients are left alone.
        images: Pictures, 8-bit RGB; read when they are needed.
        test: ``single`` or ``multi``.
        batch_size: Windows at once; if None 8 on a GPU, on a processor, whose cache is small, as
            many as have 100,000 pixels.
        window: Side of the windows, in pixels; the network's own if None.

    Yields:
        Probabilities on the CPU; background is the first.

    References:
        Thesis section 4.3.2; windows of 401 pixels every 267 as in DeepLab's public test code.
    """
    _check_test(test)
    side = _side(network, window)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    else:
        cuda = next(network.parameters()).device.type == "cuda"
        batch_size = 8 if cuda else max(1, 100_000 // side**2)
    waiting: deque[_Picture] = deque()
    cuts: deque[tuple[_View, tuple[int, int]]] = deque()
    for pixels in images:
        picture = _Picture(network, pixels, test, side)
        waiting.append(picture)
        cuts.extend((view, corner) for view in picture.views for corner in view.corners)
        while len(cuts) >= batch_size:
            _look(network, [cuts.popleft() for _ in range(batch_size)], side)
            while waiting and waiting[0].done:
                yield waiting.popleft().probabilities()
    while cuts:
        _look(network, [cuts.popleft() for _ in range(min(batch_size, len(cuts)))], side)
        while waiting and waiting[0].done:
            yield waiting.popleft().probabilities()


def _side(network: SegmentationNetwork, window: int | None) -> int:
    # Of the windows, in pixels.
    if window is not None:
        check_whole("window", window, 1)
    return network.fitting(network.window if window is None else window)


class _Picture:
    # A picture at the sizes it is looked at.
    def __init__(
        self, network: SegmentationNetwork, pixels: Pixels, test: Test, side: int
    ) -> None:
        device = next(network.parameters()).device
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        whole = network.normalized(tensor.to(device))
        self.size = pixels.shape[:2]
        scales = (side / max(self.size),) if test == "single" else SCALES
        self.views = [_View(whole, scale, side, 1 + network.class_count) for scale in scales]

    @property
    def done(self) -> bool:
        return not any(view.left for view in self.views)

    def probabilities(self) -> Float[Tensor, "k h w"]:
        return (
            torch.stack([view.probabilities(self.size) for view in self.views]).mean(dim=0).cpu()
        )


class _View:
    # A picture at one size, and the sums of the probabilities of its windows.
    def __init__(
        self, whole: Float[Tensor, "1 3 h w"], scale: float, side: int, count: int
    ) -> None:
        size = [max(1, round(length * scale)) for length in whole.shape[2:]]
        self.image = interpolate(whole, size, mode="bilinear", align_corners=False)
        self.corners = list(product(*(_starts(length, side) for length in size)))
        self.left = len(self.corners)
        self.total = whole.new_zeros(count, *size)
        self.seen = whole.new_zeros(size)

    def window(self, corner: tuple[int, int], side: int) -> Float[Tensor, "3 s s"]:
        top, left = corner
        part = self.image[0, :, top : top + side, left : left + side]
        return pad(part, (0, side - part.shape[2], 0, side - part.shape[1]))  # the mean color

    def add(self, corner: tuple[int, int], found: Float[Tensor, "k s s"]) -> None:
        top, left = corner
        height, width = (
            min(length - start, found.shape[1])
            for length, start in zip(self.seen.shape, corner, strict=True)
        )
        place = (slice(top, top + height), slice(left, left + width))
        self.total[:, *place] += found[:, :height, :width]
        self.seen[place] += 1
        self.left -= 1

    def probabilities(self, size: tuple[int, int]) -> Float[Tensor, "k h w"]:
        mean = (self.total / self.seen)[None]
        return interpolate(mean, size, mode="bilinear", align_corners=False)[0]


def _starts(length: int, side: int) -> list[int]:
    # Where windows begin: two thirds of a side after another, the last at the border.
    step = max(1, side * 2 // 3)
    return [*range(0, max(length - side, 0), step), max(length - side, 0)]


@torch.no_grad()
def _look(
    network: SegmentationNetwork, cuts: list[tuple[_View, tuple[int, int]]], side: int
) -> None:
    training = [module for module in network.modules() if module.training]
    images = torch.stack([view.window(corner, side) for view, corner in cuts])
    network.eval()
    try:
        scores = network(images.contiguous(memory_format=torch.channels_last)).float()
    finally:
        for module in training:
            module.training = True
    # softmax runs along the classes several times as fast in this order of memory
    found = network.enlarged(scores.contiguous(), (side, side)).softmax(dim=1)
    for (view, corner), each in zip(cuts, found, strict=True):
        view.add(corner, each)


# ------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """What masks are worth, with and without a dense CRF; made by :func:`evaluate`."""

    class_names: tuple[str, ...]
    """Names of the classes, background first."""
    image_ids: tuple[str, ...]
    """The pictures that count."""
    confusions: dict[str, Int[np.ndarray, "b k k"]]
    """For ``plain`` and ``crf`` the pixels of each picture, by true class and by given one."""
    test: Test
    """How the pictures were looked at."""
    crf: str | None
    """Whose dense CRF; None: there is no ``crf``."""
    init: str
    """What the network's training started from; results with other weights don't compare."""
    problems: tuple[str, ...] = field(default=())
    """Pictures that do not count, and why."""

    def mean_iou(self, kind: str = "plain") -> float:
        """Returns the mean IoU (Eq. 3.12) over the whole data set, from 0 to 1."""
        return float(mean_iou(self._confusion(kind)))

    def interval(self, kind: str = "plain", resamples: int = 2000) -> tuple[float, float]:
        """Returns the 95 % bootstrap interval of the mean IoU: pictures drawn with replacement."""
        counts = torch.from_numpy(self.confusions[kind]).double().flatten(1)
        generator = torch.Generator().manual_seed(0)
        images, size = len(counts), len(self.class_names)
        drawn = torch.randint(images, (resamples, images), generator=generator)
        times = counts.new_zeros(resamples, images).scatter_add_(
            1, drawn, counts.new_ones(resamples, images)
        )
        sums = (times @ counts).reshape(resamples, size, size)
        shared = sums.diagonal(dim1=1, dim2=2)
        ious = shared / (sums.sum(dim=1) + sums.sum(dim=2) - shared)
        # a class that no drawn picture has keeps its value, or rare classes would lift the mean
        values = torch.where(ious.isnan(), class_ious(self._confusion(kind)), ious).nanmean(dim=1)
        low, high = np.quantile(values.numpy(), [0.025, 0.975])
        return float(low), float(high)

    def table(self) -> "pd.DataFrame":
        """Returns the IoU of each class by kind, NaN where it neither is nor is found."""
        import pandas as pd

        columns = {kind: class_ious(self._confusion(kind)).numpy() for kind in self.confusions}
        index = pd.Index(self.class_names, name="class")
        pixels = self._confusion("plain").sum(dim=1).numpy()
        return pd.DataFrame({"pixels": pixels, **columns}, index=index)

    def to_json(self) -> dict[str, object]:
        """Returns the numbers for a file."""
        kinds = {}
        for kind in self.confusions:
            low, high = self.interval(kind)
            ious = class_ious(self._confusion(kind)).tolist()
            named = zip(self.class_names, ious, strict=True)
            kinds[kind] = {"mean_iou": self.mean_iou(kind), "low": low, "high": high}
            kinds[kind]["classes"] = {name: None if iou != iou else iou for name, iou in named}
        facts = {"images": len(self.image_ids), "test": self.test, "crf": self.crf}
        return {**facts, "init": self.init, **kinds}

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="{:.3f}".format)

    def _confusion(self, kind: str) -> Int[Tensor, "k k"]:
        return torch.from_numpy(self.confusions[kind]).sum(dim=0)


def evaluate(
    network: SegmentationNetwork,
    items: Iterable[Item],
    test: Test = "multi",
    crf: str | None = "oaa_pytorch",
    *,
    batch_size: int | None = None,
    window: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Scores:
    """Compares what a network finds in pictures with their true masks.

    A picture that cannot be read, or whose mask is missing, of another size or of other classes,
    does not count; ``problems`` of the result says which.

    Args:
        network: The network.
        items: Pictures with masks.
        test: See :func:`segment`.
        crf: A name of :data:`attnviz.labels.CRF_PRESETS`; None leaves the dense CRF out.
        batch_size: See :func:`segment`.
        window: See :func:`segment`.
        workers: Processes for the dense CRF; 0: none beside this one.
        progress: Whether to show a bar on stderr.

    Raises:
        ValueError: No picture counts, or `test` or `crf` is none that can be chosen.
        ImportError: pydensecrf2, which `crf` needs, is not installed.
    """
    _check(test, crf, workers)
    problems: list[str] = []
    count = 1 + network.class_count
    image_ids, found = [], {"plain": [], **({} if crf is None else {"crf": []})}
    known = len(items) if isinstance(items, Sequence) else None
    with tqdm(desc="masks", total=known, unit=" images", disable=not progress) as bar:
        pictures = _with_masks(items, count, problems, bar)
        for (image_id, mask), *labels in _masks(
            network, pictures, test, crf, batch_size, window, workers
        ):
            image_ids.append(image_id)
            for kind, given in zip(found, labels, strict=False):
                matrix = confusion_matrix(torch.from_numpy(given), torch.from_numpy(mask), count)
                found[kind].append(matrix.int().numpy())
    if not image_ids:
        first = f": {problems[0]}" if problems else ""
        raise ValueError(f"expected pictures with masks, got none of {len(problems)}{first}")
    names = network.class_names or [str(i) for i in range(network.class_count)]
    return Scores(
        ("background", *names), tuple(image_ids),
        {kind: np.stack(matrices) for kind, matrices in found.items()},
        test, crf, network.provenance.get("init", network.provenance["weights"]), tuple(problems),
    )  # fmt: skip


def _check(test: Test, crf: str | None, workers: int) -> None:
    # Before any picture goes through the network.
    _check_test(test)
    if crf not in (None, *CRF_PRESETS):
        raise ValueError(f"expected `crf` in {(None, *CRF_PRESETS)}, got {crf!r}")
    if crf is not None:  # is the package there?
        dense_crf(np.zeros((1, 1, 3), np.uint8), torch.ones(2, 1, 1), crf)
    check_whole("workers", workers, 0)


def _check_test(test: Test) -> None:
    check_choice("test", test, Test)


def _with_masks(
    items: Iterable[Item], count: int, problems: list[str], bar: tqdm
) -> Iterator[tuple[tuple[str, Labels], Pixels]]:
    for item in items:
        bar.update()
        try:
            mask = item.read_mask()
            if mask is None:
                raise ValueError("it has no mask")
            pixels = np.array(to_pixels(item.read()))
            check_labels(mask, pixels.shape[:2], count)
        except (ValueError, OSError) as error:
            problems.append(f"{item.image_id}: {error}")
            continue
        yield (item.image_id, mask), pixels


def check_labels(labels: np.ndarray, size: tuple[int, int], count: int) -> None:
    """Raises ValueError unless labels have a picture's size and are classes, or 255.

    Args:
        labels: A mask.
        size: Height and width of the picture.
        count: Number of classes, background included.
    """
    if labels.shape != size:
        raise ValueError(
            f"expected labels of {size[0]} x {size[1]}, the picture's size, got "
            f"{' x '.join(map(str, labels.shape))}; do the two belong together?"
        )
    if labels.dtype.kind not in "ui":
        raise ValueError(f"expected labels of whole numbers, got {labels.dtype}")
    values = np.unique(labels)
    wrong = values[(values < 0) | (values >= count) & (values != IGNORE)]
    if wrong.size:
        raise ValueError(
            f"expected labels 0 to {count - 1} or {IGNORE}, got {wrong[0]}; are they of another "
            "data set?"
        )


# -------------------------------------------------------------------------------------- masks


def write_submission(
    network: SegmentationNetwork,
    items: Iterable[Item],
    out: str | Path,
    test: Test = "multi",
    crf: str | None = "oaa_pytorch",
    *,
    batch_size: int | None = None,
    window: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Path:
    """Writes masks of pictures as the VOC server wants them, to be packed and sent.

    They are palette pictures ``results/VOC2012/Segmentation/comp6_test_cls/ID.png`` below `out`.
    Each is written whole, and one that is there and whole is not made again, so a killed call
    goes on. What they are made with stands beside ``results``, in ``submission.json``, which is
    not sent; with another network or other settings `out` is refused.

    Args:
        network: The network.
        items: Pictures; their masks are not looked at.
        out: A folder for this network and these settings alone; made if it is missing.
        test: See :func:`segment`.
        crf: See :func:`evaluate`.
        batch_size: See :func:`segment`.
        window: See :func:`segment`.
        workers: See :func:`evaluate`.
        progress: Whether to show a bar on stderr.

    Returns:
        The folder to pack: ``results`` in `out`.

    Raises:
        ValueError: A picture cannot be read, and the server wants all; or the masks in `out` were
            made in another way.
        NotADirectoryError: `out` is a file.
        ImportError: pydensecrf2, which `crf` needs, is not installed.
    """
    _check(test, crf, workers)
    side, results = _side(network, window), Path(out) / "results"
    folder = results / "VOC2012" / "Segmentation" / "comp6_test_cls"
    make_folder(folder, "masks")
    paths = [(item, label_file(folder, item.image_id)) for item in items]
    if not paths:
        raise ValueError("expected at least one picture in `items`, got none")
    facts = {"test": test, "crf": crf, "window": side, "network": network.name}
    facts["sha256"] = _digest(network)
    check_record(Path(out) / "submission.json", facts, "masks", any(folder.glob("*.png")))
    missing = [(item, path) for item, path in paths if not is_kept(path)]
    pictures = ((path, _read(item)) for item, path in missing)
    with tqdm(
        desc="masks", total=len(paths), initial=len(paths) - len(missing), unit=" images",
        disable=not progress,
    ) as bar:  # fmt: skip
        for path, plain, refined in _masks(
            network, pictures, test, crf, batch_size, window, workers
        ):
            _write_labels(path, plain if refined is None else refined)
            bar.update()
    return results


def _digest(network: SegmentationNetwork) -> str:
    digest = sha256()
    for name, values in network.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(item: Item) -> Pixels:
    try:
        return np.array(to_pixels(item.read()))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"expected a picture {item.image_id!r} that can be read, got: {error}; the server "
            "wants all, put it right and call again"
        ) from error


def _write_labels(path: Path, labels: Labels) -> None:
    picture = Image.fromarray(labels)
    picture.putpalette(voc_colors().tobytes())
    write_whole(path, lambda file: picture.save(file, "png"))


def _masks(
    network: SegmentationNetwork,
    pictures: Iterable[tuple[object, Pixels]],
    test: Test,
    crf: str | None,
    batch_size: int | None,
    window: int | None,
    workers: int,
) -> Iterator[tuple[object, Labels, Labels | None]]:
    # What goes with each picture, its labels, and those after the dense CRF.
    behind: deque[tuple[object, Pixels]] = deque()

    def pixels() -> Iterator[Pixels]:
        for key, image in pictures:
            behind.append((key, image))
            yield image

    waiting: deque[tuple[object, Labels, Future | Labels | None]] = deque()
    with _pool(workers) as pool:
        for found in segment(network, pixels(), test, batch_size=batch_size, window=window):
            key, image = behind.popleft()
            refined = None
            if crf is not None:
                job = (image, found.numpy(), crf)
                refined = _refined(*job) if pool is None else pool.submit(_refined, *job)
            waiting.append((key, found.argmax(dim=0).byte().numpy(), refined))
            while len(waiting) > 2 * workers:
                yield _awaited(*waiting.popleft())
        while waiting:
            yield _awaited(*waiting.popleft())


def _awaited(
    key: object, plain: Labels, refined: Future | Labels | None
) -> tuple[object, Labels, Labels | None]:
    return key, plain, refined.result() if isinstance(refined, Future) else refined


def _refined(image: Pixels, probabilities: Float[np.ndarray, "k h w"], crf: str) -> Labels:
    found = dense_crf(image, torch.from_numpy(probabilities), crf)
    return found.argmax(dim=0).byte().numpy()


def _pool(workers: int) -> Executor | nullcontext:
    check_whole("workers", workers, 0)
    if workers == 0:
        return nullcontext()
    context = get_context("spawn")  # a fork would inherit torch's threads, which is not safe
    return ProcessPoolExecutor(workers, context, _begin)
