"""Post-hoc EMA for DDP and FSDP."""
