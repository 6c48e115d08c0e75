import threading

import numpy as np
import pytest
import torch
from test_stages import _trace
from torch import nn
from torch.nn.functional import interpolate

from attnviz import cam
from attnviz.explain import stage_maps
from attnviz.stages import staged

ALL = tuple(cam.METHODS)


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(3, 3, 16, 16, generator=generator, dtype=torch.float64)


def _by_hand(model, images, class_ids):
    """Activation and gradient of each stage from a plain forward pass with everything kept."""
    activations, x = [], images
    for index, (convolution, relu) in enumerate(zip(model.convolutions, model.relus)):
        x = relu(convolution(model.pool(x) if index else x))
        activations.append(x)
    scores = model.fc(x.mean((2, 3)))
    picked = scores[range(len(images)), class_ids].sum()
    return activations, torch.autograd.grad(picked, activations)


@pytest.mark.parametrize("method", ALL)
def test_maps_are_the_method_on_activation_and_gradient(net, tiny, images, method):
    maps = stage_maps(net, images, [0, 3, 1], (method,))
    pairs = zip(*_by_hand(tiny, images, [0, 3, 1]))
    for found, (activation, gradient) in zip(maps[method], pairs, strict=True):
        expected = cam.METHODS[method](activation, gradient)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_a_batch_equals_its_single_images(net, images):
    together = stage_maps(net, images, [0, 1, 2], ALL)
    for row in range(3):
        alone = stage_maps(net, images[row : row + 1], row, ALL)
        for method in ALL:
            for many, one in zip(together[method], alone[method]):
                torch.testing.assert_close(many[row], one[0], rtol=1e-9, atol=1e-13)


def test_several_classes_equal_one_class_after_another(net, images):
    rows = [[0, 1], [2, 3], [1, 0]]
    together = stage_maps(net, images, rows)
    assert together["layercam"][0].shape == (3, 2, 16, 16)
    for column in range(2):
        alone = stage_maps(net, images, [row[column] for row in rows])
        for many, one in zip(together["layercam"], alone["layercam"]):
            torch.testing.assert_close(many[:, column], one)


def test_an_image_with_fewer_classes_gets_zero_maps_for_the_rest(net, images):
    maps = stage_maps(net, images, [[0], [2, 3], []])
    assert maps.class_ids.tolist() == [[0, -1], [2, 3], [-1, -1]]
    assert maps["layercam"][2][0, 1].abs().sum() == 0
    assert maps["layercam"][2][2].abs().sum() == 0


def test_without_class_the_highest_score_is_explained(net, images):
    maps = stage_maps(net, images)
    assert torch.equal(maps.class_ids, net(images).argmax(1))
    expected = stage_maps(net, images, maps.class_ids)
    assert all(map(torch.equal, maps["layercam"], expected["layercam"]))


def test_a_function_of_the_output_is_a_target(net, images):
    maps = stage_maps(
        net, images, lambda scores: scores[:, 1] - scores[:, 2], ("layercam_normal",)
    )
    one, two = (stage_maps(net, images, k, ("cam",)) for k in (1, 2))
    assert maps.class_ids is None
    difference = stage_maps(net, images, lambda s: s[:, 1] - s[:, 2], ("cam",))
    for found, a, b in zip(difference["cam"], one["cam"], two["cam"]):
        torch.testing.assert_close(found, a - b)


def test_some_stages_equal_those_among_all(net, images):
    everything = stage_maps(net, images, 1)
    some = stage_maps(net, images, 1, stages=[3, 2])
    assert some.stages == (2, 3)
    for a, b in zip(some["layercam"], everything["layercam"][1:], strict=True):
        torch.testing.assert_close(a, b)


# Theorems on networks.


def test_gradcam_is_cam_on_a_pooled_network_up_to_its_area(net, tiny, images):
    maps = stage_maps(net, images, 2, ("cam", "gradcam"), stages=[3])
    area = maps["cam"][0][0].numel()
    torch.testing.assert_close(maps["gradcam"][0] * area, maps["cam"][0].relu())
    activation = staged(tiny).activations(images)[0][2]
    expected = torch.einsum("k,bkij->bij", tiny.fc.weight[2], activation) / 1.0
    torch.testing.assert_close(maps["cam"][0], expected.detach())


def test_without_biases_the_signed_evidence_of_every_stage_sums_to_the_score(net, images):
    pieces = net.differentiable(images)
    gradients = torch.autograd.grad(pieces.output[:, 1].sum(), pieces.activations)
    for activation, gradient in zip(pieces.activations, gradients):
        total = (activation * gradient).sum((1, 2, 3))
        torch.testing.assert_close(total, pieces.output[:, 1], rtol=1e-12, atol=1e-13)


