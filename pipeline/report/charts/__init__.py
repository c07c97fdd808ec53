"""Charts: data to shapes at places, then to SVG for the page and to PNG files."""
