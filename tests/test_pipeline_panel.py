import base64
import io
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled import make_panel, settings_of
from PIL import Image
from traitlets import TraitError

import attnviz
from attnviz.panels import LabelPanel, explore_labels, pipeline

NAMES = ("boat", "heron", "</script><b>reed", "cloud")


@pytest.fixture(scope="module")
def panel():
    return make_panel()


@pytest.fixture
def reset(panel):
    before = {
        name: getattr(panel, name) for name in ("method", "cue", "background", *settings_of(0))
    }
    yield panel
    for name, value in before.items():
        setattr(panel, name, value)


def _small(maps, **parts):
    # A panel on the 8 bit maps themselves: nothing is resized.
    size = np.shape(next(iter(maps.values())))
    image = np.full((*size, 3), 120, np.uint8)
    return LabelPanel(image, {k: np.array(map) for k, map in maps.items()}, NAMES, **parts)


# ------------------------------------------------------------------------------------ the labels


def _slow_rules(panel, maps, saliency):
    # The rules, pixel by pixel, in their order.
    spread = [(map - map.min()) / (map.max() - map.min()) for map in maps]
    height, width = maps[0].shape
    labels = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            own = [map[y, x] for map in spread]
            if panel.cue == "saliency":
                own = [1 - saliency[y, x], *own]
                own = [value if value >= panel.floor else 0 for value in own]
            elif panel.cue == "affinity":
                own = [(1 - max(own)) ** panel.power, *own]
            else:
                own = [panel.constant, *own]
            label = own.index(max(own))
            if sum(value > panel.conflict for value in own) >= 2:
                label = 255
            elif panel.cue == "saliency" and label == 0:
                strong = any(map[y, x] > panel.strong for map in spread)
                label = 255 if saliency[y, x] >= panel.salient or strong else 0
            labels[y, x] = label
    objects = ((labels > 0) & (labels < 255)).sum()
    return labels if objects / labels.size >= panel.least else np.full_like(labels, 255)


@pytest.mark.parametrize("cue", ["saliency", "affinity", "constant"])
def test_labels_are_those_of_the_rules_pixel_by_pixel(cue):
    generator = np.random.default_rng(3)
    levels = generator.integers(0, 256, (3, 9, 14))
    levels[:, 0, 0] = 255  # the maximum, so that the panel's levels are these
    saliency = generator.integers(0, 256, (9, 14)).astype(np.uint8)
    panel = _small(dict(zip((2, 0, 3), levels)), saliency=saliency, cue=cue)
    numbers = np.array([0, 3, 1, 4])
    seen = set()
    for seed in range(12):
        for name, value in settings_of(seed).items():
            setattr(panel, name, value)
        panel.averaged = False
        slow = _slow_rules(panel, levels / 255, saliency / 255)
        expected = np.where(slow == 255, 255, numbers[np.minimum(slow, 3)])
        np.testing.assert_array_equal(panel.labels(), expected)
        seen |= set(np.unique(expected))
    assert seen == {0, 1, 3, 4, 255}


def test_superpixels_vote_by_their_means(reset):
    panel = reset
    panel.method, panel.regions = "superpixels", "felzenszwalb"
    regions, maps = panel._regions["felzenszwalb"], list(panel._maps.values())
    for background in (0.1, 0.3, 0.6):
        panel.background = background
        labels = panel.labels()
        for region in range(regions.max() + 1):
            inside = regions == region
            means = [map[inside].mean() / 255 for map in maps]
            best = int(np.argmax(means))
            expected = 1 + list(panel._maps)[best] if means[best] >= background else 0
            assert set(labels[inside]) == {expected}


def test_averaged_maps_are_the_same_all_over_a_superpixel(reset):
    panel = reset
    plain = panel.evidence()
    panel.averaged = True
    averaged = panel.evidence()
    regions = panel._regions["slic"]
    for region in range(0, regions.max() + 1, 7):
        assert np.ptp(averaged[regions == region]) == 0
    assert np.ptp(averaged) == 1  # stretched again, as the rules do
    assert (plain != averaged).any()
    panel.cue = "affinity"
    steps = np.stack([panel._maps[k] / 255 for k in panel._maps])
    means = [[map[regions == region].mean() for region in range(regions.max() + 1)]
             for map in steps]  # fmt: skip
    most = np.max([(np.array(m) - min(m)) / (max(m) - min(m)) for m in means], axis=0)
    np.testing.assert_allclose(panel.cue_map(), (1 - most[regions]) ** 4, atol=1e-12)


