"""Pure functions of arrays: no files, no clocks, no devices, no global state."""
