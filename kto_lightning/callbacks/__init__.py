"""Lightning callbacks: checkpoints, progress, reporting, generations, preemption."""
