"""Many student runs over one cache: a space of settings in, finished runs and a report out."""
