"""What a run leaves behind: rows of metrics, a progress display, a report."""
