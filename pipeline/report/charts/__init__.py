"""Charts: data to shapes at places, drawn as SVG for the page and as PNG files."""
