"""Memory and time of a run, computed before any allocation. Pure: no JAX, no files."""
