"""Metrics against numbers worked out by hand."""

import math

import pytest
import torch

from eval.scores.fidelity import MAX_PSNR, compare, mean_scores, psnr


def grey(value: float, size: int = 32) -> torch.Tensor:
    return torch.full((3, size, size), value)


def test_psnr_of_a_constant_error():
    assert psnr(grey(0.5), grey(0.6)) == pytest.approx(20.0, abs=1e-4)  # 10·log10(1 / 0.1²)
    assert psnr(grey(0.0), grey(1.0)) == pytest.approx(0.0, abs=1e-6)


def test_equal_pictures_have_a_finite_psnr():
    assert psnr(grey(0.3), grey(0.3)) == MAX_PSNR
    assert psnr(grey(0.3), grey(0.3) + 1e-7) == MAX_PSNR
    assert compare(grey(0.3), grey(0.3))["ssim"] == pytest.approx(1.0)


def test_ssim_of_constants_is_the_luminance_term():
    """Without contrast SSIM is (2·a·b + c) / (a² + b² + c), c = 0.01²."""
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert compare(grey(0.4), grey(0.6))["ssim"] == pytest.approx(expected, abs=1e-5)


def test_regions_are_scored_each_without_the_other():
    background = torch.zeros(32, 32, dtype=torch.bool)
    background[:, :24] = True
    prediction, target = grey(0.5), grey(0.5)
    prediction[:, background] += 0.01
    prediction[:, ~background] += 0.1
    scores = compare(prediction, target, background)
    assert scores["psnr_background"] == pytest.approx(40.0, abs=1e-3)
    assert scores["psnr_edited"] == pytest.approx(20.0, abs=1e-3)
    mean_square = 0.75 * 0.01**2 + 0.25 * 0.1**2
    assert scores["psnr"] == pytest.approx(-10 * math.log10(mean_square), abs=1e-3)


def test_an_empty_region_has_no_score():
    everywhere = torch.ones(32, 32, dtype=torch.bool)
    assert compare(grey(0.5), grey(0.6), everywhere).keys() == {"psnr", "ssim", "psnr_background"}
    assert compare(grey(0.5), grey(0.6), ~everywhere).keys() == {"psnr", "ssim", "psnr_edited"}


def test_means_are_over_the_rows_that_have_the_metric():
    assert mean_scores([{"psnr": 10.0}, {"psnr": 20.0, "psnr_edited": 7.0}]) == {"psnr": 15.0, "psnr_edited": 7.0}
