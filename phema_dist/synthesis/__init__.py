"""What runs afterwards: from stored snapshots to an average of any length."""
