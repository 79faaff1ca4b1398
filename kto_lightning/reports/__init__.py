"""The data report (`inspect`), the run report (`report`) and warnings during a run."""
