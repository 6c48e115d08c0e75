r"""Attention from hiding parts of a picture: squares, random grids, superpixels, a learned mask.

The first four functions ask a network for nothing but probabilities, many times for each picture:
what chapter 2 of the thesis compares gradients with. Symbols: :math:`p(x)` is the probability of
one class for image :math:`x` (softmax over the classes; sigmoid for a network of several labels),
:math:`m` a mask, 1 where the image is kept. Hidden places get the mean color unless said.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..checks import check_choice, check_number, check_seed, check_whole
from ..labels import superpixels
from ..stages import Staged
from .deletion import _probability
from .occlusion import ClassIds, Fill, _chosen, _filling

__all__ = [
    "lime",
    "meaningful_perturbation",
    "prediction_difference",
    "rise",
    "sliding_occlusion",
]


def sliding_occlusion(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    size: int | None = None,
    stride: int | None = None,
    fill: Fill = "mean",
    batch_size: int = 32,
    progress: bool = False,
) -> Float[Tensor, "b h w"]:
    """Covers each image with a square at each place of a grid and notes what probability is lost.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        size: Side of the square in pixels; a fifth of the short side if None.
        stride: From one place to the next in pixels, at most `size`; half of `size` if None. A
            last place at the border is added.
        fill: What the square shows; see :func:`attnviz.probes.occlude`.
        batch_size: Covered images in one forward pass.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        For each pixel the mean of :math:`p(x) - p(x')` over the squares that cover it, in
        [-1, 1]; negative where the probability grows.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range.

    References:
        Visualizing and Understanding Convolutional Networks (Zeiler and Fergus, 2014),
        https://arxiv.org/abs/1311.2901.
    """
    ids = _chosen(net, images, class_ids)
    rows, columns = _windows(images, size, stride)
    check_choice("fill", fill, Fill)
    batch_size = check_whole("batch_size", batch_size, 1)
    covers = _filling(net, images, fill).expand_as(images)

    def cover(image: Tensor, place: Tensor) -> Tensor:
        inside = rows[place][:, None, :, None] & columns[place][:, None, None, :]
        return torch.where(inside, covers[image], images[image])

    found = _probabilities(net, images, ids, len(rows), cover, batch_size, "occlusion", progress)
    drops = _probability(net, images, ids)[:, None] - found
    return _mean_over(drops, rows, columns).to(images)


def prediction_difference(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    others: Float[Tensor, "n c h w"],
    class_ids: ClassIds = None,
    *,
    size: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Float[Tensor, "b h w"]:
    r"""Weighs the evidence of each square against what could be there instead.

    .. math:: \log_2 \frac{p}{1 - p} - \log_2 \frac{\bar p}{1 - \bar p}, \qquad
        \bar p = \frac{1}{n} \sum_{i=1}^n p(x \text{ with the square of image } i)

    This is the paper's marginal sampling; its conditional sampling draws from a Gaussian that is
    fitted to image patches. Probabilities are kept :math:`10^{-6}` away from 0 and 1.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        others: Images from the same source, of the same size: what a square is replaced by.
        class_ids: See :func:`sliding_occlusion`.
        size: See :func:`sliding_occlusion`.
        stride: See :func:`sliding_occlusion`.
        batch_size: Changed images in one forward pass.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        For each pixel the mean over the squares that cover it, in bits; positive where the
        image speaks for the class.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or `others` are of another size.

    References:
        Visualizing Deep Neural Network Decisions: Prediction Difference Analysis (Zintgraf et
        al., 2017), https://arxiv.org/abs/1702.04595.
    """
    ids = _chosen(net, images, class_ids)
    shape = tuple(others.shape) if isinstance(others, Tensor) else type(others).__name__
    if not isinstance(others, Tensor) or others.shape[1:] != images.shape[1:] or not len(others):
        sides = ", ".join(map(str, images.shape[1:]))
        raise ValueError(f"expected `others` of shape (n, {sides}), got {shape}")
    if not others.is_floating_point() or not others.isfinite().all():
        raise ValueError("expected `others` normalized as `images`, without NaN and infinity")
    rows, columns = _windows(images, size, stride)
    batch_size = check_whole("batch_size", batch_size, 1)
    others = others.to(images)

    def replace(image: Tensor, state: Tensor) -> Tensor:
        place, other = state // len(others), state % len(others)
        inside = rows[place][:, None, :, None] & columns[place][:, None, None, :]
        return torch.where(inside, others[other], images[image])

    count = len(rows) * len(others)
    found = _probabilities(net, images, ids, count, replace, batch_size, "samples", progress)
    without = found.unflatten(1, (len(rows), len(others))).mean(dim=2)
    whole = _probability(net, images, ids)[:, None]
    evidence = torch.logit(whole, 1e-6) - torch.logit(without, 1e-6)
    return _mean_over(evidence / np.log(2), rows, columns).to(images)


def rise(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    masks: int = 4000,
    grid: int = 7,
    keep: float = 0.5,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "b h w"]:
    r"""Averages random masks, each weighed by the probability of the image seen through it.

    .. math:: \frac{1}{n q} \sum_{i=1}^n p(x \odot m_i) \, m_i

    A mask is a small grid whose cells are 1 with probability :math:`q`, made one cell larger than
    the image (bilinear) and shifted at random by up to a cell. All images share the masks.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`sliding_occlusion`.
        masks: :math:`n`, forward passes for each image. The standard error falls with its root.
        grid: Cells along each side.
        keep: :math:`q`, from 0.001 to 0.999.
        batch_size: Masked images in one forward pass.
        seed: Of the masks; the global generator is not touched.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        About :math:`p(x \odot m)` given that the pixel is kept, from 0. What does not matter is
        not 0 but at the mean probability: compare within one map only.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range.

    References:
        RISE: Randomized Input Sampling for Explanation of Black-box Models (Petsiuk et al.,
        2018), https://arxiv.org/abs/1806.07421.
    """
    ids = _chosen(net, images, class_ids)
    masks, grid = check_whole("masks", masks, 1), check_whole("grid", grid, 1)
    batch_size, seed = check_whole("batch_size", batch_size, 1), check_seed(seed)
    keep = check_number("keep", keep, 0.001, 0.999)
    size = images.shape[-2:]
    cell = [-(-side // grid) for side in size]
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(masks, grid, grid, generator=generator) < keep).to(images.dtype)
    shifts = torch.stack([torch.randint(0, c, (masks,), generator=generator) for c in cell], 1)
    total = torch.zeros(len(images), *size, dtype=torch.float64)
    with tqdm(
        desc="RISE", total=masks * len(images), unit="mask", delay=2, disable=not progress
    ) as bar:
        for chunk in torch.arange(masks).split(batch_size):
            large = functional.interpolate(
                cells[chunk, None], [(grid + 1) * c for c in cell], mode="bilinear"
            )
            cut = [
                each[:, y : y + size[0], x : x + size[1]]
                for each, (y, x) in zip(large, shifts[chunk].tolist(), strict=True)
            ]
            mask = torch.stack(cut)
            on_device = mask.to(images.device)
            for row, image in enumerate(images):
                found = _probability(net, image * on_device, ids[row].expand(len(mask)))
                total[row] += torch.einsum("n,nhw->hw", found, mask[:, 0].double())
                bar.update(len(mask))
    return (total / (masks * keep)).to(images)


def lime(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    regions: int = 50,
    samples: int = 1000,
    width: float = 0.25,
    ridge: float = 1.0,
    fill: Fill = "mean",
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "b h w"]:
    r"""Fits a linear model of the probability to the presence of each superpixel.

    .. math:: \min_{w, b} \sum_i \pi_i \big( p(x_{z_i}) - b - w^\top z_i \big)^2
        + \lambda \lVert w \rVert^2, \qquad
        \pi_i = \exp \Big( -\frac{(1 - \cos(z_i, 1))^2}{\sigma^2} \Big)

    :math:`z_i` says which superpixels are shown, each with probability one half; the first
    sample is the whole image.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`sliding_occlusion`.
        regions: About how many superpixels (SLIC).
        samples: Forward passes for each image.
        width: :math:`\sigma`, how far from the whole image a sample still counts; from 0.001 to
            1000.
        ridge: :math:`\lambda`, from 0 (plain least squares) to 1e6.
        fill: What hidden superpixels show; see :func:`attnviz.probes.occlude`.
        batch_size: Changed images in one forward pass.
        seed: Of the samples; the global generator is not touched.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        At each pixel the weight :math:`w` of its superpixel: the probability that it adds.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range.

    References:
        "Why Should I Trust You?" Explaining the Predictions of Any Classifier (Ribeiro et al.,
        2016), https://arxiv.org/abs/1602.04938.
    """
    ids = _chosen(net, images, class_ids)
    regions, samples = check_whole("regions", regions, 1), check_whole("samples", samples, 1)
    batch_size, seed = check_whole("batch_size", batch_size, 1), check_seed(seed)
    width = check_number("width", width, 0.001, 1000)
    ridge = check_number("ridge", ridge, 0, 1e6)
    check_choice("fill", fill, Fill)
    mean, std = (images.new_tensor(part)[:, None, None] for part in (net.mean, net.std))
    pictures = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    if pictures.shape[-1] != 3:
        pictures = pictures.float().mean(dim=-1, keepdim=True).byte().expand(-1, -1, -1, 3)
    covers = _filling(net, images, fill).expand_as(images)
    maps = []
    with tqdm(
        desc="LIME", total=samples * len(images), unit="sample", delay=2, disable=not progress
    ) as bar:
        for row, picture in enumerate(pictures.cpu().numpy()):
            generator = torch.Generator().manual_seed(seed)  # so that images do not mix
            region = torch.from_numpy(superpixels(picture, count=regions))
            shown = torch.rand(samples, int(region.max()) + 1, generator=generator) < 0.5
            shown[0] = True
            found = []
            for part in shown.split(batch_size):
                inside = part[:, region][:, None].to(images.device)
                mixed = torch.where(inside, images[row], covers[row])
                found.append(_probability(net, mixed, ids[row].expand(len(part))))
                bar.update(len(part))
            maps.append(_weights(shown.double(), torch.cat(found), width, ridge)[region])
    return torch.stack(maps).to(images)


def meaningful_perturbation(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    grid: int = 28,
    steps: int = 300,
    area: float = 1.0,
    smoothness: float = 1e-2,
    fill: Fill = "blur",
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "b h w"]:
    r"""Learns the smallest smooth mask that takes a class away.

    .. math:: \min_{m} \lambda_1 \operatorname{mean} (1 - m)
        + \lambda_2 \sum_u \lVert \nabla m(u) \rVert_3^3 + p(m \odot x + (1 - m) \odot x')

    The mask lives on a small grid, is enlarged (bilinear) and shifted by up to four pixels at
    each step. Adam with rate 0.1 begins with :math:`m = 1/2`; the paper begins with a disc. One
    forward and one backward pass for each step.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`sliding_occlusion`.
        grid: Cells of the mask along each side.
        steps: Of the optimization.
        area: :math:`\lambda_1`, what hiding all would cost; more makes smaller masks. The paper
            sums where this takes the mean, so that its weight would depend on `grid`.
        smoothness: :math:`\lambda_2`; more makes smoother masks.
        fill: :math:`x'`; see :func:`attnviz.probes.occlude`.
        seed: Of the shifts; the global generator is not touched.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        :math:`1 - m` in [0, 1]: what has to be hidden.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range.

    References:
        Interpretable Explanations of Black Boxes by Meaningful Perturbation (Fong and Vedaldi,
        2017), https://arxiv.org/abs/1704.03296.
    """
    ids = _chosen(net, images, class_ids)
    grid, steps = check_whole("grid", grid, 1), check_whole("steps", steps, 1)
    area = check_number("area", area, 0, 1e6)
    smoothness, seed = check_number("smoothness", smoothness, 0, 1e6), check_seed(seed)
    check_choice("fill", fill, Fill)
    height, width = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(desc="mask", total=steps, unit="step", delay=2, disable=not progress)
    with torch.inference_mode(False), torch.enable_grad(), bar:
        ids, dtype = ids.clone(), images.dtype  # not of inference_mode
        images = images.detach().clone().to(torch.promote_types(dtype, torch.float32))
        covers = _filling(net, images, fill).expand_as(images)
        mask = torch.full((len(images), 1, grid, grid), 0.5).to(images).requires_grad_()
        optimizer = torch.optim.Adam([mask], lr=0.1)
        for _ in range(steps):
            large = functional.interpolate(mask, (height + 4, width + 4), mode="bilinear")
            y, x = torch.randint(0, 5, (2,), generator=generator).tolist()
            large = large[..., y : y + height, x : x + width]
            scores = net.activations((large * images + (1 - large) * covers).to(dtype))[1]
            scores = scores.to(mask.dtype)
            shares = scores.sigmoid() if net.multilabel else scores.softmax(dim=1)
            slopes = mask.diff(dim=2).abs().pow(3).sum() + mask.diff(dim=3).abs().pow(3).sum()
            loss = shares.gather(1, ids[:, None]).sum()
            loss = loss + area * (1 - mask).mean(dim=(1, 2, 3)).sum() + smoothness * slopes
            (mask.grad,) = torch.autograd.grad(loss, [mask])
            optimizer.step()
            mask.data.clamp_(0, 1)
            bar.update()
        hidden = 1 - mask.detach()
        large = functional.interpolate(hidden, (height + 4, width + 4), mode="bilinear")
        return large[:, 0, 2:-2, 2:-2].to(dtype)


def _windows(images: Tensor, size: int | None, stride: int | None) -> tuple[Tensor, Tensor]:
    # Which rows (n, h) and which columns (n, w) each square covers.
    short = min(images.shape[-2:])
    size = check_whole("size", max(1, short // 5) if size is None else size, 1)
    if size > short:
        raise ValueError(f"expected `size` of at most the short side, {short}, got {size}")
    stride = check_whole("stride", max(1, size // 2) if stride is None else stride, 1)
    if stride > size:
        raise ValueError(
            f"expected `stride` of at most `size`, {size}, so that each pixel is covered, "
            f"got {stride}"
        )
    sides = []
    for side in images.shape[-2:]:
        starts = torch.tensor(sorted({*range(0, side - size, stride), side - size}))
        steps = torch.arange(side)
        sides.append((steps >= starts[:, None]) & (steps < starts[:, None] + size))
    rows, columns = sides
    places = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(columns)))
    return rows[places[:, 0]].to(images.device), columns[places[:, 1]].to(images.device)


def _mean_over(
    values: Float[Tensor, "b n"], rows: Tensor, columns: Tensor
) -> Float[Tensor, "b h w"]:
    rows, columns = rows.cpu().double(), columns.cpu().double()
    total = torch.einsum("bn,nh,nw->bhw", values, rows, columns)
    return total / torch.einsum("nh,nw->hw", rows, columns)


def _probabilities(
    net: Staged, images: Tensor, ids: Tensor, count: int,
    change: Callable[[Tensor, Tensor], Tensor], batch_size: int, name: str, progress: bool,
) -> Float[Tensor, "b n"]:  # fmt: skip
    # The probability of each image in each of `count` states, in float64 on the CPU.
    found = []
    pairs = torch.arange(len(images) * count, device=images.device)
    with tqdm(desc=name, total=len(pairs), unit="image", delay=2, disable=not progress) as bar:
        for chunk in pairs.split(batch_size):
            image, state = chunk // count, chunk % count
            found.append(_probability(net, change(image, state), ids[image]))
            bar.update(len(chunk))
    return torch.cat(found).reshape(len(images), count)


def _weights(shown: Tensor, values: Tensor, width: float, ridge: float) -> Tensor:
    # Weighted ridge regression with an intercept that is not penalized.
    away = 1 - shown.mean(dim=1).sqrt()  # 1 - cos(z, 1)
    weight = (-(away**2) / width**2).exp()
    share = weight / weight.sum()
    shown, values = shown - share @ shown, values - share @ values
    gram = (shown * weight[:, None]).T @ shown + ridge * torch.eye(shown.shape[1]).double()
    return torch.linalg.lstsq(gram, (shown * weight[:, None]).T @ values, driver="gelsd").solution
