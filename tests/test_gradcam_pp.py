import itertools

import pytest
import torch

from attnviz import cam
from attnviz.explain import stage_maps
from attnviz.stages import staged


@pytest.fixture(params=range(3))
def pair(request):
    generator = torch.Generator().manual_seed(request.param)
    activation = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).relu()
    gradient = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    gradient[1, 2] = -gradient[1, 2].abs()  # a channel that only speaks against the class
    return activation, gradient


def _replica(activation, gradient, alpha_norm):
    """Eqs. 3.4 and 3.5 over single numbers, with the released code's sum of alpha."""
    b, c, h, w = activation.shape
    places = list(itertools.product(range(h), range(w)))
    result = torch.zeros(b, h, w, dtype=torch.float64)
    for n in range(b):
        for k in range(c):
            total = sum(float(activation[n, k, i, j]) for i, j in places)
            weight = alphas = 0.0
            for i, j in places:
                g = float(gradient[n, k, i, j])
                if g > 0:
                    alpha = g**2 / (2 * g**2 + total * g**3)
                    alphas += alpha
                    weight += alpha * g
            if alpha_norm and alphas:
                weight /= alphas
            for i, j in places:
                result[n, i, j] += weight * float(activation[n, k, i, j])
    return result.relu()


@pytest.mark.parametrize("alpha_norm", [False, True])
def test_both_forms_equal_their_loops(pair, alpha_norm):
    expected = _replica(*pair, alpha_norm)
    found = cam.gradcam_pp(*pair, alpha_norm=alpha_norm)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_released_form_is_gradcam_where_the_gradient_is_constant_and_positive(pair):
    activation, gradient = pair
    constant = gradient.mean((2, 3), keepdim=True).abs().expand_as(gradient).contiguous()
    found = cam.gradcam_pp_released(activation, constant)
    torch.testing.assert_close(found, cam.gradcam(activation, constant), rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1e-12, 1e3])
def test_released_weight_of_one_position_is_its_gradient(factor):
    activation = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    gradient = torch.zeros_like(activation)
    gradient[0, 0, 1, 1] = factor
    gradient[0, 1, 2, 0] = -factor
    found = cam.gradcam_pp_released(activation, gradient)
    torch.testing.assert_close(found, factor * activation[:, 0], rtol=1e-12, atol=0)


def test_without_positive_gradient_both_forms_are_zero(pair):
    activation, gradient = pair
    for alpha_norm in (False, True):
        assert not cam.gradcam_pp(activation, -gradient.abs(), alpha_norm).any()
        assert not cam.gradcam_pp(activation, 0 * gradient, alpha_norm).any()


def test_released_form_is_chosen_by_its_name(tiny):
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    maps = stage_maps(staged(tiny), images, 1, ("gradcam_pp", "gradcam_pp_released"))
    pieces = staged(tiny).differentiable(images)
    gradients = torch.autograd.grad(pieces.output[:, 1].sum(), pieces.activations)
    for position, (a, g) in enumerate(zip(pieces.activations, gradients)):
        a = a.detach()
        assert torch.equal(maps["gradcam_pp"][position], cam.gradcam_pp(a, g))
        assert torch.equal(maps["gradcam_pp_released"][position], cam.gradcam_pp(a, g, True))
