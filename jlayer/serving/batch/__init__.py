"""Files of many requests: read and checked, run beside people, and answered line by line."""
