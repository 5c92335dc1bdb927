"""Plots of curves."""

from gpt_jax.experiments.plots import Curve, plot_curves

PNG = b"\x89PNG\r\n\x1a\n"


def test_curves_are_drawn(tmp_path):
    curves = [Curve("one", [0, 1], [1, 2], [(0, 2), (1, 3)]), Curve("two", [], [], color=1, style=5)]
    plot_curves(tmp_path / "folder" / "plot.png", curves, "Title", "x", "y")
    assert (tmp_path / "folder" / "plot.png").read_bytes().startswith(PNG)


def test_lines_error_bars_and_names_of_ticks_are_visible(tmp_path):
    """Each option changes the picture of the same points."""
    plain = Curve("one", [0, 1], [1, 2])
    with_ranges = plain._replace(ranges=[(0, 1), (2, 3)])
    many = Curve("one", list(range(9)), [1] * 9)  # more names than fit side by side
    names = [f"name {x}" for x in range(9)]
    figures = [(plain, (), True), (plain, (), False), (with_ranges, (), True), (plain, ("a", "b"), True), (many, names, True)]
    for number, (curve, tick_names, joined) in enumerate(figures):
        plot_curves(tmp_path / f"{number}.png", [curve], "Title", "", "y", tick_names, joined)
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(len(figures))}) == len(figures)
