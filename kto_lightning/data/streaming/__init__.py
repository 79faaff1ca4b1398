"""Streaming: records are read and tokenized during the run instead of before it."""
