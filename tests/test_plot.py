"""The picture of the reconstruction error shows the numbers that it should."""

import subprocess
import sys

import numpy as np
import pytest

from phema_dist.errors import ProfileError
from phema_dist.plot import figure_to_image, reconstruction_error_figure
from phema_dist.schedule import reconstruction_errors

TS, PAIR = range(1000, 9000, 1000), (0.05, 0.28)


def test_the_curve_is_the_reconstruction_error_in_percent() -> None:
    (axes,) = reconstruction_error_figure(TS, PAIR).axes
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(y, np.maximum(100 * reconstruction_errors(TS, PAIR, x), 1e-3))
    assert axes.get_yscale() == "log"
    assert "%" in axes.get_ylabel()
    assert r"\sigma" in axes.get_xlabel()
    assert "8 snapshots" in axes.get_title()


def test_the_tracked_sigma_rels_are_marked() -> None:
    (axes,) = reconstruction_error_figure(TS, PAIR).axes
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [0.05, 0.28]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["tracked"]


def test_the_range_is_the_one_asked_for() -> None:
    (axes,) = reconstruction_error_figure(TS, PAIR, (0.1, 0.2)).axes
    assert axes.get_xlim() == (0.1, 0.2)
    with pytest.raises(ProfileError, match=r"got 0\.4\."):
        reconstruction_error_figure(TS, PAIR, (0.1, 0.4))
    with pytest.raises(ProfileError, match="no averages are stored"):
        reconstruction_error_figure([], PAIR)


def test_a_figure_becomes_an_image() -> None:
    image = figure_to_image(reconstruction_error_figure(TS, PAIR))
    assert image.size == (700, 480)
    assert image.mode == "RGB"
    assert len(set(image.resize((70, 48)).tobytes())) > 10


def test_a_missing_matplotlib_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "phema-dist\[plot\]"'):
        reconstruction_error_figure(TS, PAIR)


def test_importing_plot_loads_no_matplotlib() -> None:
    code = "import sys, phema_dist.plot; sys.exit(bool({'matplotlib', 'PIL', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
