r"""Attribution to pixels: the gradient of a class score and the methods built on it.

They are what the decomposition is compared with in thesis figure 5.7. All of them return one
value per pixel and color, :func:`pixel_map` makes a map of these. Symbols: :math:`y` is a class
score, :math:`x` an image, :math:`x'` a baseline.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..stages import Staged
from .occlusion import _check_scores, _class_ids

__all__ = [
    "Baseline",
    "deconvnet",
    "deeplift",
    "gradient",
    "guided_backprop",
    "integrated_gradients",
    "pixel_map",
    "smoothgrad",
]

Baseline = Literal["mean", "black"]
ClassIds = int | Sequence[int] | Int[Tensor, " b"] | None


def pixel_map(attribution: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Sums the absolute values over the colors."""
    return attribution.abs().sum(dim=1)


def gradient(
    net: Staged, images: Float[Tensor, "b c h w"], class_ids: ClassIds = None
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient of a class score at each pixel.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.

    Returns:
        The gradient, by normalized pixel values.

    References:
        Deep Inside Convolutional Networks (Simonyan et al., 2014),
        https://arxiv.org/abs/1312.6034.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        scores = _check_scores(net.activations(leaf)[1], len(leaf))
        ids = _class_ids(scores.detach(), class_ids).clone()  # not one of inference_mode
        picked = scores.gather(1, ids[:, None])
        return torch.autograd.grad(picked.sum(), leaf)[0]


def smoothgrad(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    samples: int = 50,
    noise: float = 0.15,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c h w"]:
    r"""Averages the gradient over noisy copies of the image.

    .. math:: \frac{1}{n} \sum_{i=1}^n \frac{\partial y}{\partial x}(x + \epsilon_i), \qquad
        \epsilon_i \sim N(0, (\sigma (\max x - \min x))^2)

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`; chosen on the images without noise.
        samples: Noisy copies of each image; one batch for each.
        noise: :math:`\sigma`, a share of the range of each image.
        generator: Where the noise comes from; seed 0 if None.

    Returns:
        The mean gradient.

    References:
        SmoothGrad: Removing Noise by Adding Noise (Smilkov et al., 2017),
        https://arxiv.org/abs/1706.03825.
    """
    if samples < 1 or noise < 0:
        raise ValueError(
            f"expected `samples` of at least 1 and `noise` of at least 0, got {samples}, {noise}"
        )
    generator = generator or torch.Generator(images.device).manual_seed(0)
    ids = _class_ids(_check_scores(net(images), len(images)), class_ids)
    width = noise * (images.amax((1, 2, 3), True) - images.amin((1, 2, 3), True))
    total = torch.zeros_like(images)
    for _ in range(samples):
        draws = torch.randn(
            images.shape, generator=generator, device=images.device, dtype=images.dtype
        )
        total += gradient(net, images + width * draws, ids)
    return total / samples


def integrated_gradients(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    baseline: Baseline = "mean",
    steps: int = 50,
) -> Float[Tensor, "b c h w"]:
    r"""Averages the gradient on the straight way from a baseline to the image.

    .. math:: (x - x') \odot \int_0^1 \frac{\partial y}{\partial x}(x' + t (x - x')) \, dt

    The sum over an image tends to :math:`y(x) - y(x')` as `steps` grow. Computed by captum
    (Gauss-Legendre nodes).

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.
        baseline: ``mean``: 0 after normalization, the mean color; or ``black``.
        steps: Nodes of the integral.

    Returns:
        The attribution, in the unit of the score.

    References:
        Axiomatic Attribution for Deep Networks (Sundararajan et al., 2017),
        https://arxiv.org/abs/1703.01365.
    """
    from captum.attr import IntegratedGradients

    if steps < 1:
        raise ValueError(f"expected `steps` of at least 1, got {steps}")
    start = _start(net, images, baseline)
    ids = _class_ids(_check_scores(net(images), len(images)), class_ids)
    with torch.inference_mode(False), torch.enable_grad():
        method = IntegratedGradients(lambda x: net.activations(x)[1])
        found = method.attribute(
            images.detach().clone(), start.clone(), target=ids.clone(), n_steps=steps,
            internal_batch_size=len(ids),
        )  # fmt: skip
    return found.detach().to(images.dtype)


def deeplift(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    baseline: Baseline = "mean",
) -> Float[Tensor, "b c h w"]:
    r"""Divides the difference to the score of a baseline among the pixels, in one backward pass.

    Rescale rule: an activation function passes back
    :math:`(f(u) - f(u')) / (u - u')` in place of its derivative, and a max-pooling passes the
    difference of its results to where the larger of both maxima lies. In a network of
    convolutions, linear layers, batch normalization, average and max-poolings and activation
    functions the sum over an image is :math:`y(x) - y(x')`. Products of activations (squeeze and
    excitation, attention) keep their gradient, and the sum is only about that.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.
        baseline: See :func:`integrated_gradients`.

    Returns:
        The attribution, in the unit of the score.

    References:
        Learning Important Features Through Propagating Activation Differences (Shrikumar et al.,
        2017), https://arxiv.org/abs/1704.02685.
    """
    start = _start(net, images, baseline)
    ids = _class_ids(_check_scores(net(images), len(images)), class_ids)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        with _Rescaled():
            scores = net.activations(torch.cat([leaf, start]))[1][: len(leaf)]
        picked = scores.gather(1, ids.clone()[:, None])
        found = torch.autograd.grad(picked.sum(), leaf)[0]
    return found * (images - start)


def guided_backprop(
    net: Staged, images: Float[Tensor, "b c h w"], class_ids: ClassIds = None
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient with each ReLU passing back only what is positive.

    A ReLU passes :math:`g` where :math:`x > 0` and :math:`g > 0`. Modules, functions and
    in-place forms of ReLU and ReLU6 are meant alike; other activation functions keep their
    gradient.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.

    Returns:
        The guided gradient.

    References:
        Striving for Simplicity: The All Convolutional Net (Springenberg et al., 2015),
        https://arxiv.org/abs/1412.6806.
    """
    with GuidedReLUs():
        return gradient(net, images, class_ids)


def _start(net: Staged, images: Tensor, baseline: Baseline) -> Tensor:
    if baseline not in get_args(Baseline):
        raise ValueError(f"expected `baseline` in {get_args(Baseline)}, got {baseline!r}")
    start = torch.zeros_like(images)
    if baseline == "black":
        mean, std = (images.new_tensor(part)[:, None, None] for part in (net.mean, net.std))
        start = (start - mean) / std
    return start


def deconvnet(
    net: Staged, images: Float[Tensor, "b c h w"], class_ids: ClassIds = None
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient with each ReLU passing back only what is positive, open or not.

    A ReLU passes :math:`g` where :math:`g > 0`, whatever its input was. For the rest see
    :func:`guided_backprop`; max-poolings remember their places.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.

    Returns:
        What arrives at the pixels.

    References:
        Visualizing and Understanding Convolutional Networks (Zeiler and Fergus, 2014),
        https://arxiv.org/abs/1311.2901.
    """
    with GuidedReLUs(deconvolution=True):
        return gradient(net, images, class_ids)


class GuidedReLUs(TorchFunctionMode):
    """Within it, every ReLU that runs passes back positive gradients only.

    With `deconvolution` it does so where it is closed, too.
    """

    def __init__(self, deconvolution: bool = False) -> None:
        super().__init__()
        self.deconvolution = deconvolution

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Replaces the call of a ReLU."""
        kwargs = kwargs or {}
        top = _TOPS.get(func)
        if func is functional.hardtanh and kwargs.get("min_val") == 0:  # the module ReLU6
            top = kwargs["max_val"]
        return (
            func(*args, **kwargs)
            if top is None
            else _Guided.apply(args[0], top, self.deconvolution)
        )


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, x: Tensor, top: float, everywhere: bool
    ) -> Tensor:
        context.save_for_backward(((x > 0) & (x < top)) | everywhere)
        return x.clamp(0, top)

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        (open_,) = context.saved_tensors
        return gradient.relu() * open_, None, None


_TOPS = {  # from the function to the largest value it gives
    functional.relu: torch.inf, functional.relu_: torch.inf, torch.relu: torch.inf,
    torch.relu_: torch.inf, Tensor.relu: torch.inf, Tensor.relu_: torch.inf,
    functional.relu6: 6.0,
}  # fmt: skip


class _Rescaled(TorchFunctionMode):
    # Within it, a batch is images and then as many baselines; see `deeplift`.

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in _ELEMENTWISE:
            kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
            return _Ratio.apply(args[0], lambda x: func(x, *args[1:], **kwargs))
        if func in _POOLINGS and not kwargs.pop("return_indices", False):
            return _Winner.apply(
                args[0],
                lambda x: functional.max_pool2d(x, *args[1:], **kwargs, return_indices=True),
            )
        return func(*args, **kwargs)


class _Ratio(torch.autograd.Function):
    # An elementwise function, which passes back the ratio of differences to the baseline.
    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, x: Tensor, function: Callable
    ) -> Tensor:
        y = function(x.clone())  # which may work in place
        context.save_for_backward(x, y)
        context.function = function
        return y

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None]:
        (x, start), (y, end) = (each.chunk(2) for each in context.saved_tensors)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            slope = torch.autograd.grad(context.function(leaf.clone()).sum(), leaf)[0]
        ratio = torch.where((x - start).abs() > _TINY, (y - end) / (x - start), slope)
        return gradient * torch.cat([ratio, torch.zeros_like(ratio)]), None


class _Winner(torch.autograd.Function):
    # A max-pooling, which passes the difference to the larger of both maxima.
    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, x: Tensor, pool: Callable) -> Tensor:
        y, places = pool(x)
        context.save_for_backward(x, y, places)
        return y

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None]:
        (x, start), (y, end), (at, of_start) = (
            each.flatten(2).chunk(2) for each in context.saved_tensors
        )
        winner = torch.where(y >= end, at, of_start)
        away = (x - start).gather(2, winner)
        ratio = torch.where(away.abs() > _TINY, (y - end) / away, 1.0)
        passed = gradient.flatten(2).chunk(2)[0] * ratio
        found = torch.zeros_like(x).scatter_add(2, winner, passed)
        whole = torch.cat([found, torch.zeros_like(found)])
        return whole.reshape(context.saved_tensors[0].shape), None


_TINY = 1e-6  # a difference below which the derivative takes the place of the ratio
_POOLINGS = {functional.max_pool2d, torch.max_pool2d}
_ELEMENTWISE = {
    *_TOPS, functional.hardtanh, functional.leaky_relu, functional.elu, functional.selu,
    functional.celu, functional.gelu, functional.silu, functional.mish, functional.softplus,
    functional.hardswish, functional.hardsigmoid, functional.prelu, functional.sigmoid,
    torch.sigmoid, Tensor.sigmoid, functional.tanh, torch.tanh, Tensor.tanh, torch.clamp,
    Tensor.clamp,
}  # fmt: skip
