"""Configs of known models and presets for runs, packed with the wheel."""
