"""Train: launch processes, run the loop, report, checkpoint, publish."""
