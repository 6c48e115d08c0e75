"""The evidence explorer in a browser: as a saved page without a network, and in JupyterLab."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from sample import settles

from attnviz import explore_evidence, load_network
from attnviz.data.scenes import Scenes
from notebooks import python

pytestmark = pytest.mark.browser

WAITS = "[role=treeitem][aria-selected=true]"
CELL = """import attnviz
from attnviz.data.scenes import Scenes
net = attnviz.load_network("scenes_conv")
panel = attnviz.explore_evidence(net, Scenes("val", 1)[0].image)
panel"""


@pytest.fixture(scope="module")
def panel():
    net = load_network("scenes_conv")
    names = list(net.class_names)
    image = Scenes("val", 1)[0].image
    best = int(net(net.preprocess(image)).argmax())
    names[best] = "</script><img src=x onerror=alert(1)>"
    net.class_names = tuple(names)
    panel = explore_evidence(net, image)
    start = panel.opened
    panel.grow(2)
    panel.add_sketches()
    panel.opened = start
    return panel


@pytest.fixture
def page(panel, open_page, tmp_path):
    page = open_page(panel.save_html(tmp_path / "tree.html"), WAITS)
    page.wait_for_timeout(400)
    return page


def _links(page):
    return page.locator("[role=treeitem]").evaluate_all("items => items.map(i => i.dataset.link)")


def _pixels(canvas):
    address = canvas.evaluate("canvas => canvas.toDataURL('image/png')")
    image = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    return np.asarray(image.convert("RGB"))


def _wait_for(page, link):
    page.locator(f'[data-link="{link}"][aria-selected=true]').wait_for()


def test_nodes_are_drawn_as_python_draws_them(page, panel):
    for cropped in (True, False):
        page.get_by_label("Crop to receptive field").set_checked(cropped)
        panel.cropped = cropped
        page.wait_for_timeout(300)
        for link in _links(page):
            drawn = _pixels(page.locator(f'[data-link="{link}"] .attnviz-thumb canvas'))
            expected = panel.thumbnail(link, 112)
            assert drawn.shape == expected.shape
            difference = np.abs(drawn.astype(int) - expected)
            assert np.median(difference) <= 1
            assert (difference > 16).mean() <= 0.01
    panel.cropped = True
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "blob:"))] == []


def test_tree_grows_on_click_and_by_keys_and_its_address_is_a_link(page, panel, open_page):
    root, first = str(panel.class_ids[0]), panel.selected
    assert _links(page) == [root, first, *_below(panel, first), *_below(panel, root)[1:]]
    other = _below(panel, root)[1]
    page.locator(f'[data-link="{other}"]').click()
    _wait_for(page, other)
    assert set(_below(panel, other)) <= set(_links(page))
    page.keyboard.press("ArrowRight")
    _wait_for(page, _below(panel, other)[0])
    page.keyboard.press("ArrowDown")
    _wait_for(page, _below(panel, other)[1])
    assert page.evaluate("document.activeElement.dataset.link") == _below(panel, other)[1]
    assert page.url.endswith(f"#{_below(panel, other)[1]}")
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    _wait_for(page, root)
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert _links(page) == [root]
    page.goto(page.url.partition("#")[0] + f"#{_below(panel, other)[2]}")
    page.reload()
    _wait_for(page, _below(panel, other)[2])
    deepest = page.locator(f'[data-link="{_below(panel, other)[2]}"]')
    assert deepest.get_attribute("aria-expanded") is None
    deepest.locator(".attnviz-door").click()
    page.get_by_text("was not exported").wait_for()
    assert page.problems == []


def _below(panel, link):
    class_id = link.partition("/")[0]
    full = link if "/" in link else class_id
    return [f"{full}/{node.stage}:{node.channel}" for node in panel.children(full)]


def test_class_name_is_text_only(page, panel):
    assert page.locator("img").count() == 0
    assert page.locator(f'[data-link="{panel.class_ids[0]}"] b').inner_text().startswith("</scr")


def test_tree_in_jupyterlab_asks_the_kernel(open_notebook):
    page = open_notebook("tree", CELL, height=1000)
    page.locator(WAITS).wait_for(timeout=60_000)
    selected = page.locator(WAITS).get_attribute("data-link")
    page.locator(f'[data-link^="{selected}/"]').first.click()
    deeper = page.locator(f'[data-link^="{selected}/"][aria-selected=true]')
    deeper.wait_for()
    link = deeper.get_attribute("data-link")
    page.locator(f'[data-link^="{link}/"]').first.wait_for()
    page.locator('[aria-label^="Guided gradient"]').wait_for()
    assert settles(lambda: python(page, "print(panel.selected)"), link)
    python(page, "panel.selected = panel.selected.rpartition('/')[0]")
    _wait_for(page, selected)
    other = page.get_by_label("Compare with")
    other.select_option(index=2)
    page.locator(".attnviz-grove").nth(1).locator("[role=treeitem]").nth(1).wait_for()
    assert page.outside == []
    assert page.problems == []
