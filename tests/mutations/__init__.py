"""Single-line changes of the sources that some named test must notice: `make test-mutations`."""
