"""Attention, accumulation, gate, drop layer and integral losses, each re-derived here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, interpolate

from attnviz import oaa


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


# -------------------------------------------------------------------------------- accumulation


def test_attention_is_the_positive_part_over_its_peak():
    class_maps = torch.tensor([[[[-2.0, 1.0], [4.0, 0.0]], [[-1.0, -3.0], [-0.5, 0.0]]]])
    expected = torch.tensor([[[[0.0, 0.25], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert torch.equal(oaa.attention(class_maps), expected)


def test_attention_does_not_depend_on_the_unit(generator):
    class_maps = torch.randn(3, 4, 5, 6, generator=generator)
    reference = oaa.attention(class_maps)
    for unit in (2.0**-100, 2.0**60):
        assert torch.equal(oaa.attention(class_maps * unit), reference)
    assert torch.equal(reference.amax((2, 3)), torch.ones(3, 4))


@given(st.permutations(range(5)), st.integers(0, 4))
def test_maximum_of_any_order_with_repeats_is_the_largest_value(order, repeated):
    maps = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1))
    accumulated = torch.zeros(2, 3)
    for i in [*order, repeated]:
        grown = oaa.accumulate_max(accumulated, maps[i])
        assert (grown >= accumulated).all()
        accumulated = grown
    assert torch.equal(accumulated, maps.amax(0))


def test_running_mean_is_the_mean_of_what_was_accepted(generator):
    maps = torch.rand(6, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    accepted = torch.rand(6, 2, 3, generator=generator) < 0.6
    accumulated, count = torch.zeros(2, 3, 4, 4).double(), torch.zeros(2, 3, dtype=torch.long)
    for visit in range(6):
        grown = oaa.accumulate_mean(accumulated, maps[visit], count)
        accumulated = torch.where(accepted[visit][..., None, None], grown, accumulated)
        count += accepted[visit]
    for image in range(2):
        for class_id in range(3):
            kept = [maps[t, image, class_id] for t in range(6) if accepted[t, image, class_id]]
            expected = sum(kept) / len(kept) if kept else torch.zeros(4, 4).double()
            torch.testing.assert_close(accumulated[image, class_id], expected)


def test_mean_of_one_third_and_two_thirds_by_hand():
    first = oaa.accumulate_mean(torch.zeros(1, 1), torch.tensor([[0.9]]), 0)
    second = oaa.accumulate_mean(first, torch.tensor([[0.3]]), 1)
    third = oaa.accumulate_mean(second, torch.tensor([[0.0]]), 2)
    assert [round(m.item(), 6) for m in (first, second, third)] == [0.9, 0.6, 0.4]


def test_gate_takes_labels_among_the_highest_scores():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]).bool()
    # two labels: ranks 0 and 2; one label of rank 1; two labels in a tie, of ranks 1 and 2
    expected = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    assert torch.equal(oaa.accepts(scores, labels), expected)
    assert torch.equal(oaa.accepts(scores.sigmoid(), labels), expected)


@given(st.integers(0, 10_000))
@settings(max_examples=50)
def test_gate_equals_counting_the_higher_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (3, 6), generator=generator).float()  # with ties
    labels = torch.rand(3, 6, generator=generator) < 0.4
    for image in range(3):
        for c in range(6):
            own = scores[image, c]
            higher = sum(bool(s > own) for s in scores[image])
            higher += sum(bool(s == own) for s in scores[image, :c])
            expected = bool(labels[image, c]) and higher < int(labels[image].sum())
            assert bool(oaa.accepts(scores, labels)[image, c]) is expected


def test_an_image_with_all_labels_accepts_all_and_one_without_none():
    scores = torch.tensor([[0.3, -1.0, 2.0], [0.3, -1.0, 2.0]])
    labels = torch.tensor([[True] * 3, [False] * 3])
    assert torch.equal(oaa.accepts(scores, labels), labels)


def test_accumulation_starts_after_the_first_pass():
    # the released Caffe layer ignores its first 10,582 calls, one image each
    assert [oaa.started(seen, 10_582) for seen in (0, 10_581, 10_582)] == [False, False, True]
    assert oaa.started(0, 10_582, passes=0)
    assert [oaa.started(seen, 10, passes=1.5) for seen in (14, 15)] == [False, True]


# ----------------------------------------------------------------------------------------- flip


@pytest.mark.parametrize("width", [296, 304])
def test_mirroring_back_is_exact_where_the_stride_divides_the_width(width, generator):
    images = torch.rand(1, 3, 16, width, generator=generator, dtype=torch.float64)
    there = avg_pool2d(images.flip(-1), 8).flip(-1)
    torch.testing.assert_close(there, avg_pool2d(images, 8), rtol=0, atol=1e-15)


def test_mirroring_back_at_width_300_shifts_the_grid_by_the_rest(generator):
    # 37 cells of 8 pixels leave out 4 pixels on the right, or, mirrored, on the left
    images = torch.rand(1, 3, 16, 300, generator=generator, dtype=torch.float64)
    there = avg_pool2d(images.flip(-1), 8).flip(-1)
    torch.testing.assert_close(there, avg_pool2d(images[..., 4:], 8), rtol=0, atol=1e-15)
    assert (there - avg_pool2d(images, 8)).abs().max() > 0.01


# ----------------------------------------------------------------------------------- drop layer


def test_drop_mask_is_the_union_over_the_labels(generator):
    attention = torch.rand(3, 4, 5, 6, generator=generator)
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    mask = oaa.drop_mask(attention, labels, (40, 48), threshold=0.7)
    for image in range(3):
        union = torch.zeros(40, 48, dtype=torch.bool)
        for c in labels[image].nonzero().flatten().tolist():
            one = interpolate(attention[None, None, image, c], size=(40, 48), mode="bilinear")
            union |= one[0, 0] > 0.7
        assert torch.equal(mask[image], union)
    assert mask[0].any()
    assert not mask[0].all()
    assert not mask[1].any()


def test_drop_mask_needs_more_than_the_threshold():
    attention = torch.tensor([[[[0.5, 0.75], [0.25, 1.0]]]])
    mask = oaa.drop_mask(attention, torch.tensor([[True]]), (2, 2), threshold=0.75)
    assert mask.int().tolist() == [[[0, 0], [0, 1]]]


def test_drop_zeroes_all_channels_inside_the_mask_of_its_own_image_only(generator):
    x = torch.rand(3, 2, 4, 5, generator=generator) + 1
    mask = torch.rand(3, 4, 5, generator=generator) < 0.5
    before, before_mask = x.clone(), mask.clone()
    dropped = oaa.drop(x, mask, rate=1.0, generator=generator)
    for image in range(3):
        for channel in range(2):
            kept = torch.where(mask[image], torch.zeros(4, 5), x[image, channel])
            assert torch.equal(dropped[image, channel], kept)
    assert torch.equal(x, before)
    assert torch.equal(mask, before_mask)
    assert torch.equal(oaa.drop(x, mask, rate=0.0, generator=generator), x)


def test_each_image_is_dropped_on_its_own_draw():
    x, mask = torch.ones(2000, 1, 1, 1), torch.ones(2000, 1, 1, dtype=torch.bool)
    dropped = oaa.drop(x, mask, 0.3, torch.Generator().manual_seed(0)).flatten() == 0
    draws = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped, draws < 0.3)
    assert abs(dropped.float().mean().item() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_drop_lets_no_gradient_through_the_mask(generator):
    x = torch.rand(1, 2, 3, 3, generator=generator, requires_grad=True)
    mask = torch.eye(3, dtype=torch.bool)[None]
    oaa.drop(x, mask, 1.0, generator).sum().backward()
    assert torch.equal(x.grad[0], (~mask).float().expand(2, 3, 3))


# ----------------------------------------------------------------------------- integral losses


# one image, two classes, two positions; the second class is absent
_MAPS = torch.tensor([[[[2.0, -1.0]], [[0.5, -3.0]]]], dtype=torch.float64)
_TARGET = torch.tensor([[[[0.8, 0.0]], [[0.0, 0.0]]]], dtype=torch.float64)


def test_thesis_loss_by_hand():
    q = [_sigmoid(x) for x in (2.0, -1.0, 0.5, -3.0)]
    first = -0.8 * math.log(q[0]) / 1 - math.log(1 - q[1]) / 1
    second = -(math.log(1 - q[2]) + math.log(1 - q[3])) / 2
    assert oaa.hybrid_loss(_MAPS, _TARGET).item() == pytest.approx(first + second, abs=1e-12)


def test_released_loss_by_hand():
    q = [_sigmoid(x) for x in (2.0, -1.0, 0.5, -3.0)]
    expected = -0.8 * math.log(q[0]) / 1 - sum(math.log(1 - each) for each in q[1:]) / 3
    loss = oaa.hybrid_loss(_MAPS, _TARGET, reduction="released")
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_soft_cross_entropy_by_hand():
    q = [_sigmoid(x) for x in (2.0, -1.0, 0.5, -3.0)]
    terms = [-0.8 * math.log(q[0]) - 0.2 * math.log(1 - q[0])]
    terms += [-math.log(1 - each) for each in q[1:]]
    loss = oaa.soft_cross_entropy(_MAPS, _TARGET)
    assert loss.item() == pytest.approx(sum(terms) / 2, abs=1e-12)  # 2 positions in each class
    loss = oaa.soft_cross_entropy(_MAPS, _TARGET, "released")
    assert loss.item() == pytest.approx(sum(terms) / 4, abs=1e-12)


def _replica(class_maps, target, threshold, reduction):
    """Eqs. 4.6 to 4.8 with loops."""
    total = 0.0
    images, classes, height, width = class_maps.shape
    for image in range(images):
        groups = [[c] for c in range(classes)]
        if reduction == "released":
            groups = [list(range(classes))]
        for group in groups:
            raised, lowered = [], []
            for c in group:
                for i in range(height):
                    for j in range(width):
                        p = target[image, c, i, j].item()
                        q = _sigmoid(class_maps[image, c, i, j].item())
                        if p > threshold:
                            raised.append(-p * math.log(q))
                        else:
                            lowered.append(-math.log(1 - q))
            total += sum(part and sum(part) / len(part) for part in (raised, lowered) if part)
    return total / images


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.001, 0.3]),
    st.sampled_from(["thesis", "released"]),
)
@settings(max_examples=60, deadline=None)
def test_hybrid_loss_equals_loops(seed, threshold, reduction):
    generator = torch.Generator().manual_seed(seed)
    class_maps = 3 * torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64)
    target = torch.rand(2, 3, 2, 3, generator=generator, dtype=torch.float64)
    target *= torch.rand(2, 3, 1, 1, generator=generator) < 0.6  # some classes are absent
    target[torch.rand(target.shape, generator=generator) < 0.3] = 0
    loss = oaa.hybrid_loss(class_maps, target, threshold, reduction)
    assert loss.item() == pytest.approx(_replica(class_maps, target, threshold, reduction))


@pytest.mark.parametrize("reduction", ["thesis", "released"])
def test_gradient_of_the_hybrid_loss_is_the_analytic_one(reduction, generator):
    # d/dx of -p log s(x) is -p (1 - q); of -log(1 - s(x)) it is q
    class_maps = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    target[target < 0.4] = 0
    class_maps.requires_grad_()
    oaa.hybrid_loss(class_maps, target, 0.0, reduction).backward()
    q, raised = class_maps.detach().sigmoid(), target > 0
    together = (2, 3) if reduction == "thesis" else (1, 2, 3)
    inside = raised.sum(together, keepdim=True)
    outside = (~raised).sum(together, keepdim=True)
    expected = torch.where(raised, -target * (1 - q) / inside, q / outside) / 2
    torch.testing.assert_close(class_maps.grad, expected)


def test_cross_entropy_is_least_at_the_target_itself():
    target = torch.tensor([[[[0.2, 0.9]]]], dtype=torch.float64)
    class_maps = target.logit().requires_grad_()
    oaa.soft_cross_entropy(class_maps, target).backward()
    torch.testing.assert_close(class_maps.grad, torch.zeros_like(target))


def test_hybrid_loss_never_lowers_weak_attention_but_cross_entropy_does():
    target = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64)
    class_maps = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)  # q = 0.5
    oaa.hybrid_loss(class_maps, target).backward()
    assert class_maps.grad.item() == pytest.approx(-0.1 * 0.5)
    class_maps.grad = None
    oaa.soft_cross_entropy(class_maps, target).backward()
    assert class_maps.grad.item() == pytest.approx(0.5 - 0.1)


def test_empty_sets_contribute_nothing():
    class_maps = torch.tensor([[[[2.0, -1.0]]]], dtype=torch.float64)
    nothing, everything = torch.zeros(1, 1, 1, 2).double(), torch.ones(1, 1, 1, 2).double()
    for reduction in ("thesis", "released"):
        assert oaa.enhancement_loss(class_maps, nothing, reduction=reduction) == 0
        assert oaa.constraint_loss(class_maps, everything, reduction=reduction) == 0
        lowered = oaa.constraint_loss(class_maps, nothing, reduction=reduction)
        assert oaa.hybrid_loss(class_maps, nothing, reduction=reduction) == lowered > 0


@pytest.mark.parametrize("loss", [oaa.hybrid_loss, oaa.soft_cross_entropy])
@pytest.mark.parametrize("reduction", ["thesis", "released"])
def test_the_loss_of_a_batch_is_the_mean_of_its_images(loss, reduction, generator):
    class_maps = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    target = torch.rand(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    target[target < 0.5] = 0
    parts = [loss(class_maps[i : i + 1], target[i : i + 1], reduction=reduction) for i in range(4)]
    torch.testing.assert_close(
        loss(class_maps, target, reduction=reduction), torch.stack(parts).mean()
    )


def test_losses_of_extreme_scores_stay_finite():
    class_maps = torch.tensor([[[[200.0, -200.0, 200.0, -200.0]]]], requires_grad=True)
    target = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    loss = oaa.hybrid_loss(class_maps, target)
    loss.backward()
    assert loss.item() == pytest.approx(200.0)  # (0 + 200) / 2 raised, (200 + 0) / 2 lowered
    assert class_maps.grad.isfinite().all()


def test_an_unknown_reduction_is_refused(untyped):
    with pytest.raises(ValueError, match=r"`reduction` in \('thesis', 'released'\), got 'mean'"):
        oaa.hybrid_loss(_MAPS, _TARGET, reduction="mean")
