"""Token buckets: few schedules that together cover several token counts."""
