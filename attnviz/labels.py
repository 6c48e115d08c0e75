r"""From maps to pseudo labels: superpixels, saliency, a dense conditional random field.

Symbols: :math:`M^c` is the map of class :math:`c` at the resolution of the image, ``k`` the
number of its classes. Maps are tensors; pictures, regions and labels are arrays. A label is 0 for
background, 1 + the position of a class in the maps, or 255 for pixels that no training counts.
Every function looks at one image. Nothing here runs a network or reads a file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from .checks import check_number, check_whole

__all__ = [
    "CRF",
    "CRF_PRESETS",
    "STRENGTHS",
    "BackgroundRule",
    "Oversegmentation",
    "background",
    "dense_crf",
    "detect_saliency",
    "saliency_labels",
    "superpixel_labels",
    "superpixel_mean",
    "superpixels",
]

Oversegmentation = Literal["slic", "felzenszwalb"]
BackgroundRule = Literal["affinity", "constant"]
Refine = Callable[[Float[Tensor, "c h w"]], Float[Tensor, "c h w"]]

STRENGTHS: dict[BackgroundRule, float] = {"affinity": 4.0, "constant": 0.25}
"""The strength of each rule of :func:`background`. AffinityNet also takes the power 32."""

_IGNORE = 255


# --------------------------------------------------------------------------------- superpixels


def superpixels(
    image: UInt8[np.ndarray, "h w 3"], method: Oversegmentation = "slic", count: int = 1000
) -> Int[np.ndarray, "h w"]:
    """Cuts a picture into small regions of one color.

    Args:
        image: The picture, RGB.
        method: ``slic``: regions of about one size, compactness 10. ``felzenszwalb``: regions as
            large as the picture is plain, scale 100. The thesis does not say which.
        count: About how many regions ``slic`` makes; ``felzenszwalb`` joins regions smaller than
            a quarter of the mean size that this gives.

    Returns:
        The number of each pixel's region, from 0 without a gap.

    References:
        SLIC Superpixels Compared to State-of-the-Art Superpixel Methods (Achanta et al., 2012),
        https://doi.org/10.1109/TPAMI.2012.120; Efficient Graph-Based Image Segmentation
        (Felzenszwalb and Huttenlocher, 2004), https://doi.org/10.1023/B:VISI.0000022288.19776.77.
    """
    from skimage.segmentation import felzenszwalb, slic

    check_whole("count", count, 1)
    check_picture(image)
    if method == "slic":
        found = slic(image, count, compactness=10, start_label=0)
    elif method == "felzenszwalb":
        least = max(1, image.shape[0] * image.shape[1] // (4 * count))
        found = felzenszwalb(image, scale=100, sigma=0.8, min_size=least)
    else:
        raise ValueError(f"expected `method` in {get_args(Oversegmentation)}, got {method!r}")
    return (np.cumsum(np.bincount(found.ravel()) > 0) - 1)[found]


def check_picture(image: np.ndarray) -> None:
    """Raises an error unless an argument is a picture (h, w, 3) of uint8."""
    remedy = "attnviz.images.to_pixels makes one of any picture"
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"expected a picture as an array of uint8, got {type(image).__name__}; {remedy}"
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a picture of shape (h, w, 3), got {image.shape}; {remedy}")
    if image.dtype != np.uint8:
        raise ValueError(f"expected a picture of uint8, got {image.dtype}; {remedy}")


def superpixel_mean(
    maps: Float[Tensor, "k h w"], regions: Int[np.ndarray, "h w"]
) -> Float[Tensor, "k h w"]:
    r"""Replaces the values of each map by their mean over each region, whose edges it then has.

    .. math:: S^c = \frac{1}{|O|} \sum_{j \in O} M^c_j

    Args:
        maps: The maps, in any unit.
        regions: The region :math:`O` of each pixel, from 0; see :func:`superpixels`.

    References:
        Thesis Eq. 3.11; as a way to sharper boundaries, its outlook in chapter 6.
    """
    check_axes("maps", maps, "k h w")
    if not isinstance(regions, np.ndarray) or regions.dtype.kind not in "iu":
        kind = getattr(regions, "dtype", type(regions).__name__)
        raise TypeError(
            f"expected `regions` as an array of whole numbers, got {kind}; "
            "attnviz.labels.superpixels makes one"
        )
    if tuple(maps.shape[1:]) != regions.shape:
        raise ValueError(
            f"expected `regions` of {maps.shape[1]} x {maps.shape[2]}, the maps' size, got "
            f"{' x '.join(map(str, regions.shape))}"
        )
    if regions.size and regions.min() < 0:
        raise ValueError(f"expected `regions` numbered from 0, got {regions.min()}")
    flat = regions.ravel().astype(np.int64, copy=False)
    pixels = np.bincount(flat)
    values = maps.flatten(1).double().numpy(force=True)  # numpy has no bfloat16
    means = [np.bincount(flat, map)[flat] / pixels[flat] for map in values]
    return torch.from_numpy(np.array(means).reshape(maps.shape)).to(maps)


def superpixel_labels(
    maps: Float[Tensor, "k h w"],
    regions: Int[np.ndarray, "h w"],
    background: float = 0.3,
    *,
    refine: Refine | None = None,
) -> UInt8[np.ndarray, "h w"]:
    """Gives each region the class with the largest mean, or background where all are low.

    Args:
        maps: The maps; each is divided by its maximum first.
        regions: The region of each pixel, from 0; see :func:`superpixels`.
        background: Where no mean reaches it is background.
        refine: What `background` and the means pass through, as channels, before the largest is
            taken, such as ``partial(dense_crf, image)``.

    Returns:
        0 background, or 1 + the position of a class in `maps`.

    References:
        Thesis Eq. 3.11 and section 3.4.4.
    """
    _check_maps(maps)
    check_number("background", background)
    positive = maps.relu()
    peaks = positive.amax(dim=(1, 2), keepdim=True)
    means = superpixel_mean(positive / torch.where(peaks > 0, peaks, 1), regions)
    channels = torch.cat([maps.new_full((1, *regions.shape), background), means])
    if refine is not None:
        channels = refine(channels)
    values = channels.roll(-1, 0).double().numpy(force=True)
    largest = values.argmax(axis=0)  # background loses a tie
    return ((largest + 1) % len(channels)).astype(np.uint8)


def check_axes(name: str, values: object, axes: str) -> None:
    """Raises an error unless an argument is a tensor of floats with so many axes.

    Args:
        name: The argument's.
        values: The argument.
        axes: Names of the axes, with spaces between them.
    """
    if not isinstance(values, Tensor):
        raise TypeError(
            f"expected `{name}` as a tensor, got {type(values).__name__}; "
            "torch.from_numpy makes one of an array"
        )
    if values.ndim != len(axes.split()):
        raise ValueError(
            f"expected `{name}` of shape ({axes.replace(' ', ', ')}), got {tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise TypeError(f"expected `{name}` of floats, got {values.dtype}; call .float() on it")


def _check_maps(maps: Float[Tensor, "k h w"]) -> None:
    check_axes("maps", maps, "k h w")
    if len(maps) >= _IGNORE:
        raise ValueError(f"expected at most {_IGNORE - 1} maps, got {len(maps)}")
    _check_finite("maps", maps)


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"expected finite {name}, got NaN or infinity; check the network")


# --------------------------------------------------------------------------- saliency, background


def background(
    maps: Float[Tensor, "k h w"],
    rule: BackgroundRule = "affinity",
    strength: float | None = None,
) -> Float[Tensor, "h w"]:
    r"""Says how much each pixel is background, from the maps alone.

    .. math:: M^0 = \big( 1 - \max_c M^c \big)^\alpha

    Args:
        maps: The maps, in [0, 1].
        rule: ``affinity``: the formula; ``constant``: one value everywhere.
        strength: The power :math:`\alpha`, or the value; from :data:`STRENGTHS` if None.

    Returns:
        Values in [0, 1] to compare with the maps.

    References:
        Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation (Ahn and Kwak, 2018), https://arxiv.org/abs/1803.10464.
    """
    if rule not in STRENGTHS:
        raise ValueError(f"expected `rule` in {get_args(BackgroundRule)}, got {rule!r}")
    strength = STRENGTHS[rule] if strength is None else strength
    check_number("strength", strength, 0)
    if rule == "constant":
        return maps.new_full(maps.shape[1:], strength)
    none = maps.new_zeros(1, *maps.shape[1:])
    return (1 - torch.cat([none, maps]).amax(dim=0)) ** strength


def saliency_labels(
    maps: Float[Tensor, "k h w"],
    saliency: Float[Tensor, "h w"] | None = None,
    *,
    floor: float = 0.3,
    conflict: float = 0.9,
    salient: float = 32 / 255,
    strong: float = 0.8,
    least: float = 0.01,
    rule: BackgroundRule = "affinity",
    strength: float | None = None,
    refine: Refine | None = None,
) -> UInt8[np.ndarray, "h w"]:
    r"""Gives each pixel its class, background, or 255 where the evidence disagrees.

    With :math:`g^0 = 1 - \mathrm{saliency}` and :math:`g^c` the map, stretched to [0, 1], in this
    order:

    1. values of :math:`g` below `floor` become 0;
    2. each pixel gets the channel with the largest value, background where all are 0;
    3. where two or more channels exceed `conflict`: 255;
    4. background where the saliency reaches `salient`, or a map exceeds `strong`: 255;
    5. an image with a smaller share of object pixels than `least` is 255 everywhere.

    Without saliency :math:`g^0` is :func:`background` of the stretched maps and takes the place
    of `floor` and `salient`: steps 1 and 4 fall away.

    Args:
        maps: The maps of the image's classes, in any unit. A flat map is zero.
        saliency: How much each pixel belongs to an object, in [0, 1], such as
            :func:`detect_saliency`; None without.
        floor: Values below count nothing.
        conflict: What several channels may not exceed.
        salient: A background pixel is not that salient.
        strong: A background pixel is not that much of any class.
        least: Share of the pixels that objects have to take.
        rule: See :func:`background`; without saliency only.
        strength: See :func:`background`; without saliency only.
        refine: What :math:`g` passes through before step 2, such as
            ``partial(dense_crf, image)``.

    Returns:
        0 background, 1 + the position of a class in `maps`, or 255.

    References:
        Thesis section 4.3; the numbers are those of its released code.
    """
    _check_maps(maps)
    if saliency is not None:
        check_axes("saliency", saliency, "h w")
    if saliency is not None and saliency.shape != maps.shape[1:]:
        raise ValueError(
            f"expected a saliency of {maps.shape[1]} x {maps.shape[2]}, the maps' size, got "
            f"{' x '.join(map(str, saliency.shape))}"
        )
    if saliency is not None and not ((saliency >= 0) & (saliency <= 1)).all():
        raise ValueError("expected a saliency from 0 to 1, got values beyond; divide it by 255")
    low, high = (getattr(maps, end)(dim=(1, 2), keepdim=True) for end in ("amin", "amax"))
    stretched = (maps - low) / torch.where(high > low, high - low, 1)
    if saliency is None:
        channels = torch.cat([background(stretched, rule, strength)[None], stretched])
    else:
        channels = torch.cat([1 - saliency[None].to(maps), stretched])
        channels = torch.where(channels < floor, 0, channels)
    refined = channels if refine is None else refine(channels)
    values = refined.double().numpy(force=True)
    labels = values.argmax(axis=0).astype(np.uint8)  # of equal ones the first
    labels[((channels > conflict).sum(dim=0) >= 2).numpy(force=True)] = _IGNORE
    if saliency is not None:
        object_like = (saliency.to(maps) >= salient) | (stretched > strong).any(dim=0)
        labels[(labels == 0) & object_like.numpy(force=True)] = _IGNORE
    if ((labels > 0) & (labels < _IGNORE)).mean() < least:
        labels[:] = _IGNORE
    return labels


def detect_saliency(image: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "h w"]:
    r"""Finds what stands out from the picture's border, without any training.

    A region of the picture that holds much of the border for its area is background, however
    large: with the geodesic similarity :math:`S(p, q)` of two superpixels,

    .. math:: \mathrm{boundary}(p) = \frac{\sum_{q \in \mathrm{border}} S(p, q)}
        {\sqrt{\sum_q S(p, q)}}, \qquad w_p = 1 - \exp(-\mathrm{boundary}(p)^2 / 2)

    A superpixel's contrast :math:`f_p` in color to near background makes it salient. Both join
    in the :math:`s` that minimizes :math:`\sum_p w_p s_p^2 + \sum_p f_p (s_p - 1)^2 +
    \sum_{p \sim q} w_{pq} (s_p - s_q)^2`.

    Objects that lie across the border are missed; what the picture is of is not known here.

    Args:
        image: The picture, RGB; seen at a long side of 250 pixels.

    Returns:
        Values from 0 to 1, both taken, or all 0 where the picture has one color.

    References:
        Saliency Optimization from Robust Background Detection (Zhu et al., 2014),
        https://doi.org/10.1109/CVPR.2014.360.
    """
    check_picture(image)
    from scipy.sparse.csgraph import dijkstra
    from skimage.color import rgb2lab

    size = image.shape[:2]
    small = _shrunk(image, 250)
    regions = superpixels(small, "slic", 300)
    count = int(regions.max()) + 1
    flat, pixels = regions.ravel(), np.bincount(regions.ravel())

    def means(values: np.ndarray) -> np.ndarray:
        channels = values.reshape(flat.size, -1).T
        return np.stack([np.bincount(flat, each) / pixels for each in channels], axis=1)

    colors = means(rgb2lab(small))
    rows, columns = np.indices(regions.shape)
    places = means(np.stack([rows, columns], axis=2)) / max(regions.shape)
    border = np.unique(np.concatenate([regions[[0, -1]].ravel(), regions[:, [0, -1]].ravel()]))
    near = np.zeros((count, count), bool)
    for a, b in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
        near[a, b] = near[b, a] = True
    np.fill_diagonal(near, False)
    distance = np.linalg.norm(colors[:, None] - colors, axis=2)
    spacing = np.linalg.norm(places[:, None] - places, axis=2)

    linked = near.copy()
    linked[np.ix_(border, border)] = True  # the world behind the border is one
    steps = np.where(linked, distance + 1e-9, 0)  # an edge of 0 would be none
    similar = np.exp(-(dijkstra(steps, directed=False) ** 2) / (2 * 10**2))
    boundary = similar[:, border].sum(axis=1) / np.sqrt(similar.sum(axis=1))
    outer = 1 - np.exp(-(boundary**2) / 2)
    contrast = (distance * np.exp(-(spacing**2) / (2 * 0.25**2))) @ outer
    contrast /= max(contrast.max(), 1e-9)
    smooth = np.where(linked, np.exp(-(distance**2) / (2 * 10**2)) + 0.1, 0)
    np.fill_diagonal(smooth, 0)
    system = np.diag(smooth.sum(axis=1) + outer + contrast + 1e-9) - smooth
    values = np.linalg.solve(system, contrast)
    low, high = values.min(), values.max()
    values = (values - low) / (high - low) if high - low > 1e-6 else np.zeros(count)
    found = torch.from_numpy(values[regions].astype(np.float32))
    return interpolate(found[None, None], size, mode="bilinear")[0, 0]


def _shrunk(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    # The picture at a long side of at most `side` pixels.
    size = [max(1, round(n * min(1, side / max(image.shape)))) for n in image.shape[:2]]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    small = interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


# ------------------------------------------------------------------- conditional random field


@dataclass(frozen=True)
class CRF:
    """The numbers of a dense conditional random field; see :func:`dense_crf`."""

    iterations: int
    """Steps of mean field."""
    w_smooth: Real
    """Weight of two different labels near to each other."""
    s_smooth: Real
    """How near, in pixels."""
    w_color: Real
    """Weight of two different labels on near pixels of one color."""
    s_space: Real
    """How near, in pixels."""
    s_color: Real
    """How far apart colors of 0 to 255 may be."""

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations, 1)
        for name in ("w_smooth", "s_smooth", "w_color", "s_space", "s_color"):
            value, weight = getattr(self, name), name.startswith("w")
            odd = not isinstance(value, Real) or not math.isfinite(value)
            if odd or value < 0 or (value == 0 and not weight):
                least = "at least" if weight else "above"
                raise ValueError(f"expected a finite `{name}` {least} 0, got {value}")


CRF_PRESETS = {
    "oaa_caffe": CRF(1, 1, 3, 3, 67, 4),
    "oaa_pytorch": CRF(10, 3, 1, 4, 67, 3),
    "deeplabv2_resnet101": CRF(10, 3, 1, 4, 67, 3),
    "deeplabv2_vgg16": CRF(10, 2, 2, 4, 65, 3),
    "largefov": CRF(10, 3, 3, 5, 50, 10),
    "largefov_multiscale": CRF(10, 3, 3, 4, 83, 5),
    "largefov_coco": CRF(10, 3, 3, 5, 69, 5),
    "l2g_largefov": CRF(10, 3, 3, 4, 121, 5),
    "convcrf": CRF(5, 3, 3, 10, 80, 13),
    "maps": CRF(10, 3, 3, 10, 80, 13),
}
"""Published numbers, by where they were used: the author's two codes, DeepLab's networks, its
first version's three settings, L2G, ConvCRF; ``maps`` are AffinityNet's and OAA's for attention
maps, which are far coarser than a segmentation network's scores."""


