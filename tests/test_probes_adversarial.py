import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.probes.adversarial import carlini_wagner, fgsm, pgd
from attnviz.stages import staged


def _linear(weights, biases):
    # Scores that are linear in a picture of one color; the stage is an identity on [0, 1].
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Flatten(),
                          nn.Linear(weights.shape[1], len(weights))).double()  # fmt: skip
    model[0].weight.data.fill_(1)
    model[3].weight.data, model[3].bias.data = weights, biases
    return staged(model, ["1"], image_size=4, mean=[0.0], std=[1.0])


@pytest.fixture
def net(tiny):
    return staged(tiny)


def _pixels(net, images):
    mean, std = (torch.tensor(p, dtype=images.dtype)[:, None, None] for p in (net.mean, net.std))
    return images * std + mean


@pytest.fixture
def images(net, generator):
    pixels = torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    mean, std = (torch.tensor(p, dtype=torch.float64)[:, None, None] for p in (net.mean, net.std))
    return (pixels - mean) / std


def test_carlini_wagner_on_a_linear_network_comes_near_the_smallest_distance(generator):
    weights = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    image = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    net = _linear(weights, torch.zeros(2, dtype=torch.float64))
    first, other = net(image)[0].topk(2).indices.tolist()
    normal = weights[other] - weights[first]
    smallest = -(normal @ image.flatten()) / normal.norm()  # to the plane of equal scores
    attack = carlini_wagner(net, image, [other], searches=8, steps=200, learning_rate=0.02)
    assert attack.success.item()
    assert attack.class_ids.item() == other
    assert smallest <= attack.distance.item() <= 1.02 * smallest
    moved = (attack.images - image).flatten()
    assert torch.cosine_similarity(moved, normal, dim=0) > 0.999
    # with a margin, the plane lies kappa further
    further = carlini_wagner(
        net, image, [other], confidence=0.5, searches=8, steps=200, learning_rate=0.02
    )
    margin = net(further.images)[0]
    assert margin[other] - margin[first] >= 0.5
    wanted = smallest + 0.5 / normal.norm()
    assert wanted <= further.distance.item() <= 1.02 * wanted


def test_carlini_wagner_reaches_every_class_within_the_range_of_pixels(net, images):
    worst = net(images).argmin(1)
    attack = carlini_wagner(net, images, worst, steps=150, learning_rate=0.05)
    assert attack.success.all()
    assert torch.equal(net(attack.images).argmax(1), worst)
    pixels = _pixels(net, attack.images)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    distance = (pixels - _pixels(net, images)).flatten(1).norm(dim=1)
    torch.testing.assert_close(attack.distance, distance)


def test_batch_equals_single_images(net, images):
    worst = net(images).argmin(1)
    settings = {"steps": 60, "searches": 2, "learning_rate": 0.05}
    together = pgd(net, images), carlini_wagner(net, images, worst, **settings)
    for row in range(4):
        one = images[row : row + 1]
        alone = pgd(net, one), carlini_wagner(net, one, worst[row : row + 1], **settings)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a.images[row : row + 1], b.images)


def test_an_attack_that_fails_returns_the_image_as_it_was(generator):
    weights = torch.zeros(2, 16, dtype=torch.float64)
    net = _linear(weights, torch.tensor([1.0, 0.0], dtype=torch.float64))
    image = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    attack = carlini_wagner(net, image, 1, steps=20, searches=2)
    assert not attack.success.item()
    assert attack.distance.item() == 0
    torch.testing.assert_close(attack.images, image)


def test_fgsm_moves_each_pixel_by_epsilon_along_the_sign_of_the_loss():
    weights = torch.zeros(2, 16, dtype=torch.float64)
    weights[0, :3], weights[1, 3:6] = 1.0, 2.0
    net = _linear(weights, torch.tensor([0.5, 0.0], dtype=torch.float64))
    image = torch.full((1, 1, 4, 4), 0.02, dtype=torch.float64)
    moved = (fgsm(net, image, 0, epsilon=0.1).images - image).flatten()
    # class 0 is left: its pixels fall, to black at most, those of class 1 rise
    expected = torch.zeros(16, dtype=torch.float64)
    expected[:3], expected[3:6] = -0.02, 0.1
    torch.testing.assert_close(moved, expected)
    back = (fgsm(net, image, 0, epsilon=0.1, targeted=True).images - image).flatten()
    expected[:3], expected[3:6] = 0.1, -0.02
    torch.testing.assert_close(back, expected)


def test_pgd_stays_within_epsilon_and_does_at_least_as_well_as_one_step(net, images):
    before = net(images)
    class_ids = before.argmax(1)
    losses = []
    for attack in (fgsm(net, images, epsilon=0.03), pgd(net, images, epsilon=0.03, step=0.01)):
        change = (_pixels(net, attack.images) - _pixels(net, images)).abs()
        assert change.max() <= 0.03 + 1e-12
        losses.append(nn.functional.cross_entropy(net(attack.images), class_ids))
    assert nn.functional.cross_entropy(before, class_ids) < losses[0] <= losses[1]


def test_the_start_of_pgd_follows_its_generator(net, images):
    found = [
        pgd(net, images, steps=1, generator=torch.Generator().manual_seed(seed)).images
        for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_trace_is_left(net, tiny, images):
    tiny.train()
    before = _trace(tiny)
    with torch.inference_mode():
        pgd(net, images)
        carlini_wagner(net, images, 1, steps=3, searches=1)
    with pytest.raises(ValueError, match="classes from 0 to 3, got 9"):
        fgsm(net, images, 9)
    assert _trace(tiny) == before


def test_bad_arguments_say_what_is_expected(net, images, untyped):
    with pytest.raises(ValueError, match="`steps` of at least 1, got 0.1, 0.1 and 0"):
        pgd(net, images, epsilon=0.1, step=0.1, steps=0)
    with pytest.raises(ValueError, match="`confidence` of at least 0, .* got -1"):
        carlini_wagner(net, images, 0, confidence=-1)
    with pytest.raises(ValueError, match="classes wanted in `class_ids`, got None"):
        carlini_wagner(net, images, None)
