"""Panels and stories by axe-core, in both color schemes, with what pops up open."""

import os
from pathlib import Path

import labelled
import pytest
from recorded import record
from sample import make_panel

from attnviz import explore_evidence, load_network
from attnviz.data.scenes import Scenes
from attnviz.panels import explore_accumulation, save_story

AXE = os.environ.get("AXE_CORE", "")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not AXE, reason="AXE_CORE is not set to axe.min.js of the npm package axe-core"
    ),
]

CHECK = """async () => {
  const { violations } = await axe.run(document, {
    runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"],
    // experimental: wants a node's short text as it stands inside its longer spoken name
    rules: { "label-content-name-mismatch": { enabled: false } },
  });
  return violations.filter(({ impact }) => ["serious", "critical"].includes(impact))
    .map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`);
}"""


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    tree = explore_evidence(load_network("scenes_conv"), Scenes("val", 1)[0].image)
    tree.grow(2)
    run = record(tmp_path_factory.mktemp("runs") / "plain", 6, history=True)
    return {
        "layercam": make_panel(),
        "player": explore_accumulation(run),
        "tree": tree,
        "labels": labelled.make_panel(),
    }


@pytest.mark.parametrize("name", ["layercam", "player", "tree", "labels", "story"])
def test_axe_finds_nothing_serious(panels, open_page, tmp_path, name):
    path = tmp_path / "page.html"
    if name == "story":
        text = "Some *text* and [a link](#panel-1?class_id=7)\n\n| a |\n|---|\n| 1 |"
        save_story(path, [text, *panels.values()], title="A story")
    else:
        panels[name].save_html(path)
    page = open_page(path, "canvas.attnviz-map[aria-label] >> nth=-1")
    page.wait_for_timeout(500)
    page.evaluate(Path(AXE).read_text("utf-8"))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.keyboard.press("Escape")
        assert page.evaluate(CHECK) == []
        for label in ("Keys", "Copy or save as a figure"):
            page.get_by_role("button", name=label).first.click()
            assert page.evaluate(CHECK) == []