def dense_crf(
    image: UInt8[np.ndarray, "h w 3"],
    probabilities: Float[Tensor, "k h w"],
    preset: str | CRF = "oaa_pytorch",
) -> Float[Tensor, "k h w"]:
    r"""Moves the borders between labels to edges of the picture, by mean field.

    .. math:: E(x) = -\sum_i \log P_i(x_i) + \sum_{i < j} 1[x_i \ne x_j] \Big(
        w_1 e^{-\frac{|p_i - p_j|^2}{2 a^2} - \frac{|I_i - I_j|^2}{2 b^2}}
        + w_2 e^{-\frac{|p_i - p_j|^2}{2 c^2}} \Big)

    :math:`P` are the probabilities, at least 1e-5 each, :math:`p` the places and :math:`I` the
    colors of pixels; :math:`w_1, a, b` are ``w_color``, ``s_space`` and ``s_color`` of
    :class:`CRF`, :math:`w_2, c` its ``w_smooth`` and ``s_smooth``.

    Args:
        image: The picture, RGB.
        probabilities: How likely each label is, at least 0; divided by their sum over the labels
            first. A pixel that is 0 everywhere says nothing.
        preset: A name of :data:`CRF_PRESETS`, or numbers of one's own.

    Returns:
        The probabilities after the last step; they sum to 1 at each pixel.

    Raises:
        ImportError: pydensecrf2 is not installed.
        ValueError: The preset is unknown, sizes differ, or a probability is below 0 or not finite.

    References:
        Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials (Kraehenbuehl
        and Koltun, 2011), https://arxiv.org/abs/1210.5644.
    """
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ImportError(
            "expected the package pydensecrf2 for a dense CRF, which is not installed; "
            "`pip install pydensecrf2` compiles it, with a C++ compiler, on Python 3.11 or 3.12"
        ) from error
    if not isinstance(preset, CRF) and preset not in tuple(CRF_PRESETS):
        raise ValueError(f"expected `preset` in {tuple(CRF_PRESETS)} or a CRF, got {preset!r}")
    crf = preset if isinstance(preset, CRF) else CRF_PRESETS[preset]
    check_picture(image)
    check_axes("probabilities", probabilities, "k h w")
    _check_finite("probabilities", probabilities)
    if (probabilities < 0).any():
        raise ValueError(
            f"expected probabilities of at least 0, got {float(probabilities.min()):.3g}; "
            "a softmax makes some of scores"
        )
    labels, height, width = probabilities.shape
    if not labels:
        raise ValueError("expected probabilities of at least one label, got none")
    if image.shape != (height, width, 3):
        raise ValueError(
            f"expected a picture of {height} x {width}, the probabilities' size, "
            f"got {image.shape}; resize one of them"
        )
    likely = probabilities.detach().cpu().float().clamp_min(1e-20)
    energy = -(likely / likely.sum(dim=0)).clamp_min(1e-5).log()
    field = DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(energy.reshape(labels, -1).contiguous().numpy())
    field.addPairwiseGaussian(sxy=crf.s_smooth, compat=crf.w_smooth)
    field.addPairwiseBilateral(
        sxy=crf.s_space, srgb=crf.s_color, rgbim=np.array(image, order="C"), compat=crf.w_color
    )
    found = np.array(field.inference(crf.iterations), np.float32)
    return torch.from_numpy(found.reshape(labels, height, width)).to(probabilities)
