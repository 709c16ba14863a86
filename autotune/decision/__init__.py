"""The decision of a search: shootout of the fastest schedules, statistical tests, and the winner's record."""
