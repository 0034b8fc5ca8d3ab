"""Many people, and batches, on one model: one queue, and forward passes that they share."""
