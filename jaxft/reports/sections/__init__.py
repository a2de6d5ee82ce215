"""The sections of a report: each computes its figures from a run folder, JSON-ready, and says them as blocks."""
