import math

import numpy as np
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.probes.pearson import (
    agreement,
    channel_means,
    contribution_curves,
    decompositions,
    overlap_counts,
    pearson_table,
)
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.3


def _below(model, activation, stage):
    # What follows a stage: the activation of the next one and the scores, by hand.
    deeper = None
    x = activation
    for index in range(stage, 3):
        x = model.relus[index](model.convolutions[index](model.pool(x)))
        deeper = x if deeper is None else deeper
    return deeper, model.fc(x.mean((2, 3)))


def test_effects_equal_a_loop_over_channels(net, tiny, images):
    records = decompositions(net, images[:1], 1, fills=["spatial_mean"], top=2)
    activations = net.activations(images[:1])[0]
    for record in records:
        activation = activations[record.stage - 1]
        before, whole = _below(tiny, activation, record.stage)
        for channel in range(activation.shape[1]):
            changed = activation.clone()
            changed[0, channel] = activation[0, channel].mean()
            deeper, output = _below(tiny, changed, record.stage)
            fall = whole[0, 1] - output[0, 1]
            if record.decision != "class":
                unit, place = record.decision.split("@")
                place = (int(unit.split(":")[1]), *map(int, place.split(",")))
                fall = before[0][place] - deeper[0][place]
            found = record.effects["spatial_mean"][channel].item()
            assert found == pytest.approx(fall.item(), abs=1e-12)


def test_on_average_pooling_removal_by_zero_is_the_contribution_and_by_the_mean_nothing(
    net, images
):
    records = list(decompositions(net, images))
    top = [record for record in records if record.stage == 3]
    assert [record.decision for record in top] == ["class"] * 4
    for record in top:
        expected = record.scores["AA"] * 16  # the mean over 4 x 4 places
        torch.testing.assert_close(record.effects["zero"], expected)
    table = agreement(records).query("step == 'T->S3' and score == 'AA'")
    assert table.query("fill == 'zero'")["pearson"].tolist() == pytest.approx([1.0] * 4)
    assert table.query("fill == 'spatial_mean'")["pearson"].isna().all()
    assert table.query("fill == 'dataset_mean'")["pearson"].notna().all()


def test_correlations_equal_numpys_and_are_averaged_by_image(net, images):
    records = list(decompositions(net, images, [0, 1, 2, 3], fills=["zero"], top=2))
    table = agreement(records)
    assert len(table) == 4 * len(records)
    named = table.set_index(["image", "step", "decision", "score"])["pearson"]
    for record in records:
        for score, values in record.scores.items():
            effect = record.effects["zero"]
            found = named[(record.image, record.step, record.decision, score)]
            if effect.abs().max() > 1e-6 * abs(record.value):
                assert found == pytest.approx(np.corrcoef(values, effect)[0, 1])
    wide = pearson_table(table)
    assert list(wide.columns) == ["T->S3", "S3->S2", "S2->S1"]
    chosen = table.query("score == 'MA' and step == 'S2->S1'")
    means = [part["pearson"].mean() for _, part in chosen.groupby("image")]
    assert wide.loc[("zero", "MA"), "S2->S1"] == pytest.approx(np.nanmean(means))


def test_every_node_of_the_tree_is_a_decision_at_most_so_many(net, images):
    from attnviz.tree import evidence

    records = list(decompositions(net, images[:1], 1, fills=["zero"], top=3))
    tree = evidence(net, images[:1], 1, 3)
    for stage in (1, 2):
        decided = [record.decision for record in records if record.stage == stage]
        assert decided == [n.id for n in tree.nodes.values() if n.stage == stage + 1]
    few = decompositions(net, images[:1], 1, fills=["zero"], top=3, most=2)
    assert [record.stage for record in few] == [3, 2, 2, 1, 1]


def test_dataset_mean_is_over_images_and_positions(net, images):
    means = channel_means(net, images.split(3))
    for stage, activation in enumerate(net.activations(images)[0]):
        torch.testing.assert_close(means[stage], activation.mean((0, 2, 3)).detach())
    own = list(decompositions(net, images[:2], 0, fills=["dataset_mean"], means=means))
    weight = net.model.fc.weight[0].detach()
    expected = weight * (net.activations(images[:1])[0][2][0].mean((1, 2)) - means[2]).detach()
    torch.testing.assert_close(own[0].effects["dataset_mean"], expected)


def test_curves_are_the_mean_of_sorted_shares_and_agree_where_the_head_averages(net, images):
    records = list(decompositions(net, images, fills=["zero"]))
    curves = contribution_curves(records).set_index(["stage", "rank"])
    for stage, width in ((1, 4), (2, 5), (3, 6)):
        chosen = [record for record in records if record.stage == stage]
        for name, kind in (("gap", "AA"), ("removal", "zero")):
            total = np.zeros(width)
            for record in chosen:
                source = record.scores if kind == "AA" else record.effects
                values = sorted(source[kind].tolist(), reverse=True)
                positive = sum(v for v in values if v > 0)
                total += [v / positive if positive else 0 for v in values]
            assert curves.loc[stage, name].tolist() == pytest.approx(list(total / len(chosen)))
    top = curves.loc[3]
    assert top["gap"].tolist() == pytest.approx(top["removal"].tolist())


def test_counts_of_active_and_overlapping_channels_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2, bias=False),
    )  # fmt: skip
    # channels 0 and 1 light up where it is bright, 2 where it is dark, 3 is closed
    model[0].weight.data = torch.tensor([1.0, 2.0, -1.0, 0.0])[:, None, None, None]
    model[4].weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]])
    image = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]])
    net = staged(model, ["1"], image_size=2)
    for class_id, active in ((0, 3), (1, 2)):
        [record] = decompositions(net, image, class_id, fills=["zero"])
        counts = overlap_counts([record]).iloc[0]
        assert counts.tolist() == [1, active, 1, 4]


def test_no_trace_is_left(net, tiny, images):
    tiny.train()
    before = _trace(tiny)
    with torch.inference_mode():
        list(decompositions(net, images[:1], fills=["zero"]))
    assert _trace(tiny) == before


def test_bad_arguments_say_what_is_expected(net, images, untyped):
    with pytest.raises(ValueError, match=r"`fills` in \('zero', .*\), got \['mean'\]"):
        next(decompositions(net, images, fills=["mean"]))
    with pytest.raises(ValueError, match="expected images, got none"):
        channel_means(net, [])
    assert math.isnan(
        agreement(decompositions(net, images[:1], 0, fills=["spatial_mean"]))["pearson"][0]
    )
