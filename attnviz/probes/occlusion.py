r"""Probes of a network: what changes when something is covered, how even its gradients are.

Symbols: :math:`A^k_{ij}` is channel :math:`k` of a stage's activation, :math:`g^k_{ij}` the
gradient of one class score, :math:`M` an attention map; ``b`` images, ``c`` channels.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import conv2d, pad

from ..cam import normalize, resize
from ..checks import check_choice, shown
from ..metrics import class_ranks
from ..stages import Staged, check_network

__all__ = ["Fill", "gradient_variance", "occlude", "occlusion_scores", "occlusion_table"]

ClassIds = int | Sequence[int] | Int[Tensor, " b"] | None
Fill = Literal["mean", "grey", "black", "blur"]


# ----------------------------------------------------------------------------------- occlusion


def occlude(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    maps: Float[Tensor, "b _ _"],
    threshold: float = 0.7,
    fill: Fill = "mean",
) -> Float[Tensor, "b c h w"]:
    r"""Covers each image where its map is strong: :math:`M / \max M \ge` the threshold.

    Args:
        net: The network, for its mean and standard deviation.
        images: Images, normalized as the network expects.
        maps: One map per image, raw or not; resized to the images before they are compared.
        threshold: Share of the maximum from which a place is covered.
        fill: With what: the mean color the network expects (0 after normalization), 50 % grey,
            black, or the image itself blurred (Gaussian, a tenth of the short side). The thesis
            does not say; ``mean`` is the least unusual to the network.

    Returns:
        The covered images. An image whose map has no positive value stays as it is.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `threshold` or `fill` is out of range, images or maps are not finite, or there
            is not one map per image.
    """
    if not isinstance(threshold, Real) or not 0 < threshold <= 1:
        raise ValueError(f"expected `threshold` in (0, 1], got {shown(threshold)}")
    check_choice("fill", fill, Fill)
    _check_maps(net, images, maps)
    covered = _covered(maps.to(images), images.shape[-2:], threshold)
    return torch.where(covered[:, None], _filling(net, images, fill), images)


def occlusion_table(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: Int[Tensor, " b"] | Sequence[int],
    maps: Float[Tensor, "b _ _"],
    threshold: float = 0.7,
    fill: Fill = "mean",
    *,
    image_ids: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Classifies images as they are and with the strong places of their maps covered.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The true class of each image.
        maps: The map of that class for each image.
        threshold: See :func:`occlude`.
        fill: See :func:`occlude`.
        image_ids: Keys of the images, which become the index.

    Returns:
        One row per image: ``class_id``; ``rank`` (0 = first) and ``confidence`` (softmax, 0 to
        1) of the true class; ``area``, the share of the image covered; ``rank_covered`` and
        ``confidence_covered``. Tables of parts join with ``pandas.concat``.

    References:
        Thesis section 3.4.2, after Visualizing and Understanding Convolutional Networks (Zeiler
        and Fergus, 2014), https://arxiv.org/abs/1311.2901.
    """
    covered = occlude(net, images, maps, threshold, fill)
    ids = _chosen(net, images, class_ids).cpu()
    area = _covered(maps.to(images), images.shape[-2:], threshold).double().mean(dim=(1, 2))
    columns = {"class_id": ids.tolist(), **_classify(net, images, ids), "area": area.tolist()}
    columns |= {f"{name}_covered": v for name, v in _classify(net, covered, ids).items()}
    index = None if image_ids is None else pd.Index(list(image_ids), name="image_id")
    return pd.DataFrame(columns, index=index)


