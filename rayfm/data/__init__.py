"""Sources, preparation, the example store, batches and readers."""