def test_scores_count_what_both_label():
    truth = np.array([[1, 1, 0, 0], [1, 255, 0, 3]], np.uint8)
    mask = np.array([[1, 0, 0, 1], [255, 1, 0, 0]], np.uint8)
    panel = _small({0: [[1.0, 0, 0, 0], [1, 1, 0, 0]]}, truth=truth, predictions={"plain": mask})
    scores = panel.scores()["network"]
    # counted are six pixels: 1-1, 1-0, 0-0, 0-1, 0-0, 3-0 (truth first)
    assert scores["background"] == pytest.approx(2 / 5)
    assert scores["boat"] == pytest.approx(1 / 3)
    assert scores["</script><b>reed"] == 0  # in the truth, and never found
    assert scores["mean"] == pytest.approx((2 / 5 + 1 / 3) / 3)
    assert panel._names == {0: "boat", 2: "</script><b>reed"}
    assert _small({0: [[1.0, 0.0]]}).scores() == {}


def test_labels_are_painted_dimmed_and_striped():
    labels = np.zeros((4, 112), np.uint8)
    labels[:, 40:80], labels[:, 80:] = 2, 255
    panel = _small({1: np.ones((4, 112))}, predictions={"plain": labels}, opacity=0.5)
    drawn = panel.render()["network"].astype(int)
    tone = np.array(pipeline.TONES[0])
    assert np.abs(drawn[:, 40:80] - (120 + tone) / 2).max() <= 0.5
    assert (drawn[:, :40] == 90).all()  # a quarter of black
    assert set(drawn[:, 80:].ravel()) == {120, 188}  # white stripes, half of it
    panel.opacity = 0.0
    assert (panel.render()["network"] == 120).all()


def test_superpixels_are_drawn_by_their_borders(reset):
    panel = reset
    panel.method = "superpixels"
    steps = panel.render()
    assert list(steps) == ["picture", "maps", "background", "labels", "network"]
    changed = (steps["background"] != steps["picture"]).any(axis=-1)
    regions = panel._regions["slic"]
    y, x = 20, 30
    for y, x in ((20, 30), (7, 55), (31, 12)):
        neighbors = {regions[y, x], regions[y - 1, x], regions[y, x - 1]}
        assert changed[y, x] == (len(neighbors) > 1)


# ---------------------------------------------------------------------------------------- input


def test_maps_may_be_tensors_of_any_size_and_pictures_of_any_kind(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "picture.png")
    maps = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(1))
    panels = [
        explore_labels(image, maps, NAMES),
        explore_labels(Image.fromarray(image), dict(enumerate(maps)), NAMES),
        explore_labels(str(tmp_path / "picture.png"), maps.numpy(), NAMES),
    ]
    for panel in panels:
        assert (panel.cue, panel.class_id, panel.prediction) == ("affinity", 0, "")
        np.testing.assert_array_equal(panel.labels(), panels[0].labels())
    assert repr(panels[0]) == "LabelPanel(boat, heron; rules, affinity)"
    shown = panels[0].evidence()
    resized = torch.nn.functional.interpolate(maps[None, :1], (40, 60), mode="bilinear")[0, 0]
    spread = (resized - resized.min()) / (resized.max() - resized.min())
    assert np.abs(shown - spread.numpy()).max() < 0.01  # in 256 levels


