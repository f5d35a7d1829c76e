"""Curves: round axes, honest averages, and markup that is well formed whatever the numbers are."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.tracking.plots import Series, format_number, line_chart, moving_average, nice_ticks


def _parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 (our own markup)


_ANY = st.floats(min_value=-1e12, max_value=1e12) | st.just(math.nan) | st.just(math.inf)


@settings(deadline=None, max_examples=60)
@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9), integers=st.booleans())
def test_ticks_cover_the_values_with_even_round_steps(low: float, span: float, integers: bool) -> None:
    """The ticks enclose both ends, are evenly spaced, few, and whole numbers where they must be."""
    high = low + span
    ticks = nice_ticks(low, high, integers=integers)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    np.testing.assert_allclose(np.diff(ticks), step, rtol=1e-3)
    assert not integers or all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 0.001])
def test_a_single_value_has_an_axis_around_it(value: float) -> None:
    """Where all values are equal the axis still has a length."""
    ticks = nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1]
    assert nice_ticks(7.0, 7.0, integers=True)[0] == 7.0


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), reach=st.integers(0, 6))
def test_the_moving_average_is_the_mean_of_the_neighbours(values: list[float], reach: int) -> None:
    """Each value is numpy's mean of the window around it, cut at the ends."""
    expected = [np.mean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]
    np.testing.assert_allclose(moving_average(values, 2 * reach + 1), expected, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(ys=st.lists(_ANY, max_size=60), more=st.lists(_ANY, max_size=3), low=st.none() | st.just(0.0))
def test_a_chart_is_well_formed_and_stays_inside(ys: list[float], more: list[float], low: float | None) -> None:
    """Any numbers, gaps included, give XML whose every coordinate is finite and within the picture."""
    curves = [Series(name=f"<{index}&", points=tuple(enumerate(given_ys))) for index, given_ys in enumerate((ys, more))]
    chart = _parsed(line_chart(curves, x_label="steps <", y_label='"nats" & more', low=low))
    for path in chart.iter("path"):
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", path.get("d", ""))]
        assert numbers
        assert all(0 <= number <= 460 for number in numbers)
    if not any(math.isfinite(y) for y in ys + more):
        assert "not measured" in "".join(chart.itertext())
    else:
        assert '"nats" & more' in list(chart.itertext())


def test_gaps_are_left_open_and_lone_points_are_dots() -> None:
    """A value that is not finite splits the curve; a stretch of one point is a dot, no line."""
    curve = Series(name="a", points=((0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5)))
    chart = _parsed(line_chart([curve], x_label="x", y_label="y"))
    assert len(list(chart.iter("path"))) == 1
    assert [dot.get("r") for dot in chart.iter("circle")] == ["2.5", "2.5", "3"]


def test_a_long_curve_is_thinned_and_keeps_its_peaks() -> None:
    """Ten thousand points become a few hundred, with the highest and the lowest of all among them."""
    ys = [math.sin(index / 50) for index in range(10_000)]
    ys[7_003], ys[3_001] = 9.0, -9.0
    svg = line_chart([Series(name="a", points=tuple(enumerate(ys)))], x_label="x", y_label="y")
    raw = re.search(r'class="raw"[^>]*d="([^"]*)"', svg)
    assert raw is not None
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", raw[1])[1:]]
    assert len(heights) <= 400
    spread = max(heights) - min(heights)
    ticks = [float(y) for y in re.findall(r'class="grid" x1="\d+" y1="([\d.]+)"', svg)]
    assert spread == pytest.approx((max(ticks) - min(ticks)) * 18 / 20, abs=0.3)  # from -9 to 9 on an axis of 20
    assert len(svg) < 20_000


def test_axes_say_as_many_decimals_as_tell_ticks_apart() -> None:
    """Small steps far from zero are told apart, and tiny numbers keep their exponent."""
    close = line_chart([Series(name="a", points=((0, 10.0), (1, 10.1)))], x_label="x", y_label="y")
    assert ">10.02<" in close
    assert ">10.10<" in close
    tiny = line_chart([Series(name="a", points=((0, 0.0), (1, 1e-9)))], x_label="x", y_label="y")
    assert ">2e-10<" in tiny


def test_two_curves_have_a_legend() -> None:
    """One curve is named by its axis; two are named by a legend with escaped names."""
    one, two = (Series(name=f"<{index}>", points=((0, 1.0), (1, 2.0))) for index in range(2))
    assert "&lt;0&gt;" not in line_chart([one], x_label="x", y_label="y")
    both = line_chart([one, two], x_label="x", y_label="y")
    assert "&lt;0&gt;" in both
    assert "&lt;1&gt;" in both


def test_numbers_are_short() -> None:
    """Headings show three digits, thousands with commas, and what is not finite by name."""
    numbers = (0, 0.25, 3.14159, -12500.4, 2e-5, 1e7, math.nan, 100.0)
    assert [format_number(number) for number in numbers] == [
        "0",
        "0.25",
        "3.14",
        "-12,500",
        "2e-05",
        "1e+07",
        "nan",
        "100",
    ]


def test_a_long_curve_with_gaps_keeps_its_average_and_bridges_short_gaps() -> None:
    """Steps without a figure between many that have one leave one average, broken at a long gap alone."""
    values = [math.nan if x % 3 == 0 or 100 <= x < 150 else 1.0 for x in range(300)]
    svg = line_chart([Series(name="a", points=tuple(enumerate(values)))], x_label="x", y_label="y")
    assert svg.count('class="curve"') == 2
    assert svg.count('class="dot"') == 0
    assert svg.count('class="raw"') == sum(
        not math.isnan(now) and math.isnan(before) for before, now in pairwise([math.nan, *values])
    )
