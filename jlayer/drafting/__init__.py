"""Guessed tokens for speculative decoding: trees of them, and how many are worth verifying.

Pure numpy: no device, no files, no clocks. It knows neither models nor lanes: whoever runs a draft
model hands in logits, noise and seconds.
"""
