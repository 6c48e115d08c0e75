import pytest
import torch
from test_stages import _trace
from torch import nn
from torch.nn.functional import interpolate

from attnviz.explain import scorecam
from attnviz.perturb import channel_masks, channel_scores, informative_channels
from attnviz.stages import staged

FORMS = ("released", "paper")


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)


def _activations(model, images):
    found, x = [], images
    for index, (convolution, relu) in enumerate(zip(model.convolutions, model.relus)):
        x = relu(convolution(model.pool(x) if index else x))
        found.append(x.detach())
    return found


def _replica(model, image, activation, class_id, form):
    """One image and one stage, one channel after another."""
    values, kept = [], []
    with torch.no_grad():
        for channel in activation:
            large = interpolate(channel[None, None], image.shape[1:], mode="bilinear")[0, 0]
            if large.max() == large.min():
                continue
            mask = (large - large.min()) / (large.max() - large.min())
            scores = model((image * mask)[None])[0]
            if form == "released":
                values.append(scores.softmax(0)[class_id])
            else:
                baseline = model(torch.zeros_like(image)[None])[0]
                values.append(scores[class_id] - baseline[class_id])
            kept.append(channel)
    if not kept:
        return torch.zeros_like(activation[0])
    weights = torch.stack(values) if form == "released" else torch.stack(values).softmax(0)
    return sum(weight * channel for weight, channel in zip(weights, kept)).relu()


def _count_passes(model):
    """Batch sizes of the forward passes from here on."""
    sizes = []
    model.convolutions[0].register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    return sizes


@pytest.mark.parametrize("form", FORMS)
def test_maps_equal_a_loop_over_channels(net, tiny, images, form):
    with torch.no_grad():
        tiny.convolutions[1].weight[2] = 0  # a dead channel
    found = scorecam(net, images, [0, 3, 1], form=form, batch_size=4)
    for stage, activation in zip(found["scorecam"], _activations(tiny, images), strict=True):
        for row, class_id in enumerate([0, 3, 1]):
            expected = _replica(tiny, images[row], activation[row], class_id, form)
            torch.testing.assert_close(stage[row], expected, rtol=1e-10, atol=1e-14)


