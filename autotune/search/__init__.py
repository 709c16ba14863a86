"""The search space of schedules, the trials of a study, and the sampler that chooses the next one."""
