"""Charts as SVG for the page and as PNG files."""