def test_large_pictures_are_shown_smaller_with_all_that_belongs_to_them():
    image = np.full((600, 1024, 3), 90, np.uint8)
    image[:, 512:] = 200
    truth = np.zeros((600, 1024), np.uint8)
    truth[:, 512:] = 1
    panel = explore_labels(
        image, {0: truth.astype(float)}, NAMES, saliency=truth.astype(float), truth=truth,
        predictions={"plain": truth},
    )  # fmt: skip
    assert {step.shape for step in panel.render().values()} == {(300, 512, 3)}
    scores = panel.scores()
    assert scores["network"]["mean"] == 1
    assert scores["labels"]["mean"] > 0.99  # the map's edge is smoothed


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"maps": {}}, "at least one class in `maps`, got none"),
        ({"maps": {4: np.ones((2, 2))}}, "classes of `maps` as .* from 0 to 3, each .*got 4"),
        ({"maps": {-1: np.ones((2, 2))}}, "classes of `maps` as .* from 0 to 3, .*got -1"),
        ({"maps": np.ones((2, 2))}, r"`maps` of shape \(k, h, w\), got \(2, 2\)"),
        ({"maps": {0.5: np.ones((2, 2))}}, "maps` as whole numbers from 0 to 3, .*got 0.5"),
        ({"maps": {0: np.full((2, 2), np.nan)}}, "finite maps, got NaN or infinity; check the"),
        ({"maps": {0: np.full((40, 40), np.inf)}}, "finite maps, got NaN or infinity"),
        ({"maps": {0: np.ones((0, 0))}}, r"maps of shape \(h, w\), at least 1 x 1, got \(0, 0\)"),
        ({"class_names": []}, "a name for each class in `class_names`, got none"),
        ({"truth": np.zeros((8, 9))}, "mask of 18 x 22 in `truth`, .*got 8 x 9; do the two"),
        ({"truth": np.full((18, 22), 0.5)}, "labels from 0 to 255 in `truth`, got 0.5 to 0.5"),
        ({"predictions": np.full((18, 22), 300)}, "in `predictions`, got 300 to 300"),
        ({"saliency": np.full((18, 22), 1.5)}, r"`saliency` of shape \(h, w\) in \[0, 1\].*1.5"),
        ({"saliency": np.full((18, 22), np.nan)}, r"`saliency` of shape .*nan"),
        ({"saliency": np.ones((0, 3))}, r"`saliency` of shape .*got \(0, 3\) from nan to nan"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(parts, message):
    given = {"maps": {0: np.ones((2, 3))}, "class_names": NAMES} | parts
    with pytest.raises(ValueError, match=message) as error:
        explore_labels(np.zeros((18, 22, 3), np.uint8), **given)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", ["maps", "saliency", "truth", "predictions"])
def test_text_is_no_map_and_no_mask(name):
    given = {"maps": {0: np.ones((2, 3))}} | {name: np.full((1, 18, 22), "a")}
    with pytest.raises(TypeError, match="expected maps and masks of real numbers, got <U1"):
        explore_labels(np.zeros((18, 22, 3), np.uint8), class_names=NAMES, **given)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("floor", 1.2, r"expected `floor` in \[0, 1\], got 1.2"),
        ("least", float("nan"), r"expected `least` in \[0, 1\], got nan"),
        ("power", 0.5, r"expected `power` in \[1, 32\], got 0.5"),
        ("method", "crf", r"expected `method` in \('rules', 'superpixels'\), got 'crf'"),
        ("cue", "saliency", r"expected `cue` in \('affinity', 'constant'\), .*without saliency"),
        ("regions", "watershed", r"expected `regions` in \('slic', 'felzenszwalb'\)"),
        ("class_id", 3, r"expected `class_id` in \(1,\), got 3"),
        ("prediction", "crf", r"expected `prediction` in \('',\), got 'crf'"),
        ("opacity", 2.0, r"expected `opacity` in \[0, 1\], got 2"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(setting, value, message):
    panel = _small({1: [[1.0, 0.0]]})
    before = getattr(panel, setting)
    with pytest.raises(TraitError, match=message):
        setattr(panel, setting, value)
    assert getattr(panel, setting) == before


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match=r"got `flor`; the nearest are \['floor'"):
        _small({1: [[1.0, 0.0]]}, flor=0.2)


def test_map_without_any_value_gives_no_object():
    panel = _small({0: np.zeros((6, 9))})
    assert (panel.labels() == 255).all()  # too few objects
    panel.least = 0.0
    assert (panel.labels() == 0).all()
    assert (panel.evidence() == 0).all()


# ------------------------------------------------------------------------------- notebook, page


def test_panel_is_found_in_the_package_and_keeps_a_picture(panel):
    assert attnviz.explore_labels is explore_labels
    assert isinstance(panel, LabelPanel)
    bundle, _ = panel._repr_mimebundle_()
    assert bundle["text/plain"] == repr(panel)
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"])))
    assert picture.size == (5 * 248 - 8, 180 + 22)
    assert "0x" not in repr(panel)


def test_setting_a_trait_sends_no_data_again(reset):
    sent = []
    reset.send_state = lambda key=None: sent.append(key)
    reset.floor, reset.cue = 0.4, "constant"
    del reset.send_state
    assert sent
    assert "_data" not in {name for key in sent for name in np.atleast_1d(key)}


def test_saved_page_holds_everything_and_asks_for_nothing(reset, tmp_path):
    reset.floor = 0.45
    page = reset.save_html(tmp_path / "page.html")
    text = page.read_text("utf-8")
    assert re.findall(r"https?://[\w.]*", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"<(link|img|iframe)|\ssrc=|@import|url\(", text)
    assert text.count("</script>") == 2
    assert (
        json.loads(re.search(r'id="data">(.*)</script>', text)[1])["panels"][0]["state"]["floor"]
        == 0.45
    )
    assert page.stat().st_size < 300_000


def test_planes_are_sent_as_differences_of_rows(panel):
    block = np.frombuffer(zlib.decompress(panel.state["_data"]["planes"]), np.uint8)
    maps, start = panel.state["_data"]["grids"], 0
    for (rows, columns), levels in zip(maps, panel._levels.values(), strict=True):
        plane = block[start : start + rows * columns].reshape(rows, columns)
        np.testing.assert_array_equal(plane.cumsum(axis=0, dtype=np.uint8), levels)
        start += rows * columns
    rest = block[start:].reshape(-1, 48, 64).cumsum(axis=1, dtype=np.uint8)
    np.testing.assert_array_equal(rest[0], panel._saliency)
    np.testing.assert_array_equal(256 * rest[1].astype(int) + rest[2], panel._regions["slic"])
    np.testing.assert_array_equal(rest[-1], panel._truth)
    assert len(rest) == 1 + 4 + 2 + 1


# ----------------------------------------------------------------------------------- JavaScript

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

TWIN = """
const { grids, size, planes, wanted } = JSON.parse(process.argv[2]);
const block = await inflate(Buffer.from(planes, "base64"));
const parts = unpackPlanes(block, [...grids, ...Array(6).fill(size)]);
const scaled = (levels) => Float64Array.from(levels, (level) => level / 255);
const levels = grids.map((grid, k) => stretchLevels(parts[k], grid, size));
const maps = levels.map(scaled);
const saliency = scaled(parts[grids.length]);
const regions = [0, 2].map((k) => Uint16Array.from(parts[grids.length + 2 + k],
  (low, i) => 256 * parts[grids.length + 1 + k][i] + low));
const labels = wanted.map((at) => {
  const numbers = regions[at.regions === "slic" ? 0 : 1];
  const voted = at.method === "superpixels";
  const means = voted || at.averaged
    ? maps.map((map) => regionMeans(map, numbers, Math.max(...numbers) + 1)) : maps;
  if (voted) return [...voteLabels(means, at.background).labels];
  const spread = means.map(spreadMap);
  const cue = backgroundCue(at.cue, spread, saliency, at);
  return [...ruleLabels(spread, cue, at.cue === "saliency" ? saliency : null, at).labels];
});
console.log(JSON.stringify({ levels: levels.map((map) => [...map]), labels }));
"""


@needs_node
def test_javascript_makes_the_labels_of_python_to_the_pixel(reset, tmp_path):
    panel = reset
    wanted = []
    for seed in range(24):
        drawn = np.random.default_rng(100 + seed)
        wanted.append(settings_of(seed) | {
            "method": "superpixels" if seed % 4 == 3 else "rules",
            "cue": ("saliency", "affinity", "constant")[seed % 3],
            "regions": str(drawn.choice(["slic", "felzenszwalb"])),
            "background": round(float(drawn.uniform(0.1, 0.6)), 2),
        })  # fmt: skip
    (tmp_path / "twin.mjs").write_text(pipeline.source("pipeline") + TWIN)
    data = panel.state["_data"]
    given = json.dumps({
        "grids": data["grids"], "size": [48, 64], "wanted": wanted,
        "planes": base64.b64encode(data["planes"]).decode(),
    })  # fmt: skip
    result = subprocess.run(
        ["node", str(tmp_path / "twin.mjs"), given], capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout)
    for levels, drawn in zip(panel._maps.values(), found["levels"], strict=True):
        np.testing.assert_array_equal(np.array(drawn).reshape(48, 64), levels)
    numbers = np.array([0, *(1 + k for k in panel._maps)])
    seen = set()
    for at, labels in zip(wanted, found["labels"], strict=True):
        for name, value in at.items():
            setattr(panel, name, value)
        labels = np.array(labels).reshape(48, 64)
        ours = np.where(labels == 255, 255, numbers[np.minimum(labels, len(numbers) - 1)])
        np.testing.assert_array_equal(panel.labels(), ours)
        seen |= set(np.unique(ours))
    assert seen == {0, *numbers, 255}


@needs_node
def test_functions_in_javascript():
    script = Path(__file__).with_name("pipeline.test.mjs")
    result = subprocess.run(
        ["node", "--test", str(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
