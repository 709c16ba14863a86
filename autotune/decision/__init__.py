"""How a search ends: the fastest schedules meet the default and their rivals, and the winner goes into the cache."""