def test_before_a_max_pooling_at_most_a_quarter_of_the_gradient_is_not_zero(net, images):
    pieces = net.differentiable(images)
    gradient = torch.autograd.grad(pieces.output[:, 1].sum(), pieces.activations[0])[0]
    assert (gradient != 0).double().mean() <= 0.25


# Gradient sources.


def test_pool_up_is_the_gradient_at_the_pool_resized(net, images):
    pieces = net.differentiable(images)
    gradient = torch.autograd.grad(pieces.output[:, 1].sum(), pieces.pooled[0])[0]
    gradient = interpolate(gradient, size=(16, 16), mode="bilinear", align_corners=True)
    expected = cam.layercam(pieces.activations[0], gradient)
    found = stage_maps(net, images, 1, gradient_at="pool_up")["layercam"][0]
    torch.testing.assert_close(found, expected.detach())


def test_pool_takes_activation_and_gradient_at_the_pool(net, tiny, images):
    pieces = net.differentiable(images)
    gradient = torch.autograd.grad(pieces.output[:, 1].sum(), pieces.pooled[0])[0]
    expected = cam.layercam(tiny.pool(pieces.activations[0]), gradient)
    found = stage_maps(net, images, 1, gradient_at="pool")["layercam"]
    torch.testing.assert_close(found[0], expected.detach())
    assert [tuple(m.shape[1:]) for m in found] == [(8, 8), (4, 4), (4, 4)]


def test_a_stage_that_ends_in_a_stride_is_averaged(images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    net = staged(model, image_size=16)
    pieces = net.differentiable(images)
    gradient = torch.autograd.grad(pieces.output[:, 1].sum(), pieces.activations[0])[0]
    mean = gradient.reshape(3, 4, 8, 2, 8, 2).mean((3, 5))
    up = interpolate(mean, size=(16, 16), mode="bilinear", align_corners=True)
    found = stage_maps(net, images, 1, gradient_at="pool_up")["layercam"]
    torch.testing.assert_close(found[0], cam.layercam(pieces.activations[0], up).detach())
    native = stage_maps(net, images, 1)["layercam"]
    torch.testing.assert_close(found[1], native[1])


# No trace, any state.


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("training", [False, True])
def test_no_method_leaves_a_trace(tiny, images, method, training):
    tiny.train(training)
    tiny.fc.weight.grad = torch.ones_like(tiny.fc.weight)
    grad = tiny.fc.weight.grad
    before = {k: v for k, v in _trace(tiny).items()}
    maps = stage_maps(staged(tiny), images, 1, (method,))
    assert {k: v for k, v in _trace(tiny).items()}.keys() == before.keys()
    assert tiny.fc.weight.grad is grad
    assert (grad == 1).all()
    assert tiny.training is training
    assert not any(stage.requires_grad for stage in maps[method])


@pytest.mark.parametrize("method", ALL)
def test_no_trace_after_a_failure(tiny, images, method):
    before = _trace(tiny)

    def fail(scores):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage_maps(staged(tiny), images, fail, (method,))
    assert _trace(tiny) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_surrounding_grad_mode_and_frozen_parameters_do_not_matter(tiny, images, context):
    expected = stage_maps(staged(tiny), images, 1)["layercam"]
    tiny.requires_grad_(False)
    with context():
        found = stage_maps(staged(tiny), images.clone(), 1)["layercam"]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_give_float32_maps(tiny, images, dtype):
    expected = stage_maps(staged(tiny.float()), images.float(), 1, ALL)
    found = stage_maps(staged(tiny.to(dtype)), images.to(dtype), 1, ALL)
    for method in ALL:
        assert all(stage.dtype == torch.float32 for stage in found[method])
        deep, wanted = found[method][-1], expected[method][-1]
        torch.testing.assert_close(deep, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))


