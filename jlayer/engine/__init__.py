"""Tokens in flight: the device, compiled programs, and the runs that share them."""
