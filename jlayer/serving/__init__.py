"""Many people, and batches, on one model: they wait in one queue and ride in the same forward passes."""
