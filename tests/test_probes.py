import statistics

import pandas as pd
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.explain import stage_maps
from attnviz.probes import gradient_variance, occlude, occlusion_scores, occlusion_table
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64)


@pytest.fixture
def maps(generator):
    return torch.rand(6, 16, 16, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------- occlusion


def test_places_from_70_percent_of_the_maximum_are_covered(net):
    images = torch.ones(2, 3, 16, 16, dtype=torch.float64)
    maps = torch.zeros(2, 16, 16, dtype=torch.float64)
    maps[0, 2, 3], maps[0, 4, 5], maps[0, 6, 7] = 10.0, 7.0, 6.99
    covered = occlude(net, images, maps)
    assert (covered[0] == 0).all(dim=0).nonzero().tolist() == [[2, 3], [4, 5]]
    assert torch.equal(covered[1], images[1])  # a zero map covers nothing
    assert images.min() == 1  # the argument is as before


def test_maps_of_a_stage_are_resized_first(net):
    maps = torch.zeros(1, 4, 4, dtype=torch.float64)
    maps[0, 1, 2] = 1.0
    covered = occlude(net, torch.ones(1, 3, 16, 16, dtype=torch.float64), maps)[0, 0] == 0
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 9:11] = expected[5:7, 8:12] = True  # 5/8 of 7/8 and more, so not the corners
    assert torch.equal(covered, expected)


def test_fillings_are_in_the_unit_of_the_network(net):
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator())
    everywhere = torch.ones(1, 16, 16, dtype=torch.float64)
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in (net.mean, net.std))
    for fill, value in (("mean", mean), ("grey", torch.full_like(mean, 0.5)), ("black", 0 * mean)):
        found = occlude(net, images, everywhere, fill=fill)
        pixels = found[0, :, 3, 4] * std + mean
        torch.testing.assert_close(pixels, value)
        assert found.std(dim=(2, 3)).max() < 1e-12


def test_blur_keeps_a_constant_image_and_the_mean_of_a_point_far_from_the_border(net):
    everywhere = torch.ones(1, 32, 32, dtype=torch.float64)
    constant = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    torch.testing.assert_close(occlude(net, constant, everywhere, fill="blur"), constant)
    point = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    point[:, 1, 16, 15] = 1.0
    blurred = occlude(net, point, everywhere, fill="blur")
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), point.sum(dim=(2, 3)))
    torch.testing.assert_close(blurred[0, 1], blurred[0, 1].flip(1).roll(-1, 1))
    assert blurred[0, 1, 16, 15] == blurred.max()
    spread = (blurred[0, 1].sum(0) * (torch.arange(32) - 15) ** 2).sum()
    assert spread.sqrt().item() == pytest.approx(3.2, rel=0.02)


def test_table_holds_ranks_and_softmax_before_and_after(net, images, maps):
    class_ids = [0, 1, 2, 3, 0, 1]
    ids = [f"image{n}" for n in range(6)]
    table = occlusion_table(net, images, class_ids, maps, image_ids=ids)
    for suffix, shown in (("", images), ("_covered", occlude(net, images, maps))):
        scores = net(shown).detach()
        for row, class_id in enumerate(class_ids):
            own = table.loc[ids[row]]
            assert own[f"rank{suffix}"] == (scores[row] > scores[row, class_id]).sum()
            confidence = scores[row].softmax(0)[class_id].item()
            assert own[f"confidence{suffix}"] == pytest.approx(confidence)
    share = (maps / maps.amax((1, 2), keepdim=True) >= 0.7).double().mean((1, 2))
    assert table["area"].tolist() == pytest.approx(share.tolist())
    assert table["class_id"].tolist() == class_ids


def test_only_images_classified_right_are_covered_and_both_shares_are_given():
    table = pd.DataFrame(
        {
            "rank": [0, 0, 0, 3, 9],
            "confidence": [0.9, 0.8, 0.7, 0.1, 0.0],
            "rank_covered": [0, 2, 7, 0, 0],
            "confidence_covered": [0.6, 0.3, 0.0, 0.9, 0.9],
        }
    )
    scores = occlusion_scores(pd.concat([table[:2], table[2:].reset_index(drop=True)]))
    expected = {
        ("correct", "original"): (3, 1.0, 1.0, 0.8),
        ("correct", "covered"): (3, 1 / 3, 2 / 3, 0.3),
        ("all", "original"): (5, 3 / 5, 4 / 5, 0.5),
        ("all", "covered"): (5, 1 / 5, 3 / 5, 0.2),  # the last two stay as they were
    }
    assert list(scores.columns) == ["images", "top1", "top5", "confidence"]
    for key, row in expected.items():
        assert scores.loc[key].tolist() == pytest.approx(row)


def test_without_an_image_classified_right_its_shares_are_nan(net, images, maps):
    worst = net(images).argmin(1)
    scores = occlusion_scores(occlusion_table(net, images, worst, maps))
    assert scores.loc[("correct", "covered"), "images"] == 0
    assert scores.loc["correct", "top1"].isna().all()
    assert scores.loc["all", "top1"].tolist() == [0, 0]


