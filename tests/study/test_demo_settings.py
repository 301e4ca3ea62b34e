"""The demo has held-out cells for every number of images that it is asked for."""

from fastfg.study.demo.run import Settings


def test_held_out_cells_for_the_images():
    assert Settings.of(12) == Settings(explained=12)
    many = Settings.of(40, thorough=True)
    assert (many.explained, many.test_images, many.thorough) == (40, 320, True)
