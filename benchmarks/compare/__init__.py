"""notifyq beside its peers: the same work on the same server, a cell at a time: ``python -m benchmarks.compare --help``."""
