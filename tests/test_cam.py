import itertools
import math
from functools import partial

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attnviz import cam
from attnviz.localize import map_to_box

B, C, H, W = 2, 3, 4, 5


@pytest.fixture(params=range(3))
def pair(request):
    generator = torch.Generator().manual_seed(request.param)
    activation = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64).relu()
    gradient = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64)
    return activation, gradient


# Replicas: the equations as loops over single numbers.


def _channel_weighted(activation, weight, positive=True):
    result = torch.zeros(B, H, W, dtype=torch.float64)
    for b, i, j in itertools.product(range(B), range(H), range(W)):
        value = sum(weight(b, k) * float(activation[b, k, i, j]) for k in range(C))
        result[b, i, j] = max(0.0, value) if positive else value
    return result


def _gradcam(a, g):
    return _channel_weighted(
        a, lambda b, k: sum(float(g[b, k, i, j]) for i in range(H) for j in range(W)) / (H * W)
    )


def _cam(a, g):
    return _channel_weighted(
        a, lambda b, k: sum(float(g[b, k, i, j]) for i in range(H) for j in range(W)), False
    )


def _gradcam_pp(a, g, alpha_norm=False):
    def weight(b, k):
        total = sum(float(a[b, k, i, j]) for i in range(H) for j in range(W))
        result = alphas = 0.0
        for i, j in itertools.product(range(H), range(W)):
            d = float(g[b, k, i, j])
            alpha = d**2 / (2 * d**2 + total * d**3) if d != 0 else 0.0
            result += alpha * max(0.0, d)
            alphas += alpha * (d > 0)
        return result / alphas if alpha_norm and alphas else result

    return _channel_weighted(a, weight)


def _pointwise(a, g, term, root=None):
    result = torch.zeros(B, H, W, dtype=torch.float64)
    for b, i, j in itertools.product(range(B), range(H), range(W)):
        pairs = [(float(a[b, k, i, j]), float(g[b, k, i, j])) for k in range(C)]
        result[b, i, j] = term(pairs)
    return result


def _layercam(a, g):
    return _pointwise(a, g, lambda ps: max(0.0, sum(max(0.0, d) * v for v, d in ps)))


def _layercam_normal(a, g):
    return _pointwise(a, g, lambda ps: max(0.0, sum(d * v for v, d in ps)))


def _normgrad(a, g):
    def term(pairs):  # Frobenius norm of the outer product, the weight gradient of a 1x1 conv
        return math.sqrt(sum((v * d) ** 2 for (v, _), (_, d) in itertools.product(pairs, pairs)))

    return _pointwise(a, g, term)


REPLICAS = {
    "cam": _cam,
    "gradcam": _gradcam,
    "gradcam_pp": _gradcam_pp,
    "gradcam_pp_released": partial(_gradcam_pp, alpha_norm=True),
    "layercam": _layercam,
    "layercam_normal": _layercam_normal,
    "normgrad": _normgrad,
}


def test_every_method_has_a_replica():
    assert set(REPLICAS) == set(cam.METHODS)


@pytest.mark.parametrize("method", REPLICAS)
def test_method_agrees_with_its_equation_written_as_loops(method, pair):
    expected = REPLICAS[method](*pair)
    torch.testing.assert_close(cam.METHODS[method](*pair), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", REPLICAS)
def test_a_batch_equals_its_single_images(method, pair):
    together = cam.METHODS[method](*pair)
    alone = torch.cat([cam.METHODS[method](a[None], g[None]) for a, g in zip(*pair)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", REPLICAS)
def test_methods_do_not_change_their_arguments(method, pair):
    before = [tensor.clone() for tensor in pair]
    cam.METHODS[method](*pair)
    assert all(torch.equal(now, then) for now, then in zip(pair, before))


def test_gradcam_pp_closed_form_on_a_2x2_map():
    activation = torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]], dtype=torch.float64)  # sum 4
    gradient = torch.tensor([[[[0.5, -1.0], [0.0, 1.0]]]], dtype=torch.float64)
    weight = 0.5 / (2 + 0.5 * 4) + 1.0 / (2 + 1.0 * 4)  # 0.125 + 1/6
    torch.testing.assert_close(cam.gradcam_pp(activation, gradient), weight * activation[:, 0])


