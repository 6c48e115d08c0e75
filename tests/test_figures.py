import io

import numpy as np
import pytest
import torch
from PIL import Image

from attnviz.explain import stage_maps
from attnviz.figures import stage_grid
from attnviz.stages import staged


@pytest.fixture
def sheet(tiny):
    maps = stage_maps(staged(tiny), torch.rand(1, 3, 32, 48).double(), 1, ("layercam", "gradcam"))
    picture = np.full((64, 96, 3), 128, dtype=np.uint8)
    return stage_grid(picture, maps, fused=(2, 3))


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