def test_four_threads_on_one_network_get_the_right_maps_every_time(tiny, images):
    net, wrong, count = staged(tiny), [], 250
    jobs = [(images[row : row + 1], class_id) for row in range(3) for class_id in range(4)]
    expected = [stage_maps(net, image, k, ALL) for image, k in jobs]

    def work(offset):
        for call in range(count):
            job = (call + offset) % len(jobs)
            maps = stage_maps(net, *jobs[job], ALL)
            for method in ALL:
                if not all(map(torch.equal, maps[method], expected[job][method])):
                    wrong.append((job, method))

    threads = [threading.Thread(target=work, args=(5 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Outputs and bad input.


class _Head(nn.Module):
    def __init__(self, tiny, head):
        super().__init__()
        self.tiny, self.head = tiny, head

    def forward(self, x):
        return self.head(self.tiny(x))


def test_a_single_score_has_the_classes_one_and_zero(tiny, images):
    column = staged(_Head(tiny, lambda s: s[:, 1:2]))
    flat = staged(_Head(tiny, lambda s: s[:, 1]))
    plain = staged(tiny)
    one = stage_maps(plain, images, 1)["layercam"]
    zero = stage_maps(plain, images, lambda s: -s[:, 1])["layercam"]
    for net in (column, flat):
        assert all(map(torch.equal, stage_maps(net, images, 1)["layercam"], one))
        assert all(map(torch.equal, stage_maps(net, images, 0)["layercam"], zero))
        auto = stage_maps(net, images)
        assert auto.class_ids.tolist() == (plain(images)[:, 1] > 0).int().tolist()


def test_other_outputs_ask_for_a_function(tiny, images):
    net = staged(_Head(tiny, lambda s: {"scores": s}))
    with pytest.raises(ValueError, match="got dict; pass a function of the output"):
        stage_maps(net, images)
    found = stage_maps(net, images, lambda out: out["scores"][:, 1])["layercam"]
    assert all(map(torch.equal, found, stage_maps(staged(tiny), images, 1)["layercam"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_ids": 4}, "expected classes from 0 to 3, got 4"),
        ({"class_ids": [-1, 0, 0]}, "expected classes from 0 to 3, got -1"),
        ({"class_ids": [1, 2]}, r"for 3 images, got 2; several classes .* \[\[3, 5\]\]"),
        ({"class_ids": [1, [2], 3]}, "as numbers or as lists, got a mixture"),
        ({"class_ids": [[], [], []]}, "expected at least one class"),
        ({"class_ids": "cat"}, "expected the number of a class, got 'cat'; Tiny has no class"),
        ({"class_ids": lambda s: s[:, 0].detach()}, "to depend on the stages.*detach it"),
        ({"class_ids": lambda s: s}, r"one value per image \(3,\), got \(3, 4\)"),
        ({"methods": ("gradcam++",)}, r"expected `methods` in \('layercam'.*got 'gradcam\+\+'"),
        ({"methods": ()}, "got none"),
        ({"gradient_at": "relu"}, "expected `gradient_at` in"),
        ({"stages": [4]}, r"`stages` from 1 to 3 .* got \[4\]"),
    ],
)
def test_bad_arguments_say_what_is_expected(net, images, arguments, message, untyped):
    with pytest.raises(ValueError, match=message):
        stage_maps(net, images, **arguments)


@pytest.mark.parametrize("class_ids", [1.5, [1.5, 1, 1], {1, 2, 3}])
def test_classes_of_another_kind_are_refused(net, images, class_ids, untyped):
    with pytest.raises(TypeError, match="whole numbers or names|as numbers or names of classes"):
        stage_maps(net, images, class_ids)


def test_classes_may_come_from_numpy_torch_or_by_name(tiny, images):
    net = staged(tiny, class_names=("a", "b", "c", "d"))
    expected = stage_maps(net, images, [1, 1, 1])["layercam"]
    for same in (np.int64(1), torch.tensor(1), np.array([1, 1, 1]), "b", ["b", 1, np.int64(1)]):
        assert all(map(torch.equal, stage_maps(net, images, same)["layercam"], expected))
    several = stage_maps(net, images, np.array([[1, 2]] * 3))["layercam"][0]
    torch.testing.assert_close(several[:, 0], expected[0])


def test_nan_weights_are_named(tiny, images):
    with torch.no_grad():
        tiny.convolutions[1].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite scores, got NaN or infinity; check"):
        stage_maps(staged(tiny), images)


def test_result_shows_what_is_behind_it(net, images):
    maps = stage_maps(net, images, 1, ("layercam", "gradcam"))
    assert list(maps) == ["layercam", "gradcam"]
    assert maps.provenance["network"] == "Tiny"
    assert set(maps.provenance["versions"]) == {"attnviz", "torch", "torchvision"}
    assert "<td>16 x 16</td>" in maps._repr_html_()
    assert repr(maps) == "StageMaps(layercam, gradcam: (3, 16, 16), (3, 8, 8), (3, 4, 4))"
