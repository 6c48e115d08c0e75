import io
import re
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import rc_context
from matplotlib.text import Text
from PIL import Image

from attnviz.data.folder import load_folder
from attnviz.data.masks import voc_colors
from attnviz.data.scenes import CLASS_NAMES, Scenes
from attnviz.data.surface import load_magnetic_tile
from attnviz.explain import stage_maps
from attnviz.figures import (
    Example,
    attention,
    decomposition,
    figure_names,
    make_figure,
    map_grid,
    stage_grid,
)
from attnviz.localize import box_iou, map_to_box
from attnviz.networks import load_network
from attnviz.probes import gradient_variance
from attnviz.stages import staged
from attnviz.tree import evidence

NUMBERS = [number for number, _ in figure_names()]
EXPECTED = {
    "1.1": {"class label, 1 s", "box, 10 s", "pixel mask, 78 s", "1 × 78 s = 78 s"},
    "1.2": {"picture", "network", "predicts\n“deer”", "attention map\nof “deer”"},
    "1.3": {"picture", "stage 5 map", "above half", "object", "deer", "fire engine", "steamer"},
    "1.4": {"LayerCAM (chapter 3)", "OAA (chapter 4)", "gAP (chapter 5)", "difficulty", "use"},
    "2.1": {"picture", "average\nover places", "linear layer\n$w_k$", "96 feature maps $A^k$"},
    "2.2": {"(a) backpropagation", "(b) class activation maps", "(c) perturbation"},
    "2.3": {"deer", "ox", "steamer", "fire engine"},
    "2.4": {"deer", "ox", "ram"},
    "2.5": {"picture", "true mask", "horse, lightship", "horse, fire engine"},
    "3.1": {"Grad-CAM", "LayerCAM", "stage 3", "stage 5", "class\n“horse”"},
    "3.2": {"Grad-CAM", "Grad-CAM++", "stage 2", "stage 3", "stage 4", "class\n“fire engine”"},
    "3.3": {"(c) feature maps", "stage 1", "stage 5"},
    "3.4": {"stage 1", "$M^{(5)}$", "fused, stages 3 to 5", "LayerCAM"},
    "3.5": {"stage 1", "stage 5", "fused 3+4+5", "horse", "deer"},
    "3.6": {"Grad-CAM", "Grad-CAM++", "LayerCAM", "taxi", "crane ship"},
    "3.7": {"picture", "truth", "LayerCAM", "Grad-CAM++", "Grad-CAM"},
    "3.8": {"picture", "truth", "layer2", "layer3", "layer4"},
    "3.9": {"picture", "true mask", "S5", "S5+S4", "S5+S4+S3"},
    "4.1": {"picture", "epoch 2", "epoch 12", "maximum"},
    "4.2": {"picture", "epoch 2", "epoch 12", "maximum"},
    "4.3": {"(a) online attention accumulation", "(b) integral attention model", "hybrid loss"},
    "4.4": {"class maps $F^c$", "GAP", "max", "$A_{12}$", "$M_{12}$"},
    "4.5": {"image $I$", "×", "hide where $A > \\delta$,\nwith probability $\\beta$"},
    "4.6": {"picture", "OAA", "OAA++"},
    "4.7": {"picture", "CAM", "OAA", "OAA++", "OAA+"},
    "4.8": {"picture", "true mask", "OAA", "OAA+"},
    "4.9": {"picture", "true mask", "OAA++ model", "OAA++"},
    "4.10": {"recall of the object (%)", "OAA, accumulated", "OAA++, map of the epoch"},
    "4.11": {"picture", "epoch 2", "epoch 4", "epoch 12", "maximum"},
    "4.12": {"deer\nOAA", "deer\nOAA++"},
    "4.13": {"$F_1$", "$F_2$", "hybrid loss", "shared stages"},
    "5.1": {"“horse”, 100%", "stage 1", "stage 5", "what excites the strongest"},
    "5.2": {"decision $d$", "attention map $A$", "what excites it", "×", "="},
    "5.3": {"what excites\nthe dot"},
    "5.4": {"“horse”\n100%", "stage 1", "stage 5"},
    "5.5": {"(a) stage 5", "(a) stage 1", "(b) channels", "removal", "gAP", "overlapping"},
    "5.6": {"72 pictures of 12 classes;\nchannels counted 5 times or more", "mean"},
    "5.7": {"gAP", "SG", "GB", "IG", "none", "classifier", "stage1.0"},
    "5.8": {"12 pictures", "accuracy", "match rate", "accuracy, whole network"},
    "5.9": {"stage 3", "stage 5", "gAP", "LRP", "conductance", "internal influence"},
    "5.10": {"strongest patches", "map covered", "deer 84%, true: ox"},
    "5.11": {"strongest patches", "deer 84%, true: ox"},
    "5.12": {"original", "attacked", "of the class before, by rank", "of the class after"},
    "5.13": {"picture", "stage 5", "stage 4", "fire engine"},
    "5.14": {"deer, n = 5", "object", "grass"},
}