def occlusion_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Scores what :func:`occlusion_table` counted; the lower when covered, the better the map.

    Only images that the network classifies right are covered. The thesis prints its original
    row for the whole set, and does not say what the other rows are shares of: so both are given.

    Args:
        table: One row per image.

    Returns:
        Four rows, by ``of`` and ``state``. ``of``: ``correct``, shares of the images classified
        right; ``all``, shares of all images, where those classified wrong keep their original
        result. ``state``: ``original`` or ``covered``. Columns ``images`` (how many), ``top1``,
        ``top5`` and ``confidence`` of the true class, from 0 to 1; NaN where no image is right.

    References:
        Thesis table 3.8.
    """
    right = table["rank"] == 0
    covered = {
        name: table[f"{name}_covered"].where(right, table[name]) for name in ("rank", "confidence")
    }
    rows = []
    for of, chosen in (("correct", right), ("all", right.notna())):
        for state, source in (("original", table), ("covered", covered)):
            rank, confidence = source["rank"][chosen], source["confidence"][chosen]
            shares = [(rank < 1).mean(), (rank < 5).mean(), confidence.mean()]
            rows.append([of, state, int(chosen.sum()), *map(float, shares)])
    columns = ["of", "state", "images", "top1", "top5", "confidence"]
    return pd.DataFrame(rows, columns=columns).set_index(["of", "state"])


def _check_maps(net: Staged, images: Tensor, maps: Tensor) -> None:
    check_network(net)
    net._check_images(images)
    if not images.isfinite().all():
        raise ValueError("expected images without NaN and infinity")
    if not isinstance(maps, Tensor):
        raise TypeError(f"expected maps as a tensor (b, h, w), got {type(maps).__name__}")
    if maps.ndim and len(maps) != len(images):
        raise ValueError(f"expected one map per image, got {len(maps)} for {len(images)}")
    if maps.ndim != 3 or not maps.numel():
        raise ValueError(f"expected maps of shape (b, h, w), got {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("expected maps without NaN and infinity; look where they come from")


def _covered(maps: Tensor, size: torch.Size, threshold: float) -> Tensor:
    return normalize(resize(maps, tuple(size))) >= float(threshold)


def _filling(net: Staged, images: Tensor, fill: Fill) -> Tensor:
    if fill == "mean":
        return torch.zeros_like(images)
    if fill == "blur":
        return _blurred(images, min(images.shape[-2:]) / 10)
    mean, std = (images.new_tensor(part)[:, None, None] for part in (net.mean, net.std))
    return ((0.5 if fill == "grey" else 0.0) - mean) / std


def _blurred(images: Tensor, sigma: float) -> Tensor:
    # A Gaussian along the columns, then along the rows; the border is continued.
    radius = max(1, round(3 * sigma))
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = (-(steps**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum())[None, None, :, None]
    rows = images.flatten(0, 1)[:, None]
    for _ in range(2):
        rows = pad(rows, (0, 0, radius, radius), mode="replicate")
        rows = conv2d(rows, kernel).transpose(-2, -1)
    return rows[:, 0].unflatten(0, images.shape[:2])


def _classify(net: Staged, images: Tensor, ids: Tensor) -> dict[str, list]:
    with torch.no_grad():
        scores = _check_scores(net(images), len(images))
    ranks = class_ranks(scores, ids)
    confidence = scores.double().softmax(dim=1).cpu().gather(1, ids.cpu()[:, None])[:, 0]
    return {"rank": ranks.tolist(), "confidence": confidence.tolist()}


def _check_scores(output: object, count: int) -> Tensor:
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        raise ValueError(f"expected a network with scores ({count}, classes), got {shape}")
    if output.isnan().any() or output.isposinf().any():
        raise ValueError(
            "expected finite scores, got NaN or infinity; check the weights and the images for NaN"
        )
    return output


# ---------------------------------------------------------------------------------- gradients


def gradient_variance(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    stages: Sequence[int] | None = None,
) -> pd.DataFrame:
    r"""Measures how much the weight of a channel differs from place to place.

    .. math:: \operatorname{Var}_{ij} g^k_{ij} \quad \text{(Grad-CAM)}, \qquad
        \operatorname{Var}_{ij} \, \alpha^k_{ij} \mathrm{ReLU}(g^k_{ij}) \quad
        \text{(Grad-CAM++)}

    One weight per channel stands for all places only where this is small. The unit is that of
    the squared gradient and changes from stage to stage; `relative` has none. The gradient is
    the activation's own: before a max-pooling most of it is zero, which counts as difference.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        stages: Numbers of the stages, 1 = shallowest; all if None.

    Returns:
        One row for each method, stage and channel: ``method`` (``gradcam`` or ``gradcam_pp``),
        ``stage``, ``stage_name``, ``channel``, ``variance`` (over places, mean over images) and
        ``relative``, the share of the mean square that is variance: 0 for equal weights, 1 for
        weights that cancel out, NaN for a channel without gradient.

    Raises:
        ValueError: A class or stage does not exist.

    References:
        Thesis section 3.2.2 and figure 3.3.
    """
    check_network(net)
    numbers = net.check_stages(stages)
    with torch.inference_mode(False), torch.enable_grad():
        pieces = net.differentiable(images, numbers)
        scores = _check_scores(pieces.output, len(images))
        ids = _class_ids(scores, class_ids)
        picked = scores.gather(1, ids[:, None]).sum()
        gradients = torch.autograd.grad(picked, pieces.activations)
    parts = []
    for number, activation, gradient in zip(numbers, pieces.activations, gradients, strict=True):
        gradient = gradient.double()
        positive = gradient.relu()
        total = activation.detach().double().sum(dim=(2, 3), keepdim=True)
        weights = {"gradcam": gradient, "gradcam_pp": positive / (2 + positive * total)}  # (3.4)
        for method, weight in weights.items():
            variance = weight.var(dim=(2, 3), correction=0).mean(dim=0)
            square = weight.square().mean(dim=(0, 2, 3))
            columns = {
                "method": method,
                "stage": number,
                "stage_name": net.stage_names[number - 1],
            }
            columns |= {
                "channel": np.arange(len(variance)),
                "variance": variance.cpu().numpy(),
                "relative": (variance / square).cpu().numpy(),
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts).sort_values(["method", "stage", "channel"], ignore_index=True)


def _chosen(net: Staged, images: Tensor, class_ids: ClassIds) -> Tensor:
    # The class of each image, one forward pass.
    check_network(net)
    net._check_images(images)
    if not images.isfinite().all():
        raise ValueError("expected images without NaN and infinity")
    return _class_ids(_check_scores(net(images), len(images)), class_ids)


def _class_ids(scores: Tensor, class_ids: ClassIds) -> Tensor:
    count, classes = scores.shape
    if class_ids is None:
        return scores.argmax(dim=1)
    if isinstance(class_ids, Tensor | np.ndarray) and not class_ids.ndim:
        class_ids = class_ids.item()
    if isinstance(class_ids, Integral) and not isinstance(class_ids, bool):
        class_ids = [int(class_ids)] * count
    try:
        ids = torch.as_tensor(class_ids, device=scores.device)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"expected `class_ids` as whole numbers, got {shown(class_ids)}")
    ids = ids.long()
    if ids.shape != (count,):
        raise ValueError(f"expected {count} classes in `class_ids`, got {tuple(ids.shape)}")
    if ids.min() < 0 or ids.max() >= classes:
        wrong = ids[(ids < 0) | (ids >= classes)][0]
        raise ValueError(f"expected classes from 0 to {classes - 1}, got {wrong}")
    return ids
