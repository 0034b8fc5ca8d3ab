"""Disk, host, device, dropped: what moves weights, and the schedule that says when."""