@pytest.fixture
def sheet(tiny):
    maps = stage_maps(staged(tiny), torch.rand(1, 3, 32, 48).double(), 1, ("layercam", "gradcam"))
    picture = np.full((64, 96, 3), 128, dtype=np.uint8)
    return stage_grid(picture, maps, fused=(2, 3))


class Made(dict):
    def __missing__(self, number):
        self[number] = make_figure(number)
        return self[number]


@pytest.fixture(scope="module")
def made():
    return Made()  # each when it is first asked for


@pytest.fixture(scope="module")
def net():
    return load_network("scenes_fc")


def _texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def _pdf(figure):
    data = io.BytesIO()
    with rc_context({"pdf.compression": 0}):  # text that can be searched
        figure.savefig(data, format="pdf")
    return data.getvalue()


def test_stage_grid_has_a_row_for_each_method_and_a_column_for_each_stage(sheet):
    assert [axis.get_title() for axis in sheet.axes[:5]] == [
        "picture", "stage 1", "stage 2", "stage 3", "fused 2+3"
    ]  # fmt: skip
    assert [sheet.axes[i].get_ylabel() for i in (0, 5)] == ["LayerCAM", "Grad-CAM"]
    assert len(sheet.axes) == 10


def test_figure_shows_itself_in_a_notebook_and_is_a_vector_file(sheet, tmp_path):
    with Image.open(io.BytesIO(sheet._repr_jpeg_())) as image:
        assert image.size[0] == 910
    sheet.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_map_grid_names_every_map():
    picture = np.full((60, 80, 3), 128, dtype=np.uint8)
    maps = {name: torch.rand(7, 9) for name in "abcdef"}
    figure = map_grid(picture, maps, columns=3)
    assert _texts(figure) == ["picture", *"abcdef"]
    assert len(figure.axes[0].images) == 7


def test_map_grid_leaves_a_zero_map_dark():
    picture = np.full((60, 80, 3), 200, dtype=np.uint8)
    figure = map_grid(picture, {"zero": torch.zeros(7, 9)})
    assert figure.axes[0].images[1].get_array().max() <= 100


@pytest.mark.parametrize("number", NUMBERS)
def test_figure_says_what_it_shows(made, number):
    assert EXPECTED[number] <= {text.get_text() for text in made[number].findobj(Text)}


@pytest.mark.parametrize("number", NUMBERS)
def test_figure_fits_a_column_or_a_page_and_can_be_read(made, number):
    figure = made[number]
    assert figure.get_figwidth() in (3.5, 7.0)
    assert figure.get_figheight() < 9
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 6
    for text in (each for axis in figure.axes for each in axis.texts):
        box = text.get_window_extent()
        inside = box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2
        assert inside, text.get_text()


