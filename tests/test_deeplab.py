"""Segmentation networks: where their cells lie, where their weights come from, what trains."""

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d
from torchvision import models

from attnviz.deeplab import SEGMENTATION_NETWORKS, load_segmentation, segmentation_network
from attnviz.networks import bundled_folder, load_network, oaa_network
from attnviz.training.runs import network_bytes

SMALL = ("scenes", "scenes_aspp", "squeezenet1_1", "mobilenet_v2", "largefov_resnet50")
BASE = torch.randn(40_000, generator=torch.Generator().manual_seed(3)) / 100


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {name: segmentation_network(name, 4, "random") for name in SMALL}


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A VGG16 as torchvision names it, whose fully connected layers share a little memory."""
    torch.manual_seed(1)
    layers = models.vgg.make_layers(models.vgg.cfgs["D"])
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    state["classifier.0.weight"] = BASE.as_strided((4096, 25088), (3, 1))
    state["classifier.3.weight"] = BASE.as_strided((4096, 4096), (5, 1))
    state["classifier.0.bias"], state["classifier.3.bias"] = BASE[:4096], BASE[1:4097]
    state["classifier.6.weight"], state["classifier.6.bias"] = BASE[:8].view(2, 4), BASE[:2]
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def vgg(vgg_file):
    return segmentation_network("largefov_vgg16", 4, vgg_file).eval()


def _averaging(module):
    # The same geometry, but every cell depends on all it can see, and positively.
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
            setattr(module, name, pool)
        elif isinstance(child, nn.BatchNorm2d | nn.Dropout):
            setattr(module, name, nn.Identity())
        elif isinstance(child, nn.Conv2d):
            child.weight.data.fill_(1 / child.weight[0].numel())
        else:
            _averaging(child)
    return module


# ----------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("name", SMALL)
def test_scores_have_one_cell_per_stride(networks, name):
    network = networks[name].eval()
    height, width = network.fitting(60), network.fitting(100)
    with torch.no_grad():
        shape = network(torch.rand(1, 3, height, width)).shape
    cells = [(side - network.cornered) // network.stride + network.cornered
             for side in (height, width)]  # fmt: skip
    assert shape == (1, 5, *cells)
    assert network.fitting(height) == height
    assert 60 <= height < 60 + network.stride


def test_thesis_views_and_windows_give_whole_cells(vgg):
    assert [vgg.fitting(side) for side in (321, 401)] == [321, 401]
    with torch.no_grad():
        assert vgg(torch.rand(1, 3, 65, 81)).shape == (1, 5, 9, 11)


@pytest.mark.parametrize(("name", "side"), [("scenes", 208), ("squeezenet1_1", 401)])
def test_cells_lie_where_enlarging_supposes_them(name, side):
    network = _averaging(segmentation_network(name, 2, "random")).eval()
    images = torch.ones(1, 3, side, side, requires_grad=True)
    scores = network(images)
    cell = scores.shape[2] // 2
    scores[0, :, cell, cell].sum().backward()
    seen = images.grad[0].abs().sum(dim=(0, 1)).nonzero()[:, 0]
    assert 0 < seen[0] < seen[-1] < side - 1  # the border cuts nothing off
    first = 0 if network.cornered else (network.stride - 1) / 2
    assert (seen[0] + seen[-1]).item() / 2 == first + cell * network.stride


def test_enlarged_scores_keep_their_values_at_the_cells_centers(networks):
    scores = torch.randn(2, 5, 6, 9)
    large = networks["squeezenet1_1"].enlarged(scores, (41, 65))
    torch.testing.assert_close(large[..., ::8, ::8], scores)
    ramp = (torch.arange(7.0) * 8 + 3.5).expand(1, 1, 3, 7)  # each cell's center, in pixels
    large = networks["scenes"].enlarged(ramp, (24, 56))[0, 0, 5]
    torch.testing.assert_close(large[4:52], torch.arange(4.0, 52.0))


def test_zero_is_the_mean_color(networks):
    network = networks["mobilenet_v2"]
    color = torch.tensor([round(255 * part) for part in network.mean], dtype=torch.uint8)
    values = network.normalized(color.view(1, 3, 1, 1))
    assert values.abs().max() < 0.5 / 255 / min(network.std) + 1e-6


# ------------------------------------------------------------------------------------ layers


def test_vgg16_equals_a_replica_of_deeplabs_layers(vgg, vgg_file):
    state = torch.load(vgg_file, weights_only=True)
    x = images = torch.rand(1, 3, 33, 41)
    for stage, layers in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        for layer in layers:
            weight, bias = (state[f"features.{layer}.{part}"] for part in ("weight", "bias"))
            d = 2 if stage == 4 else 1
            x = conv2d(x, weight, bias, padding=d, dilation=d).relu()
        x = max_pool2d(x, 3, stride=2 if stage < 3 else 1, padding=1)
    x = avg_pool2d(x, 3, stride=1, padding=1)
    first = torch.empty(1024, 512, 3, 3)
    for y in range(3):
        for column in range(3):
            # output 4j, input c, place (3y, 3x) of 7 x 7 in the file's layout
            start = 3 * y * 7 + 3 * column
            first[:, :, y, column] = BASE[
                start + 12 * torch.arange(1024)[:, None] + 49 * torch.arange(512)
            ]
    second = BASE[20 * torch.arange(1024)[:, None] + 4 * torch.arange(1024)]
    x = conv2d(x, first, BASE[:4096:4], padding=12, dilation=12).relu()
    x = conv2d(x, second[:, :, None, None], BASE[1:4097:4]).relu()
    score = vgg.head.score
    x = conv2d(x, score.weight, score.bias)
    with torch.no_grad():
        torch.testing.assert_close(vgg(images), x, rtol=1e-4, atol=1e-5)
    assert x.std() > 0


def test_pyramid_is_the_sum_of_four_dilated_views():
    network = segmentation_network("aspp_resnet101", 4, "random").eval()
    features = torch.randn(1, 2048, 5, 6)
    layers = dict(network.head.named_parameters())
    expected = 0
    for branch, rate in enumerate((6, 12, 18, 24)):
        weight, bias = (layers[f"branches.{branch}.{part}"] for part in ("weight", "bias"))
        assert not bias.any()
        assert weight.std().item() == pytest.approx(0.01, rel=0.02)
        expected = expected + conv2d(features, weight, bias + branch, padding=rate, dilation=rate)
        bias.data += branch
    with torch.no_grad():
        torch.testing.assert_close(network.head(features), expected)


def test_scenes_starts_as_the_bundled_classifier():
    network = segmentation_network("scenes", 12)
    plain = load_network("scenes_conv").model
    ours = [p for p in network.backbone.state_dict().values()]
    theirs = [v for k, v in plain.state_dict().items() if k.startswith("stage")]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert network.provenance["weights"] == "scenes_conv.safetensors"


# -------------------------------------------------------------------------- what trains, and how


def test_only_layers_without_pretrained_weights_are_new(vgg, networks):
    assert {id(p) for p in vgg.new_parameters()} == {id(p) for p in vgg.head.score.parameters()}
    resnet = networks["largefov_resnet50"]
    assert {id(p) for p in resnet.new_parameters()} == {id(p) for p in resnet.head.parameters()}
    for network in (vgg, *networks.values()):
        old, new = ({id(p) for p in part} for part in
                    (network.old_parameters(), network.new_parameters()))  # fmt: skip
        assert not old & new
        assert old | new == {id(p) for p in network.parameters() if p.requires_grad}


def test_pretrained_normalization_stays_as_it_is(networks):
    network = networks["largefov_resnet50"].train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53
    assert not any(norm.training for norm in norms)
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert network.head.training
    assert all(m.training for m in networks["scenes"].train().modules())


# -------------------------------------------------------------------------------------- files


def test_trained_network_comes_back_from_its_file(networks, tmp_path):
    network = networks["scenes"].eval()
    names = ["a", "b", "c", "d"]
    path = tmp_path / "network.safetensors"
    path.write_bytes(network_bytes(network.state_dict(), network.metadata(names)))
    images = torch.rand(1, 3, 48, 48)
    for place in (path, tmp_path):
        loaded = load_segmentation(place)
        assert torch.equal(loaded(images), network(images))
        assert not loaded.training
        assert loaded.class_names == tuple(names)
        assert loaded.provenance["init"] == "random"
    with pytest.raises(ValueError, match="expected weights that fit scenes with 3 classes"):
        segmentation_network("scenes", 3, path)


def test_classifier_of_chapter_4_is_something_to_start_from(tmp_path):
    classifier = oaa_network("scenes", 3, "random")
    path = tmp_path / "network.safetensors"
    path.write_bytes(network_bytes(classifier.state_dict(), classifier.metadata()))
    network = segmentation_network("scenes", 3, path)
    first = next(iter(network.backbone.parameters()))
    assert torch.equal(first, next(iter(classifier.backbone.parameters())))


def test_what_is_no_network_says_so(tmp_path):
    with pytest.raises(ValueError, match="expected `name` in .*'largefov_vgg16'.*, got 'unet'"):
        segmentation_network("unet", 3)
    with pytest.raises(ValueError, match="expected `class_count` from 1 to 254, got 255"):
        segmentation_network("scenes", 255)
    with pytest.raises(FileNotFoundError, match="which is not there; finish its run"):
        load_segmentation(tmp_path)
    bundled = bundled_folder() / "networks" / "scenes_fc.safetensors"
    with pytest.raises(ValueError, match="expected the network of a run of `attnviz train seg"):
        load_segmentation(bundled)
    assert len(SEGMENTATION_NETWORKS) == 8
