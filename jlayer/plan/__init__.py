"""Bytes and seconds before any allocation. Pure: no JAX, no files."""