@pytest.mark.parametrize("number", NUMBERS)
def test_figure_is_a_pdf_whose_text_is_text(made, number):
    pdf = _pdf(made[number])
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf  # an embedded TrueType font
    assert b"/Type3" not in pdf
    assert len(re.findall(rb"\sT[jJ]\s", pdf)) >= 3
    source = "OAA: scenes on scenes" if number.startswith("4.") else "network scenes_"
    source = "network defects" if number in ("3.7", "3.8") else source
    source = "scenes-val-0" if number == "2.5" else source
    source = "masks " if number in ("3.9", "4.8", "4.9") else source
    facts = f"figure {number}" + (f"; {source}" if number != "1.4" else "")
    assert facts.encode() in pdf


def test_the_same_figure_has_the_same_bytes(made):
    assert _pdf(made["1.2"]) == _pdf(make_figure("1.2"))


def test_there_is_a_title_for_every_figure():
    assert set(NUMBERS) == set(EXPECTED)
    assert all(title for _, title in figure_names())


def test_label_costs_are_those_of_the_objects_drawn(made):
    texts = _texts(made["1.1"])
    crowded = next(
        s for s in Scenes("val", objects="several") if len(s.objects) == len(s.class_ids) == 3
    )
    assert [text for text in texts if text.startswith("3 ×")] == [
        "3 × 1 s = 3 s", "3 × 10 s = 30 s", "3 × 78 s = 234 s"
    ]  # fmt: skip
    assert "\n".join(CLASS_NAMES[class_id] for class_id in crowded.class_ids) in texts


def test_shares_of_figure_1_3_are_those_of_the_region():
    region, mask = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    region[:, 1:] = True
    mask[:, :2] = True
    assert attention._shares(region, mask) == (0.5, pytest.approx(1 / 3))


def test_weights_of_figure_2_1_are_the_weights_of_the_linear_layer():
    net = load_network("scenes_conv")
    scene = Scenes("val", objects="few")[0]
    pieces = net.differentiable(net.preprocess(scene.image), [5])
    class_id, weights = attention._linear_weights(net, pieces, 3)
    layer = net.model.classifier.weight[3, :, 0, 0]
    assert class_id == 3
    torch.testing.assert_close(weights, layer.detach(), atol=1e-5, rtol=1e-4)


def test_occlusion_finds_the_one_place_that_counts():
    class Corner(torch.nn.Module):
        def forward(self, images):
            return images[:, :1, :8, :8].mean((2, 3)).repeat(1, 2)

    drop = attention._occlusion_drop(Corner(), torch.ones(1, 3, 112, 112), 1)
    assert drop.shape == (14, 14)
    assert drop.argmax() == 0
    assert drop[3:, 3:].max() == 0


def test_curves_of_figure_3_3_are_the_variances(made, net):
    scenes = Scenes("val", count=500, objects="few")
    tables = []
    for name in ("horse", "deer", "fire engine", "steamer"):
        wanted = [CLASS_NAMES.index(name)]
        scene = next(s for s in scenes if [o.class_id for o in s.objects] == wanted)
        tables.append(gradient_variance(net, net.preprocess(scene.image), wanted))
    axes = [axis for axis in made["3.3"].axes if axis.lines]
    assert [axis.get_ylabel() for axis in axes] == ["variance", "variance / mean square"] * 2
    kinds = [(m, w) for m in ("gradcam", "gradcam_pp") for w in ("variance", "relative")]
    for axis, (method, what) in zip(axes, kinds):
        assert [line.get_label() for line in axis.lines] == [f"stage {n}" for n in range(1, 6)]
        for stage, line in enumerate(axis.lines, start=1):
            rows = [t[(t["method"] == method) & (t["stage"] == stage)] for t in tables]
            means = pd.concat([row.set_index("channel")[what] for row in rows], axis=1)
            wanted = np.sort(means.mean(axis=1).dropna())[::-1]  # without dead channels
            np.testing.assert_allclose(line.get_ydata(), wanted, rtol=1e-5)


def test_lines_of_figure_3_3_differ_without_color(made):
    axis = next(axis for axis in made["3.3"].axes if axis.lines)
    assert len({line.get_marker() for line in axis.lines}) == 5


