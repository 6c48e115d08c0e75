r"""Pictures made by a network: what excites a channel or a class, what a stage still knows.

Both are found by gradient ascent on the pixels, which are kept natural by a spectrum whose
amplitudes fall with frequency, as those of photographs do. Symbols: :math:`A^k` is channel
:math:`k` of a stage's activation, :math:`x` the image that is made.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..checks import check_number, check_seed, check_size, check_whole, plain
from ..stages import Staged, check_network
from .occlusion import _check_scores, _class_ids
from .saliency import _gradient, _put, _split, _top

__all__ = ["Made", "activation_maximization", "invert"]


class Made(NamedTuple):
    """Images that were made, and how good they are."""

    images: Float[Tensor, "b c h w"]
    """Normalized as the network expects."""
    pictures: UInt8[np.ndarray, "b h w c"]
    """The same, to look at."""
    values: Float[Tensor, " b"]
    """What was aimed at, for these images."""


def activation_maximization(
    net: Staged,
    stage: int | None,
    ids: int | str | Sequence[int | str] | Int[Tensor, "*b"],
    *,
    size: tuple[int, int] | None = None,
    steps: int = 256,
    decay: float = 1.0,
    jitter: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Made:
    r"""Makes images that excite a channel, or a class, as much as possible.

    .. math:: \arg\max_x \operatorname{mean}_{ij} A^k_{ij}(x) \quad \text{or} \quad
        \arg\max_x y^c(x)

    Adam with rate 0.05 on the image's spectrum, which begins as noise; each step looks at the
    image shifted by a few pixels. Closed ReLUs pass on a tenth of the gradient, or a channel that
    the noise does not excite would stay silent. Several images begin with the same noise; the
    steps enlarge rounding, so that an image made alone comes out a little different.

    Args:
        net: A network of 1 or 3 colors.
        stage: Number of the stage, 1 = shallowest; None for classes.
        ids: Channels of the stage, or classes by number or name; one image for each.
        size: Height and width of the images; those the network expects if None.
        steps: Of the optimization; a forward and a backward pass each.
        decay: How fast the spectrum fades (decoupled weight decay). 0 gives the highest values
            and the shrillest pictures.
        jitter: Most pixels by which an image is shifted, along each side.
        seed: Of noise and shifts; the global generator is not touched.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        The images; ``values`` has the mean activation or the class score of each.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range.

    Example:
        >>> from torchvision.models import squeezenet1_1
        >>> import attnviz
        >>> net = attnviz.staged(squeezenet1_1())
        >>> activation_maximization(net, 2, [3, 5], size=(64, 64), steps=2).pictures.shape
        (2, 64, 64, 3)

    References:
        Deep Inside Convolutional Networks (Simonyan et al., 2014),
        https://arxiv.org/abs/1312.6034; the spectrum and the shifts: Feature Visualization
        (Olah et al., 2017), https://doi.org/10.23915/distill.00007; thesis section 2.4.2.
    """
    check_network(net)
    if stage is not None:
        check_whole("stage", stage, 1)
        net.check_stages([stage])
    ids = plain(ids)
    ids = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(map(plain, ids))
    if not ids:
        raise ValueError("expected `ids` with at least one channel or class, got none")
    ids = [net.class_id(each) if stage is None else check_whole("ids", each, 0) for each in ids]

    def value(activations: Sequence[Tensor], output: object) -> Tensor:
        if stage is None:
            scores = _check_scores(output, len(ids))
            return scores.gather(1, _class_ids(scores.detach(), ids)[:, None])[:, 0]
        activation = activations[stage - 1]
        if max(ids) >= activation.shape[1]:
            raise ValueError(
                f"expected channels from 0 to {activation.shape[1] - 1}, got {max(ids)}"
            )
        return activation[torch.arange(len(ids)), ids].mean(dim=(1, 2))

    return _make(net, len(ids), size, value, steps, decay, jitter, seed, progress)


def invert(
    net: Staged,
    image: Float[Tensor, "1 c h w"],
    stage: int | None,
    *,
    steps: int = 256,
    decay: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> Made:
    r"""Makes an image with the same activation as another: what a stage still knows of it.

    .. math:: \arg\min_x \frac{\lVert A(x) - A(x_0) \rVert^2}{\lVert A(x_0) \rVert^2}

    Found as by :func:`activation_maximization`, without shifts.

    Args:
        net: A network of 1 or 3 colors.
        image: :math:`x_0`, normalized as the network expects.
        stage: Number of the stage, 1 = shallowest; None for the scores of all classes.
        steps: See :func:`activation_maximization`.
        decay: See :func:`activation_maximization`; more makes smoother images that fit less.
        seed: Of the noise; the global generator is not touched.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        The image; ``values`` has the error that is left, a share of that of no activation.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or the activation is 0.

    References:
        Understanding Deep Image Representations by Inverting Them (Mahendran and Vedaldi,
        2015), https://arxiv.org/abs/1412.0035; thesis section 2.4.2.
    """
    check_network(net)
    if stage is not None:
        check_whole("stage", stage, 1)
        net.check_stages([stage])
    net._check_images(image)
    if len(image) != 1:
        raise ValueError(f"expected one image (1, c, h, w), got {tuple(image.shape)}")

    def known(activations: Sequence[Tensor], output: object) -> Tensor:
        return _check_scores(output, 1) if stage is None else activations[stage - 1]

    with torch.inference_mode(False), torch.no_grad():
        wanted = known(*net.activations(image.clone())).float()
        total = wanted.square().sum()
    if not (total > 0 and total.isfinite()):
        raise ValueError(f"expected an image with a finite activation that is not 0, got {total}")

    def value(activations: Sequence[Tensor], output: object) -> Tensor:
        away = known(activations, output).float() - wanted
        return -(away.square().sum() / total)[None]

    size = (int(image.shape[2]), int(image.shape[3]))
    made = _make(net, 1, size, value, steps, decay, 0, seed, progress)
    return made._replace(values=-made.values)


def _make(
    net: Staged, count: int, size: tuple[int, int] | None,
    value: Callable[[Sequence[Tensor], object], Tensor],
    steps: int, decay: float, jitter: int, seed: int, progress: bool,
) -> Made:  # fmt: skip
    # Images with as large a value as can be found.
    steps, jitter = check_whole("steps", steps, 1), check_whole("jitter", jitter, 0)
    decay, seed = check_number("decay", decay, 0, 20), check_seed(seed)
    if len(net.mean) not in (1, 3):
        raise ValueError(f"expected a network of 1 or 3 colors, got one of {len(net.mean)}")
    if size is None:
        size = net.image_size
        size = (size, size) if isinstance(size, int) else size
    check_size("size", size)
    height, width = size
    if jitter > max(size):
        raise ValueError(f"expected `jitter` of at most {max(size)}, the side, got {jitter}")
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(desc="image", total=steps, unit="step", delay=2, disable=not progress)
    with torch.inference_mode(False), torch.enable_grad(), bar:
        mean, std = (
            torch.tensor(p, device=net.device)[:, None, None] for p in (net.mean, net.std)
        )
        amplitude = _amplitude(height, width)
        noise = 0.3 * torch.randn(len(net.mean), *amplitude.shape, 2, generator=generator)
        amplitude = amplitude.to(net.device)
        # the same noise for each
        spectrum = noise.expand(count, -1, -1, -1, -1).clone().to(net.device).requires_grad_()
        optimizer = torch.optim.AdamW([spectrum], lr=0.05, weight_decay=decay)

        def pixels() -> Tensor:
            waves = torch.view_as_complex(spectrum) * amplitude
            return torch.fft.irfft2(waves, s=size, norm="ortho").sigmoid()

        for _ in range(steps):
            y, x = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            images = ((pixels() - mean) / std).roll((y, x), (2, 3))
            with _Leaking():
                found = value(*net.activations(images.to(net.dtype))).float()
            spectrum.grad = _gradient(-found, spectrum)
            optimizer.step()
            bar.update()
        made = pixels().detach()
        images = ((made - mean) / std).to(net.dtype)
        values = value(*net.activations(images)).float().detach()
    bytes_ = (made * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return Made(images, bytes_, values)


def _amplitude(height: int, width: int) -> Float[Tensor, "h w2"]:
    # 1 / f, so that noise of variance 1 gives pixels of about that variance.
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    return amplitude / amplitude.square().mean().sqrt()


class _Leaking(TorchFunctionMode):
    # Within it, a closed ReLU passes back a tenth of the gradient.
    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if _top(func, kwargs) is None:
            return func(*args, **kwargs)
        x, rest, named = _split(args, kwargs)
        y = func(x.clone(), *rest, **named)
        leak = 0.1 * (x - x.detach()) * (y <= 0)
        return _put(y + leak, x, func, kwargs)
