"""From drawings to pixels."""

import numpy as np
import pytest
from PIL import Image

from trainer.suite.drawing import from_grey, jitter, pick_colour, render_svg

RED_SQUARE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"{}>'
    '<path fill="red" d="M0 0h1v2H0z"/></svg>'
)


def test_an_svg_is_drawn_with_transparency() -> None:
    image = render_svg(RED_SQUARE.format(""), 10, 10)
    assert image.size == (10, 10)
    assert image.getpixel((2, 5)) == (255, 0, 0, 255)
    assert image.getpixel((8, 5)) == (0, 0, 0, 0)


def test_an_svg_measured_in_millimetres_is_drawn_too() -> None:
    image = render_svg(RED_SQUARE.format(' width="50.8mm" height="50.8mm"'), 10, 10)
    assert image.getpixel((2, 5)) == (255, 0, 0, 255)


def test_what_is_no_svg_is_refused() -> None:
    with pytest.raises(ValueError, match=r"."):
        render_svg("a word", 10, 10)


def test_grey_pictures_become_rgb_of_the_suites_size() -> None:
    grey_HW = np.zeros((28, 28), np.uint8)
    grey_HW[:14] = 255
    pixels_HWC = from_grey(grey_HW)
    assert pixels_HWC.shape == (64, 64, 3)
    assert pixels_HWC[5, 5].tolist() == [255, 255, 255]
    assert pixels_HWC[60, 5].tolist() == [0, 0, 0]


def test_jitter_depends_on_the_generator_alone_and_keeps_the_drawing_on_the_canvas() -> None:
    drawing = Image.new("RGBA", (80, 60), (255, 0, 0, 255))

    def jittered(seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return jitter(drawing, (0, 0, 255), generator=generator, noise=0)

    np.testing.assert_array_equal(jittered(1), jittered(1))
    for seed in range(20):
        pixels_HWC = jittered(seed)
        assert pixels_HWC.shape == (64, 64, 3)
        red = (pixels_HWC[..., 0] > pixels_HWC[..., 2]).mean()
        assert 0.1 < red < 0.95


def test_colours_lie_in_their_range() -> None:
    generator = np.random.default_rng(0)
    colours = np.array([pick_colour(generator, 100, 110) for _ in range(200)])
    assert colours.min() == 100
    assert colours.max() == 109
