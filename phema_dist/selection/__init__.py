"""Choosing the length of the average after training, by a metric of the user's own."""
