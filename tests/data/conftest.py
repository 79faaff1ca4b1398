"""Property-based tests without a deadline: how long one example takes is the machine's business."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
