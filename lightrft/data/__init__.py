"""Problems and their splits, the order in which they are drawn, and token batches."""
