"""The host's own cores multiply weights where they lie in memory, in whatever form they are stored.

Kernels are compiled for this processor with llvmlite, if it is installed; else numpy multiplies,
slowly. The room knows neither JAX nor models: it gets rows of matrices and some columns.
"""
