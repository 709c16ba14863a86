"""Choosing few schedules for several token counts."""
