"""How a model runs a micro-batch: packed, on cached prompts, or padded; chosen by a probe."""
