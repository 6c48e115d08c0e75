r"""Measures of classification and localization: arithmetic, without a network or a picture.

Symbols: ``b`` images, ``k`` classes, ``t`` thresholds, ``n`` and ``m`` boxes. A target is 1 where
the class is present, 0 where it is not. Boxes are ``(x0, y0, x1, y1)``, as in
:mod:`attnviz.localize`, which finds them.

Localization is counted first and scored after. Per image: :func:`class_ranks` and
:func:`image_ious`, then :func:`localization_hits`, a table that may be joined from parts, then
:func:`localization_scores`. Over a sweep of thresholds: :func:`sweep_ious` per image,
:func:`sweep_counts`, which may be added up, then :func:`max_box_acc`. That threshold is chosen
on the very images it is scored on; :func:`held_out_hits` chooses it on others.

Regions are pixels counted: :func:`region_counts` and :func:`confusion_matrix` of parts of a data
set add up.
"""

import hashlib
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Integer, Num
from torch import Tensor

from .checks import check_choice, check_whole

__all__ = [
    "IOUS",
    "BoxConvention",
    "average_precision",
    "best_ious",
    "bootstrap_interval",
    "box_ious",
    "centered_boxes",
    "choose_threshold",
    "class_ious",
    "class_ranks",
    "confusion_matrix",
    "held_out_hits",
    "image_ious",
    "localization_baselines",
    "localization_hits",
    "localization_scores",
    "max_box_acc",
    "max_box_acc_v2",
    "mean_average_precision",
    "mean_iou",
    "recall_noise",
    "region_counts",
    "split_half",
    "sweep_counts",
    "sweep_ious",
    "sweep_region_ious",
]

BoxConvention = Literal["half_open", "plus_one"]
Boxes = Num[np.ndarray, "_ 4"] | Num[Tensor, "_ 4"] | Sequence[Sequence[Real] | None]

IOUS = (0.3, 0.5, 0.7)
"""The intersections over union at which MaxBoxAccV2 counts a box as right."""


def average_precision(
    scores: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, " k"]:
    r"""Area under each class's precision-recall curve, as a sum of steps.

    .. math:: \mathrm{AP} = \sum_n (R_n - R_{n-1}) P_n

    with recall :math:`R_n` and precision :math:`P_n` at the n-th distinct score, highest first;
    images with equal scores enter together, so their order has no influence. This is
    scikit-learn's definition. VOC's (since 2010) first raises each precision to the largest at
    any higher recall, so it is never lower.

    Args:
        scores: Class scores; only their order within a class matters.
        targets: 1 where the class is present, else 0.

    Returns:
        The average precision of each class in [0, 1], float64; NaN for a class that no image has.

    References:
        The PASCAL Visual Object Classes Challenge: A Retrospective (Everingham et al., 2015),
        https://doi.org/10.1007/s11263-014-0733-5.
    """
    if scores.isnan().any():
        raise ValueError("expected scores without NaN, which have no rank; check the network")
    if not scores.numel():
        return torch.full(scores.shape[1:], torch.nan, dtype=torch.float64, device=scores.device)
    columns = zip(scores.double().unbind(1), targets.double().unbind(1), strict=True)
    return torch.stack([_area(score, target) for score, target in columns])


def mean_average_precision(
    scores: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, ""]:
    """Mean of :func:`average_precision` over the classes that occur; NaN if none does."""
    return average_precision(scores, targets).nanmean()


