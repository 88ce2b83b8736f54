"""What those who run rayfm look at: metrics, alerts, the guard before a promotion, structured logs, trackers.

A room of plain records and pure decisions, so that every room above it may record what it measures.
"""
