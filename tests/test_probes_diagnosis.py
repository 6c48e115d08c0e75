import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.probes.diagnosis import attacked_channels, cover_evidence, failures
from attnviz.probes.occlusion import occlude
from attnviz.stages import staged
from attnviz.tree import evidence


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.3


def test_failures_are_the_wrong_answers_the_surest_first(net, images):
    labels = [0, 1, 2, 3, 0, 1]
    scores = net(images)
    table = failures(net, images, labels)
    expected = [i for i in range(6) if scores[i].argmax() != labels[i]]
    assert sorted(table["image"]) == expected
    assert 0 < len(expected)
    assert table["predicted_probability"].is_monotonic_decreasing
    for row in table.itertuples():
        found = scores[row.image].softmax(0)
        assert row.predicted_probability == pytest.approx(found.max().item(), rel=1e-5)
        assert row.class_probability == pytest.approx(found[labels[row.image]].item(), rel=1e-5)
    assert failures(net, images, scores.argmax(1)).empty


def _colors():
    # Class 0 is what is red, class 1 what is green.
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(3, 2, bias=False))  # fmt: skip
    model[0].weight.data = torch.eye(3)[:, :, None, None].clone()
    model[4].weight.data = 20 * torch.eye(3)[:2]
    return staged(model, ["1"], image_size=(8, 8), mean=[0.0] * 3, std=[1.0] * 3)


def test_covering_what_was_mistaken_gives_the_true_class():
    net = _colors()
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, :4, :4], image[0, 1, 6:, 6:] = 1.0, 1.0  # much red, some green
    tree = evidence(net, image)
    assert tree.class_id == 0
    table = cover_evidence(tree, 1)
    row = table.iloc[0]
    assert row["area"] == pytest.approx(16 / 64)
    assert row["before"] < 0.5 < row["after"]
    assert row["wrong_before"] == pytest.approx(1 - row["before"])
    assert row["wrong_after"] == pytest.approx(1 - row["after"])
    score = 20 * 4 / 64  # green alone is left
    assert row["after"] == pytest.approx(torch.tensor([0.0, score]).softmax(0)[1].item())
    assert row["predicted"] == 1


def test_each_row_equals_a_forward_of_the_covered_image(net, images):
    tree = evidence(net, images[:1])
    table = cover_evidence(tree, 2, threshold=0.6, batch_size=4)
    assert len(table) == len(tree.edges)
    assert table["after"].is_monotonic_decreasing
    edges = {(edge.parent, edge.child): edge for edge in tree.edges}
    for row in table.itertuples():
        edge = edges[row.parent, row.child]
        covered = occlude(net, images[:1], edge.map[None], 0.6)
        found = net(covered)[0].softmax(0)
        assert row.after == pytest.approx(found[2].item(), rel=1e-5)
        assert row.wrong_after == pytest.approx(found[tree.class_id].item(), rel=1e-5)
        assert row.share == edge.share


def test_an_attack_lowers_the_true_channels_and_raises_the_wanted_ones():
    net = _colors()
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0, :4, :4], images[:, 1, 6, 6] = 0.9, 0.2
    attacked = images.clone()
    attacked[:, 0, :4, :4], attacked[:, 1, 6, 6] = 0.3, 0.8
    table = attacked_channels(net, images, attacked, [0, 0], [1, 1], top=1)
    table = table.set_index(["image", "of"])
    for image in (0, 1):
        true, wanted = table.loc[(image, "true")], table.loc[(image, "wanted")]
        assert (true["channel"], wanted["channel"]) == (0, 1)
        assert true[["original", "attacked", "change"]].tolist() == pytest.approx([0.9, 0.3, -0.6])
        assert wanted[["original", "attacked", "change"]].tolist() == pytest.approx(
            [0.2, 0.8, 0.6]
        )


def test_channels_of_the_true_class_are_those_of_the_tree(net, images):
    ids = net(images).argmax(1)
    table = attacked_channels(net, images, images, ids, ids, top=2)
    assert table["change"].abs().max() == 0
    for image in range(6):
        tree = evidence(net, images[image : image + 1], int(ids[image]), 2, depth=1)
        rows = table.query(f"image == {image} and of == 'true'")
        assert rows["channel"].tolist() == [tree.nodes[e.child].channel for e in tree.edges]


def test_no_trace_is_left_and_bad_arguments_say_what_is_expected(net, tiny, images, untyped):
    tiny.train()
    before = _trace(tiny)
    tree = evidence(net, images[:1])
    cover_evidence(tree, 0)
    attacked_channels(net, images, images, [0] * 6, [1] * 6)
    with pytest.raises(ValueError, match="classes from 0 to 3, got 4"):
        cover_evidence(tree, 4)
    with pytest.raises(ValueError, match=r"shape of the originals, \(6, 3, .*got \(5, 3"):
        attacked_channels(net, images, images[:5], [0] * 6, [1] * 6)
    neuron = next(iter(tree.nodes.values())).neuron
    with pytest.raises(ValueError, match="evidence for a class, got that for a neuron"):
        cover_evidence(evidence(net, images[:1], neuron), 0)
    assert _trace(tiny) == before
