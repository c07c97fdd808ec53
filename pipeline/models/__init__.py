"""Models and tokenizers by name: the embedded one, a folder, or a hub id, to local files."""