# Theorems.


def test_layercam_is_gradcam_where_the_gradient_is_constant_and_positive(pair):
    activation, gradient = pair
    constant = gradient.abs().mean((2, 3), keepdim=True).expand_as(gradient)
    torch.testing.assert_close(
        cam.layercam(activation, constant), cam.gradcam(activation, constant)
    )


def test_layercam_is_layercam_normal_where_no_gradient_is_negative(pair):
    activation, gradient = pair
    maps = [method(activation, gradient.abs()) for method in (cam.layercam, cam.layercam_normal)]
    torch.testing.assert_close(*maps)


def test_layercam_differs_from_gradcam_where_the_gradient_varies(pair):
    assert not torch.allclose(cam.layercam(*pair), cam.gradcam(*pair))


def test_normgrad_ignores_the_sign_of_the_gradient(pair):
    activation, gradient = pair
    torch.testing.assert_close(cam.normgrad(activation, -gradient), cam.normgrad(*pair))


# Normalization, scaling, fusion.

finite = st.floats(0, 1e3, allow_subnormal=False)
one_map = arrays.arrays(np.float64, (4, 4), elements=finite).map(torch.from_numpy)


@given(one_map)
def test_normalized_map_has_maximum_one_or_is_zero(map):
    peak = float(cam.normalize(map).max())
    assert peak == (1.0 if map.max() > 0 else 0.0)


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e6])
def test_the_fused_map_does_not_depend_on_the_unit_of_the_score(unit):
    maps = [torch.rand(1, 8, 8), torch.rand(1, 4, 4)]
    scaled = cam.fuse([stage * unit for stage in maps])
    torch.testing.assert_close(scaled, cam.fuse(maps), rtol=1e-5, atol=1e-6)


def test_normalize_takes_a_signed_map_at_its_positive_part():
    map = torch.tensor([[-4.0, 2.0], [1.0, 0.0]])
    assert cam.normalize(map).tolist() == [[0.0, 1.0], [0.5, 0.0]]
    assert cam.normalize(-map.abs()).abs().sum() == 0


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("none", lambda x: x),
        ("tanh", lambda x: math.tanh(3.0 * x)),
        ("sqrt", math.sqrt),
        ("tan", math.tan),
    ],
)
def test_scaling_functions_by_hand(scaling, expected):
    map = torch.tensor([[0.0, 1.0], [2.0, 4.0]], dtype=torch.float64)
    wanted = torch.tensor([[expected(v / 4) for v in row] for row in map.tolist()]).double()
    torch.testing.assert_close(cam.scale(map, scaling, 3.0), wanted)


@settings(max_examples=30)
@given(one_map, one_map)
def test_fused_map_is_never_below_any_stage(first, second):
    fused = cam.fuse([first, second], scaled="all")
    for stage in (first, second):
        assert (fused >= cam.scale(stage, "tanh", 2.0)).all()


@settings(max_examples=30)
@given(one_map)
def test_fusing_with_a_zero_map_changes_nothing(map):
    zero = torch.zeros_like(map)
    assert torch.equal(cam.fuse([map, zero], scaled="all"), cam.fuse([map], scaled="all"))


def test_fusion_by_hand():
    shallow = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])
    deep = torch.tensor([[[10.0, 5.0], [0.0, 0.0]]])
    fused = cam.fuse([shallow, deep], gamma=2.0)
    expected = [[1.0, 0.5], [math.tanh(1.0), math.tanh(2.0)]]
    torch.testing.assert_close(fused[0], torch.tensor(expected))


def test_fusion_of_one_map_keeps_the_order_of_its_values():
    map = torch.rand(1, 6, 6)
    fused = cam.fuse([map], scaled="all")
    assert torch.equal(map.flatten().argsort(), fused.flatten().argsort())


