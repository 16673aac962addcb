"""Drawing shared by all pages and pictures: palette, SVG figures, scales, numbers as text.

No chart of a particular result lives here; those are beside the results that they draw.
"""
