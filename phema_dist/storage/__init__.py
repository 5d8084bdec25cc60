"""Bytes at a URL, what they mean, and how a snapshot is laid out in them."""