def _area(score: Float[Tensor, " b"], target: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    order = score.argsort(descending=True)
    ends = torch.ones_like(order, dtype=torch.bool)
    ends[:-1] = score[order].diff() != 0  # the last image of each group of equal scores
    found = target[order].cumsum(0)[ends]
    taken = torch.arange(1, len(order) + 1, device=score.device)[ends]
    recall = found / target.sum()
    return (recall.diff(prepend=recall.new_zeros(1)) * found / taken).sum()


# ------------------------------------------------------------------------- boxes against boxes


def box_ious(
    a: Boxes, b: Boxes, convention: BoxConvention = "half_open"
) -> Float[np.ndarray, "n m"]:
    """Returns the intersection over union of every box of `a` with every box of `b`.

    Args:
        a: Boxes ``(x0, y0, x1, y1)``; None in a list stands for a missing box.
        b: Boxes.
        convention: ``half_open``: a box is ``x1 - x0`` wide. ``plus_one``: it is
            ``x1 - x0 + 1`` wide, as in the released code; boxes that only touch still share
            nothing.

    Returns:
        Values from 0 to 1; 0 for a missing box.

    Raises:
        ValueError: A box ends before it begins.
    """
    check_choice("convention", convention, BoxConvention)
    a, b = _box_array(a)[:, None], _box_array(b)[None]
    extra = 1 if convention == "plus_one" else 0
    shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.where((shared > 0).all(axis=-1), (shared + extra).prod(axis=-1), 0)
    union = sum((box[..., 2:] - box[..., :2] + extra).prod(axis=-1) for box in (a, b)) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def best_ious(
    boxes: Boxes, truths: Boxes, convention: BoxConvention = "half_open"
) -> Float[np.ndarray, " n"]:
    """Returns, for each box, the largest intersection over union with any true box.

    Args:
        boxes: Boxes of one image.
        truths: All true boxes of the image, at least one.
        convention: See :func:`box_ious`.

    Raises:
        ValueError: There is no true box.
    """
    if not len(truths):
        raise ValueError("expected at least one true box in `truths`, got none; leave the image")
    return box_ious(boxes, truths, convention).max(axis=1)


def image_ious(
    boxes: Boxes, truths: Sequence[Boxes], convention: BoxConvention = "half_open"
) -> Float[np.ndarray, " b"]:
    """Returns, for each image, the largest intersection over union of its box with a true one.

    Args:
        boxes: One box per image, None where none was found (which counts as 0).
        truths: The true boxes of each image, at least one.
        convention: See :func:`box_ious`.
    """
    if len(boxes) != len(truths):
        raise ValueError(f"expected true boxes for {len(boxes)} images, got {len(truths)}")
    pairs = zip(_box_array(boxes), truths, strict=True)
    return np.array([best_ious(box[None], each, convention)[0] for box, each in pairs], np.float64)


def _box_array(boxes: Boxes) -> np.ndarray:
    if not isinstance(boxes, np.ndarray | Tensor):
        boxes = [(np.nan,) * 4 if box is None else box for box in boxes]
    array = np.asarray(boxes, dtype=np.float64)
    if len(array) and array.shape[1:] != (4,):
        raise ValueError(f"expected boxes (x0, y0, x1, y1), got an array {array.shape}")
    array = array.reshape(-1, 4)
    if np.isinf(array).any():
        raise ValueError("expected boxes (x0, y0, x1, y1) of finite numbers, got infinity")
    wrong = (array[:, 2:] < array[:, :2]).any(axis=1)
    if wrong.any():
        raise ValueError(
            f"expected boxes (x0, y0, x1, y1), got {tuple(array[wrong.argmax()].tolist())}; "
            "is it (x, y, width, height)?"
        )
    return array


# -------------------------------------------------------------------- images at one threshold


def class_ranks(
    scores: Float[Tensor, "b k"], class_ids: Int[Tensor, " b"] | Sequence[int]
) -> Int[np.ndarray, " b"]:
    """Returns how many classes score higher than the true one: 0 where it is the first.

    Of equal scores the class with the smaller number comes first, as in ``argmax``.

    Raises:
        ValueError: A score is NaN, a class does not exist, or there is not one per image.
    """
    if scores.isnan().any():
        raise ValueError("expected scores without NaN, which have no rank; check the network")
    ids = torch.as_tensor(class_ids, device=scores.device, dtype=torch.long)
    if ids.shape != scores.shape[:1]:
        raise ValueError(f"expected {len(scores)} class ids, got {tuple(ids.shape)}")
    wrong = ids[(ids < 0) | (ids >= scores.shape[1])]
    if len(wrong):
        raise ValueError(f"expected classes from 0 to {scores.shape[1] - 1}, got {int(wrong[0])}")
    own = scores.gather(1, ids[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < ids[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(dim=1).cpu().numpy()


def localization_hits(
    ranks: Int[np.ndarray, " b"],
    ious: Float[np.ndarray, " b"],
    threshold: float = 0.5,
    *,
    image_ids: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Says for each image what is right: its class, its box, both.

    The box belongs to the map of the true class. ``loc5`` needs no other: where the class is
    among the first five, its box is the one that the official protocol looks at.

    Args:
        ranks: From :func:`class_ranks`.
        ious: From :func:`image_ious`.
        threshold: Least intersection over union of a right box.
        image_ids: Keys of the images, which become the index.

    Returns:
        One row per image; columns ``cls1 cls5 gt_known loc1 loc5``, true or false. Tables of
        parts join with ``pandas.concat``; ``hits.sum()`` are the counts.
    """
    if len(ranks) != len(ious):
        raise ValueError(f"expected as many ranks as ious, got {len(ranks)} and {len(ious)}")
    known = ious >= threshold
    first, five = ranks < 1, ranks < 5
    columns = {"cls1": first, "cls5": five, "gt_known": known}
    columns |= {"loc1": known & first, "loc5": known & five}
    index = None if image_ids is None else pd.Index(list(image_ids), name="image_id")
    return pd.DataFrame(columns, index=index)


def localization_scores(
    hits: pd.DataFrame,
    *,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    """Scores what :func:`localization_hits` counted.

    Args:
        hits: One row per image, one true-or-false column per measure.
        resamples: See :func:`bootstrap_interval`.
        generator: See :func:`bootstrap_interval`.

    Returns:
        One row per measure: ``images``, ``count`` (right ones), ``score`` (their share, from 0
        to 1) and its 95 % interval, ``low`` to ``high``.
    """
    if not len(hits):
        raise ValueError("expected at least one image in `hits`, got none")
    rows = {}
    for name, column in hits.items():
        values = column.to_numpy(np.float64)
        low, high = bootstrap_interval(values, resamples=resamples, generator=generator)
        count = int(values.sum())
        rows[name] = [len(values), count, count / len(values), low, high]
    columns = ["images", "count", "score", "low", "high"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.rename_axis("measure")


def bootstrap_interval(
    values: Num[np.ndarray, " b"] | Bool[np.ndarray, " b"],
    level: float = 0.95,
    *,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Returns the bootstrap interval of a mean over images: percentiles of resampled means.

    Args:
        values: One value per image, such as right or wrong.
        level: Share of the resampled means inside the interval.
        resamples: How many times the images are drawn, with replacement.
        generator: Source of the draws; seeded with 0 if None, so that a result can be repeated.

    References:
        An Introduction to the Bootstrap (Efron and Tibshirani, 1993), section 13.3.
    """
    if not len(values):
        raise ValueError("expected at least one value, got none")
    check_whole("resamples", resamples, 1)
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"expected `level` in (0, 1), got {level!r}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    numbers = torch.from_numpy(np.asarray(values, dtype=np.float64))
    rows = max(1, 2_000_000 // len(numbers))  # as many draws at once as take 16 MB
    means = [
        numbers[
            torch.randint(len(numbers), (size.numel(), len(numbers)), generator=generator)
        ].mean(dim=1)
        for size in torch.arange(resamples).split(rows)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(torch.cat(means).numpy(), [tail, 1 - tail])
    return float(low), float(high)


# ------------------------------------------------------------------- images at many thresholds


def sweep_ious(
    boxes: Boxes,
    positions: Int[np.ndarray, " n"],
    truths: Boxes,
    count: int,
    convention: BoxConvention = "half_open",
) -> Float[np.ndarray, " t"]:
    """Returns, for each threshold, the best intersection over union of any box with a true one.

    Args:
        boxes: All boxes of one image, from :func:`attnviz.localize.sweep_boxes`.
        positions: The threshold that each box belongs to, from 0.
        truths: The true boxes of the image, at least one.
        count: Number of thresholds.
        convention: See :func:`box_ious`.

    Returns:
        Values from 0 to 1; 0 at a threshold without a box.
    """
    best = np.zeros(count)
    np.maximum.at(best, positions, best_ious(boxes, truths, convention))
    return best


def sweep_counts(
    ious: Float[np.ndarray, "b t"], at: Sequence[float] = IOUS
) -> Int[np.ndarray, "i t"]:
    """Counts the images whose box is right, for each way of being right and each threshold.

    Args:
        ious: One row per image, from :func:`sweep_ious`.
        at: Least intersections over union of a right box.

    Returns:
        One row for each of `at`. Counts of parts of a data set add up.
    """
    return np.stack([(ious >= least).sum(axis=0) for least in at])


def max_box_acc(counts: Int[np.ndarray, "*i t"], images: int) -> Float[np.ndarray, "*i"]:
    r"""Share of right boxes at the one threshold that suits the whole data set best.

    .. math:: \mathrm{MaxBoxAcc} = \max_\tau \frac{1}{b} \sum_i
        1[\mathrm{IoU}(\mathrm{box}(M_i, \tau), \mathrm{truth}_i) \ge 0.5]

    It is not the best threshold of each image, which would be higher.

    Args:
        counts: A row of :func:`sweep_counts`, or all of them.
        images: Number of images counted.

    Returns:
        From 0 to 1, one value per row.

    References:
        Evaluating Weakly Supervised Object Localization Methods Right (Choe et al., 2020),
        https://arxiv.org/abs/2001.07437.
    """
    if not counts.size:
        raise ValueError("expected counts at one threshold at least, got none")
    check_whole("images", images, max(1, int(counts.max())))
    return np.asarray(counts.max(axis=-1) / images)


def max_box_acc_v2(counts: Int[np.ndarray, "i t"], images: int) -> float:
    """Mean of :func:`max_box_acc` over the rows, each at its own best threshold.

    The published measure counts at the three :data:`IOUS` and takes all regions of a map
    (``sweep_boxes(..., rule="contour_area", keep="all")``).
    """
    return float(max_box_acc(counts, images).mean())


# ------------------------------------------------------------------ thresholds chosen elsewhere


def split_half(image_ids: Sequence[str]) -> Bool[np.ndarray, " b"]:
    """Divides images into two halves by a hash of their key, always in the same way.

    Neither the order of the images nor the other images have an influence. The halves are about
    equal in size.

    Returns:
        True for the half to score on, False for the half to choose on.
    """
    digests = (hashlib.sha256(image_id.encode()).digest() for image_id in image_ids)
    return np.array([digest[0] % 2 == 1 for digest in digests], dtype=bool)


def choose_threshold(ious: Float[np.ndarray, "b t"], at: float = 0.5) -> int:
    """Returns the position of the threshold with the most right boxes.

    Of several best ones it is the middle one, which is the least a matter of chance.

    Args:
        ious: One row per image, from :func:`sweep_ious`.
        at: Least intersection over union of a right box.
    """
    if not ious.size:
        raise ValueError(
            "expected at least one image and threshold to choose on, got none; use more images"
        )
    counts = sweep_counts(ious, [at])[0]
    best = np.flatnonzero(counts == counts.max())
    return int(best[len(best) // 2])


def held_out_hits(
    ious: Float[np.ndarray, "b t"], scored: Bool[np.ndarray, " b"], at: float = 0.5
) -> tuple[int, Bool[np.ndarray, " m"]]:
    """Chooses a threshold on one half of the images and says which boxes of the other are right.

    Args:
        ious: One row per image, from :func:`sweep_ious`.
        scored: The half to score on, from :func:`split_half`.
        at: Least intersection over union of a right box.

    Returns:
        The position of the threshold, and one value per scored image.

    Raises:
        ValueError: A half is empty.
    """
    if not scored.any():
        raise ValueError("expected at least one image to score on, got none; use more images")
    position = choose_threshold(ious[~scored], at)
    return position, ious[scored, position] >= at


# --------------------------------------------------------------------- without any network


def centered_boxes(
    size: tuple[int, int], shares: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "t 4"]:
    """Returns boxes in the middle of an image that take shares of its height and width.

    In an image squeezed to a square, as the localization protocols do, they are squares. Share 1
    is the full image.
    """
    height, width = size
    whole = np.array([width, height, width, height]) / 2
    return whole + np.outer(shares, whole * (-1, -1, 1, 1))


def localization_baselines(
    sizes: Sequence[tuple[int, int]],
    truths: Sequence[Boxes],
    scored: Bool[np.ndarray, " b"],
    *,
    at: float = 0.5,
    shares: Float[np.ndarray, " t"] | None = None,
    convention: BoxConvention = "half_open",
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    """Scores the boxes that need no network: the full image and the best centered square.

    Both know nothing of the picture, so a method has to beat them.

    Args:
        sizes: Height and width of each image.
        truths: The true boxes of each image, at least one.
        scored: The half to score on, from :func:`split_half`; the side of the square is chosen
            on the other half.
        at: Least intersection over union of a right box.
        shares: Sides of the square to choose from, as shares of the image's; 0.01 to 1 if None.
        convention: See :func:`box_ious`.
        generator: See :func:`bootstrap_interval`.

    Returns:
        Rows ``full image`` and ``centered square``; columns ``share`` (the side), ``images``,
        ``count``, ``score`` and its 95 % interval, ``low`` to ``high``. They compare with
        GT-known localization.
    """
    if not len(sizes):
        raise ValueError("expected at least one image, got none")
    shares = np.arange(1, 101) / 100 if shares is None else shares
    tried = np.append(shares, 1.0)  # the last one is the full image
    pairs = zip(sizes, truths, strict=True)
    ious = np.stack(
        [best_ious(centered_boxes(size, tried), each, convention) for size, each in pairs]
    )
    position, right = held_out_hits(ious[:, :-1], scored, at)
    hits = {"full image": ious[scored, -1] >= at, "centered square": right}
    table = localization_scores(pd.DataFrame(hits), generator=generator).rename_axis("baseline")
    table.insert(0, "share", [1.0, float(shares[position])])
    return table


# -------------------------------------------------------------------------- regions and pixels


def region_counts(
    maps: Float[Tensor, "b h w"],
    masks: Bool[Tensor, "b h w"],
    threshold: float = 0.5,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Int[Tensor, "b 3"]:
    r"""Counts the pixels of what a map points at, :math:`P`, and of the object, :math:`G`.

    Args:
        maps: Attention maps, at least 0, as large as the masks.
        masks: The object :math:`G`: all pixels of the map's class.
        threshold: :math:`P` is where a map reaches this share of its maximum; nowhere in a map
            that is zero.
        valid: Pixels that count; all if None. Those that no one labeled should not.

    Returns:
        For each map the pixels of :math:`P \cap G`, :math:`P` and :math:`G`.
    """
    found = (maps >= threshold * maps.amax(dim=(1, 2), keepdim=True)) & (maps > 0)
    valid = torch.ones_like(masks) if valid is None else valid
    regions = (found & masks, found, masks)
    return torch.stack([(region & valid).sum(dim=(1, 2)) for region in regions], dim=1)


def sweep_region_ious(
    map: Float[Tensor, "h w"],
    mask: Bool[Tensor, "h w"],
    thresholds: Float[np.ndarray, " t"],
    valid: Bool[Tensor, "h w"] | None = None,
) -> Float[np.ndarray, " t"]:
    r"""Compares what a map points at, at each threshold, with the object, pixel by pixel.

    .. math:: \mathrm{IoU}_t = \frac{|P_t \cap G|}{|P_t \cup G|}

    The mean over images is the mIoU of defects (thesis Eq. 3.10), which is not
    :func:`mean_iou`.

    Args:
        map: An attention map, at least 0, as large as the mask.
        mask: The object :math:`G`.
        thresholds: Shares of the maximum, ascending; :math:`P_t` is where the map reaches one and
            is not zero.
        valid: Pixels that count; all if None.

    Returns:
        One value per threshold, in [0, 1]; NaN where :math:`P_t` and :math:`G` are empty.
    """
    values = map.double().cpu().numpy()
    counted = values > 0
    if valid is not None:
        counted, mask = counted & valid.cpu().numpy(), mask & valid
    object = mask.cpu().numpy()
    shares = values[counted] / max(values.max(), np.finfo(np.float64).tiny)
    reached = np.searchsorted(thresholds, shares, side="right")  # how many thresholds
    found, shared = (
        np.bincount(part, minlength=len(thresholds) + 1)[::-1].cumsum()[::-1][1:]
        for part in (reached, reached[object[counted]])
    )
    with np.errstate(invalid="ignore"):
        return shared / (found + object.sum() - shared)


def recall_noise(
    maps: Float[Tensor, "b h w"],
    masks: Bool[Tensor, "b h w"],
    threshold: float = 0.5,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    r"""Returns how much of the object the map points at, and how much it points elsewhere.

    .. math:: \mathrm{recall} = \frac{|P \cap G|}{|G|}, \qquad
        \mathrm{noise} = \frac{|P \setminus G|}{|P|}

    Average them with ``nanmean`` over all maps (thesis table 4.11) or over those of a class
    (4.13), or divide sums of :func:`region_counts`, where large objects weigh more: all differ.

    Args:
        maps: See :func:`region_counts`, as for the others.
        masks: The object :math:`G`.
        threshold: The share of the maximum that bounds :math:`P`.
        valid: Pixels that count.

    Returns:
        Recall, NaN without an object, and noise, NaN where the map is zero; both from 0 to 1.

    References:
        Thesis section 4.3.4.
    """
    shared, found, truth = region_counts(maps, masks, threshold, valid).double().unbind(-1)
    return shared / truth, (found - shared) / found


def confusion_matrix(
    predictions: Integer[Tensor, "*b"],
    targets: Integer[Tensor, "*b"],
    class_count: int,
    ignored: int = 255,
) -> Int[Tensor, "k k"]:
    """Counts the pixels of each true class (rows) that were given each class (columns).

    Args:
        predictions: The class of each pixel; any number where it does not count.
        targets: The true class of each pixel.
        class_count: Number of classes, the background included.
        ignored: The true class of pixels that do not count.

    Raises:
        ValueError: A class lies outside 0 to `class_count` - 1.
    """
    check_whole("class_count", class_count, 1)
    predictions, targets = predictions.long(), targets.long()  # bytes compare with bytes only
    counted = targets != ignored
    for name, classes in (("predictions", predictions), ("targets", targets)):
        wrong = classes[counted & ((classes < 0) | (classes >= class_count))]
        if len(wrong):
            raise ValueError(
                f"expected classes from 0 to {class_count - 1} in `{name}`, got {int(wrong[0])}"
            )
    pairs = targets[counted] * class_count + predictions[counted]
    return pairs.bincount(minlength=class_count**2).reshape(class_count, class_count)


def class_ious(confusion: Int[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Returns each class's intersection over union; NaN for one neither there nor predicted."""
    counts = confusion.double()
    shared = counts.diagonal()
    return shared / (counts.sum(dim=0) + counts.sum(dim=1) - shared)


def mean_iou(confusion: Int[Tensor, "k k"]) -> Float[Tensor, ""]:
    r"""Mean intersection over union over the classes that occur.

    .. math:: \mathrm{mIoU} = \frac{1}{N_{cl}} \sum_i
        \frac{N_{ii}}{\sum_j N_{ij} + \sum_j N_{ji} - N_{ii}}

    Args:
        confusion: :func:`confusion_matrix` of the whole data set: the mean of the images' values
            is another number.

    References:
        Thesis Eq. 3.12.
    """
    return class_ious(confusion).nanmean()
