"""Drawing for every page and picture: palette, figures as SVG, scales, numbers as text."""