def test_by_hand_on_two_channels():
    """Two opposite channels, so that each mask keeps one half of the picture."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 2, bias=False),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0])
        model[4].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    image = torch.tensor([[1.0, -3.0]], dtype=torch.float64)[None, None]
    net = staged(model, ["1"])
    # A = [1, 0], [0, 3] and masks [1, 0], [0, 1]; scores (1, 0) and (0, 3) of the masked images
    e = torch.e
    first, second = e / (e + 1), 1 / (1 + e**3)
    expected = torch.tensor([[[first, 3 * second]]], dtype=torch.float64)
    torch.testing.assert_close(scorecam(net, image, 0)["scorecam"][0], expected)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)
    expected = torch.stack([weights[0], 3 * weights[1]])[None, None]
    torch.testing.assert_close(scorecam(net, image, 0, form="paper")["scorecam"][0], expected)


@pytest.mark.parametrize("form", FORMS)
def test_batch_size_and_company_do_not_matter(net, images, form):
    expected = scorecam(net, images, [0, 1, 2], form=form)["scorecam"]
    for batch_size in (1, 7, 1000):
        found = scorecam(net, images, [0, 1, 2], form=form, batch_size=batch_size)["scorecam"]
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    for row in range(3):
        alone = scorecam(net, images[row : row + 1], row, form=form)["scorecam"]
        for a, b in zip(alone, expected):
            torch.testing.assert_close(a[0], b[row])


@pytest.mark.parametrize("form", FORMS)
def test_several_classes_share_their_passes(net, tiny, images, form):
    alone = [scorecam(net, images, k, form=form)["scorecam"] for k in (1, 3)]
    sizes = _count_passes(tiny)
    found = scorecam(net, images, [[1, 3], [1, 3], [1]], form=form)
    assert sum(sizes) == 3 + found.provenance["masks"]
    assert found.class_ids.tolist() == [[1, 3], [1, 3], [1, -1]]
    for stage, one, three in zip(found["scorecam"], *alone, strict=True):
        torch.testing.assert_close(stage[:, 0], one)
        torch.testing.assert_close(stage[:2, 1], three[:2])
        assert not stage[2, 1].any()


def test_constant_channels_are_never_run_and_batches_never_too_large(net, tiny, images):
    with torch.no_grad():
        tiny.convolutions[0].weight[1] = 0
        tiny.convolutions[1].weight[3] = 0
    lively = sum(int((a.amax((2, 3)) > a.amin((2, 3))).sum()) for a in _activations(tiny, images))
    sizes = _count_passes(tiny)
    maps = scorecam(net, images, 1, batch_size=5)
    assert sum(sizes) == 3 + lively
    assert maps.provenance["masks"] == lively < 3 * (4 + 5 + 6)
    assert max(sizes) == 5


def test_memory_holds_one_batch_of_masks(images, generator):
    alive = []

    def score(masked, rows):
        alive.append(len(masked))
        return masked.mean((1, 2, 3))[:, None]

    activation = torch.rand(3, 40, 4, 4, generator=generator, dtype=torch.float64)
    chosen = torch.ones(3, 40, dtype=torch.bool)
    found = channel_scores(score, images, activation, chosen, 16)
    assert alive == [16] * 7 + [8]
    assert found.shape == (3, 40, 1)


@pytest.mark.parametrize("form", FORMS)
def test_channels_of_highest_variance_are_taken(net, tiny, images, form):
    found = scorecam(net, images, 2, stages=[2], form=form, channels=2)
    assert found.provenance["masks"] == 6
    activation = _activations(tiny, images)[1]
    for row in range(3):
        order = activation[row].var(dim=(1, 2)).argsort(descending=True)[:2]
        expected = _replica(tiny, images[row], activation[row][order], 2, form)
        torch.testing.assert_close(found["scorecam"][0][row], expected)
    everything = scorecam(net, images, 2, stages=[2], form=form)["scorecam"][0]
    more = scorecam(net, images, 2, stages=[2], form=form, channels=99)["scorecam"][0]
    torch.testing.assert_close(more, everything)


def test_constant_channels_are_not_among_the_chosen():
    activation = torch.zeros(1, 3, 3, 3)
    activation[0, 1, 0, 0] = 1e-20
    activation[0, 2] = 0.1  # resized, it would vary by rounding
    assert informative_channels(activation).tolist() == [[False, True, False]]
    assert informative_channels(activation, 2).tolist() == [[False, True, False]]


@pytest.mark.parametrize("form", FORMS)
def test_without_a_channel_that_varies_the_map_is_zero(net, tiny, images, form):
    with torch.no_grad():
        tiny.convolutions[1].weight.zero_()
    found = scorecam(net, images, 1, form=form)["scorecam"]
    assert found[0].any()
    assert not found[1].any()
    assert not found[2].any()
    found = scorecam(net, images, [[1, 2], [0], []], form=form, stages=[3])["scorecam"][0]
    assert found.shape == (3, 2, 4, 4)
    assert not found.any()


def test_an_image_without_a_channel_beside_one_with_channels_gets_zeros(net, images):
    images = images.clone()
    images[1] = 0
    found = scorecam(net, images, 1, form="paper")["scorecam"]
    assert all(stage[0].any() and not stage[1].any() for stage in found)


def test_masks_span_zero_to_one_and_do_not_depend_on_the_unit(generator):
    channels = torch.rand(3, 3, 5, generator=generator, dtype=torch.float64)
    masks = channel_masks(channels, (9, 20))
    assert masks.shape == (3, 9, 20)
    assert torch.equal(masks.amin((1, 2)), torch.zeros(3).double())
    assert torch.equal(masks.amax((1, 2)), torch.ones(3).double())
    torch.testing.assert_close(channel_masks(1e-30 * channels, (9, 20)), masks)


def test_a_function_of_the_output_gives_the_weights(net, images):
    expected = scorecam(net, images, 2)["scorecam"]
    found = scorecam(net, images, lambda scores: scores.softmax(1)[:, 2])
    assert found.class_ids is None
    for a, b in zip(found["scorecam"], expected):
        torch.testing.assert_close(a, b)


class _Head(nn.Module):
    def __init__(self, tiny, head):
        super().__init__()
        self.tiny, self.head = tiny, head

    def forward(self, x):
        return self.head(self.tiny(x))


def test_a_single_score_has_the_classes_one_and_zero(tiny, images):
    plain = staged(tiny)
    for net in (staged(_Head(tiny, lambda s: s[:, 1:2])), staged(_Head(tiny, lambda s: s[:, 1]))):
        for class_id, sign in ((1, 1), (0, -1)):
            found = scorecam(net, images, class_id)["scorecam"]

            def probability(scores, sign=sign):
                return (sign * scores[:, 1]).sigmoid()

            for a, b in zip(found, scorecam(plain, images, probability)["scorecam"]):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_networks_give_float32_maps(tiny, images, dtype, form):
    expected = scorecam(staged(tiny.float()), images.float(), 1, form=form)["scorecam"]
    found = scorecam(staged(tiny.to(dtype)), images.to(dtype), 1, form=form)["scorecam"]
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.03 * float(b.max()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_surrounding_grad_mode_does_not_matter(net, images, context):
    expected = scorecam(net, images, 1)["scorecam"]
    with context():
        found = scorecam(net, images.clone(), 1)["scorecam"]
    assert all(map(torch.equal, found, expected))
    assert not any(stage.requires_grad or stage.is_inference() for stage in found)


@pytest.mark.parametrize("training", [False, True])
def test_no_trace(tiny, images, training):
    tiny.train(training)
    tiny.fc.weight.grad = torch.ones_like(tiny.fc.weight)
    before, copies = _trace(tiny), images.clone()
    scorecam(staged(tiny), images, 1)
    assert _trace(tiny).keys() == before.keys()
    assert all(_same(a, b) for a, b in zip(_trace(tiny).values(), before.values()))
    assert torch.equal(images, copies)


def _same(a, b):
    return len(a) == len(b) and all(x is y or x == y for x, y in zip(_flat(a), _flat(b)))


def _flat(value):
    return [each for part in value for each in (_flat(part) if type(part) is tuple else [part])]


def test_no_trace_after_a_failure(tiny, images):
    before = _trace(tiny)
    calls = []

    def fail(scores):
        calls.append(len(scores))
        if len(calls) == 3:
            raise ZeroDivisionError
        return scores[:, 0]

    with pytest.raises(ZeroDivisionError):
        scorecam(staged(tiny), images, fail, batch_size=4)
    assert _trace(tiny) == before


def test_progress_is_shown_only_on_request_and_only_if_it_takes_long(net, images, capfd):
    scorecam(net, images, 1, progress=True)
    scorecam(net, images, 1)
    assert capfd.readouterr() == ("", "")


def test_result_says_how_it_was_made(net, images):
    maps = scorecam(net, images, 1, stages=[3], form="paper", channels=2)
    assert repr(maps) == "StageMaps(scorecam: (3, 4, 4))"
    assert maps.provenance["form"] == "paper"
    assert maps.provenance["channels"] == 2
    assert maps.stages == (3,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "softmax"}, r"expected `form` in \('released', 'paper'\), got 'softmax'"),
        ({"batch_size": 0}, "expected `batch_size` of at least 1, got 0"),
        ({"channels": 0}, "expected `channels` of at least 1, got 0"),
        ({"stages": [4]}, r"`stages` from 1 to 3 .* got \[4\]"),
        ({"class_ids": 4}, "expected classes from 0 to 3, got 4"),
        ({"class_ids": [1, 2]}, r"for 3 images, got 2"),
        ({"class_ids": lambda s: s}, r"one value per image \(3,\), got \(3, 4\)"),
        ({"class_ids": lambda s: s.sum()}, "got one for all; masked images run together"),
    ],
)
def test_bad_arguments_say_what_is_expected(net, images, arguments, message, untyped):
    with pytest.raises(ValueError, match=message):
        scorecam(net, images, **arguments)


def test_not_finite_scores_of_masked_images_are_named(net, images):
    def first_fine(scores):
        return scores[:, 1] if len(scores) == 3 else scores[:, 1] / 0

    with pytest.raises(ValueError, match="expected finite scores, got NaN or infinity"):
        scorecam(net, images, first_fine, batch_size=2)