@pytest.mark.parametrize(
    ("scaled", "expected"),
    [
        ("shallow", (True, False)),
        ("all", (True, True)),
        ("none", (False, False)),
        ((1,), (False, True)),
    ],
)
def test_only_the_chosen_stages_are_scaled(scaled, expected):
    maps = [torch.tensor([[[1.0, 0.5], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [0.5, 1.0]]])]
    fused = cam.fuse(maps, gamma=2.0, scaled=scaled)[0]
    for value, is_scaled in zip((fused[0, 1], fused[1, 0]), expected):
        assert float(value) == pytest.approx(math.tanh(1.0) if is_scaled else 0.5)


@pytest.mark.parametrize("scaled", [1, "deep", [2], [-1], ["all"]])
def test_scaling_what_is_no_map_is_refused(scaled, untyped):
    with pytest.raises(ValueError, match="or a list of positions from 0 to 1, got"):
        cam.fuse([torch.rand(1, 2, 2), torch.rand(1, 2, 2)], scaled=scaled)


def test_one_tensor_of_maps_is_refused(untyped):
    with pytest.raises(TypeError, match=r"expected a list of maps, got one tensor \(1, 2, 2\)"):
        cam.fuse(torch.rand(1, 2, 2))


def test_fusion_keeps_leading_dimensions_and_takes_the_largest_size():
    maps = [torch.rand(2, 3, 8, 6), torch.rand(2, 3, 4, 3)]
    assert cam.fuse(maps).shape == (2, 3, 8, 6)
    assert cam.fuse(maps, size=(20, 10)).shape == (2, 3, 20, 10)


def test_fusion_of_several_classes_equals_one_class_after_another():
    maps = [torch.rand(2, 3, 8, 6), torch.rand(2, 3, 4, 3)]
    alone = torch.stack([cam.fuse([stage[:, k] for stage in maps]) for k in range(3)], 1)
    torch.testing.assert_close(cam.fuse(maps), alone)


def test_bad_fusion_arguments_say_what_is_allowed(untyped):
    with pytest.raises(ValueError, match="at least one map"):
        cam.fuse([])
    with pytest.raises(ValueError, match="expected `scaling` in"):
        cam.fuse([torch.rand(1, 2, 2)], scaling="log", scaled="all")
    with pytest.raises(ValueError, match="expected `scaled` in"):
        cam.fuse([torch.rand(1, 2, 2)], scaled="deep")
    with pytest.raises(ValueError, match="the same images and classes, got shapes"):
        cam.fuse([torch.rand(1, 2, 2), torch.rand(2, 2, 2)])
    for gamma in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected `gamma` above 0 and finite"):
            cam.fuse([torch.rand(1, 2, 2)], gamma)
    with pytest.raises(ValueError, match=r"`size` as \(height, width\), .* got 16"):
        cam.fuse([torch.rand(1, 2, 2)], size=16)


def test_zero_map_gives_zero_fusion_and_no_box():
    fused = cam.fuse([torch.zeros(1, 4, 4)], size=(8, 8))
    assert fused.sum() == 0
    assert map_to_box(fused[0]) is None


@pytest.mark.parametrize("method", cam.METHODS.values(), ids=cam.METHODS)
def test_maps_can_be_differentiated_and_leave_their_arguments(method, generator):
    activation, gradient = (
        torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64) for _ in "ag"
    )
    activation.abs_()
    kept = activation.clone(), gradient.clone()
    method(activation, gradient)
    assert torch.equal(activation, kept[0])
    assert torch.equal(gradient, kept[1])
    assert torch.autograd.gradcheck(method, [each.requires_grad_() for each in kept])


@pytest.mark.parametrize("name", sorted(cam.METHODS))
def test_of_two_types_the_more_exact_counts(pair, name):
    activation, gradient = pair
    exact = cam.METHODS[name](activation, gradient.float())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, cam.METHODS[name](activation, gradient.float().double()))
    other = cam.METHODS[name](activation.bfloat16(), gradient.float())
    assert other.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(cam.METHODS))
def test_activation_and_gradient_have_one_shape(untyped, pair, name):
    activation, gradient = pair
    for wrong in (gradient[:, :, :1, :1], gradient[:1], gradient[0]):
        with pytest.raises(ValueError, match="expected activation and gradient of one shape"):
            cam.METHODS[name](activation, wrong)