def test_boxes_of_figure_3_6_are_those_of_the_deep_map(made):
    net = load_network("scenes_conv")
    wanted = [CLASS_NAMES.index("horse")]
    scenes = Scenes("val", count=500, objects="few")
    scene = next(s for s in scenes if [o.class_id for o in s.objects] == wanted)
    images = net.preprocess(scene.image)
    map = stage_maps(net, images, wanted, ("gradcam",), stages=[5])["gradcam"][0][0]
    iou = box_iou(map_to_box(map, size=(112, 112)), scene.objects[0].box)
    assert next(text for text in _texts(made["3.6"]) if "IoU" in text) == f"IoU {iou:.2f}"


def test_boxes_differ_without_color(made):
    colored = [each for each in made["3.6"].axes[0].patches if max(each.get_edgecolor()[:3]) > 0]
    styles = {each.get_edgecolor(): str(each.get_linestyle()) for each in colored}
    assert len(styles) == len(set(styles.values())) == 2


def test_photographs_of_any_shape_can_be_drawn(net, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (60, 200, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    figure = make_figure("3.2", network=net, pictures=[tmp_path / "wide.png", picture])
    assert "wide.png, picture" in figure.facts


def test_a_folder_explains_the_class_it_names(net, tmp_path):
    for name in ("taxi", "unheard of"):
        (tmp_path / name).mkdir()
        Image.fromarray(Scenes("val")[1].image).save(tmp_path / name / f"{name}.png")
    figure = make_figure("3.5", network=net, pictures=load_folder(tmp_path))
    top = CLASS_NAMES[int(net(net.preprocess(Scenes("val")[1].image)).argmax())]
    labels = [text for text in _texts(figure) if text in CLASS_NAMES]
    assert labels == ["taxi", top]


def test_examples_bring_their_own_boxes():
    scene = Scenes("val", objects="few")[0]
    example = Example(scene.image, boxes=(scene.objects[0].box,))
    figure = make_figure("3.6", pictures=[example])
    assert sum("IoU" in text for text in _texts(figure)) == 3


def test_seed_draws_other_scenes():
    assert make_figure("1.2", seed=1).facts != make_figure("1.2").facts


def test_figures_leave_the_network_alone(net):
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    make_figure("3.3", network=net)
    assert all(torch.equal(before[name], v) for name, v in net.model.state_dict().items())
    assert all(parameter.grad is None for parameter in net.model.parameters())


# ------------------------------------------------------------------------------- decomposition


def _singles(count):
    scenes = Scenes("val", count=10_000, objects="few")
    return list(islice((scene for scene in scenes if len(scene.objects) == 1), count))


def test_shares_of_figure_5_4_are_those_of_gradient_times_activation(made, net):
    wanted = [CLASS_NAMES.index("horse")]
    scenes = Scenes("val", count=500, objects="few")
    scene = next(s for s in scenes if [o.class_id for o in s.objects] == wanted)
    pieces = net.differentiable(net.preprocess(scene.image), [5])
    (gradient,) = torch.autograd.grad(pieces.output[0, wanted[0]], pieces.activations)
    sums = (gradient * pieces.activations[0]).sum((0, 2, 3)).detach()
    parts = sums.relu() / sums.relu().sum()
    channels = parts.argsort(descending=True)[:3].tolist()
    expected = {f"no. {channel}, {float(parts[channel]):.0%}" for channel in channels}
    assert expected <= set(_texts(made["5.4"]))


def test_curve_of_figure_5_5_is_that_of_gradient_times_activation(made, net):
    curves = []
    for scene in _singles(12):
        pieces = net.differentiable(net.preprocess(scene.image), [5])
        score = pieces.output[0, scene.objects[0].class_id]
        (gradient,) = torch.autograd.grad(score, pieces.activations)
        sums = (gradient * pieces.activations[0]).sum((0, 2, 3)).detach().double()
        curves.append((100 * sums / sums.relu().sum()).sort(descending=True).values)
    axis = next(axis for axis in made["5.5"].axes if axis.get_title() == "(a) stage 5")
    line = next(line for line in axis.lines if line.get_label() == "gAP")
    np.testing.assert_allclose(line.get_ydata(), torch.stack(curves).mean(0), atol=1e-3)


def test_channels_of_one_class_are_discriminative(net):
    scene = _singles(1)[0]
    example = Example(scene.image, scene.objects[0].class_id)
    [axis] = make_figure("5.6", network=net, pictures=[example] * 5).axes
    points = next(line for line in axis.lines if line.get_label() == "channel")
    assert len(points.get_ydata()) >= 15  # three channels of each of five stages
    assert set(points.get_ydata()) == {1.0}


def test_maps_of_figure_5_7_change_from_being_the_same(made):
    [axis] = made["5.7"].axes
    lines = [line for line in axis.lines if line.get_label() in {"gAP", "SG", "GB", "IG"}]
    assert [line.get_ydata()[0] for line in lines] == [1.0] * 4
    assert all(abs(line.get_ydata()[-1]) < 0.9 for line in lines)


def test_lines_of_figure_5_9_start_at_the_accuracy_of_the_network(made):
    net = load_network("scenes_conv")
    scenes = _singles(12)
    ids = torch.tensor([scene.objects[0].class_id for scene in scenes])
    images = torch.cat([net.preprocess(scene.image) for scene in scenes])
    accuracy = 100 * (net(images).argmax(1) == ids).double().mean()
    lines = [line for axis in made["5.9"].axes for line in axis.lines]
    assert len(lines) == 12
    assert {line.get_ydata()[0] for line in lines} == {float(accuracy)}


def test_bars_of_figure_5_12_are_the_largest_activations(made):
    net = load_network("scenes_conv")
    axis = next(axis for axis in made["5.12"].axes if axis.get_title() == "(b) this picture")
    with torch.no_grad():
        activation = net.activations(net.preprocess(_singles(1)[0].image))[0][4][0]
    channels = [int(label.get_text()) for label in axis.get_xticklabels()]
    heights = [bar.get_height() for bar in axis.containers[0]]
    np.testing.assert_allclose(heights, activation.amax((1, 2))[channels], rtol=1e-5)


def test_regions_of_the_user_name_what_lies_under_the_maps(net):
    scene = _singles(1)[0]
    size = scene.image.shape[:2]
    regions = {"floor": np.ones(size, bool), "ceiling": np.zeros(size, bool)}
    example = Example(scene.image, scene.objects[0].class_id, regions=regions)
    [axis] = make_figure("5.14", network=net, pictures=[example]).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["floor"]
    assert [bar.get_height() for bar in axis.patches] == [100]


@pytest.mark.parametrize("rows", [112, 64])
def test_map_is_magnified_to_what_its_decision_sees(rows):
    net = load_network("scenes_conv")  # of any size
    tree = evidence(net, net.preprocess(_singles(1)[0].image)[:, :, -rows:])
    for edge in tree.edges:
        pixels, (x0, y0, x1, y1) = decomposition._magnified(tree, edge)
        assert pixels.shape[0] / pixels.shape[1] == pytest.approx(rows / 112, abs=0.1)
        assert 0 <= x0 < x1 <= 112
        assert 0 <= y0 < y1 <= rows
        if edge.parent != "class":
            seen = tree.nodes[edge.parent].field
            assert np.all((x0, y0) <= np.array(seen[:2]))
            assert np.all((x1, y1) >= np.array(seen[2:]))


PICTURE = np.full((64, 64, 3), 128, dtype=np.uint8)
RIGHT = Example(Scenes("val", objects="few")[0].image, 5)


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        ("9.9", {}, r"expected a figure in \{1\.1, .*\}, got '9\.9'"),
        ("3.1", {"pictures": []}, "expected at least one picture, got none"),
        ("1.1", {"pictures": [PICTURE]}, "expected generated scenes for figure 1.1"),
        ("1.3", {"pictures": [PICTURE]}, "expected pictures with a mask .* figure 1.3"),
        ("3.6", {"pictures": [PICTURE]}, "expected pictures with true boxes for figure 3.6"),
        ("3.7", {"network": "scenes_fc"}, "expected `pictures` for scenes_fc, got none"),
        ("3.8", {"network": "scenes_fc", "pictures": [PICTURE]}, "expected .* class 'defect'"),
        ("2.1", {"network": "scenes_fc"}, "expected a network that ends in a global average"),
        ("5.8", {"pictures": [PICTURE]}, "expected pictures of known classes for figure 5.8"),
        ("5.10", {"pictures": [RIGHT]}, "expected a picture whose class scenes_fc gets wrong"),
        ("5.14", {"pictures": [Example(PICTURE, 0)]}, "expected pictures with masks of what"),
        ("4.1", {"pictures": [PICTURE]}, "expected `runs` for figure 4.1, got `pictures`"),
        ("5.1", {"runs": ["run"]}, "expected `network` or `pictures` for figure 5.1, got `runs`"),
        ("4.8", {"runs": ["run"]}, "expected `masks` or `pictures` for figure 4.8, got `runs`"),
        ("4.8", {"masks": {"OAA": "."}}, r"expected 2 folders .* 4.8 \(OAA, OAA\+\), got 1"),
        ("4.8", {"masks": {"a": "no", "b": "no"}}, "expected label pictures IMAGE_ID.png of the"),
        ("3.1", {"network": "nothing"}, "expected the name of a network, got 'nothing'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(number, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_figure(number, **options)
    assert "\n" not in str(caught.value)


def test_a_network_without_generated_classes_needs_pictures(tiny):
    net = staged(tiny, image_size=32)
    with pytest.raises(ValueError, match="expected `pictures` for Tiny, got none"):
        make_figure("3.1", network=net)


def test_too_few_stages_are_named(tiny):
    net = staged(tiny.float(), image_size=32)
    with pytest.raises(ValueError, match="expected a network of at least 4 stages .* Tiny with 3"):
        make_figure("3.2", network=net, pictures=[PICTURE])


def test_truth_of_a_defect_is_the_mask_of_its_kind(tmp_path):
    # the picture's own, enlarged as the picture is
    folder = tmp_path / "MT_Crack"
    folder.mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[10:20, 30:50] = 255
    Image.fromarray(PICTURE).save(folder / "exp1_num_1.jpg")
    Image.fromarray(mask).save(folder / "exp1_num_1.png")
    figure = make_figure("3.7", pictures=load_magnetic_tile(tmp_path))
    truth = figure.axes[0].images[1].get_array()
    inside = np.asarray(Image.fromarray(mask).resize(truth.shape[1::-1])) > 127
    assert (np.asarray(truth)[..., 0] > 127)[inside].all()
    assert inside.mean() == pytest.approx((np.asarray(truth)[..., 0] > 127).mean(), abs=0.005)


def test_masks_lie_in_the_colors_of_voc_over_their_picture(tmp_path):
    scene = Scenes("val", objects="few")[3]
    truth = np.zeros((112, 112), np.uint8)
    for each in scene.objects:
        truth[each.mask] = 1 + each.class_id
    labels = np.where(truth > 0, truth, 255).astype(np.uint8)
    for name, values in (("a", truth), ("b", labels)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / f"{scene.image_id}.png")
    figure = make_figure("4.8", masks={"one": tmp_path / "a", "two": tmp_path / "b"})
    assert {"picture", "true mask", "one", "two"} <= set(_texts(figure))
    _, true, one, two = (image.get_array() for image in figure.axes[0].get_images())
    assert np.array_equal(true, one)
    inside = np.kron(truth, np.ones((2, 2))) > 0
    assert np.array_equal(two[inside], one[inside])
    assert (two[~inside] == 235).all()
    label = truth[truth > 0][0]
    shown = one[np.kron(truth, np.ones((2, 2))) == label]
    darkest = 0.75 * voc_colors()[label]  # a quarter of the picture lies over it
    assert ((shown >= darkest - 1) & (shown <= darkest + 0.25 * 0.6 * 255 + 1)).all()
