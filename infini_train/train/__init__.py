"""Training: sessions, steps, schedules, metrics, and the loop that reads as one page."""