def test_covering_what_the_network_uses_lowers_its_confidence_more_than_covering_the_rest():
    model = nn.Sequential(  # class 1: how much red there is, anywhere
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 2, bias=False),
    )  # fmt: skip
    weights = torch.eye(2)
    model[0].weight.data = torch.cat([weights, torch.zeros(2, 1)], 1)[:, :, None, None]
    model[4].weight.data = 50 * weights.flip(0)
    net = staged(model, ["1"], image_size=16)
    images = torch.zeros(1, 3, 16, 16)
    images[0, 0, 4:8, 4:8] = 1.0
    maps = stage_maps(net, images, 1)["layercam"][0]
    used = occlusion_table(net, images, [1], maps)
    rest = occlusion_table(net, images, [1], maps.max() - maps)
    assert used["confidence_covered"].item() == pytest.approx(0.5)
    assert rest["confidence_covered"].item() == pytest.approx(used["confidence"].item())


# ----------------------------------------------------------------------------------- gradients


def _by_hand(model, images, class_ids):
    activations, x = [], images
    for index, (convolution, relu) in enumerate(zip(model.convolutions, model.relus)):
        x = relu(convolution(model.pool(x) if index else x))
        activations.append(x)
    picked = model.fc(x.mean((2, 3)))[range(len(images)), class_ids].sum()
    return activations, torch.autograd.grad(picked, activations)


def test_variance_equals_its_definition_place_by_place(net, tiny, images):
    class_ids = [0, 1, 2, 3, 0, 1]
    table = gradient_variance(net, images, class_ids).set_index(["method", "stage", "channel"])
    activations, gradients = _by_hand(tiny, images, class_ids)
    for stage, (activation, gradient) in enumerate(zip(activations, gradients), start=1):
        for channel in range(gradient.shape[1]):
            plain, weighted = [], []
            for A, g in zip(activation[:, channel].detach(), gradient[:, channel]):
                flat = g.flatten().tolist()
                total = A.sum().item()
                alpha = [v**2 / (2 * v**2 + total * v**3) if v > 0 else 0 for v in flat]
                plain.append(statistics.pvariance(flat))
                weights = [a * max(v, 0) for a, v in zip(alpha, flat)]
                weighted.append(statistics.pvariance(weights))
            for method, values in (("gradcam", plain), ("gradcam_pp", weighted)):
                found = table.loc[(method, stage, channel), "variance"]
                expected = sum(values) / len(values)
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_with_average_pooling_the_deepest_gradient_is_even(net, images):
    table = gradient_variance(net, images)
    deepest = table.query("method == 'gradcam' and stage == 3")
    assert deepest["variance"].max() < 1e-30
    assert deepest["relative"].max() < 1e-20
    shallow = table.query("method == 'gradcam' and stage == 1")
    assert shallow["relative"].min() > 0.5  # most places lost the max-pooling
    assert table["relative"].dropna().between(0, 1).all()


def test_channel_without_gradient_has_no_relative_variance(net, tiny, images):
    tiny.fc.weight.data[:, 2] = 0
    row = gradient_variance(net, images, 1, stages=[3]).query("channel == 2")
    assert row["variance"].tolist() == [0, 0]
    assert row["relative"].isna().all()


def test_the_unit_of_the_score_changes_the_variance_but_not_the_relative_one(net, tiny, images):
    before = gradient_variance(net, images, 1).query("method == 'gradcam'")
    tiny.fc.weight.data *= 10
    after = gradient_variance(net, images, 1).query("method == 'gradcam'")
    assert after["variance"].tolist() == pytest.approx((100 * before["variance"]).tolist())
    assert after["relative"].tolist() == pytest.approx(before["relative"].tolist(), abs=1e-12)


# -------------------------------------------------------------------------------------- traces


def test_no_trace_is_left_on_the_model(net, tiny, images, maps):
    tiny.train()
    before = _trace(tiny)
    with torch.no_grad():
        gradient_variance(net, images)
        occlusion_table(net, images, [0] * 6, maps)
    with pytest.raises(ValueError, match="classes from 0 to 3"):
        gradient_variance(net, images, 4)
    assert _trace(tiny) == before


def test_bad_arguments_say_what_is_expected(net, tiny, images, maps, untyped):
    with pytest.raises(ValueError, match=r"`threshold` in \(0, 1\], got 0"):
        occlude(net, images, maps, 0)
    with pytest.raises(ValueError, match=r"`fill` in \('mean', .*\), got 'white'"):
        occlude(net, images, maps, fill="white")
    with pytest.raises(ValueError, match="one map per image, got 2 for 6"):
        occlude(net, images, maps[:2])
    with pytest.raises(ValueError, match=r"6 classes in `class_ids`, got \(2,\)"):
        gradient_variance(net, images, [0, 1])
    with pytest.raises(ValueError, match="classes from 0 to 3, got -1"):
        gradient_variance(net, images, [0, 1, 2, 3, 0, -1])
    with pytest.raises(ValueError, match="classes from 0 to 3, got 7"):
        occlusion_table(net, images, [0, 1, 2, 3, 0, 7], maps)
    with pytest.raises(ValueError, match="expected 6 classes in `class_ids`, got"):
        occlusion_table(net, images, [0, 1], maps)
    tiny.fc = nn.Linear(6, 1).double()
    with pytest.raises(ValueError, match=r"scores \(6, classes\), got \(6, 1\)"):
        gradient_variance(staged(tiny), images)
