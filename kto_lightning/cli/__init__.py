"""The command line, `trainer` for fit, validate and predict; `inspect`, `report`, `export`."""
